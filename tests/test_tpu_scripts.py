"""The scripts of experiments/tpu, with stand-ins for what only a cloud has."""

import os
import pathlib
import runpy
import shlex
import subprocess
import sys

import jax
import pytest

from jemjax import cli
from jemjax.training.run import pretrain as loop

ROOT = pathlib.Path(__file__).parents[1]
LAUNCH = ROOT / "experiments/tpu/launch.sh"
WORKER = ROOT / "experiments/tpu/worker.sh"


def _run(script, *arguments, stubs=None, **variables):
    path = f"{stubs}:{os.environ['PATH']}" if stubs else os.environ["PATH"]
    return subprocess.run(
        ["bash", script, *arguments],
        env={"PATH": path, "HOME": os.environ["HOME"]} | variables,
        capture_output=True,
        text=True,
        timeout=60,
    )


def _printed(*arguments, **variables):
    done = _run(
        LAUNCH, "--dry-run", *arguments, PROJECT="mine", BUCKET="images", **variables
    )
    assert not done.returncode, done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines()]


def _command(*arguments, **variables):
    """The words that every host is given to run."""
    (line,) = _printed("start", *arguments, **variables)
    (remote,) = [word for word in line if word.startswith("--command=")]
    words = shlex.split(remote.removeprefix("--command="))
    assert words[1:4] == ["checkout/experiments/tpu/worker.sh", "start", "images"]
    return words[4:]


@pytest.fixture
def parsed(monkeypatch):
    """The configurations with which a run would have begun."""
    configs = []
    monkeypatch.setattr(loop, "pretrain", configs.append)
    monkeypatch.setattr(jax.distributed, "initialize", lambda *a, **k: None)
    return configs


@pytest.mark.parametrize("script", [LAUNCH, WORKER], ids=lambda path: path.name)
def test_the_syntax_and_an_unknown_command(script):
    assert not _run("-n", script).returncode
    assert _run(script, "lunch").returncode == 2


def test_what_is_missing_is_said():
    done = _run(LAUNCH, "create", PROJECT="mine")
    assert done.returncode == 2
    assert "PROJECT and BUCKET" in done.stderr


def test_the_command_of_a_method_is_one_of_the_command_line(parsed):
    program, *arguments = _command("--batch-size", "4096", "--fsdp", "4", RECIPE="dino")
    assert program == "jemjax"
    cli.main(arguments)
    (config,) = parsed
    assert config.method.name == "dino"
    assert config.output == "bucket/runs/imagenet"
    assert (config.batch_size, config.fsdp, config.resume) == (4096, 4, True)


def test_the_command_of_the_recipe_is_understood_by_it(parsed, monkeypatch):
    program, script, *arguments = _command("--epochs", "300", NAME="long")
    assert program == "python"
    script = ROOT / script.removeprefix("checkout/")
    monkeypatch.syspath_prepend(script.parent)
    monkeypatch.setattr(sys, "argv", [str(script), *arguments])
    runpy.run_path(str(script), run_name="__main__")
    del sys.modules["_run"]  # with the stand-in
    (config,) = parsed
    assert config.data == "tfds:imagenet2012"
    assert (config.backbone, config.epochs) == ("resnet50", 300)
    assert config.output == "bucket/runs/long"


def test_a_request_on_demand_is_not_for_spot_machines():
    (spot,), (on_demand,) = _printed("create"), _printed("create", SPOT="no")
    assert set(spot) - set(on_demand) == {"--spot"}


GCLOUD = """
# Each question is answered by the next line of a file; the rest is written down.
case "$*" in
*queued-resources\\ describe*) next=states ;;
*worker.sh\\ status*) next=progress ;;
*storage\\ ls*) [[ ! -s states ]]; exit ;;
*) echo "${*:3}" >> calls; exit ;;
esac
answer=$(head -n 1 $next); sed -i 1d $next
case "$next $answer" in
"states ") echo "ERROR: NOT_FOUND" >&2; exit 1 ;;
"states error") echo "ERROR: UNAVAILABLE" >&2; exit 1 ;;
esac
echo "$answer"
"""


def test_a_preempted_slice_is_replaced_until_the_run_has_finished(tmp_path):
    stubs, checkout = tmp_path / "bin", tmp_path / "checkout"
    stubs.mkdir()
    (checkout / "experiments/tpu").mkdir(parents=True)
    launch = checkout / "experiments/tpu/launch.sh"
    launch.write_text(LAUNCH.read_text())
    launch.chmod(0o755)
    for name, text in {"gcloud": GCLOUD, "sleep": "", "git": ""}.items():
        (stubs / name).write_text(f"#!/bin/bash\n{text}")
        (stubs / name).chmod(0o755)
    (checkout / "states").write_text(
        "\nPROVISIONING\nACTIVE\nerror\nACTIVE\nSUSPENDED\n\nACTIVE\nACTIVE\n"
    )
    (checkout / "progress").write_text("absent\nrunning\nabsent\nstopped\n")
    done = _run(launch, "keep", stubs=stubs, PROJECT="mine", BUCKET="images")
    assert not done.returncode, done.stderr
    calls = (checkout / "calls").read_text().splitlines()
    words = ("queued-resources create", "queued-resources delete", " install", " start")
    kinds = [word.split()[-1] for call in calls for word in words if word in call]
    assert kinds == [
        *["create", "install", "start"],
        *["delete", "create", "install", "start"],
        *["start", "delete"],
    ]


RUN = """
import pathlib, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (pathlib.Path("saved").touch(), sys.exit()))
pathlib.Path("began").touch()
time.sleep(60)
"""


def test_a_host_runs_one_process_which_saves_when_it_is_stopped(tmp_path):
    stubs = tmp_path / "bin"
    stubs.mkdir()
    for name, text in {"mountpoint": "exit 1", "gcsfuse": "echo $* >> mounts"}.items():
        (stubs / name).write_text(f"#!/bin/bash\n{text}\n")
        (stubs / name).chmod(0o755)
    (tmp_path / "installed").touch()

    def worker(*arguments):
        done = _run(WORKER, *arguments, stubs=stubs, HOME=str(tmp_path))
        assert not done.returncode, done.stderr
        return done.stdout.strip()

    assert worker("status") == "stopped"
    assert worker("start", "images", sys.executable, "-c", RUN) == "started"
    assert worker("start", "images", sys.executable, "-c", RUN) == "running"
    assert (tmp_path / "mounts").read_text().endswith("0 images bucket\n")
    while not (tmp_path / "began").exists():
        assert worker("status") == "running"
    assert worker("stop") == "stopped"
    assert (tmp_path / "saved").exists()
