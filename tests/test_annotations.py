"""No annotation refuses, at run time, what its function accepts."""

import inspect
import typing

import jax
import numpy as np
import pytest
from beartype import BeartypeConf, beartype

from jemjax import augment, evaluation, losses, targets

# As type checkers read them: an int is a float, too.
CONF = BeartypeConf(is_pep484_tower=True)
MODULES = (losses, augment, evaluation, targets)
FUNCTIONS = {
    f"{module.__name__.split('.')[-1]}.{name}": function
    for module in MODULES
    for name, function in vars(module).items()
    if not name.startswith("_")
    and not inspect.isclass(function)
    and getattr(function, "__module__", "").startswith(module.__name__)
    and callable(function)
}


def _floats(*shape):
    return np.random.default_rng(0).random(shape, np.float32)


IMAGES, ROWS, VIEWS, TOKENS = (
    _floats(2, 8, 8, 3),
    _floats(4, 3),
    _floats(2, 4, 3),
    _floats(2, 3, 4),
)
KEY = jax.random.key(0)
LABELS = np.arange(4) % 2
PAIR = (ROWS, ROWS)
LIMITS = {"scale": (0.2, 1.0), "ratio": (0.75, 1.5)}

# Arguments by place and by name. A float stands for a number of any type, and is whole
# so that it may be an int.
CALLS = {
    "losses.vicreg": (PAIR, {"gamma": 1.0, "eps": 1.0, "covariance_weight": 1.0}),
    "losses.vicreg_terms": (PAIR, {"gamma": 1.0, "eps": 1.0}),
    "losses.barlow_twins": (PAIR, {"off_diagonal_weight": 1.0, "eps": 1.0}),
    "losses.barlow_twins_terms": (PAIR, {"eps": 1.0}),
    "losses.lecture_energy": (PAIR, {"gamma": 1.0}),
    "losses.variance_hinge": (PAIR[:1], {"gamma": 1.0, "eps": 1.0}),
    "losses.covariance_penalty": (PAIR[:1], {}),
    "losses.nt_xent": (PAIR, {"temperature": 1.0}),
    "losses.info_nce": ((*PAIR, ROWS), {"temperature": 1.0}),
    "losses.sinkhorn": (PAIR[:1], {"epsilon": 1.0, "num_iterations": 2}),
    "losses.swav": ((VIEWS,), {"queue_scores": VIEWS, "num_assigned": 2}),
    "losses.cross_entropy": (PAIR, {"student_temperature": 1.0}),
    "losses.dino": ((VIEWS, VIEWS, ROWS[0]), {"teacher_temperature": 1.0}),
    "losses.update_center": ((ROWS[0], VIEWS), {"momentum": 1.0}),
    "losses.byol": (PAIR, {}),
    "losses.negative_cosine": (PAIR, {}),
    "losses.smooth_l1": ((TOKENS, TOKENS), {"beta": 1.0, "mask": TOKENS[..., 0] > 0.5}),
    "losses.data2vec_target": ((_floats(2, 2, 3, 4),), {}),
    "targets.moving_average": (({"w": ROWS}, {"w": ROWS}, 1.0), {}),
    "targets.linear": ((1.0, 0.0, 2), {}),
    "targets.cosine": ((1.0, 0.0, 2.0), {}),
    "targets.warmup_cosine": (
        (),
        {"peak": 1.0, "warmup_steps": 1, "total_steps": 3, "final": 1.0, "start": 1.0},
    ),
    "targets.per_epoch": ((targets.linear(1.0, 0.0, 3), 2), {}),
    "augment.gaussian_blur": ((IMAGES, 1.0), {"kernel_size": 3}),
    "augment.random_gaussian_blur": (
        (KEY, IMAGES),
        {"sigma": (1.0, 2.0), "probability": 1.0, "kernel_size": 3},
    ),
    "augment.adjust_brightness": ((IMAGES, 1.0), {}),
    "augment.adjust_contrast": ((IMAGES, 1.0), {}),
    "augment.adjust_saturation": ((IMAGES, 1.0), {}),
    "augment.adjust_hue": ((IMAGES, 0.0), {}),
    "augment.to_grayscale": ((IMAGES,), {}),
    "augment.solarize": ((IMAGES, 1.0), {}),
    "augment.normalize": ((IMAGES, (0.5,) * 3, (1.0,) * 3), {}),
    "augment.denormalize": ((IMAGES, (0.5,) * 3, (1.0,) * 3), {}),
    "augment.color_jitter": (
        (KEY, IMAGES),
        {
            **dict.fromkeys(("brightness", "contrast", "saturation"), 1.0),
            "hue": 0.0,
            "probability": 1.0,
        },
    ),
    "augment.random_grayscale": ((KEY, IMAGES), {"probability": 1.0}),
    "augment.random_solarize": ((KEY, IMAGES), {"probability": 1.0, "threshold": 1.0}),
    "augment.random_flip": ((KEY, IMAGES), {"probability": 1.0}),
    "augment.random_resized_crop": ((KEY, IMAGES, 4), LIMITS),
    "augment.random_boxes": ((KEY, 2, (8, 8)), LIMITS),
    "augment.crop_and_resize": (
        (IMAGES, np.array([[0, 0, 4, 4]] * 2, np.float32), (4, 4)),
        {},
    ),
    "augment.block_mask": ((KEY, 2, (4, 4)), {"num_masked": 6, "min_block": 4}),
    "augment.random_patch_mask": ((KEY, 2, 16), {"ratio": 1.0}),
    "augment.mask_of_noise": ((_floats(2, 16), 1.0), {}),
    "augment.num_kept_patches": ((16, 1.0), {}),
    "augment.multi_block_masks": ((KEY, 2, (6, 6)), {"num_targets": 2}),
    "augment.make_masks": ((KEY, 2, 4, augment.MaskRecipe("random", 0.5)), {}),
    "augment.fill_masked": ((IMAGES, np.ones((2, 16), bool), 4), {}),
    "augment.make_views": ((KEY, IMAGES, augment.vicreg_small(8)), {}),
    "augment.finish_views": ((KEY, [IMAGES, IMAGES], augment.vicreg_small(8)), {}),
    "augment.evaluation_view": ((IMAGES, augment.vicreg_small(8)), {}),
    "evaluation.cluster_accuracy": ((LABELS, LABELS), {}),
    "evaluation.normalized_mutual_information": ((LABELS, LABELS), {}),
    "evaluation.prototype_usage": ((LABELS, 3), {}),
    "evaluation.label_clusters": ((ROWS, LABELS), {"temperature": 1.0}),
    "evaluation.few_label_cluster_accuracy": (
        (ROWS, LABELS, LABELS, LABELS),
        {"temperature": 1.0},
    ),
    "evaluation.normalized_std": ((ROWS,), {}),
    "evaluation.effective_rank": ((ROWS,), {}),
    "evaluation.rankme": ((ROWS,), {"eps": 1.0}),
    "evaluation.alpha_req": ((ROWS,), {}),
    "evaluation.name_collapse": (
        (),
        {"normalized_std": 1.0, "effective_rank": 2.0, "dimension": 3},
    ),
    "evaluation.knn_predict": (
        (ROWS, LABELS, ROWS),
        {"k": 2, "temperature": 1.0, "num_classes": 2},
    ),
    "evaluation.knn_accuracy": (
        (ROWS, LABELS, ROWS, LABELS),
        {"k": 2, "temperature": 1.0, "num_classes": 2},
    ),
    "evaluation.few_labels": ((LABELS, 1, 0), {}),
    "evaluation.linear_probe": (
        (ROWS, LABELS, ROWS, LABELS),
        {"num_classes": 2, "l2": 1.0, "max_iterations": 1},
    ),
}
RECIPES = [name for name in FUNCTIONS if name.endswith(("_imagenet", "_small"))]


def _as_numpy(value):
    """Its numbers as NumPy's: float32, which is no Python float, and int32."""
    if isinstance(value, tuple):
        return tuple(map(_as_numpy, value))
    if isinstance(value, float):
        return np.float32(value)
    return np.int32(value) if type(value) is int else value


def _as_ints(value):
    return int(value) if isinstance(value, float) else value


def _is_traced(name, value):
    """Whether a value may be a tracer; these ratios must be known."""
    fixed = ("mask_of_noise", "random_patch_mask", "num_kept_patches")
    numbers = () if name.endswith(fixed) else (float,)
    return isinstance(value, (np.ndarray, *numbers))


def test_every_function_is_called():
    assert sorted(CALLS) == sorted(set(FUNCTIONS) - set(RECIPES))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_annotations_can_be_read(name):
    hints = typing.get_type_hints(FUNCTIONS[name])
    assert set(hints) == {*inspect.signature(FUNCTIONS[name]).parameters, "return"}


@pytest.mark.parametrize("name", CALLS)
def test_annotations_accept_what_the_function_accepts(name):
    arguments, keywords = CALLS[name]
    function = FUNCTIONS[name]
    checked = beartype(conf=CONF)(function)

    def call(arguments, keywords):
        result = checked(*arguments, **keywords)
        if callable(result):  # a schedule
            result = result(3)
        return [x for x in jax.tree.leaves(result) if isinstance(x, jax.Array)]

    for change in (lambda value: value, _as_numpy, _as_ints):
        given = [change(value) for value in arguments]
        named = {key: change(value) for key, value in keywords.items()}
        if name.startswith("evaluation."):  # needs values
            call(given, named)
        else:  # tracing takes less time
            jax.make_jaxpr(lambda g=given, n=named: call(g, n))()
    if name.startswith("evaluation."):
        return

    # Inside of `jit`, with tracers.
    places = {**dict(enumerate(arguments)), **keywords}
    traced = {k: v for k, v in places.items() if _is_traced(name, v)}

    def inside(*values):
        now = {**places, **dict(zip(traced, values, strict=True))}
        return call(
            [now[i] for i in range(len(arguments))], {key: now[key] for key in keywords}
        )

    jax.make_jaxpr(inside)(*traced.values())
