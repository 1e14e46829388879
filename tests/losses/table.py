"""The losses, as the contract and the device contexts see them."""

import functools

from jemjax import losses

# name: loss of two arrays (N, D)
PAIRS = {
    "vicreg": losses.vicreg,
    "lecture_energy": losses.lecture_energy,
    "lecture_energy, uncentered": functools.partial(
        losses.lecture_energy, center=False
    ),
    "barlow_twins": losses.barlow_twins,
}
# name: loss of one array (N, D)
SINGLES = {
    "variance_hinge": losses.variance_hinge,
    "variance_hinge, on variance": functools.partial(
        losses.variance_hinge, on="variance"
    ),
    "covariance_penalty": losses.covariance_penalty,
}
ALL = {name: (loss, 2) for name, loss in PAIRS.items()} | {
    name: (loss, 1) for name, loss in SINGLES.items()
}
# Finite up to 1e20, because they normalize; the others up to 1e8.
NORMALIZING = {"barlow_twins"}
# The value for identical embeddings of all the images, (N, D) = (16, 12).
COLLAPSED = {
    "vicreg": 24.75,
    "lecture_energy": 2.0,
    "barlow_twins": 12.0,
    "variance_hinge": 0.99,
    "variance_hinge, on variance": 1.0,
    "covariance_penalty": 0.0,
}
