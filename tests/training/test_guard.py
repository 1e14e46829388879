"""Numbers that are not finite: skipped, kept, found again, and the end of a run."""

import dataclasses
import errno
import io
import json
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from training.setups import BATCH, SIZE, Setup, setup_of, tiny_method

from jemjax.data import open_data
from jemjax.errors import DivergenceError, UserError
from jemjax.methods import VICReg
from jemjax.runtime import quick_compilation
from jemjax.training.config.options import OptimizerOptions, PretrainConfig
from jemjax.training.config.resolve import resolve
from jemjax.training.inspect.replay import find, replay
from jemjax.training.reporting.display import Display
from jemjax.training.reporting.metrics_file import read_metrics
from jemjax.training.run import pretrain as loop
from jemjax.training.run import setup as run_setup
from jemjax.training.run.embedder import Embedder
from jemjax.training.run.pretrain import explaining_memory, pretrain
from jemjax.training.run.setup import build
from jemjax.training.step import branch, update
from jemjax.training.step.sharding import make_mesh, to_devices
from jemjax.training.step.state import Skipped, TrainState, all_finite
from jemjax.training.storage import manifest, skipped_steps
from jemjax.training.storage.checkpoints import Checkpoints, fingerprint
from jemjax.training.storage.manifest import saved_steps
from jemjax.training.storage.provenance import write_config
from jemjax.training.storage.skipped_steps import SkippedSteps, skipped_step


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Runs use one of the eight devices, and XLA optimizes little."""

    def make_train_step(*arguments, **keywords):
        step = update.make_train_step(*arguments, **keywords)
        options = quick_compilation()
        return jax.jit(step, donate_argnums=0, compiler_options=options)

    monkeypatch.setattr(run_setup, "make_mesh", lambda fsdp: make_mesh(1, fsdp=fsdp))
    monkeypatch.setattr(run_setup, "make_train_step", make_train_step)


# Of white images the poisoned views are not numbers.
WHITE = 255


@pytest.fixture
def poisoned(monkeypatch):
    make_views = branch.make_views

    def replaced(keys, images, recipe):
        white = jnp.all(images == WHITE, axis=(1, 2, 3), keepdims=True)
        views = make_views(keys, images, recipe)
        return tuple(jnp.where(white, jnp.nan, view) for view in views)

    monkeypatch.setattr(branch, "make_views", replaced)


def _bytes_of(state):
    return jax.device_get(state.replace(key=None))


def test_a_bad_batch_is_as_if_it_had_not_been_on_any_device(poisoned):
    setup = Setup(tiny_method("byol"), devices=4)
    white = to_devices(np.full((BATCH, SIZE, SIZE, 3), WHITE, np.uint8), setup.mesh)
    state, _ = setup.steps(setup.init(), [0])
    # A step that never was, of which only the number is missing.
    without = jax.tree.map(jnp.copy, state)
    state, metrics = setup.compiled(state, white)
    assert not np.isfinite(metrics["loss"])
    for shard in state.skipped.in_a_row.addressable_shards:
        assert int(shard.data) == 1
    without = without.replace(step=state.step + 0, skipped=Skipped(*state.skipped))
    without = jax.tree.map(jnp.copy, without)
    state, _ = setup.steps(state, [1])
    assert state.skipped == Skipped(steps=1, in_a_row=0, latest=2)
    without, _ = setup.steps(without, [1])
    chex.assert_trees_all_equal(_bytes_of(state), _bytes_of(without))
    # After as many in a row as are allowed nothing changes until the run is stopped.
    before = _bytes_of(state)
    for _ in range(5):
        state, _ = setup.compiled(state, white)
    state, (metrics,) = setup.steps(state, [2])
    assert np.isfinite(metrics["loss"]) and int(state.skipped.in_a_row) == 6
    counters = {"step": 9, "skipped": state.skipped}
    chex.assert_trees_all_equal(
        _bytes_of(state), before.replace(**jax.device_get(counters))
    )


class Kinked(VICReg):
    """Its loss is finite, but not the gradient."""

    def loss(self, *arguments, **keywords):
        loss, terms = super().loss(*arguments, **keywords)
        kink = jnp.sqrt(jnp.square(loss) - jnp.square(loss))
        return loss + kink, terms


def test_a_gradient_that_is_not_finite_is_enough():
    setup = Setup(Kinked(**dataclasses.asdict(tiny_method("vicreg"))))
    state = setup.init()
    before = _bytes_of(state)
    state, (metrics,) = setup.steps(state, [0])
    assert np.isfinite(metrics["loss"]) and np.isnan(metrics["gradient_norm"])
    after = _bytes_of(state)
    assert after.skipped == Skipped(steps=1, in_a_row=1, latest=1)
    chex.assert_trees_all_equal(
        after, before.replace(step=after.step, skipped=after.skipped)
    )


def test_all_finite_sees_every_floating_point_number():
    tree = {"a": jnp.ones(3), "b": (jnp.arange(2), jnp.ones(2, jnp.bfloat16))}
    assert all_finite(tree) and all_finite({}) and all_finite(jax.random.key(0))
    for bad in (jnp.nan, jnp.inf, -jnp.inf):
        assert not all_finite({**tree, "c": jnp.array([0, bad])})


def _config(tmp_path, white=(), **options):
    """A run of 12 steps on 80 images, of which some are white."""
    rng = np.random.default_rng(0)
    data = tmp_path / "data"
    data.mkdir()
    for number in range(80):
        pixels = rng.integers(0, 200, (SIZE, SIZE, 3), np.uint8)
        pixels[...] = WHITE if number in white else pixels
        Image.fromarray(pixels).save(data / f"{number:02}.png")
    values = {
        "method": VICReg(projector=(16,)),
        "data": f"folder:{data}",
        "output": str(tmp_path / "run"),
        "backbone": "resnet-narrow",
        "steps": 12,
        "batch_size": 16,
        "eval_every": 0,
        "checkpoint_every": 3,
        "log_every": 4,
    }
    return PretrainConfig(**{**values, **options})


QUIET = Display(quiet=True)


@pytest.mark.slow
def test_a_skipped_step_is_counted_kept_and_found_again(poisoned, tmp_path, capsys):
    config = _config(tmp_path, white=[7])
    pretrain(config, QUIET)
    folder = tmp_path / "run"
    rows = [row for row in read_metrics(folder / "metrics.jsonl") if "loss" in row]
    # 12 steps of 16 images: each image is in two or three batches.
    assert rows[-1]["skipped_steps"] in (2, 3)
    number = json.loads((folder / "skipped" / "step.json").read_text())["step"]
    assert 1 <= number <= 5
    findings = replay(folder)
    assert findings[0].name == "view 0"
    assert findings[0].bad == SIZE * SIZE * 3  # one image of it
    said = capsys.readouterr().out
    assert f"step {number} of" in said and "the step is skipped" in said
    assert "view 0: 192 of 3,072 numbers" in said
    # What was kept for it is damaged, and so is a checkpoint after it.
    kept = list((folder / "skipped" / "checkpoints").iterdir())
    for place in (*kept, folder / "checkpoints" / "12"):
        (place / manifest.MANIFEST).write_text("{}")
    assert replay(folder) == findings
    said = capsys.readouterr().out
    assert "from the state after step 0" in said
    for place in kept:
        assert f"WARNING: checkpoint {place.name}: file manifest.json" in said
    # Another step is finite: nothing is found.
    assert replay(folder, step=number + 1) == []
    assert "all numbers are finite" in capsys.readouterr().out
    with pytest.raises(UserError, match="--step: got 13, expected 1 to 12"):
        replay(folder, step=13)


def test_devices_that_do_not_divide_the_batch_replay_nothing(tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    write_config(_config(tmp_path), tmp_path / "run")
    monkeypatch.setattr(jax, "device_count", lambda: 3)
    problem = "--batch-size: got 16, expected a multiple of the 3 devices"
    with pytest.raises(UserError, match=problem):
        replay(tmp_path / "run", step=2)


def test_after_some_in_a_row_a_run_stops_with_its_last_good_state(poisoned, tmp_path):
    config = _config(tmp_path, white=range(40, 80), max_skipped=2, log_every=5)
    with pytest.raises(DivergenceError, match="--max-skipped allows 2") as error:
        pretrain(config, QUIET)
    assert error.value.exit_code == 4
    folder = tmp_path / "run"
    assert not (folder / "results.json").exists()
    # The first two steps were bad, so the state is that at the beginning.
    run = build(resolve(config, open_data(config.data)), open_data(config.data))
    first = run.init()
    [kept] = (folder / "skipped" / "checkpoints").iterdir()
    assert kept.name == "0"
    with Checkpoints(folder / "skipped") as checkpoints:
        assert fingerprint(checkpoints.restore(first)) == fingerprint(first)
    assert skipped_step(folder) == 1


@pytest.mark.parametrize(
    ("module", "name"), [(manifest, "finish"), (skipped_steps, "write_json")]
)
def test_what_cannot_be_kept_for_replay_ends_no_run(
    module, name, tmp_path, monkeypatch
):
    def fail(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, name, fail)
    said = []
    zero = jnp.zeros((), jnp.int32)
    state = TrainState(
        step=zero,
        key=jax.random.key(0),
        params={"kernel": jnp.ones(3)},
        batch_stats={},
        opt_state={},
        skipped=Skipped(zero, zero, zero),
    )
    config = PretrainConfig(VICReg(), max_skipped=2)
    skipping = SkippedSteps(config, tmp_path, state, said.append, lambda: None)

    def after(step):
        return state.replace(step=zero + step, skipped=Skipped(*[zero + step] * 3))

    assert skipping.report_skipped(1, after(1)) == 1
    assert "not kept" in said[-1] and "No space left" in said[-1]
    with pytest.raises(DivergenceError, match="--max-skipped allows 2") as error:
        skipping.report_skipped(2, after(2))
    assert error.value.exit_code == 4


@pytest.mark.slow
def test_a_state_that_is_not_finite_is_never_saved(tmp_path):
    # Of a finite gradient, an update beyond the range of float32.
    options = OptimizerOptions(name="sgd", learning_rate=1e38, weight_decay=0.0)
    config = _config(tmp_path, optimizer=options, checkpoint_every=1)
    with pytest.raises(DivergenceError) as error:
        pretrain(config, QUIET)
    assert error.value.exit_code == 4
    source = open_data(config.data)
    like = build(resolve(config, source), source).init()
    for step in saved_steps(tmp_path / "run" / "checkpoints"):
        with Checkpoints(tmp_path / "run") as checkpoints:
            assert all_finite(checkpoints.restore(like, until=step))


@pytest.mark.slow
def test_divergence_leaves_with_4_and_no_traceback(tmp_path):
    options = ["--steps=60", "--batch-size=64", "--projector", "64", "--log-every=10"]
    options += ["--optimizer.name=sgd", "--optimizer.learning-rate=1e12"]
    options += ["--optimizer.weight-decay=1e-4", "--image-size=8"]
    done = subprocess.run(
        [sys.executable, "-m", "jemjax.cli", "pretrain", "vicreg", *options]
        + [f"--output={tmp_path / 'run'}"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 4, done.stderr
    assert "Traceback" not in done.stderr and "learning-rate" in done.stderr


def _built(tmp_path, **options):
    config = _config(tmp_path, **options)
    source = open_data(config.data)
    run = build(resolve(config, source), source)
    images = np.random.default_rng(0).integers(0, 256, (16, SIZE, SIZE, 3), np.uint8)
    return run, run.init(), run.images({"image": images})


@pytest.mark.parametrize("accumulate", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_layer_that_overflows_is_named(accumulate, tmp_path):
    run, state, images = _built(tmp_path, accumulate=accumulate)
    assert find(run, state, images) == []
    layer = state.params["projector"]["Dense_0"]
    layer["kernel"] = jnp.full_like(layer["kernel"], 3e38)
    findings = find(run, state, images)
    assert findings[0].name.startswith("layer projector/Dense_0")
    names = [finding.name for finding in findings]
    assert names.index("loss") > 0
    assert any(name.startswith("gradient ") for name in names)


def test_a_bad_parameter_is_named_before_what_it_leads_to(tmp_path):
    run, state, images = _built(tmp_path)
    bias = state.params["projector"]["Dense_0"]["kernel"]
    state.params["projector"]["Dense_0"]["kernel"] = bias.at[0, 0].set(jnp.nan)
    findings = find(run, state, images)
    assert findings[0].name == "before the step, params/projector/Dense_0/kernel"
    assert findings[0].bad == 1


def test_no_memory_is_answered_with_what_can_be_done(tmp_path):
    config = PretrainConfig(VICReg(), batch_size=512, image_size=224, backbone="vit")
    text = "RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nmany lines"
    with pytest.raises(UserError) as error, explaining_memory(config):
        raise jax.errors.JaxRuntimeError(text)
    said = str(error.value)
    assert "--batch-size 512" in said and "allocating 9 bytes" in said
    assert "many lines" not in said
    for knob in ("--accumulate", "--batch-size", "--image-size", "--backbone"):
        assert f"  {knob}" in said or f"or {knob}" in said
    with pytest.raises(UserError, match="of the host"), explaining_memory(config):
        raise MemoryError
    other = pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL")
    with other, explaining_memory(config):
        raise jax.errors.JaxRuntimeError("INTERNAL: broken")


def test_no_memory_in_a_step_is_told_so(tmp_path, monkeypatch):
    def step(*arguments):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    def built(*arguments):
        return build(*arguments)._replace(step=step)

    monkeypatch.setattr("jemjax.training.run.pretrain.build", built)
    monkeypatch.setattr("jemjax.training.run.setup.Setup.check", lambda run: None)
    with pytest.raises(UserError, match="out of memory with --batch-size 16"):
        pretrain(_config(tmp_path), QUIET)


@pytest.mark.parametrize("name", ["vicreg", "dino"])
def test_evaluation_leaves_the_state_as_it_was(name):
    setup = setup_of(name)
    state = setup.init()
    before = fingerprint(state)
    embedder = Embedder(setup.method, setup.network, setup.recipe, setup.mesh)
    images = np.full((4, SIZE, SIZE, 3), 7, np.uint8)
    first, second = embedder.embed(state, images), embedder.embed(state, images)
    chex.assert_trees_all_equal(first, second)
    assert fingerprint(state) == before


@pytest.mark.slow
def test_collapse_is_told_while_it_happens_with_its_causes(tmp_path, monkeypatch):
    found = {"effective_rank": 1.0}, ["type 1: all the same"]
    monkeypatch.setattr(loop, "monitor", lambda *arguments: found)
    output = io.StringIO()
    config = _config(tmp_path, eval_every=4)
    pretrain(config, Display(Console(file=output, soft_wrap=True)))
    said = output.getvalue()
    for step in (4, 8):
        assert f"step {step}: collapse, type 1: all the same" in said
    during, _, _ = said.partition("measuring: trained")
    assert during.count("for vicreg: ") == 1
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows if row.get("collapse")] == [4, 8]


def test_deterministic_is_set_before_jax_uses_a_device():
    program = """
import os
from jemjax.errors import UserError
from jemjax.methods import VICReg
from jemjax.training.config.options import PretrainConfig
from jemjax.training.run.pretrain import pretrain
os.environ["XLA_FLAGS"] = "--xla_cpu_enable_fast_math=false"
try:
    pretrain(PretrainConfig(VICReg(), data="folder:none", deterministic=True))
except UserError:
    print(os.environ["XLA_FLAGS"])
import jax
jax.devices()  # XLA ends the process for a flag that it does not know
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True)
    assert done.returncode == 0, done.stderr
    flags = done.stdout.decode().split()
    assert flags == [
        "--xla_cpu_enable_fast_math=false",
        "--xla_gpu_deterministic_ops=true",
    ]
