"""Whole runs as a user starts them: learning, resuming, refusing."""

import dataclasses
import functools
import io
import json
import os
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from jemjax.cli import METHOD_NAMES, main
from jemjax.data import open_data
from jemjax.errors import DataError, UserError
from jemjax.methods import DINO, VICReg
from jemjax.training.config.file import to_toml
from jemjax.training.config.options import PretrainConfig
from jemjax.training.config.resolve import resolve, with_given_length
from jemjax.training.reporting.display import Display
from jemjax.training.reporting.metrics_file import MetricsFile, read_metrics
from jemjax.training.run import duration
from jemjax.training.run import pretrain as loop
from jemjax.training.run.protocols import KNN, Protocol
from jemjax.training.step.sharding import make_mesh
from jemjax.training.storage.files import replacing
from jemjax.training.storage.folder import check_folder
from jemjax.training.storage.provenance import load_config

# A network and a run so small that compilation is most of the time.
TINY = [
    "--steps=40",
    "--batch-size=64",
    "--expander",
    "64",
    "--image-size=8",
    "--backbone=resnet-narrow",
    "--log-every=5",
]


def _command(*arguments):
    return [sys.executable, "-m", "jemjax.cli", *map(str, arguments)]


def _jemjax(*arguments, **environment):
    return subprocess.run(
        _command(*arguments),
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )


def _results(folder):
    return json.loads((Path(folder) / "results.json").read_text())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run on digits: its folder, and what it printed."""
    folder = tmp_path_factory.mktemp("runs") / "digits"
    done = _jemjax(
        "pretrain", "vicreg", *TINY, "--checkpoint-every=10", f"--output={folder}"
    )
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_a_run_writes_what_it_promises(finished):
    folder, _ = finished
    results = _results(folder)
    for protocol in ("knn", "knn_10_labels", "linear"):
        assert set(results[protocol]) == {"trained", "untrained", "pixels"}
        assert all(0.1 < value <= 1 for value in results[protocol].values())
    assert results["steps"] == 40
    assert results["images_per_second"] > 0
    assert set(results["collapse"]) >= {"normalized_std", "effective_rank", "rankme"}
    rows = read_metrics(folder / "metrics.jsonl")
    logged = [row["step"] for row in rows if "loss" in row]
    assert logged == [1, 5, 10, 15, 20, 25, 30, 35, 40]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert np.mean(losses[-4:]) < losses[0]  # of batches, so each is noisy
    assert any("knn" in row for row in rows)


def test_a_run_tells_what_it_does(finished):
    _, output = finished
    for text in ("1,442 images", "resnet-narrow", "images/s", "raw pixels"):
        assert text in output
    assert "\x1b" not in output, "plain lines where there is no terminal"


def test_evaluate_repeats_the_final_figures(finished):
    folder, _ = finished
    done = _jemjax("evaluate", folder)
    assert done.returncode == 0, done.stderr
    again = json.loads((folder / "evaluation.json").read_text())
    for protocol in ("knn", "knn_10_labels", "linear"):
        assert again[protocol] == pytest.approx(_results(folder)[protocol])


@pytest.mark.slow
def test_sharded_parameters_and_batches_in_parts_are_options(tmp_path):
    folder = tmp_path / "run"
    options = [*TINY[1:], "--steps=3", "--final-examples=200", f"--output={folder}"]
    done = _jemjax(
        *("pretrain", "vicreg", "--fsdp=2", "--accumulate=4", *options),
        JAX_NUM_CPU_DEVICES="4",
    )
    assert done.returncode == 0, done.stderr
    assert "4 x cpu, parameters sharded over 2, batches in 4 parts" in done.stdout
    # On devices over which nothing can be sharded, nor such a batch in parts.
    done = _jemjax("evaluate", folder, JAX_NUM_CPU_DEVICES="3")
    assert done.returncode == 0, done.stderr
    again = json.loads((folder / "evaluation.json").read_text())
    assert again["knn"]["trained"] == pytest.approx(
        _results(folder)["knn"]["trained"], abs=0.02
    )


def test_minutes_choose_the_steps_once(tmp_path, monkeypatch):
    one_device = functools.partial(make_mesh, 1)
    monkeypatch.setattr("jemjax.training.run.setup.make_mesh", one_device)
    timed = duration._seconds_of_a_step

    def a_twentieth(run, source):
        assert timed(run, source) > 0
        return 0.05

    monkeypatch.setattr(duration, "_seconds_of_a_step", a_twentieth)
    config = PretrainConfig(
        VICReg(projector=(64,)),
        minutes=0.01,
        eval_every=0,
        batch_size=64,
        final_examples=200,
        output=str(tmp_path / "run"),
        resume=True,
    )
    said = io.StringIO()
    results = loop.pretrain(config, Display(Console(file=said, width=200)))
    assert results["steps"] == 12  # 0.6 seconds
    assert "a step takes 0.05 s here, so 12 steps" in said.getvalue()
    written = tomllib.loads((tmp_path / "run" / "config.toml").read_text())
    assert written["steps"] == 12 and "minutes" not in written
    # A machine that is faster or slower now does not change the run.
    monkeypatch.setattr(duration, "_seconds_of_a_step", None)
    again = loop.pretrain(config, Display(Console(file=said, width=200)))
    assert "begun with 12 steps" in said.getvalue()
    assert again["state_sha256"] == results["state_sha256"]


class Widest(Protocol):
    """The largest feature, as a protocol that somebody adds."""

    name = "widest"

    def measure(self, given):
        return float(given.embedded.test.made.features.max())

    def monitor(self, given):
        return {"widest_so_far": self.measure(given)}, ["type 9: too wide"]


def test_somebody_adds_a_protocol(tmp_path, monkeypatch):
    one_device = functools.partial(make_mesh, 1)
    monkeypatch.setattr("jemjax.training.run.setup.make_mesh", one_device)
    config = PretrainConfig(
        VICReg(projector=(64,)),
        steps=4,
        eval_every=2,
        batch_size=64,
        eval_examples=64,
        final_examples=64,
        output=str(tmp_path / "run"),
    )
    said = io.StringIO()
    display = Display(Console(file=said, width=200))
    results = loop.pretrain(config, display, protocols=(KNN(), Widest()))
    assert {*results["widest"]} == {*results["knn"]}
    assert {*results["knn"]} == {"trained", "untrained", "pixels"}
    assert "linear" not in results and "collapse" not in results
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    [measured] = [row for row in rows if "knn" in row]
    assert list(measured) == ["step", "knn", "widest_so_far", "collapse"]
    assert "step 2: collapse, type 9: too wide" in said.getvalue()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"minutes": 3.0}, (None, None, 3.0)),
        ({"steps": 9}, (9, None, None)),
        ({"seed": 1}, (5, 0.1, None)),
        ({"steps": 9, "minutes": 3.0}, (9, None, 3.0)),  # refused later
    ],
)
def test_a_given_length_takes_the_place_of_a_files(given, expected):
    default = PretrainConfig(VICReg(), steps=5, epochs=0.1)
    config = with_given_length(dataclasses.replace(default, **given), default)
    assert (config.steps, config.epochs, config.minutes) == expected


@pytest.mark.parametrize("other", [{"steps": 5}, {"epochs": 1.0}])
def test_minutes_and_another_length_exclude_each_other(other, tmp_path):
    config = PretrainConfig(VICReg(), minutes=1.0, **other)
    with pytest.raises(UserError, match="--minutes excludes"):
        loop.pretrain(config, Display(quiet=True))


def test_a_run_of_an_earlier_version_is_told_what_its_file_lacks(tmp_path):
    digits = open_data("digits", split="train")
    text = to_toml(resolve(PretrainConfig(DINO()), digits))
    assert 'head_norm = "batch"\n' in text
    (tmp_path / "config.toml").write_text(text)
    assert load_config(tmp_path).method == DINO().resolve(8, 128, len(digits))
    text = text.replace('head_norm = "batch"\n', "")
    (tmp_path / "config.toml").write_text(text)
    with pytest.raises(UserError, match="lacks method.head_norm, which this version"):
        load_config(tmp_path)


def _kill_and_resume(method, options, folder):
    """What `results.json` says of a run that was killed once, and of its output."""
    arguments = [*options, "--checkpoint-every=10", f"--output={folder}", "--resume"]
    process = subprocess.Popen(
        _command("pretrain", method, *arguments), stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 240
    while not any((folder / "checkpoints").glob("[0-9]*[0-9]")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (folder / "results.json").exists()
    done = _jemjax("pretrain", method, *arguments)
    assert done.returncode == 0, done.stderr
    assert "resumed after step" in done.stdout
    return _results(folder)


def test_killed_and_resumed_it_ends_in_the_same_bytes(finished, tmp_path):
    folder = tmp_path / "run"
    results = _kill_and_resume("vicreg", TINY, folder)
    assert results["state_sha256"] == _results(finished[0])["state_sha256"]
    steps = [r["step"] for r in read_metrics(folder / "metrics.jsonl") if "loss" in r]
    assert steps == sorted(set(steps))


@pytest.mark.slow
@pytest.mark.parametrize("method", METHOD_NAMES[1:])
def test_every_method_ends_in_the_same_bytes_when_killed(method, tmp_path):
    options = ["--steps=40", "--batch-size=64", "--image-size=8", "--log-every=5"]
    options += ["--eval-every=0"]
    # Used from the second step on.
    options += ["--queue-start=0", "--queue-length=64"] if method == "swav" else []
    done = _jemjax("pretrain", method, *options, f"--output={tmp_path / 'undisturbed'}")
    assert done.returncode == 0, done.stderr
    results = _kill_and_resume(method, options, tmp_path / "killed")
    undisturbed = _results(tmp_path / "undisturbed")
    assert results["state_sha256"] == undisturbed["state_sha256"]


def test_clusters_and_collapse_are_measured(tmp_path):
    done = _jemjax(
        "pretrain",
        "swav",
        *TINY[:2],
        "--projector",
        "16",
        "8",
        "--num-prototypes=20",
        "--image-size=8",
        "--eval-every=20",
        f"--output={tmp_path / 'run'}",
    )
    assert done.returncode == 0, done.stderr
    results = _results(tmp_path / "run")
    clusters = results["clusters"]
    assert 1 <= clusters["used_prototypes"] <= clusters["prototypes"] == 20
    for name in ("hungarian_accuracy", "few_label_accuracy"):
        assert 0 < clusters[name] <= 1
    rows = (tmp_path / "run" / "clusters.csv").read_text().splitlines()
    assert rows[0] == "image,prototype,label" and len(rows) == 1 + 355
    assert "prototypes used" in done.stdout
    for key in ("collapse", "embedding_collapse"):
        assert isinstance(results[key]["collapse"], list)
    logged = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert any("effective_rank" in row for row in logged)


def test_a_swap_that_makes_no_sense_is_refused_with_the_reason(tmp_path):
    done = _jemjax(
        "pretrain", "data2vec", "--projector", "8", f"--output={tmp_path / 'run'}"
    )
    assert done.returncode == 2
    assert "--projector: data2vec predicts the backbone's own layers" in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_finished_run_can_be_resumed_too(finished):
    folder, _ = finished
    before = _results(folder)
    done = _jemjax(
        "pretrain",
        "vicreg",
        *TINY,
        "--checkpoint-every=10",
        f"--output={folder}",
        "--resume",
    )
    assert done.returncode == 0, done.stderr
    assert _results(folder)["state_sha256"] == before["state_sha256"]


def _folder_of_images(path, names, sizes=(8, 9)):
    rng = np.random.default_rng(0)
    for name in names:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (*rng.integers(*sizes, 2), 3), np.uint8)
        Image.fromarray(pixels).save(path / name)
    return path


def _unlabelled(tmp_path, count=80):
    return _folder_of_images(tmp_path / "flat", [f"{i:03}.png" for i in range(count)])


def test_unlabelled_images_are_trained_on_and_collapse_is_measured(tmp_path):
    data = _unlabelled(tmp_path)
    done = _jemjax(
        "pretrain",
        "vicreg",
        *TINY,
        "--steps=5",
        "--batch-size=16",
        f"--data=folder:{data}",
        f"--output={tmp_path / 'run'}",
    )
    assert done.returncode == 0, done.stderr
    results = _results(tmp_path / "run")
    assert "knn" not in results and results["collapse"]["normalized_std"] > 0


@pytest.mark.slow
def test_images_of_several_sizes_resumed_end_in_the_same_bytes(tmp_path):
    names = [f"{i:03}.{('jpg', 'png')[i % 2]}" for i in range(80)]
    data = _folder_of_images(tmp_path / "flat", names, sizes=(12, 60))
    options = [*TINY, "--batch-size=16", "--accumulate=2", f"--data=folder:{data}"]
    undisturbed = tmp_path / "undisturbed"
    done = _jemjax("pretrain", "vicreg", *options, f"--output={undisturbed}")
    assert done.returncode == 0, done.stderr
    assert "images of several sizes, measured at 256 x 256 x 3" in done.stdout
    assert "crops made by the loader" in done.stdout
    results = _kill_and_resume("vicreg", options, tmp_path / "killed")
    assert results["state_sha256"] == _results(undisturbed)["state_sha256"]


@pytest.mark.slow
def test_d1_a_run_without_bad_images_resumed_ends_in_the_same_bytes(tmp_path):
    names = [f"{i:03}.{('jpg', 'png')[i % 2]}" for i in range(80)]
    data = _folder_of_images(tmp_path / "flat", names, sizes=(12, 60))
    for name, kept in ((names[20], 0), (names[21], 120), (names[55], 40)):
        path = data / name
        path.write_bytes(path.read_bytes()[:kept])
    options = [*TINY, "--batch-size=16", f"--data=folder:{data}"]
    refused = _jemjax("pretrain", "vicreg", *options, f"--output={tmp_path / 'no'}")
    assert refused.returncode == 3 and names[20] in refused.stderr
    assert "Traceback" not in refused.stderr
    options += ["--on-bad-image=skip", "--max-bad-share=0.1"]
    undisturbed = tmp_path / "undisturbed"
    done = _jemjax("pretrain", "vicreg", *options, f"--output={undisturbed}")
    assert done.returncode == 0, done.stderr
    for name in (names[20], names[21], names[55]):
        assert done.stderr.count(f"{name}: ") == 1
    results = _kill_and_resume("vicreg", [*options, "--workers=2"], tmp_path / "killed")
    first = _results(undisturbed)
    assert results["state_sha256"] == first["state_sha256"]
    counts = first["unreadable_images"] + first["unreadable_test_images"]
    assert counts == 3


def _text_named_jpg(tmp_path):
    data = _unlabelled(tmp_path)
    (data / "note.jpg").write_text("this is not an image")
    return [f"--data=folder:{data}"]


def _used_folder(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.toml").write_text('method_name = "vicreg"\n')
    return []


def _foreign_folder(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("precious")
    return ["--overwrite"]


def _config_with_a_typo(tmp_path):
    (tmp_path / "c.toml").write_text("batch_sise = 64\n")
    return [f"--config={tmp_path / 'c.toml'}"]


def _config_of_a_wrong_type(tmp_path):
    (tmp_path / "c.toml").write_text('steps = "many"\n')
    return [f"--config={tmp_path / 'c.toml'}"]


# what is wrong, the options it makes, the exit codes allowed, what must be said
WRONG = {
    "a folder that does not exist": (["--data=folder:nowhere"], (2, 3), ["nowhere"]),
    "a text file named .jpg": (_text_named_jpg, (3,), ["note.jpg"]),
    "a batch larger than the data": (["--batch-size=5000"], (2, 3), ["5000", "1442"]),
    "a misspelt option": (["--batch-sise=5"], (2,), ["--batch-size"]),
    "a value of the wrong type": (["--steps=many"], (2,), ["--steps", "many"]),
    "an unknown data set": (["--data=digist"], (2, 3), ["digits"]),
    "a used output folder": (_used_folder, (2,), ["--resume", "--overwrite"]),
    "a folder of something else": (_foreign_folder, (2,), ["holds files"]),
    "a misspelt key of a file": (_config_with_a_typo, (2,), ["batch_size"]),
    "a wrong type in a file": (_config_of_a_wrong_type, (2,), ["steps", "many"]),
    "an unknown backbone": (["--backbone=resnet9"], (2,), ["resnet18"]),
    "a set that is not prepared": (
        ["--data=tfds:fashion_mnist", "--data-dir=nowhere"],
        (2, 3),
        ["jemjax data prepare"],
    ),
    "several at once": (
        ["--steps=-1", "--log-every=0"],
        (2,),
        ["--steps", "--log-every"],
    ),
    "a negative weight": (["--covariance-weight=-1"], (2,), ["covariance_weight"]),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_mistakes_are_answered_in_a_sentence(wrong, tmp_path, capsys, monkeypatch):
    # In this process, whose settings stay as they are.
    monkeypatch.setattr("jemjax.runtime.prepare_process", lambda: None)
    options, codes, texts = WRONG[wrong]
    options = options(tmp_path) if callable(options) else options
    output = tmp_path / "run"
    with pytest.raises(SystemExit) as stopped:  # anything else would be a traceback
        main(["pretrain", "vicreg", f"--output={output}", *options])
    said = "".join(capsys.readouterr())
    assert stopped.value.code in codes, said
    for text in texts:
        assert text in said
    if wrong == "a folder of something else":
        assert (output / "thesis.tex").read_text() == "precious"


def test_help_is_quick_and_needs_no_jax():
    code = (
        "import sys, jemjax.cli\n"
        "jemjax.cli.main(['--help'])\n"
        "assert 'jax' not in sys.modules and 'numpy' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "pretrain" in done.stdout


def test_every_public_option_is_listed():
    done = _jemjax("pretrain", "vicreg", "--help")
    assert done.returncode == 0, done.stderr
    names = "data eval-data output backbone steps epochs batch-size seed eval-every"
    for name in f"{names} checkpoint-every multihost resume overwrite".split():
        assert f"--{name}" in done.stdout
    assert "--config" in done.stdout
    for part in "crop flip jitter grayscale blur solarize".split():
        assert f"--views.no-{part}" in done.stdout
    assert "--views.mask {None,none," in done.stdout


@pytest.mark.parametrize("arguments", [["pretrian"], ["pretrain", "vicregg"]])
def test_misspelt_commands_get_a_suggestion(arguments):
    done = _jemjax(*arguments)
    assert done.returncode == 2
    assert "did you mean" in done.stderr


def test_a_folder_in_which_nothing_was_written_is_not_left_behind(tmp_path):
    data = _unlabelled(tmp_path)
    cut = data / "007.png"
    cut.write_bytes(cut.read_bytes()[:-60])  # seen only when it is decoded
    options = {"data": f"folder:{data}", "batch_size": 16, "image_size": 8}
    options |= {"backbone": "resnet-narrow"}
    config = PretrainConfig(VICReg(projector=(16,)), **options)
    made = tmp_path / "runs" / "of today" / "1"
    mine = tmp_path / "mine"
    mine.mkdir()
    for output in (made, mine):
        given = dataclasses.replace(config, output=str(output))
        with pytest.raises(DataError, match="007.png"):
            loop.pretrain(given, Display(quiet=True))
    assert sorted(os.listdir(tmp_path)) == ["flat", "mine"]
    assert os.listdir(mine) == []


def test_a_start_that_failed_does_not_lock_its_folder(tmp_path):
    with pytest.raises(ZeroDivisionError), replacing(tmp_path / "config.toml"):
        raise ZeroDivisionError
    assert os.listdir(tmp_path) == []
    for name in ("config.tmp", ".jemjax-hosts", ".jemjax-lock"):  # it was killed
        (tmp_path / name).touch()
    check_folder(tmp_path, resume=False, overwrite=False)
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(UserError, match="holds files"):
        check_folder(tmp_path, resume=False, overwrite=False)


def test_metrics_are_rewound_to_the_restored_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
    file = MetricsFile(path, first_step=2)
    file.write({"step": 2, "loss": 1.0})
    file.close()
    assert [row["step"] for row in read_metrics(path)] == [1, 2]
    assert os.listdir(tmp_path) == ["metrics.jsonl"]
