"""Each front door brings only what it needs, and rooms know only those below them."""

import ast
import collections
import subprocess
import sys
from pathlib import Path

import pytest

import jemjax

PACKAGE = Path(jemjax.__file__).parent

# Which parts of the package each part may import; the standard ones are left out.
PARTS = {
    "errors": "",
    "runtime": "",
    "losses": "",
    "_kernels": "",
    "augment": "_kernels",
    "evaluation": "",
    "data": "errors",
    "wire": "runtime",
    "testing": "losses runtime",
    "targets": "losses",
    "models": "_kernels augment",
    "methods": "augment losses models targets",
    "training": "augment data errors evaluation losses methods models runtime targets",
    "doctor": "losses runtime",
    "cli": "data doctor errors methods runtime training",
}
# Which rooms of `training` each of them may import. What lies in none of them, the
# front door, may import all.
ROOMS = {
    "config": "",
    "step": "",
    "process": "",
    "storage": "config process step",
    "reporting": "storage",
    "run": "config process reporting step storage",
    "inspect": "config reporting run step storage",
}


def _imported(statement):
    code = f"import sys; {statement}; print(*sys.modules)"
    return set(
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.split()
    )


HEAVY = {"flax", "optax", "orbax", "grain", "tensorflow_datasets", "tensorflow", "PIL"}


@pytest.mark.parametrize("package", ["losses", "augment"])
def test_arrays_in_arrays_out_needs_jax_only(package):
    modules = _imported(f"import jemjax.{package}")
    assert "jax" in modules
    assert not modules & (HEAVY | {"chex", "sklearn", "tyro"})


def test_the_proof_kit_needs_no_network():
    assert not _imported("import jemjax.testing") & HEAVY


def test_the_data_package_needs_no_jax():
    modules = _imported("import jemjax.data")
    assert not modules & {"jax", "flax", "tensorflow"}


def test_the_package_itself_is_nearly_free():
    modules = _imported("import jemjax")
    assert not modules & (HEAVY | {"jax", "numpy"})


def _imports(path):
    """The modules that a file names in imports, those inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _arrows(folder, name):
    """The parts of a package by those that import them, with one file that does."""
    arrows = collections.defaultdict(dict)
    parts = {path.stem for path in folder.iterdir()} - {"__init__", "__pycache__"}
    for path in sorted(folder.rglob("*.py")):
        part = path.relative_to(folder).with_suffix("").parts[0]
        for module in _imports(path):
            if not module.startswith(f"{name}."):
                continue
            other = module.removeprefix(f"{name}.").split(".")[0]
            if part != "__init__" and other != part and other in parts:
                arrows[part][other] = path
    return arrows


def _upward(folder, name, allowed):
    """A sentence for each import that is not allowed."""
    return [
        f"{path.relative_to(folder)}: {part} imports {other}"
        for part, others in _arrows(folder, name).items()
        for other, path in others.items()
        if other not in allowed.get(part, "").split()
    ]


@pytest.mark.parametrize(
    ("name", "allowed"), [("jemjax", PARTS), ("jemjax.training", ROOMS)]
)
def test_imports_go_one_way(name, allowed):
    folder = PACKAGE.joinpath(*name.split(".")[1:])
    seen = []
    for part, others in allowed.items():  # so there is no circle
        assert {*others.split()} <= {*seen}
        seen.append(part)
    assert not _upward(folder, name, allowed)
    unused = [
        f"{part} -> {other}"
        for part, others in allowed.items()
        for other in {*others.split()} - _arrows(folder, name)[part].keys()
    ]
    assert not unused, "allowed, but nobody does"


@pytest.mark.parametrize(
    "planted",
    [
        "from jemjax.training.run.setup import build",
        "def late():\n    import jemjax.training.storage.files",
        "from jemjax.training import reporting",
    ],
)
def test_an_import_upward_is_found(planted, tmp_path):
    for room in ROOMS:
        (tmp_path / room).mkdir()
    (tmp_path / "step" / "planted.py").write_text(planted)
    [sentence] = _upward(tmp_path, "jemjax.training", ROOMS)
    assert sentence.startswith("step/planted.py: step imports ")


def test_what_a_checkpoint_command_needs_is_no_jax():
    statement = "from jemjax.training.storage import files, folder, manifest"
    assert not _imported(statement) & (HEAVY | {"jax", "numpy"})
