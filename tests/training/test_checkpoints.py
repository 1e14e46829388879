"""Checkpoints: what damage, full disks and other runs can do to them, and cannot."""

import concurrent.futures
import contextlib
import errno
import json
import os
import shutil
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training.disks import mount

from jemjax.cli import main
from jemjax.errors import CheckpointDamaged, CheckpointError, UserError
from jemjax.training.step.state import Skipped, TrainState
from jemjax.training.storage import manifest
from jemjax.training.storage.checkpoints import ATTEMPTS, Checkpoints, fingerprint
from jemjax.training.storage.folder import locked

FULL = OSError(errno.ENOSPC, "No space left on device")


def _state(step, *, size=1000, dtype=jnp.float32, **params):
    """A state that does not compress, and differs from step to step."""
    draws = np.random.default_rng(step).normal(size=size)
    params = {"kernel": jnp.asarray(draws, dtype), **params}
    return TrainState(
        step=jnp.asarray(step, jnp.int32),
        key=jax.random.key(step),
        params=params,
        batch_stats={},
        opt_state={"momentum": jnp.asarray(draws[:10], jnp.float32)},
        loss_state={"queue": jnp.ones((4, 2)) * step},
        skipped=Skipped(*[jnp.zeros((), jnp.int32) for _ in Skipped._fields]),
    )


def _save(folder, *steps, **options):
    said = []
    with Checkpoints(folder, say=said.append, **options) as checkpoints:
        for step in steps:
            checkpoints.save(step, _state(step))
    return said


def _restore(folder, like=None, **options):
    """The state that a run would resume from, and what it said."""
    said = []
    with Checkpoints(folder, say=said.append, **options) as checkpoints:
        return checkpoints.restore(_state(0) if like is None else like), "\n".join(said)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with checkpoints 10 and 20; not to be changed."""
    folder = tmp_path_factory.mktemp("run")
    assert _save(folder, 10, 20) == []
    return folder


@pytest.fixture
def run(saved, tmp_path):
    """The same, to be changed."""
    return shutil.copytree(saved, tmp_path / "run")


def _files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_the_state_that_is_restored_is_the_one_that_was_saved(saved):
    restored, said = _restore(saved)
    assert fingerprint(restored) == fingerprint(_state(20))
    assert said == ""


def test_a_state_is_restored_onto_other_devices(tmp_path):
    def placed(state, count):
        mesh = jax.make_mesh((count,), ("data",), devices=jax.devices()[:count])
        shardings = jax.tree.map(
            lambda x: jax.NamedSharding(
                mesh, jax.P("data") if x.shape == (1000,) else jax.P()
            ),
            state,
        )
        return jax.device_put(state, shardings)

    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, placed(_state(1), 8))
    for count in (1, 4):
        restored, _ = _restore(tmp_path, placed(_state(0), count))
        assert fingerprint(restored) == fingerprint(_state(1))
        assert len(restored.params["kernel"].sharding.device_set) == count


def test_the_two_newest_are_kept(tmp_path):
    _save(tmp_path, 1, 2, 3, 4)
    assert manifest.saved_steps(tmp_path / "checkpoints") == [3, 4]
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["3", "4"]


def _flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "truncated": lambda path: os.truncate(path, path.stat().st_size - 1),
    "emptied": lambda path: os.truncate(path, 0),
    "deleted": lambda path: path.unlink(),
    "one bit flipped": _flip,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_damage_to_every_file_is_detected(saved, tmp_path, damage):
    names = [path.relative_to(saved) for path in _files(saved / "checkpoints" / "20")]
    assert len(names) > 8
    for number, name in enumerate(names):
        run = shutil.copytree(saved, tmp_path / str(number))
        DAMAGES[damage](run / name)
        with pytest.raises(
            CheckpointDamaged, match=f"checkpoint 20: file .*{name.name}"
        ):
            manifest.verify(run / "checkpoints" / "20")
        manifest.verify(run / "checkpoints" / "10")


def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_used(run):
    largest = max(_files(run / "checkpoints" / "20"), key=lambda p: p.stat().st_size)
    _flip(largest)
    restored, said = _restore(run)
    assert fingerprint(restored) == fingerprint(_state(10))
    assert "WARNING" in said and largest.name in said and "20.damaged" in said
    assert sorted(os.listdir(run / "checkpoints")) == ["10", "20.damaged"]
    _save(run, 20)  # its place is free
    assert fingerprint(_restore(run)[0]) == fingerprint(_state(20))


def test_who_only_reads_changes_nothing(run):
    _flip(run / "checkpoints" / "20" / "manifest.json")
    before = _files(run)
    restored, said = _restore(run, writable=False)
    assert int(restored.step) == 10 and "WARNING" in said
    assert _files(run) == before


def test_without_fallback_a_damaged_checkpoint_stops_with_exit_code_5(run):
    _flip(run / "checkpoints" / "20" / "state" / "_METADATA")
    with pytest.raises(CheckpointError, match="checkpoint 20: .*_METADATA") as caught:
        _restore(run, fallback=False)
    assert caught.value.exit_code == 5
    assert (run / "checkpoints" / "20").exists()


def test_where_all_are_damaged_nothing_starts_anew_silently(run):
    for step in ("10", "20"):
        shutil.rmtree(run / "checkpoints" / step / "state")
    for _ in range(2):  # the second time they are set aside already
        with pytest.raises(CheckpointError, match="is whole .*: start .*--overwrite"):
            _restore(run)


def test_replay_goes_past_damage_and_then_from_the_start(run):
    def restore(until):
        said = []
        with Checkpoints(run, writable=False, say=said.append) as checkpoints:
            return checkpoints.restore(_state(0), until=until), "\n".join(said)

    _flip(_files(run / "checkpoints" / "20")[-1])
    restored, said = restore(19)  # what is after it does not matter
    assert fingerprint(restored) == fingerprint(_state(10)) and said == ""
    restored, said = restore(20)
    assert fingerprint(restored) == fingerprint(_state(10))
    assert "checkpoint 20: " in said
    _flip(_files(run / "checkpoints" / "10")[-1])
    restored, said = restore(15)
    assert restored is None
    assert "checkpoint 10: " in said and "checkpoint 20: " not in said
    assert sorted(os.listdir(run / "checkpoints")) == ["10", "20"]


def test_links_out_of_a_checkpoint_are_refused(run, tmp_path):
    place = run / "checkpoints" / "20"
    (tmp_path / "outside").mkdir()
    (place / "state" / "extra").symlink_to(tmp_path / "outside")
    with pytest.raises(CheckpointDamaged, match="is a link to .*outside"):
        manifest.verify(place)


def test_a_manifest_cannot_name_files_outside_its_checkpoint(run):
    place = run / "checkpoints" / "20"
    (run / "secret").write_text("x")
    told = manifest.read_manifest(place)
    files = {"../../secret": [1, manifest._sha256(run / "secret")]}
    (place / "manifest.json").write_text(manifest._encode(told._replace(files=files)))
    with pytest.raises(CheckpointDamaged, match="not inside the checkpoint"):
        manifest.verify(place)


def test_a_pipe_in_place_of_a_file_is_not_waited_for(run):
    path = run / "checkpoints" / "20" / "state" / "_METADATA"
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(CheckpointDamaged, match="_METADATA is not a file"):
        manifest.verify(run / "checkpoints" / "20")


def test_what_interrupted_saves_have_left_is_removed_and_told(run):
    for name in ("30.unfinished", "30.unfinished.orbax-checkpoint-tmp"):
        (run / "checkpoints" / name).mkdir()
        (run / "checkpoints" / name / "data").write_bytes(bytes(2_000_000))
    _, said = _restore(run, writable=False)
    assert said == "" and (run / "checkpoints" / "30.unfinished").exists()
    restored, said = _restore(run)
    assert int(restored.step) == 20
    assert "removed 2 unfinished checkpoint(s): 4.0 MB free" in said
    assert sorted(os.listdir(run / "checkpoints")) == ["10", "20"]


def test_what_has_no_manifest_yet_is_not_saved(run, monkeypatch):
    with monkeypatch.context() as patch:  # as if killed between orbax's commit and it
        patch.setattr(manifest, "finish", lambda *arguments: None)
        _save(run, 30)
    assert (run / "checkpoints" / "30.unfinished" / "state").is_dir()
    restored, said = _restore(run)
    assert int(restored.step) == 20 and "removed 1 unfinished" in said


@pytest.mark.parametrize(
    "like, texts",
    [
        (_state(0, dtype=jnp.bfloat16), ["kernel", "float32[1000]", "bfloat16[1000]"]),
        (_state(0, size=999), ["kernel", "float32[1000]", "float32[999]"]),
        (
            _state(0, bias=jnp.zeros(3)),
            ["params['bias']: missing in the checkpoint"],
        ),
        (
            _state(0).replace(opt_state={}),
            ["opt_state['momentum']: in the checkpoint, but not in the run"],
        ),
        (
            _state(0).replace(loss_state={"queues": jnp.ones((4, 2))}),
            ["'queues']: missing in the checkpoint (it has .loss_state['queue'])"],
        ),
    ],
    ids=["dtype", "shape", "missing leaf", "extra leaf", "renamed leaf"],
)
def test_a_state_of_another_form_is_refused_by_name(run, like, texts):
    with pytest.raises(CheckpointError) as caught:
        _restore(run, like)
    for text in texts:
        assert text in str(caught.value)
    assert (run / "checkpoints" / "20").exists(), "it is not damaged"


def test_a_failed_save_is_told_at_the_next_step_and_the_third_stops(run, monkeypatch):
    def fail(*arguments):
        raise FULL

    monkeypatch.setattr(manifest, "finish", fail)
    said = []
    checkpoints = Checkpoints(run, say=said.append)
    with pytest.raises(CheckpointError, match="No space left") as caught, checkpoints:
        for attempt in range(1, ATTEMPTS + 1):
            checkpoints.save(20 + attempt, _state(20 + attempt))
            while len(said) < attempt:
                checkpoints.check()
                time.sleep(0.01)
            assert f"checkpoint {20 + attempt} could not be saved" in said[-1]
            assert "saved are: 10, 20" in said[-1] and "--resume" in said[-1]
    assert caught.value.exit_code == 5
    assert sorted(os.listdir(run / "checkpoints")) == ["10", "20"]


def test_a_good_save_forgives_those_that_failed(run, monkeypatch):
    finish, calls = manifest.finish, []

    def fail_twice(*arguments):
        calls.append(arguments)
        if len(calls) % 3:
            raise FULL
        finish(*arguments)

    monkeypatch.setattr(manifest, "finish", fail_twice)
    said = _save(run, *range(21, 30))
    assert len(said) == 6
    assert manifest.saved_steps(run / "checkpoints") == [26, 29]


def test_the_last_save_is_tried_twice_and_then_stops(run, monkeypatch):
    def fail(*arguments):
        raise FULL

    said = []
    with Checkpoints(run, say=said.append) as checkpoints:
        finish = manifest.finish
        calls = iter([fail, finish])
        monkeypatch.setattr(manifest, "finish", lambda *a: next(calls)(*a))
        checkpoints.save(30, _state(30), last=True)
        assert manifest.saved_steps(run / "checkpoints") == [20, 30]  # room was made
        monkeypatch.setattr(manifest, "finish", fail)
        with pytest.raises(CheckpointError, match="checkpoint 40 could not be saved"):
            checkpoints.save(40, _state(40), last=True)
    assert manifest.saved_steps(run / "checkpoints") == [30]


def test_old_checkpoints_that_cannot_be_removed_stay(run, monkeypatch):
    def remove(folder, remove=manifest.remove):
        if folder.name.isdecimal():
            raise PermissionError(errno.EACCES, "Permission denied")
        return remove(folder)

    finish, calls = manifest.finish, []

    def fail_once(*arguments):
        calls.append(arguments)
        if len(calls) == 1:
            raise FULL
        finish(*arguments)

    monkeypatch.setattr(manifest, "remove", remove)
    monkeypatch.setattr(manifest, "finish", fail_once)
    said = []
    with Checkpoints(run, say=said.append) as checkpoints:
        checkpoints.save(30, _state(30), last=True)
    assert len(said) == 1 and "No space left" in said[0]
    assert manifest.saved_steps(run / "checkpoints") == [10, 20, 30]


def test_an_error_of_a_save_does_not_hide_an_earlier_one(run, monkeypatch):
    def fail(*arguments):
        raise FULL

    monkeypatch.setattr(manifest, "finish", fail)
    said = []
    with pytest.raises(ZeroDivisionError), Checkpoints(run, say=said.append) as points:
        points.save(30, _state(30))
        raise ZeroDivisionError
    assert "checkpoint 30 could not be saved" in said[0]


@contextlib.contextmanager
def _small_disk(folder, size):
    folder.mkdir()
    mount(folder, f"size={size}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


# TensorStore's threads report each write that failed, to a loop that has ended.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_full_disk_keeps_earlier_checkpoints_and_reports_none_that_failed(tmp_path):
    size = 100_000  # 0.4 MB
    with _small_disk(tmp_path / "disk", "1400k") as run:
        said = []
        checkpoints = Checkpoints(run, say=said.append)
        with pytest.raises(CheckpointError) as caught, checkpoints:
            checkpoints.save(1, _state(1, size=size))
            for step in range(2, 9):
                checkpoints.save(step, _state(step, size=3 * size))
        assert caught.value.exit_code == 5
        assert len(said) == ATTEMPTS - 1
        for text in (*said, str(caught.value)):
            assert "could not be saved" in text and "saved are: 1." in text
            assert "Traceback" not in text and len(text) < 800
        assert os.listdir(run / "checkpoints") == ["1"], "what failed is cleared away"
        manifest.verify(run / "checkpoints" / "1")


def test_what_cannot_fit_is_not_begun(tmp_path):
    with _small_disk(tmp_path / "disk", "1400k") as run:
        said = []
        with Checkpoints(run, say=said.append) as checkpoints:
            checkpoints.save(1, _state(1, size=200_000))
            checkpoints.save(2, _state(2, size=200_000))
        assert len(said) == 1 and "do not fit" in said[0] and "free" in said[0]
        assert os.listdir(run / "checkpoints") == ["1"]


def test_room_is_made_where_the_disk_would_be_full(tmp_path):
    with _small_disk(tmp_path / "disk", "1400k") as run:
        said = []
        with Checkpoints(run, say=said.append) as checkpoints:
            for step in range(1, 6):
                checkpoints.save(step, _state(step, size=150_000), last=step == 5)
        assert said == []
        assert manifest.saved_steps(run / "checkpoints")[-1] == 5


# ---------------------------------------------------------------- one run a folder

HOLD = """
import sys, time
from pathlib import Path
from jemjax.training.storage.folder import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def _hold(folder):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout and process.stdout.readline() == "held\n"
    process.stdout.close()
    return process


def test_a_second_run_is_refused_and_told_who_is_there(tmp_path):
    owner = _hold(tmp_path)
    try:
        with pytest.raises(UserError, match=f"process {owner.pid} on ") as caught:
            with locked(tmp_path):
                raise AssertionError("two at once")
        assert caught.value.exit_code == 2
    finally:
        owner.kill()
        owner.wait()


def test_the_lock_of_a_run_that_was_killed_is_taken_over(tmp_path):
    owner = _hold(tmp_path)
    owner.kill()
    owner.wait()
    with locked(tmp_path), pytest.raises(UserError, match=f"process {os.getpid()} on"):
        with locked(tmp_path):
            raise AssertionError("two at once")
    assert os.listdir(tmp_path) == []
    with locked(tmp_path):
        pass


def test_of_many_at_once_one_gets_the_lock(tmp_path):
    def take(_):
        try:
            with locked(tmp_path):
                time.sleep(0.05)
                inside.append(len(os.listdir(tmp_path)))
        except UserError:
            refused.append(1)

    inside, refused = [], []
    for _ in range(5):
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            list(pool.map(take, range(8)))
    assert inside == [1] * len(inside) and len(inside) >= 5 and refused


# ---------------------------------------------------------------- jemjax checkpoint


def _run_command(*arguments):
    """The exit code of a command."""
    try:
        main(["checkpoint", *map(str, arguments)])
    except SystemExit as leaving:
        return leaving.code
    return 0


def test_checkpoints_are_listed_with_sizes_dates_and_state(run, capsys):
    (run / "checkpoints" / "30.unfinished").mkdir()
    shutil.copytree(run / "checkpoints" / "10", run / "checkpoints" / "5.damaged")
    os.truncate(run / "checkpoints" / "20" / "state" / "_METADATA", 3)
    assert _run_command("list", run) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert list(lines) == ["10", "20", "30.unfinished", "5.damaged"]
    assert "MB" in lines["10"] and "+00:00" in lines["10"]
    assert lines["10"].endswith("complete")
    assert "damaged: file state/_METADATA has 3 bytes" in lines["20"]
    assert lines["30.unfinished"].endswith("unfinished")
    assert lines["5.damaged"].endswith("set aside")


def test_verify_reads_every_file_and_leaves_with_5_if_one_is_damaged(run, capsys):
    assert _run_command("verify", run) == 0
    assert capsys.readouterr().out.count("whole") == 2
    _flip(run / "checkpoints" / "10" / "state" / "_METADATA")
    assert _run_command("verify", run / "checkpoints") == 5
    said = capsys.readouterr()
    assert "state/_METADATA has other contents" in said.out
    assert "not whole: 10" in said.err
    assert (run / "checkpoints" / "10").exists(), "it only reads"


def test_what_a_run_removes_while_it_is_read_is_not_broken(run, monkeypatch, capsys):
    digest = manifest._sha256

    def removing(old):
        def replaced(path):
            if old in path.parts and path.exists():
                manifest.remove(run / "checkpoints" / old)
            return digest(path)

        return replaced

    monkeypatch.setattr(manifest, "READERS", 1)
    monkeypatch.setattr(manifest, "_sha256", removing("10"))
    assert _run_command("verify", run) == 0
    said = capsys.readouterr().out
    assert said.count("whole") == 1 and "cannot be read" not in said
    _save(run, 30)
    monkeypatch.setattr(manifest, "_sha256", removing("30"))
    restored, _ = _restore(run, writable=False)
    assert int(restored.step) == 20


def test_prune_keeps_the_newest_whole_ones(run, capsys):
    _flip(run / "checkpoints" / "20" / "state" / "_METADATA")
    (run / "checkpoints" / "30.unfinished").mkdir()
    assert _run_command("prune", run, "--keep", 0) == 2
    assert _run_command("prune", run, "--keep", 1) == 0
    assert "deleted 20, 30.unfinished" in capsys.readouterr().out
    assert os.listdir(run / "checkpoints") == ["10"]


def test_prune_deletes_nothing_of_a_run_that_goes_on(run, capsys):
    with locked(run):
        assert _run_command("prune", run, "--keep", 1) == 2
    assert str(os.getpid()) in capsys.readouterr().err
    assert sorted(os.listdir(run / "checkpoints")) == ["10", "20"]


def test_prune_deletes_nothing_where_nothing_is_whole(run):
    for step in ("10", "20"):
        (run / "checkpoints" / step / "manifest.json").unlink()
    assert _run_command("prune", run, "--keep", 1) == 2
    assert sorted(os.listdir(run / "checkpoints")) == ["10", "20"]


@pytest.mark.parametrize("command", ["list", "verify", "prune"])
def test_a_folder_without_checkpoints_is_told(command, tmp_path, capsys):
    assert _run_command(command, tmp_path) == 2
    assert "holds no checkpoints" in capsys.readouterr().err


def test_checkpoint_commands_need_no_jax(saved):
    code = (
        "import sys, jemjax.cli\n"
        f"jemjax.cli.main(['checkpoint', 'verify', {str(saved)!r}])\n"
        "assert 'jax' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (
        json.loads((saved / "checkpoints" / "20" / "manifest.json").read_text())["step"]
        == 20
    )
