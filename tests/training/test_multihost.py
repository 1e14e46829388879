"""Runs on several hosts: processes on this machine, each with virtual devices."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image
from training.disks import mount

from jemjax.training.reporting.metrics_file import read_metrics
from jemjax.training.storage import manifest

TINY = [
    "--steps=8",
    "--batch-size=64",
    "--expander",
    "32",
    "--image-size=8",
    "--backbone=resnet-narrow",
    "--log-every=1",
    "--checkpoint-every=4",
    "--eval-every=4",
    "--eval-examples=200",
    "--final-examples=200",
]
# Longer than anything takes on a busy machine.
PATIENCE = 300


PROGRAM = ["-m", "jemjax.cli"]


def _start(*arguments, devices, program=PROGRAM, folder=None, **environment):
    return subprocess.Popen(
        [sys.executable, *program, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
        env={**os.environ, "JAX_PLATFORMS": "cpu"}
        | {"JAX_NUM_CPU_DEVICES": str(devices), **environment},
    )


def _start_hosts(*arguments, program=PROGRAM, folders=(None, None)):
    """A process of 4 devices for each of two hosts, which find each other."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    return [
        _start(
            *arguments,
            "--multihost",
            devices=4,
            program=program,
            folder=folders[host],
            JAX_COORDINATOR_ADDRESS=f"localhost:{port}",
            JAX_NUM_PROCESSES="2",
            JAX_PROCESS_ID=str(host),
        )
        for host in range(2)
    ]


def _end(processes):
    """Exit codes, and what was printed."""
    try:
        said = [process.communicate(timeout=PATIENCE) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], said


def _run(*arguments, devices):
    (code,), ((_, errors),) = _end([_start(*arguments, devices=devices)])
    assert code == 0, errors


def _losses(folder):
    rows = read_metrics(folder / "metrics.jsonl")
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def _results(folder):
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="module")
def one_host(tmp_path_factory):
    """A run on 8 devices of one process."""
    folder = tmp_path_factory.mktemp("runs") / "one"
    _run("pretrain", "vicreg", *TINY, f"--output={folder}", devices=8)
    return folder


@pytest.fixture(scope="module")
def two_hosts(tmp_path_factory):
    """The same on 4 devices of each of two, and what they printed."""
    folder = tmp_path_factory.mktemp("runs") / "two"
    codes, said = _end(_start_hosts("pretrain", "vicreg", *TINY, f"--output={folder}"))
    assert codes == [0, 0], said
    return folder, said


def test_two_hosts_do_what_one_does(one_host, two_hosts):
    folder, said = two_hosts
    losses = _losses(one_host)
    assert list(losses) == list(range(1, 9))
    assert _losses(folder) == pytest.approx(losses, rel=1e-5)
    results, expected = _results(folder), _results(one_host)
    for protocol in ("knn", "knn_10_labels", "linear"):
        assert results[protocol]["trained"] == pytest.approx(
            expected[protocol]["trained"], abs=0.02
        )
        assert results[protocol]["pixels"] == expected[protocol]["pixels"]
    rank = expected["collapse"]["effective_rank"]
    assert results["collapse"]["effective_rank"] == pytest.approx(rank, rel=1e-3)


def test_only_the_first_host_writes_and_tells(two_hosts):
    folder, ((first, _), (second, _)) = two_hosts
    assert "written to" in first
    # Of what jax's transport prints there, threads cut lines.
    assert not [text for text in ("jemjax", "step", "measur", "/") if text in second]
    steps = [row["step"] for row in read_metrics(folder / "metrics.jsonl")]
    assert steps == [1, 2, 3, 4, 4, 5, 6, 7, 8]  # 4 is measured too


def _cut(folder, copy):
    """A copy of a run as it was after its first checkpoint."""
    shutil.copytree(folder, copy)
    shutil.rmtree(copy / "checkpoints" / "8")
    (copy / "results.json").unlink()
    return copy


def _resume_and_compare(folder, copy, devices, one_host):
    copy = _cut(folder, copy)
    options = [*TINY, f"--output={copy}", "--resume"]
    _run("pretrain", "vicreg", *options, devices=devices)
    assert _losses(copy) == pytest.approx(_losses(one_host), rel=1e-5)


def test_what_two_hosts_began_one_device_continues(one_host, two_hosts, tmp_path):
    _resume_and_compare(two_hosts[0], tmp_path / "run", 1, one_host)


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 4])
def test_what_eight_devices_began_fewer_continue(devices, one_host, tmp_path):
    _resume_and_compare(one_host, tmp_path / "run", devices, one_host)


@pytest.mark.slow
def test_parameters_sharded_over_hosts_are_saved_whole(one_host, tmp_path):
    folder = tmp_path / "run"
    options = [*TINY, f"--output={folder}"]
    codes, said = _end(_start_hosts("pretrain", "vicreg", *options, "--fsdp=8"))
    assert codes == [0, 0], said
    assert _losses(folder) == pytest.approx(_losses(one_host), rel=1e-5)
    of_hosts = _results(folder)
    _run("pretrain", "vicreg", *options, "--resume", devices=1)
    assert _results(folder)["state_sha256"] == of_hosts["state_sha256"]
    codes, said = _end(_start_hosts("evaluate", folder))
    assert codes == [0, 0], said
    again = json.loads((folder / "evaluation.json").read_text())
    assert again["knn"] == pytest.approx(of_hosts["knn"])


@pytest.mark.slow
def test_images_of_several_sizes_are_cropped_alike_on_two_hosts(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "data").mkdir()
    for number in range(80):
        pixels = rng.integers(0, 256, (*rng.integers(12, 60, 2), 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "data" / f"{number:02}.png")
    options = [*TINY, f"--data=folder:{tmp_path / 'data'}", "--accumulate=2"]
    _run("pretrain", "vicreg", *options, f"--output={tmp_path / 'one'}", devices=8)
    options += [f"--output={tmp_path / 'two'}"]
    codes, said = _end(_start_hosts("pretrain", "vicreg", *options))
    assert codes == [0, 0], said
    assert "crops made by the loader" in said[0][0]
    losses = _losses(tmp_path / "one")
    assert _losses(tmp_path / "two") == pytest.approx(losses, rel=1e-5)


# White images are poison. Of several hosts orbax names what one waits for in another
# by the step alone, so that two states must not be on their way at once.
POISONED = """
import time
import jax.numpy as jnp
from orbax.checkpoint import AsyncCheckpointer
from jemjax import cli
from jemjax.training.step import branch

make_views = branch.make_views


def poisoned(keys, images, recipe):
    white = jnp.all(images == 255, axis=(1, 2, 3), keepdims=True)
    return tuple(jnp.where(white, jnp.nan, x) for x in make_views(keys, images, recipe))


save, wait = AsyncCheckpointer.save, AsyncCheckpointer.wait_until_finished
saving = set()


def save_alone(self, *arguments, **keywords):
    assert not saving - {self}, "another state is being saved"
    save(self, *arguments, **keywords)
    saving.add(self)


def wait_and_note(self):
    wait(self)
    if self in saving:
        time.sleep(5)  # longer than a step
        saving.discard(self)


branch.make_views = poisoned
AsyncCheckpointer.save = save_alone
AsyncCheckpointer.wait_until_finished = wait_and_note
cli.main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("every", [1, 9], ids=["at once", "later"])
def test_a_skipped_step_of_two_hosts_is_kept_whole_and_found_again(every, tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "data").mkdir()
    for number in range(160):
        pixels = rng.integers(0, 200, (8, 8, 3), np.uint8)
        pixels[...] = 255 if number == 7 else pixels
        Image.fromarray(pixels).save(tmp_path / "data" / f"{number:03}.png")
    folder, program = tmp_path / "run", ["-c", POISONED]
    # Seen at once, the state is kept as it is; later, the checkpoint before it is.
    options = [*TINY, f"--data=folder:{tmp_path / 'data'}", "--batch-size=16"]
    options += ["--steps=12", "--eval-every=0", "--fsdp=8", f"--output={folder}"]
    options += [f"--log-every={every}", "--checkpoint-every=7"]
    codes, said = _end(_start_hosts("pretrain", "vicreg", *options, program=program))
    assert codes == [0, 0], said
    kept = folder / "skipped"
    number = json.loads((kept / "step.json").read_text())["step"]
    assert said[0][0].count(f"step {number}: loss or gradient was not finite") == 1
    assert "WARNING" not in said[0][0]
    (step,) = manifest.saved_steps(kept / "checkpoints")
    manifest.verify(kept / "checkpoints" / str(step))
    assert sorted(os.listdir(kept / "checkpoints")) == [str(step)]
    assert (number, step) == (8, 7)
    rows = [row for row in read_metrics(folder / "metrics.jsonl") if "loss" in row]
    assert rows[-1]["step"] == 12 and rows[-1]["skipped_steps"] == 2
    (code,), ((out, errors),) = _end(
        [_start("replay", folder, devices=1, program=program)]
    )
    assert code == 0, errors
    assert f"from the state after step {step}" in out
    assert "the step is skipped" in out and "view 0: 192 of 3,072 numbers" in out


@pytest.mark.slow
def test_sigterm_on_one_host_saves_and_stops_all(tmp_path):
    folder = tmp_path / "run"
    options = [*TINY[1:-3], "--steps=60", "--eval-every=0", "--final-examples=200"]
    options += [f"--output={folder}"]
    hosts = _start_hosts("pretrain", "vicreg", *options)
    deadline = time.monotonic() + PATIENCE
    while not _losses(folder).get(5):
        assert time.monotonic() < deadline
        assert all(host.poll() is None for host in hosts)
        time.sleep(0.05)
    hosts[1].send_signal(signal.SIGTERM)
    codes, said = _end(hosts)
    assert codes == [143, 143], said
    assert [errors.count("it continues with:") for _, errors in said] == [1, 0]
    last = max(_losses(folder))
    assert 5 <= last < 60
    assert (folder / "checkpoints" / str(last)).is_dir()
    codes, said = _end(_start_hosts("pretrain", "vicreg", *options, "--resume"))
    assert codes == [0, 0], said
    assert f"resumed after step {last}" in said[0][0]
    assert list(_losses(folder)) == list(range(1, 61))


@pytest.mark.slow
def test_hosts_do_not_wait_for_one_that_was_killed(tmp_path):
    options = [*TINY[1:], "--steps=100000", f"--output={tmp_path / 'run'}"]
    hosts = _start_hosts("pretrain", "vicreg", *options)
    deadline = time.monotonic() + PATIENCE
    while not _losses(tmp_path / "run"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    hosts[1].kill()
    codes, said = _end(hosts)
    assert codes[0] != 0, said


FAILING = """
import functools
import jax

# So late that whoever waits for a silent host outlasts the test.
jax.distributed.initialize = functools.partial(
    jax.distributed.initialize, heartbeat_timeout_seconds=3600
)
from jemjax.data import DataError
from jemjax.training.process import distributed

with distributed.leaving_at_once():
    distributed.connect(True)
    assert distributed.gather("ab" * jax.process_index()) == ["", "ab"]
    if jax.process_index():
        raise DataError("no such image")
    distributed.gather("for ever")
"""


def test_a_host_that_fails_alone_does_not_leave_others_waiting():
    codes, said = _end(_start_hosts(program=["-c", FAILING]))
    assert codes[0] not in (0, 3) and codes[1] == 3, said
    assert "host 1: no such image" in said[1][1]


def test_a_refusal_reaches_all_hosts_and_is_told_once(one_host):
    before = (one_host / "config.toml").read_bytes()
    codes, said = _end(
        _start_hosts("pretrain", "vicreg", *TINY, f"--output={one_host}")
    )
    assert codes == [2, 2], said
    assert [errors.count("holds a run") for _, errors in said] == [1, 0]
    assert (one_host / "config.toml").read_bytes() == before


def test_what_only_one_host_finds_wrong_stops_all(tmp_path):
    rng = np.random.default_rng(0)
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        (folder / "data").mkdir(parents=True)
        for number in range(20):
            pixels = rng.integers(0, 256, (8, 8, 3), np.uint8)
            Image.fromarray(pixels).save(folder / "data" / f"{number:02}.png")
    (folders[1] / "data" / "07.png").write_text("this is not an image")
    options = ["--data=folder:data", "--batch-size=8", f"--output={tmp_path / 'run'}"]
    codes, said = _end(_start_hosts("pretrain", "vicreg", *options, folders=folders))
    assert codes == [3, 3], said
    assert [errors.count("07.png") for _, errors in said] == [1, 0]
    assert "host 1" in said[0][1]
    assert not (tmp_path / "run").exists()


def test_a_full_disk_is_told_by_several_hosts_as_by_one(tmp_path):
    told = []
    for hosts in (1, 2):
        disk = tmp_path / str(hosts)
        disk.mkdir()
        # The root, the run, its lock, config.toml and checkpoints; no metrics.jsonl.
        mount(disk, "nr_inodes=5")
        options = ["pretrain", "vicreg", *TINY, f"--output={disk / 'run'}"]
        try:
            codes, said = _end(
                [_start(*options, devices=8)] if hosts == 1 else _start_hosts(*options)
            )
        finally:
            subprocess.run(["umount", "-l", str(disk)], check=True)
        assert codes == [5] * hosts, said
        assert not [errors for _, errors in said if "Traceback" in errors], said
        lines = [errors.count("cannot be written") for _, errors in said]
        assert lines == [1, 0][:hosts], said
        told += [x for x in said[0][1].splitlines() if x.startswith("jemjax: ")]
    assert "metrics.tmp: cannot be written (No space left on device)" in told[0]
    assert told[1] == told[0].replace(str(tmp_path / "1"), str(tmp_path / "2"))


def test_a_folder_that_only_looks_shared_is_refused(tmp_path):
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        (folder / "run").mkdir(parents=True)
    (folders[1] / "run" / "config.toml").write_text("")
    codes, said = _end(
        _start_hosts("pretrain", "vicreg", *TINY, "--output=run", folders=folders)
    )
    assert codes == [2, 2], said
    assert [errors.count("are not seen here") for _, errors in said] == [1, 0]
    assert not list((folders[0] / "run").iterdir())


@pytest.mark.parametrize(
    "flag, environment, text",
    [
        (["--multihost"], {}, "JAX_COORDINATOR_ADDRESS"),
        ([], {"JAX_NUM_PROCESSES": "2"}, "--multihost"),
        ([], {"SLURM_STEP_NUM_TASKS": "2"}, "--multihost"),
    ],
    ids=["nobody to join", "no flag", "no flag, Slurm"],
)
def test_a_host_that_cannot_join_says_so(flag, environment, text, tmp_path):
    options = [*flag, f"--output={tmp_path / 'run'}"]
    (code,), ((_, errors),) = _end(
        [_start("pretrain", "vicreg", *options, devices=1, **environment)]
    )
    assert code == 2, errors
    assert text in errors and "Traceback" not in errors
    assert not (tmp_path / "run").exists()
