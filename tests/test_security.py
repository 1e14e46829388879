"""Nothing in the package runs what a file says; section 4 of what it promises."""

import ast
import csv
import pathlib

import numpy as np
import pytest

import jemjax
from jemjax.data import ArraySource
from jemjax.training.reporting.display import Display
from jemjax.training.run.embedder import EmbeddedSet, EmbeddedSplit, EvalSet, Features
from jemjax.training.run.protocols import _write_clusters

PACKAGE = pathlib.Path(jemjax.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

# They build whatever objects a file names, or run it.
MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal"}
MODULES |= {"shelve", "yaml", "tarfile", "zipfile", "torch"}
CALLS = {"eval", "exec", "compile", "__import__", "extractall", "unpack_archive"}
CALLS |= {"import_module", "system", "popen", "read_pickle", "literal_eval"}


def forbidden(tree):
    """What a file of Python does that it must not: (line, what) each."""
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        else:
            names = []
        for name in names:
            if name.split(".")[0] in MODULES:
                yield line, f"import {name}"
        if not isinstance(node, ast.Call):
            continue
        function = node.func
        if isinstance(function, ast.Name) and function.id in CALLS:
            yield line, function.id
        # `jax.jit(...).compile()` and `re.compile` are other ones.
        if isinstance(function, ast.Attribute) and function.attr in CALLS - {"compile"}:
            yield line, function.attr
        for keyword in node.keywords:
            value = keyword.value
            off = isinstance(value, ast.Constant) and not value.value
            if keyword.arg in ("allow_pickle", "shell") and not off:
                yield line, keyword.arg


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_the_source_unpacks_and_runs_nothing_that_a_file_says(path):
    assert list(forbidden(ast.parse(path.read_text()))) == []


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from pickle import loads",
        "import cloudpickle as c",
        "import joblib.externals",
        "import yaml",
        "import marshal",
        "numpy.load(path, allow_pickle=True)",
        "numpy.load(path, allow_pickle=flag)",
        "eval(text)",
        "exec(text)",
        "archive.extractall(folder)",
        "shutil.unpack_archive(path)",
        "subprocess.run(text, shell=True)",
        "importlib.import_module(name)",
    ],
)
def test_the_test_of_the_source_sees_what_it_is_for(code):
    assert list(forbidden(ast.parse(code)))


@pytest.mark.parametrize(
    "code",
    ["numpy.load(path, allow_pickle=False)", "import pickletools", "re.compile(x)"],
)
def test_the_test_of_the_source_lets_the_harmless_be(code):
    assert not list(forbidden(ast.parse(code)))


def test_no_class_name_is_a_formula_of_a_spreadsheet(tmp_path):
    names = ["=cmd|' /C calc'!A0", "+1", "-1", "@SUM(A1)", 'comma, "quote"', "cat"]
    labels = np.arange(6)
    source = ArraySource(np.zeros((6, 2, 2, 1), np.uint8), labels, class_names=names)
    made = Features(np.zeros((6, 2)), cluster=np.zeros(6, np.int64))
    examples = EvalSet(source, labels, source, labels, 6)
    split = EmbeddedSplit(made, labels)
    _write_clusters(tmp_path / "clusters.csv", EmbeddedSet(split, split, 6), examples)
    with open(tmp_path / "clusters.csv", newline="") as file:
        written = [row["label"] for row in csv.DictReader(file)]
    assert written == [f"'{name}" for name in names[:4]] + names[4:]


def test_no_name_is_markup_or_an_instruction_to_the_terminal(capsys):
    display = Display()
    hostile = "[red]x[/red] \x1b[2J \r \udcff \u202e"
    display.header(hostile, [("data", hostile)])
    display.say(f"two\n{hostile}")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and all(line.isprintable() for line in lines)
    shown = r"[red]x[/red] \x1b[2J \r \xff \u202e"
    assert [shown in line for line in lines] == [True, True, False, True]
