"""The benchmarks' harness: what is timed, compared, and said of what cannot run."""

import importlib
import json
import pathlib
import sys
import textwrap

import numpy as np
import pytest

FOLDER = pathlib.Path(__file__).parents[1] / "experiments/benchmarks"

TOY = """
    import os
    import time

    import numpy as np


    def exact(count):
        return lambda: (np.arange(count, dtype=np.float64), np.float64(2))


    def quick(count):
        return lambda: (np.arange(count, dtype=np.float32), np.float32(2))


    def slow(count, batches):
        def call():
            time.sleep(0.2)
            print("this line is no answer")
            return quick(count)()

        return call


    def wrong(count):
        return lambda: (np.arange(count, dtype=np.float32), np.float32(3))


    def other_shape(count):
        return lambda: (np.zeros(count + 1), np.float32(2))


    def infinite(count):
        return lambda: np.full(count, np.inf)


    def missing(count):
        import a_library_that_nobody_has


    def crashing(count):
        return lambda: os._exit(3)


    def raising(count):
        raise RuntimeError(f"no room for {count}")


    def state(count):
        import state_of_jemjax

        return lambda: np.full(count, state_of_jemjax.NUMBER)
"""


@pytest.fixture
def harness(monkeypatch):
    return _module(monkeypatch, FOLDER, "harness")


@pytest.fixture
def toy(monkeypatch, tmp_path):
    (tmp_path / "toy.py").write_text(textwrap.dedent(TOY))
    return _module(monkeypatch, tmp_path, "toy")


def _module(monkeypatch, folder, name):
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module(name)


def _run(harness, workload):
    said = []
    result = harness.run(
        workload,
        peers=pathlib.Path(sys.executable),
        rounds=3,
        seconds=0.01,
        say=said.append,
    )
    return {row["name"]: row for row in result["rows"]}, result, said


def test_contenders_are_timed_and_the_others_named(harness, toy):
    def contender(setup, **options):
        return harness.Contender(setup.__name__, setup, ("numpy",), **options)

    workload = harness.Workload(
        "toy",
        "Nothing.",
        (
            contender(toy.quick, peer=False),
            contender(toy.slow, batches=100, targets={"quick": 1e9}),
            contender(toy.missing),
            contender(toy.crashing),
            contender(toy.raising),
            contender(toy.infinite),
        ),
        baselines=("quick",),
        sizes={"count": 5},
        items=10,
    )
    rows, result, said = _run(harness, workload)

    assert len(rows["quick"]["times"]) == len(rows["slow"]["times"]) == 3
    # Of a batch: a call, which takes 0.2 s or more, makes a hundred.
    assert all(0.002 <= time < 0.2 for turn in rows["slow"]["times"] for time in turn)
    assert result["gflops"] > 0 and result["gigabytes_per_second"] > 0
    assert result["versions"]["peers"]["numpy"] == np.__version__
    assert "a_library_that_nobody_has is not installed" in rows["missing"]["failed"]
    assert "-m pip install numpy" in rows["missing"]["failed"]
    assert "ended with code 3" in rows["crashing"]["failed"]
    assert rows["raising"]["failed"] == "RuntimeError: no room for 5"
    assert "not finite" in rows["infinite"]["failed"]

    table = harness.table(workload, result)
    ratio = np.median([np.median(turn) for turn in rows["slow"]["times"]])
    ratio /= np.median([np.median(turn) for turn in rows["quick"]["times"]])
    assert f"| {ratio:.3g} (1e+09) |" in table  # not reached, so not bold
    assert table.count("- missing: ") == 1
    assert "| missing | - | - | - | - |" in table
    assert any(line.startswith("crashing: ended") for line in said)


def test_what_returns_other_numbers_than_the_reference_is_not_timed(harness, toy):
    setups = (toy.quick, toy.wrong, toy.other_shape)
    workload = harness.Workload(
        "toy",
        "Nothing.",
        tuple(harness.Contender(setup.__name__, setup, ()) for setup in setups),
        baselines=("quick",),
        sizes={"count": 5},
        reference=toy.exact,
    )
    rows, result, _ = _run(harness, workload)
    assert rows["quick"]["errors"] == [0, 0] and "times" in rows["quick"]
    assert "relative errors [0.0, 0.5]" in rows["wrong"]["failed"]
    assert "shapes [(6,), ()], expected [(5,), ()]" in rows["other_shape"]["failed"]
    assert "- quick: 0.0e+00, 0.0e+00" in harness.table(workload, result)


def test_no_environment_of_peers(harness, toy, tmp_path):
    workload = harness.Workload(
        "toy",
        "Nothing.",
        (
            harness.Contender("ours", toy.quick, (), peer=False),
            harness.Contender("theirs", toy.quick, ()),
        ),
        baselines=("ours",),
        sizes={"count": 5},
    )
    result = harness.run(
        workload, peers=tmp_path / "python", rounds=1, seconds=0.01, say=print
    )
    ours, theirs = result["rows"]
    assert "times" in ours
    assert theirs["failed"].startswith(f"no interpreter {tmp_path / 'python'} (No such")


@pytest.mark.parametrize("name", ["jemjax_fused", "jemjax_faithful"])
def test_our_views_are_of_the_right_shape_and_new_at_each_call(monkeypatch, name):
    views = _module(monkeypatch, FOLDER, "views")
    call = getattr(views, name)(batch_size=4, size=16, blur=True)
    first, second = call(), call()
    assert [view.shape for view in first] == 2 * [(4, 16, 16, 3)]
    assert not np.array_equal(first[0], first[1])
    assert not np.array_equal(first[0], second[0])


def test_every_workload_is_found_by_its_name(monkeypatch):
    run = _module(monkeypatch, FOLDER, "run")
    names = [workload.name for workload in run.chosen(())]
    assert names == [workload.name for workload in run.WORKLOADS]
    assert [workload.name for workload in run.chosen(("views",))] == [
        "views/32",
        "views/224",
    ]
    assert [workload.name for workload in run.chosen(("views/32",))] == ["views/32"]
    with pytest.raises(SystemExit, match="got 'losses/of-time', expected one of"):
        run.chosen(("losses/of-time",))
    for workload in run.WORKLOADS:
        contenders = {contender.name for contender in workload.contenders}
        assert contenders.issuperset(workload.baselines)
        for contender in workload.contenders:
            assert set(contender.targets) <= set(workload.baselines)


def test_an_earlier_state_is_imported_in_place_of_this_one(
    monkeypatch, harness, toy, tmp_path
):
    run = _module(monkeypatch, FOLDER, "run")
    for number, name in enumerate(("now", "before")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "state_of_jemjax.py").write_text(f"NUMBER = {number}.0")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "now"))
    ours = harness.Contender("ours", toy.state, harness.JEMJAX, peer=False)
    peer = harness.Contender("peer", toy.missing, ("numpy",))
    workload = run.beside(
        harness.Workload("toy", "Nothing.", (ours, peer), ("ours",), {"count": 2}),
        "v0",
        tmp_path / "before",
    )
    assert [each.name for each in workload.contenders] == ["ours", "ours v0"]
    numbers = []
    for contender in workload.contenders:
        worker = harness.Worker(contender, workload.sizes, pathlib.Path(sys.executable))
        try:
            worker.ask("setup")
            (made,) = harness._outputs(worker)
        finally:
            worker.close()
        numbers.append(made[0])
    assert numbers == [0.0, 1.0]


def test_the_peer_is_told_what_a_run_of_ours_does(monkeypatch, tmp_path):
    learning = _module(monkeypatch, FOLDER, "learning")
    options = learning.Options(data="digits", peers=tmp_path / "python", examples=100)
    specs = {}
    for method in learning.METHODS:
        of_method = learning.dataclasses.replace(options, method=method)
        peer = learning.Peer(of_method, tmp_path)
        specs[method] = json.loads(json.dumps(peer.spec(seed=3, steps=40)))
    for method, spec in specs.items():
        rates = spec["learning_rates"]
        assert (spec["method"], spec["seed"]) == (method, 3) and len(rates) == 40
        assert max(rates) == pytest.approx(spec["peak_rate"], rel=0.01)
        assert all(view["size"] == 8 for view in spec["views"])
    assert specs["vicreg"]["projector"]["widths"] == [512, 512, 512]
    assert specs["vicreg"]["backbone"]["zero_init"] is False
    assert specs["simsiam"]["constant_rate"] == ["predictor"]
    assert specs["simsiam"]["momenta"] is None and len(specs["byol"]["momenta"]) == 40
    assert specs["dino"]["prototypes"] == 1024 and specs["dino"]["frozen_steps"]


def test_a_table_has_means_and_spreads(monkeypatch):
    learning = _module(monkeypatch, FOLDER, "learning")
    run = {"steps": 40, "images_per_second": 500.0, "training_seconds": 10.0}
    figures = {"knn_untrained": 0.3, "linear": 0.5, "linear_untrained": 0.4}
    rows = [{**run, **figures, "knn": knn} for knn in (0.41, 0.43)]
    table = learning.table(
        learning.Options(data="digits"), {"ours": rows, "theirs": []}
    )
    assert "| ours | 40 | 500 | 10 s | 42.0 (41.0 to 43.0) | 30.0 (30.0 to" in table
    assert "theirs" not in table and "2 seeds" in table
