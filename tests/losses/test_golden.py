"""Values and every gradient of the official code, at the published tolerances."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jemjax import losses


def vicreg(z, x, y):
    return losses.vicreg(
        x,
        y,
        invariance_weight=float(z["sim_coeff"]),
        variance_weight=float(z["std_coeff"]),
        covariance_weight=float(z["cov_coeff"]),
        gamma=float(z.get("gamma", 1.0)),
        eps=float(z.get("eps", 1e-4)),
    )


def vicreg_term(name):
    return lambda z, x, y: getattr(
        losses.vicreg_terms(x, y, gamma=float(z["gamma"]), eps=float(z["eps"])), name
    )


def lecture(center):
    return lambda z, x, y: losses.lecture_energy(
        x, y, gamma=float(z["gamma"]), center=center
    )


def barlow(z, x, y):
    return losses.barlow_twins(
        x, y, off_diagonal_weight=float(z["lambd"]), eps=float(z["bn_eps"])
    )


def barlow_term(name):
    return lambda z, x, y: getattr(
        losses.barlow_twins_terms(x, y, eps=float(z["bn_eps"])), name
    )


def byol(z, p1, p2, t1, t2):
    return losses.byol(p1, t2) + losses.byol(p2, t1)


def simsiam(z, p1, p2, t1, t2):
    return 0.5 * (losses.negative_cosine(p1, t2) + losses.negative_cosine(p2, t1))


def simclr(z, hidden):
    x, y = jnp.split(hidden, 2)
    return 2 * losses.nt_xent(x, y, temperature=float(z["temperature"]))


def mocov3(z, q1, q2, k1, k2, axis_name=None):
    temperature = float(z["temperature"])
    keywords = dict(temperature=temperature, axis_name=axis_name)
    total = losses.info_nce(q1, k2, **keywords) + losses.info_nce(q2, k1, **keywords)
    return 2 * temperature * total


def mocov3_direction(z, query, key):
    temperature = float(z["temperature"])
    return 2 * temperature * losses.info_nce(query, key, temperature=temperature)


def moco(step):
    def loss(z, query, key):
        queue = z["queue" if step == 0 else f"queue_after{step - 1}"].T  # (Q, D)
        return losses.info_nce(query, key, queue, temperature=float(z["temperature"]))

    return loss


def dino_step(step):
    def loss(z, student, teacher):
        views, outputs = int(z["ncrops"]), student.shape[-1]
        center = z["center0" if step == 0 else f"center_after{step}"]
        return losses.dino(
            student.reshape(views, -1, outputs),
            teacher.reshape(2, -1, outputs),
            center[0].astype(student.dtype),
            student_temperature=float(z["student_temp"]),
            teacher_temperature=float(
                z["teacher_temp_schedule"][int(z["epoch"]) + step]
            ),
        )

    return loss


def data2vec(normalizations, beta, summed):
    def loss(z, prediction, layers):
        if "top_k" in z:
            layers = layers[-int(z["top_k"]) :]
        else:
            layers = layers[z["target_layers"]]
        target = losses.data2vec_target(
            layers,
            layer_normalization=normalizations[0],
            final_normalization=normalizations[1],
        )
        mask = z["mask"]
        value = losses.smooth_l1(prediction, target, beta=beta, mask=mask)
        # fairseq adds over the features and the masked tokens, times 1 / sqrt(D).
        return (
            value * float(mask.sum()) * prediction.shape[-1] ** 0.5 if summed else value
        )

    return loss


FAIRSEQ = {
    "avg_l2": ((None, None), 0.0),
    "lnlayer_l2": (("layer", None), 0.0),
    "lntargets_sl1b2": ((None, "layer"), 2.0),
    "lnlayer_lntargets_sl1b2": (("layer", "layer"), 2.0),
    "inlayer_l2": (("instance", None), 0.0),
    "inlayer_intargets_sl1b05": (("instance", "instance"), 0.5),
}
VISION = {
    "paper_sl1b2": (("layer", "layer"), 2.0),
    "lnlayer_only_l2": (("layer", None), 0.0),
    "avg_only_sl1b012": ((None, None), 0.12),
    "in_layer_sl1b2": (("instance", None), 2.0),
}

# file, loss, arrays, value, gradients (None where the file has none: at the end of a
# row that is compared, the array is a target, and its gradient has to be zero)
XY, ZZ = ("x", "y"), ("z1", "z2")
TABLE = [
    *[
        (file, *row)
        for file in (
            "vicreg_Nltd",
            "vicreg_Ngtd",
            "vicreg_collapsed",
            "vicreg_allactive_off",
        )
        for row in (
            (vicreg, XY, "loss", ("grad_x", "grad_y")),
            (
                vicreg_term("invariance"),
                XY,
                "repr_loss",
                ("grad_x_repr", "grad_y_repr"),
            ),
            (vicreg_term("variance"), XY, "std_loss", ("grad_x_std", "grad_y_std")),
            (vicreg_term("covariance"), XY, "cov_loss", ("grad_x_cov", "grad_y_cov")),
        )
    ],
    ("vicreg_2rank", vicreg, XY, "loss", ("grad_x", "grad_y")),
    *[
        (
            "lecture_vicreg_own",
            lecture(name == "centered"),
            XY,
            f"loss_{name}",
            (f"grad_x_{name}", f"grad_y_{name}"),
        )
        for name in ("centered", "uncentered")
    ],
    *[
        (file, *row)
        for file in ("barlow_Nltd", "barlow_Ngtd")
        for row in (
            (barlow, ZZ, "loss", ("grad_z1", "grad_z2")),
            (barlow_term("on_diagonal"), ZZ, "on_diag", ("grad_z1_on", "grad_z2_on")),
            (barlow_term("off_diagonal"), ZZ, "off_diag", None),
        )
    ],
    (
        "byol",
        byol,
        ("pred1", "pred2", "proj1", "proj2"),
        "loss",
        ("grad_pred1", "grad_pred2", None, None),
    ),
    (
        "simsiam",
        simsiam,
        ("p1", "p2", "z1", "z2"),
        "loss",
        ("grad_p1", "grad_p2", None, None),
    ),
    ("simclr_ntxent", simclr, ("hidden",), "loss", ("grad_hidden",)),
    (
        "mocov3",
        mocov3,
        ("q1", "q2", "k1", "k2"),
        "loss",
        ("grad_q1", "grad_q2", None, None),
    ),
    ("mocov3", mocov3_direction, ("q1", "k2"), "loss_q1k2", None),
    ("mocov3", mocov3_direction, ("q2", "k1"), "loss_q2k1", None),
    ("moco_queue", moco(0), ("q0", "k0"), "loss", ("grad_q0", None)),
    *[
        ("moco_queue", moco(step), (f"q{step}", f"k{step}"), f"loss{step}", None)
        for step in (1, 2, 3)
    ],
    *[
        row
        for file in ("dino_2g0l", "dino_2g4l")
        for row in (
            (
                file,
                dino_step(0),
                ("student", "teacher0"),
                "loss",
                ("grad_student", None),
            ),
            (file, dino_step(1), ("student", "teacher1"), "loss_step2", None),
            (file, dino_step(2), ("student", "teacher2"), "loss_step3", None),
        )
    ],
    *[
        (
            file,
            data2vec(*case, summed=file == "data2vec_fairseq"),
            ("pred", "layers"),
            f"{name}/loss",
            (f"{name}/grad_pred", None),
        )
        for file, cases in (
            ("data2vec_fairseq", FAIRSEQ),
            ("data2vec_vision_beit", VISION),
        )
        for name, case in cases.items()
    ],
]
# dtype: relative tolerance of the value, and relative and absolute of the gradients,
# the absolute one in units of the largest entry
TOLERANCES = {np.float32: (2e-5, 2e-4, 1e-6), np.float64: (1e-9, 1e-7, 1e-12)}
# The official code of these computes parts in float32, even of a float64 run.
SINGLE_PRECISION = {"simclr_ntxent": (1e-6, 1e-5, 1e-7)}


@pytest.mark.parametrize("dtype", TOLERANCES, ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize(
    ("file", "loss", "arrays", "value", "gradients"),
    TABLE,
    ids=[f"{row[0]}-{row[3]}" for row in TABLE],
)
def test_equals_the_official_code(golden, dtype, file, loss, arrays, value, gradients):
    z = golden(file)
    value_tolerance, relative, absolute = TOLERANCES[dtype]
    if dtype is np.float64:
        value_tolerance, relative, absolute = SINGLE_PRECISION.get(
            file, TOLERANCES[dtype]
        )
    with jax.enable_x64(dtype is np.float64):
        inputs = [z[name].astype(dtype) for name in arrays]
        function = functools.partial(loss, z)
        if gradients is None:
            got, got_gradients = jax.jit(function)(*inputs), ()
        else:
            numbers = tuple(range(len(arrays)))
            run = jax.jit(jax.value_and_grad(function, numbers))
            got, got_gradients = run(*inputs)
        assert got.dtype == dtype
        np.testing.assert_allclose(got, z[value], rtol=value_tolerance)
        for name, gradient in zip(gradients or (), got_gradients, strict=False):
            if name is None:
                np.testing.assert_array_equal(gradient, np.zeros_like(gradient))
                continue
            np.testing.assert_allclose(
                gradient,
                z[name],
                rtol=relative,
                atol=absolute * np.abs(z[name]).max(),
            )


def test_every_gradient_of_the_files_is_compared(golden):
    for file in {row[0] for row in TABLE}:
        compared = {name for row in TABLE if row[0] == file for name in row[4] or ()}
        present = {k for k in golden(file) if "grad_" in k}
        assert {k for k in present if not k.endswith("_ranks")} == compared - {None}


def test_two_ranks_of_the_official_code(golden):
    """Each rank has half of the rows; the ranks' mean is the global batch's loss."""
    z = golden("vicreg_2rank")
    shards = [z[name].reshape(2, 12, 10) for name in ("x", "y")]

    def step(x, y):
        return jax.value_and_grad(
            lambda x, y: losses.vicreg(x, y, axis_name="data"), argnums=(0, 1)
        )(x, y)

    values, gradients = jax.jit(jax.vmap(step, axis_name="data"))(*shards)
    np.testing.assert_allclose(values, np.mean(z["loss_ranks"]), rtol=2e-5)
    for name, gradient in zip(("grad_x_ranks", "grad_y_ranks"), gradients, strict=True):
        np.testing.assert_allclose(
            gradient.reshape(24, 10),
            z[name],
            rtol=2e-4,
            atol=1e-6 * np.abs(z[name]).max(),
        )


def test_two_ranks_of_moco_v3(golden):
    """A rank's queries meet the keys of both; its gradients are of its own loss."""
    z = golden("mocov3")
    names = ("q1", "q2", "k1", "k2")
    shards = [z[name].reshape(2, 8, 12) for name in names]

    def step(*arrays):
        return jax.value_and_grad(
            lambda *arrays: mocov3(z, *arrays, axis_name="data"), argnums=(0, 1, 2, 3)
        )(*arrays)

    values, gradients = jax.jit(jax.vmap(step, axis_name="data"))(*shards)
    np.testing.assert_allclose(values, np.mean(z["loss_ranks"]), rtol=2e-5)
    for name, gradient in zip(names, gradients, strict=True):
        # Absent: the keys are constants.
        expected = z.get(f"grad_{name}_ranks", np.zeros((16, 12)))
        np.testing.assert_allclose(
            gradient.reshape(16, 12),
            expected,
            rtol=2e-4,
            atol=1e-6 * np.abs(expected).max(),
        )


@pytest.mark.parametrize("dtype", TOLERANCES, ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("file", ["dino_2g0l", "dino_2g4l"])
def test_centers_of_the_official_code(golden, dtype, file):
    z = golden(file)
    with jax.enable_x64(dtype is np.float64):
        center = z["center0"][0].astype(dtype)
        for step in range(3):
            logits = z[f"teacher{step}"].astype(dtype).reshape(2, -1, center.size)
            center = losses.update_center(
                center, logits, momentum=float(z["center_momentum"])
            )
            expected = z[f"center_after{step + 1}"][0]
            scale = np.abs(expected).max()
            tolerance = TOLERANCES[dtype][0]
            np.testing.assert_allclose(center, expected, tolerance, tolerance * scale)


@pytest.mark.parametrize(
    ("file", "name"),
    [("data2vec_fairseq", name) for name in FAIRSEQ]
    + [("data2vec_vision_beit", name) for name in VISION],
)
def test_targets_of_the_official_code(golden, file, name):
    z = golden(file)
    (layer, final), _ = (FAIRSEQ | VISION)[name]
    target = losses.data2vec_target(
        z["layers"][-4:], layer_normalization=layer, final_normalization=final
    )
    expected = z[f"{name}/target"]
    np.testing.assert_allclose(target[z["mask"]], expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("file", ["dino_2g0l", "dino_2g4l"])
def test_the_teachers_distribution_is_that_of_the_official_code(golden, file):
    """The gradient of one student view is its softmax minus the teacher's."""
    z = golden(file)
    outputs = z["student"].shape[-1]
    teacher = z["teacher0"].reshape(2, -1, outputs) - z["center0"]
    temperature = float(z["teacher_temp_schedule"][int(z["epoch"])])
    for logits, expected in zip(
        teacher, z["teacher_probs"].reshape(teacher.shape), strict=True
    ):
        student = np.zeros_like(logits)
        gradient = jax.jit(jax.grad(losses.cross_entropy))(
            student, logits, student_temperature=1.0, teacher_temperature=temperature
        )
        probabilities = 1 / outputs - len(logits) * gradient
        np.testing.assert_allclose(probabilities, expected, rtol=2e-4, atol=1e-6)


def test_logits_of_moco(golden):
    """The mean of logsumexp - positive, of the official logits."""
    z = golden("moco_queue")
    logits = z["logits0"]
    shifted = logits - logits.max(axis=1, keepdims=True)
    expected = np.mean(np.log(np.exp(shifted).sum(axis=1)) - shifted[:, 0])
    np.testing.assert_allclose(moco(0)(z, z["q0"], z["k0"]), expected, rtol=2e-5)
