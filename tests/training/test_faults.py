"""Whole runs whose disk is full, whose folder is taken, whose files are damaged."""

import json
import os
import subprocess
import sys

import pytest
from training.disks import mount

from jemjax.training.reporting.metrics_file import read_metrics
from jemjax.training.storage import manifest

TINY = [
    "--steps=40",
    "--checkpoint-every=10",
    "--batch-size=64",
    "--expander",
    "64",
    "--image-size=8",
    "--backbone=resnet-narrow",
    "--log-every=1",
    "--eval-every=0",
    "--final-examples=200",
]


def _start(folder, *more):
    command = [sys.executable, "-m", "jemjax.cli", "pretrain", "vicreg", *TINY, *more]
    return subprocess.Popen(
        [*command, f"--output={folder}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _run(folder, *more):
    process = _start(folder, *more)
    out, errors = process.communicate()
    return process.returncode, out, errors


def _digest(folder):
    return json.loads((folder / "results.json").read_text())["state_sha256"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "undisturbed"
    code, _, errors = _run(folder)
    assert code == 0, errors
    return folder


@pytest.mark.slow
def test_a_run_on_a_full_disk_keeps_what_it_has_and_goes_on_once_there_is_room(
    undisturbed, tmp_path
):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount(disk, "size=1600k")  # one checkpoint has 1.0 MB
    try:
        code, out, errors = _run(disk / "run", "--resume")
        assert code == 5, out + errors
        assert "Traceback" not in errors
        assert "could not be saved" in errors and "--resume" in errors
        (step,) = manifest.saved_steps(disk / "run" / "checkpoints")
        manifest.verify(disk / "run" / "checkpoints" / str(step))
        assert f"saved are: {step}." in errors
        mount(disk, "remount,size=20m")
        code, out, errors = _run(disk / "run", "--resume")
        assert code == 0, errors
        assert f"resumed after step {step}" in out
        assert _digest(disk / "run") == _digest(undisturbed)
        rows = read_metrics(disk / "run" / "metrics.jsonl")
        assert [row["step"] for row in rows if "loss" in row] == list(range(1, 41))
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.slow
def test_a_run_on_a_read_only_disk_is_refused_in_a_sentence(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount(disk, "size=1m,ro")
    try:
        code, _, errors = _run(disk / "run")
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
    assert code in (2, 5) and "Traceback" not in errors
    assert "cannot be written (Read-only file system)" in errors


@pytest.mark.slow
def test_of_two_runs_on_a_folder_the_second_is_refused_and_harms_nothing(
    undisturbed, tmp_path
):
    folder = tmp_path / "run"
    first = _start(folder, "--steps=1000000")
    try:
        while not manifest.saved_steps(folder / "checkpoints"):
            assert first.poll() is None
        for flag in ("--resume", "--overwrite"):
            code, _, errors = _run(folder, flag)
            assert code == 2 and f"process {first.pid} on" in errors, errors
        assert first.poll() is None
    finally:
        first.kill()
        first.communicate()
    code, _, errors = _run(folder, "--overwrite")  # the lock of the dead is no lock
    assert code == 0, errors
    assert _digest(folder) == _digest(undisturbed)


@pytest.mark.slow
def test_a_damaged_checkpoint_costs_its_steps_and_nothing_else(undisturbed, tmp_path):
    folder = tmp_path / "run"
    subprocess.run(["cp", "-r", str(undisturbed), str(folder)], check=True)
    newest = folder / "checkpoints" / "40"
    largest = max(newest.rglob("*"), key=lambda path: path.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)
    code, _, errors = _run(folder, "--resume", "--no-fallback")
    assert code == 5 and largest.name in errors and "Traceback" not in errors
    code, out, errors = _run(folder, "--resume")
    assert code == 0, errors
    assert "40.damaged" in out and "resumed after step 30" in out
    assert _digest(folder) == _digest(undisturbed)
