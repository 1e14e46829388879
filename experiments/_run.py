"""How every script here starts: its recipe is the default, flags change it."""

from jemjax.runtime import prepare_process

prepare_process()  # before jax starts

import tyro  # noqa: E402

from jemjax.cli import reporting_errors  # noqa: E402
from jemjax.training.config.options import PretrainConfig  # noqa: E402
from jemjax.training.config.resolve import with_given_length  # noqa: E402
from jemjax.training.process.distributed import leaving_at_once  # noqa: E402
from jemjax.training.run.pretrain import pretrain  # noqa: E402


def run(recipe: PretrainConfig) -> None:
    """Trains by a recipe, with the changes that the command line makes to it."""
    with reporting_errors():
        config = tyro.cli(PretrainConfig, default=recipe)
        with leaving_at_once():
            pretrain(with_given_length(config, recipe))
