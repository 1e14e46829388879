"""Every method: published numbers, official scales, and what is remembered."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training.setups import (
    BATCH,
    SIZE,
    TINY,
    Setup,
    setup_of,
    tiny_backbone,
    tiny_method,
)

from jemjax.cli import METHOD_NAMES, main
from jemjax.methods import (
    BYOL,
    DINO,
    METHODS,
    MoCo,
    MoCoV3,
    Progress,
    SimCLR,
    SimSiam,
    SwAV,
)
from jemjax.models import MaskedTokens, Outputs
from jemjax.training.run.pretrain import advice


def test_the_command_line_knows_every_method():
    assert tuple(METHODS) == METHOD_NAMES


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("image_size", [SIZE, 224])
def test_resolving_leaves_no_choice_open(name, image_size):
    method = METHODS[name]().resolve(image_size, 128, 50_000)
    open_fields = {k for k, v in vars(method).items() if v is None}
    if method.target != "momentum":
        open_fields -= {"target_momentum", "final_target_momentum"}
    assert not open_fields
    assert method.resolve(SIZE, 64, 100) == method
    assert method.problems(128) == []
    assert method.views(image_size).views[0].size == image_size


def _progress(step, steps_per_epoch=10.0, total_steps=100):
    return Progress(jnp.asarray(step), steps_per_epoch, total_steps)


# The official loss of each, from the golden files, where it differs from ours in scale.


def test_byol_sums_both_directions(golden):
    z = golden("byol")
    loss, _ = BYOL().loss((z["pred1"], z["pred2"]), (z["proj1"], z["proj2"]))
    np.testing.assert_allclose(loss, z["loss"], rtol=2e-5)


def test_simsiam_halves_them(golden):
    z = golden("simsiam")
    loss, _ = SimSiam().loss((z["p1"], z["p2"]), (z["z1"], z["z2"]))
    np.testing.assert_allclose(loss, z["loss"], rtol=2e-5)


def test_simclr_is_the_sum_of_two_means(golden):
    z = golden("simclr_ntxent")
    method = SimCLR(temperature=float(z["temperature"]))
    loss, _ = method.loss(tuple(np.split(z["hidden"], 2)))
    np.testing.assert_allclose(loss, z["loss"], rtol=2e-5)


def test_moco_v3_is_scaled_by_its_temperature(golden):
    z = golden("mocov3")
    method = MoCoV3(temperature=float(z["temperature"]))
    loss, _ = method.loss((z["q1"], z["q2"]), (z["k1"], z["k2"]))
    np.testing.assert_allclose(loss, z["loss"], rtol=2e-5)


def test_moco_overwrites_the_oldest_keys(golden):
    z = golden("moco_queue")
    method = MoCo(temperature=float(z["temperature"]))
    state = {"queue": jnp.asarray(z["queue"].T)}
    first = int(z["ptr0"]) // 8
    for step in range(4):
        queries, keys = z[f"q{step}"], z[f"k{step}"]
        loss, _ = method.loss((queries,), (keys,), state)
        np.testing.assert_allclose(
            loss, z["loss" if step == 0 else f"loss{step}"], rtol=2e-5
        )
        outputs = Outputs(keys, keys, keys, keys)
        state = method.remember(state, _progress(first + step), (), (outputs,))
        np.testing.assert_allclose(state["queue"], z[f"queue_after{step}"].T, atol=1e-6)


def test_swav_puts_new_embeddings_in_front(golden):
    z = golden("swav_loss_queue")
    count = int(z["bs"])
    rows = [jnp.asarray(part) for part in np.split(z["z"], len(z["z"]) // count)]
    normalized = jnp.asarray(z["prototypes_normalized"], jnp.float32)

    def scores(embeddings):
        norms = jnp.linalg.norm(embeddings, axis=-1, keepdims=True)
        return embeddings / norms @ normalized.T

    method = SwAV(
        queue_length=24,
        queue_start=0,
        num_prototypes=len(normalized),
        epsilon=float(z["epsilon"]),
    )
    state = {"queue": jnp.asarray(z["queue"])}
    memory = method.recall(state, _progress(0), scores)
    assert bool(memory["queue_is_used"])
    loss, _ = method.loss(tuple(map(scores, rows)), None, memory)
    np.testing.assert_allclose(loss, z["loss"], rtol=1e-4)
    outputs = tuple(Outputs(row, row, row, row) for row in rows)
    after = method.remember(state, _progress(0), outputs, outputs)
    np.testing.assert_allclose(after["queue"], z["queue_after"], atol=1e-6)


def test_swav_waits_for_a_full_queue():
    method = SwAV(queue_length=8, queue_start=2, num_prototypes=5)
    rows = jnp.ones((4, 3))
    outputs = (Outputs(rows, rows, rows, rows),) * 2
    state = method.init_loss_state(jax.random.key(0), outputs[0])
    used = []
    for step in (0, 19, 20, 21, 22):
        memory = method.recall(state, _progress(step), lambda z: z)
        used.append(bool(memory["queue_is_used"]))
        state = method.remember(state, _progress(step), outputs, outputs)
    assert used == [False, False, False, False, True]


def test_dino_uses_the_center_before_it_is_moved(golden):
    z = golden("dino_2g4l")
    views = int(z["ncrops"])
    student = tuple(np.split(z["student"], views))
    method = DINO(
        student_temperature=float(z["student_temp"]),
        warmup_teacher_temperature=float(z["warmup_teacher_temp"]),
        teacher_temperature=float(z["teacher_temp"]),
        warmup_teacher_epochs=int(z["warmup_teacher_temp_epochs"]),
        center_momentum=float(z["center_momentum"]),
    )
    state = {"center": jnp.asarray(z["center0"][0], jnp.float32)}
    for step in range(3):
        teacher = tuple(np.split(z[f"teacher{step}"], 2))
        progress = _progress(10 * (int(z["epoch"]) + step))
        memory = method.recall(state, progress, lambda z: z)
        np.testing.assert_allclose(
            memory["teacher_temperature"],
            z["teacher_temp_schedule"][int(z["epoch"]) + step],
            rtol=1e-6,
        )
        loss, _ = method.loss(student, teacher, memory)
        name = "loss" if step == 0 else f"loss_step{step + 1}"
        np.testing.assert_allclose(loss, z[name], rtol=2e-5)
        outputs = tuple(Outputs(rows, rows, rows, rows) for rows in teacher)
        state = method.remember(state, progress, (), outputs)
        np.testing.assert_allclose(
            state["center"], z[f"center_after{step + 1}"][0], atol=1e-6
        )


def test_data2vec_is_the_mean_over_masked_patches(golden):
    z = golden("data2vec_vision_beit")
    method = METHODS["data2vec"](predictor=(), top_layers=len(z["target_layers"]))
    layers = np.moveaxis(z["layers"][z["target_layers"]], 0, 1)  # (N, L, T, D)
    prediction = MaskedTokens(z["pred"], z["mask"])
    loss, _ = method.loss((prediction,), (layers,))
    np.testing.assert_allclose(loss, z["paper_sl1b2/loss"], rtol=2e-5)


@pytest.mark.parametrize(
    ("name", "key"), [("dino", "dino_momentum"), ("moco-v3", "mocov3_momentum")]
)
def test_momentum_of_the_official_code(golden, name, key):
    z = golden("schedules")
    values = z[key]
    method = tiny_method(name, target_momentum=float(values[0]))
    # MoCo v3 moves its target before a step, with that step's momentum: after the
    # step before it.
    ahead = 1 if name == "moco-v3" else 0
    got = [
        float(method.momentum(_progress(step, total_steps=len(values))))
        for step in range(len(values) - ahead)
    ]
    np.testing.assert_allclose(got, values[ahead:], rtol=1e-6)


def test_a_target_that_averages_itself_at_one_never_moves():
    setup = setup_of("byol", target_momentum=1.0)
    state = setup.init()
    before = jax.device_get(state.target_params)
    state, _ = setup.steps(state, range(3))
    jax.tree.map(np.testing.assert_array_equal, before, state.target_params)


@pytest.mark.parametrize("name", ["byol", "dino"])
def test_a_target_starts_as_published(name):
    state = setup_of(name).init()
    path = ("projector", "Dense_0", "kernel")
    online, target = state.params, state.target_params
    for part in path:
        online, target = online[part], target[part]
    # BYOL's has parameters of its own, the others' are copies.
    assert np.array_equal(online, target) == (name != "byol")
    assert "predictor" not in state.target_params


def test_the_last_layer_stands_still_in_the_first_epoch():
    setup = setup_of("dino")
    state = setup.init()
    kernels = [np.asarray(state.params["prototypes"]["kernel"])]
    for number in range(6):
        state, _ = setup.steps(state, [number])
        kernels.append(np.asarray(state.params["prototypes"]["kernel"]))
    for number in range(4):  # an epoch has four steps
        np.testing.assert_array_equal(kernels[number + 1], kernels[0])
    assert np.any(kernels[5] != kernels[0])


def test_swavs_prototypes_keep_unit_length():
    _, state = setup_of("swav").run(6)
    norms = np.linalg.norm(state.params["prototypes"]["kernel"], axis=1)
    np.testing.assert_allclose(norms, 1, rtol=1e-6)


def test_moco_v3_does_not_train_the_patch_embedding():
    setup = Setup(tiny_method("moco-v3"), backbone=tiny_backbone("vit"))
    before = jax.device_get(setup.init().params["backbone"])
    _, state = setup.run(3)
    after = state.params["backbone"]
    np.testing.assert_array_equal(
        before["patch_embedding"]["kernel"], after["patch_embedding"]["kernel"]
    )
    assert np.any(before["class_token"] != after["class_token"])


@pytest.mark.parametrize("name", TINY)
def test_queues_fit_the_batch_and_the_data(name):
    method = METHODS[name]().resolve(SIZE, 100, 1_442)
    length = getattr(method, "queue_length", 0)
    assert length % 100 == 0 and length <= 1_442
    assert method.problems(100) == []


def test_a_queue_that_the_batch_does_not_divide_is_refused():
    (problem,) = MoCo(queue_length=BATCH + 1).problems(BATCH)
    assert "--queue-length: got 17, expected a multiple" in problem


def test_a_momentum_that_is_given_to_moco_is_constant():
    method = MoCo(target_momentum=0.9).resolve(SIZE, BATCH, 100)
    assert method.final_target_momentum == 0.9


def test_moco_v3_compares_both_directions_without_a_predictor_too():
    rng = np.random.default_rng(0)
    x, y = (jnp.asarray(rng.standard_normal((6, 5)), jnp.float32) for _ in range(2))
    method = MoCoV3(target="shared")
    np.testing.assert_allclose(
        method.loss((x, y))[0], method.loss((y, x))[0], rtol=1e-6
    )


def test_an_image_of_dino_falls_in_a_cluster_by_its_centered_scores():
    scores, center = jnp.array([[3.0, 1.0]]), jnp.array([2.5, 0.0])
    assert jnp.argmax(DINO().cluster_scores(scores, {"center": center})) == 1


@pytest.mark.parametrize("name", METHODS)
def test_what_helps_against_collapse_names_options_that_there_are(
    name, capsys, monkeypatch
):
    method = METHODS[name]()
    assert "--" in method.collapse_hint
    # In this process, whose settings stay as they are.
    monkeypatch.setattr("jemjax.runtime.prepare_process", lambda: None)
    with pytest.raises(SystemExit):
        main(["pretrain", name, "--help"])
    options = set(re.findall(r"--[a-z0-9.-]+[a-z0-9]", capsys.readouterr().out))
    assert set(re.findall(r"--[a-z.-]+[a-z]", advice(method))) <= options
