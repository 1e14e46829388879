"""A run that was saved, measured."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jemjax.errors import CheckpointError
from jemjax.training.process.distributed import (
    all_hosts,
    connect,
    end_on_sigterm,
    is_first,
)
from jemjax.training.reporting.display import Display
from jemjax.training.run.embedder import Embedder, choose_examples
from jemjax.training.run.inputs import check_test, open_part, read
from jemjax.training.run.protocols import PROTOCOLS, Protocol, measure
from jemjax.training.run.setup import rebuild
from jemjax.training.storage.checkpoints import Checkpoints
from jemjax.training.storage.files import write_json
from jemjax.training.storage.provenance import load_config


def evaluate(
    folder: Path,
    *,
    data: str | None = None,
    eval_data: str | None = None,
    data_dir: str | None = None,
    multihost: bool = False,
    display: Display | None = None,
    protocols: Sequence[Protocol] = PROTOCOLS,
) -> dict[str, Any]:
    """Measures the newest checkpoint of a run, on its own data or on other.

    Args:
        folder: the run.
        data: labelled images that are the neighbors; unless given, the run's.
        eval_data: of which the test part is asked about; unless given, `data`.
        data_dir: where prepared data sets are; unless given, as in the run.
        multihost: whether several hosts do it, each of which calls this.
        display: where progress is shown.
        protocols: how to measure.

    Returns:
        The figures, which are also written to `evaluation.json` in the folder.

    Raises:
        UserError: where there is no run or no checkpoint, or other data do not fit.
    """
    connect(multihost)
    end_on_sigterm()
    display = display or Display(quiet=not is_first())
    with all_hosts():
        config = load_config(folder)
        if data_dir is not None:
            config = dataclasses.replace(config, data_dir=data_dir)
        same = data is None and eval_data is None
        eval_data = eval_data or data or config.eval_data or config.data
        data = data or config.data
        source = open_part(data, "train", config)
        test = open_part(eval_data, "test", config)
        check_test(
            dataclasses.replace(config, data=data, eval_data=eval_data), source, test
        )
        setup = rebuild(config, source)
        source, test = read(source, display), read(test, display)
    untrained = setup.init()
    with Checkpoints(folder, writable=False, say=display.say) as checkpoints:
        state = checkpoints.restore(untrained)
    if state is None:
        raise CheckpointError(f"{folder}: holds no checkpoint yet")
    display.say(f"{folder}: step {int(state.step)} of {config.steps}")
    results = {
        "data": data,
        "eval_data": eval_data,
        "step": int(state.step),
        **measure(
            state,
            untrained,
            choose_examples(source, test, config.final_examples),
            Embedder(config.method, setup.network, setup.recipe, setup.mesh),
            setup.recipe,
            protocols,
            folder / "evaluation_clusters.csv",
            display.say,
        ),
    }
    with all_hosts():
        if is_first():
            write_json(folder / "evaluation.json", results)
    display.results(results)
    if not same:
        display.say(f"measured on {data} and {eval_data}, not on the run's own data")
    return results
