"""A signal in any phase of a run: the step ends, the state is saved, and it goes on."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from jemjax import cli
from jemjax.errors import UserError
from jemjax.methods import VICReg
from jemjax.training.config.options import PretrainConfig
from jemjax.training.process.signals import NAMES, Signals
from jemjax.training.reporting.metrics_file import read_metrics
from jemjax.training.run import pretrain as loop
from jemjax.training.run.loop import stop_by_signal
from jemjax.training.storage import provenance

PATIENCE = 120
OPTIONS = ["--steps=30", "--batch-size=64", "--expander", "64", "--image-size=8"]
OPTIONS += ["--backbone=resnet-narrow", "--log-every=1", "--final-examples=200"]
OPTIONS += ["--eval-examples=64", "--checkpoint-every=7"]

# A run that reaches a phase writes a file, and some stay in it.
PROGRAM = """
import os, signal, sys, time

# A shell may have started the tests in the background, where Ctrl-C is ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
phase, marker = sys.argv.pop(1), sys.argv.pop(1)
handlers = [signal.getsignal(number) for number in range(1, 32)]
from jemjax import cli
from jemjax.data import pipeline
from jemjax.training.storage import checkpoints
from jemjax.training.run import pretrain as loop
assert handlers == [signal.getsignal(number) for number in range(1, 32)]

def reach(seconds):
    open(marker, "w").close()
    time.sleep(seconds)

def replace(module, name, seconds, when=lambda *arguments: True):
    before = getattr(module, name)
    def replaced(*arguments, **keywords):
        if when(*arguments):
            reach(seconds)
        return before(*arguments, **keywords)
    setattr(module, name, replaced)

if phase == "compilation":  # between lowering and XLA's part
    from jax import monitoring
    def listen(event, seconds, fun_name="", **others):
        if "to_mlir" in event and "train_step" in fun_name:
            reach(1)
    monitoring.register_event_duration_secs_listener(listen)
elif phase == "step":
    replace(checkpoints.Checkpoints, "preempted", 0.2, lambda self, step: step > 4)
elif phase == "evaluation":
    replace(loop, "monitor", 600)
elif phase == "data":
    replace(pipeline, "_gather", 600, lambda source, crops, seed, number, _: number > 6)
elif phase == "save":
    replace(checkpoints.Checkpoints, "save", 1)
elif phase == "measurement":
    replace(loop, "measure", 600)
cli.main(sys.argv[1:])
"""


def _signalled(phase, name, folder, marker):
    """Starts a run, sends a signal in a phase; the exit code and what is said."""
    run = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, phase, str(marker)]
        + ["pretrain", "vicreg", *OPTIONS, f"--output={folder}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    deadline = time.monotonic() + PATIENCE
    try:
        while not marker.exists():
            assert run.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        time.sleep(0.1)
        run.send_signal(signal.Signals[name])
        said, _ = run.communicate(timeout=PATIENCE)
    finally:
        run.kill()
    return run.returncode, said


def _saved(folder):
    names = [path.name for path in (folder / "checkpoints").iterdir()]
    return max(int(name) for name in names if name.isdecimal())


def _resume(said):
    """Runs the command that was printed."""
    [command] = [line for line in said.splitlines() if line.endswith("--resume")]
    name, *arguments = command.split()
    assert name == "jemjax"
    done = subprocess.run(
        [sys.executable, "-m", "jemjax.cli", *arguments], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("name", "code"), [("SIGUSR1", 138)])
def test_a_signal_in_a_step_saves_it_and_says_how_to_go_on(name, code, tmp_path):
    returned, said = _signalled("step", name, tmp_path / "run", tmp_path / "marker")
    assert returned == code, said
    last = _saved(tmp_path / "run")
    assert 5 <= last < 30 and f"stopped by {name} after step {last}" in said
    assert "Traceback" not in said
    assert max(r["step"] for r in read_metrics(tmp_path / "run/metrics.jsonl")) == last


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("signals") / "run"
    command = [sys.executable, "-m", "jemjax.cli", "pretrain", "vicreg", *OPTIONS]
    done = subprocess.run([*command, f"--output={folder}"], capture_output=True)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "results.json").read_text())["state_sha256"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("phase", "name", "code"),
    [
        ("compilation", "SIGTERM", 143),
        ("step", "SIGINT", 130),
        ("evaluation", "SIGTERM", 143),
        ("evaluation", "SIGINT", 130),
        ("data", "SIGTERM", 143),
        ("data", "SIGUSR1", 138),
        ("save", "SIGINT", 130),
        ("measurement", "SIGTERM", 143),
    ],
)
def test_a_signal_in_any_phase_ends_in_the_same_bytes(
    phase, name, code, undisturbed, tmp_path
):
    returned, said = _signalled(phase, name, tmp_path / "run", tmp_path / "marker")
    assert returned == code, said
    assert f"stopped by {name}" in said and "Traceback" not in said
    if phase != "measurement":
        assert _saved(tmp_path / "run") < 30
    assert not (tmp_path / "run" / "results.json").exists()
    _resume(said)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["state_sha256"] == undisturbed
    steps = [row["step"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    assert sorted(set(steps)) == list(range(1, 31))


IN_XLA = """
import jax, signal
from jemjax.training.process.signals import Signals

signal.signal(signal.SIGINT, signal.default_int_handler)
endless = jax.jit(
    lambda x: jax.lax.while_loop(lambda x: x >= 0, lambda x: (x + 1) % 1000, x)
)
with Signals():
    print("ready", flush=True)
    endless(1).block_until_ready()
"""


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_second_signal_ends_the_process_at_once(name, code):
    run = subprocess.Popen(
        [sys.executable, "-c", IN_XLA],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert run.stdout.readline() == "ready\n"
        time.sleep(1)
        run.send_signal(signal.Signals[name])
        time.sleep(1)
        assert run.poll() is None, "XLA computes, and the first is only noted"
        run.send_signal(signal.Signals[name])
        _, said = run.communicate(timeout=PATIENCE)
    finally:
        run.kill()
    assert run.returncode == code
    assert f"jemjax: {name}: stopping" in said


def test_the_command_that_is_printed_has_what_resuming_needs(tmp_path, monkeypatch):
    given = PretrainConfig(
        VICReg(),
        output=str(tmp_path),
        fallback=False,
        allow_change=("views", "backbone"),
    )
    provenance.write_config(given, tmp_path)
    with pytest.raises(UserError) as stopped:
        stop_by_signal(Signals(), given, "after step 1")
    resumed = []
    monkeypatch.setattr(loop, "pretrain", resumed.append)
    monkeypatch.setattr("jemjax.runtime.prepare_process", lambda: None)
    cli.main(str(stopped.value).splitlines()[-1].split()[1:])
    assert resumed[0].resume and not resumed[0].fallback
    assert resumed[0].allow_change == ("views", "backbone")


@pytest.fixture
def handlers():
    """Handlers of our own, so that a signal does not end the tests."""
    seen = []
    before = {name: signal.getsignal(signal.Signals[name]) for name in NAMES}
    for name in NAMES:
        signal.signal(signal.Signals[name], lambda number, _: seen.append(number))
    yield seen
    for name, handler in before.items():
        signal.signal(signal.Signals[name], handler)


@pytest.mark.parametrize("name", NAMES)
def test_handlers_are_put_back(name, handlers, capfd):
    number = signal.Signals[name]
    with Signals() as signals:
        assert signals.interruptibly(lambda: 5) == 5 and not signals.stopping
        os.kill(os.getpid(), number)
        assert signals.stopping and signals.received == number and handlers == []
        assert signals.exit_code == 128 + number and signals.name == name
        assert signals.interruptibly(lambda: 5) is None, "what comes after is left out"
    os.kill(os.getpid(), number)
    assert handlers == [number]
    assert signal.set_wakeup_fd(-1) == -1


def test_a_wait_is_left(handlers):
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGUSR1)).start()
    waited_for = threading.Event()
    with Signals() as signals:
        assert signals.interruptibly(waited_for.wait) is None  # it is never set
    waited_for.set()


def test_an_error_comes_through_and_handlers_are_put_back(handlers):
    with pytest.raises(ZeroDivisionError), Signals() as signals:
        signals.interruptibly(lambda: 1 / 0)
    os.kill(os.getpid(), signal.SIGTERM)
    assert handlers == [signal.SIGTERM]


def test_what_is_ignored_stays_ignored(handlers):
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    with Signals() as signals:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert not signals.stopping


def test_other_threads_change_no_handler(handlers):
    installed = signal.getsignal(signal.SIGTERM)
    seen = []

    def run():
        with Signals() as signals:
            seen.append(signal.getsignal(signal.SIGTERM))
            seen.append(signals.interruptibly(lambda: 5))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [installed, 5]
