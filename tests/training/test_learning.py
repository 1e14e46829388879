"""No method collapses with its defaults, on the images that come with the library."""

import itertools

import jax
import pytest

from jemjax.data import batches, open_data
from jemjax.methods import DINO, METHODS, MoCo
from jemjax.training.config.options import PretrainConfig
from jemjax.training.config.resolve import resolve
from jemjax.training.reporting.display import Display
from jemjax.training.run.pretrain import pretrain
from jemjax.training.run.setup import build
from jemjax.training.step.sharding import make_mesh


def _results(tmp_path, **changes):
    config = PretrainConfig(output=str(tmp_path / "run"), **changes)
    return pretrain(config, Display(quiet=True))


def _check(results):
    assert results["loss_collapse"] == []
    assert results["collapse"]["collapse"] == []
    assert results["embedding_collapse"]["collapse"] == []
    assert "advice" not in results
    assert results["linear"]["trained"] > results["linear"]["untrained"]


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["resnet-narrow", "vit-narrow"])
@pytest.mark.parametrize("name", METHODS)
def test_defaults_learn(name, backbone, tmp_path):
    _check(_results(tmp_path, method=METHODS[name](), backbone=backbone))


def _short(method, steps=100, **changes):
    """The last metrics of so many steps on one device, and the run."""
    source = open_data("digits", split="train")
    config = resolve(PretrainConfig(method, steps=steps, **changes), source)
    run = build(config, source, make_mesh(1))
    state, metrics = run.init(), {}
    stream = batches(source, batch_size=config.batch_size, seed=0)
    for batch in itertools.islice(stream, steps):
        state, metrics = run.step(state, run.images(batch))
    stream.close()
    return jax.device_get(metrics), run


def test_dino_learns_soon():
    metrics, run = _short(DINO())
    assert metrics["loss"] < 0.985 * run.collapsed_loss()
    assert metrics["embedding_std"] > 0.2 / 128**0.5


def test_dino_collapses_with_the_head_of_version_0_1_0():
    metrics, run = _short(DINO(head_norm="none"))
    assert metrics["loss"] == pytest.approx(run.collapsed_loss(), rel=1e-3)
    assert metrics["embedding_std"] < 0.05 / 128**0.5
    assert "--head-norm" in run.config.method.collapse_hint


@pytest.mark.slow
@pytest.mark.parametrize(
    ("head_norm", "stays_apart"), [("batch", True), ("none", False)]
)
def test_a_transformer_does_not_leave_the_queue_in_one_direction(
    head_norm, stays_apart
):
    method = MoCo(head_norm=head_norm)
    metrics, run = _short(method, steps=25, backbone="vit-narrow")
    assert (metrics["embedding_std"] > 0.2 / 128**0.5) == stays_apart
    assert "--head-norm" in run.config.method.collapse_hint


def test_moco_has_the_published_head_for_photographs():
    of_photographs, of_small = (
        MoCo().resolve(size, 256, 10**6).head_norm for size in (224, 32)
    )
    assert (of_photographs, of_small) == ("none", "batch")


def test_a_transformer_has_an_optimizer_of_its_own():
    digits = open_data("digits", split="train")
    of_vit, of_resnet = (
        resolve(PretrainConfig(DINO(), backbone=backbone), digits).optimizer
        for backbone in ("vit-narrow", "resnet-narrow")
    )
    assert of_vit.learning_rate < of_resnet.learning_rate and of_vit.clip_norm
