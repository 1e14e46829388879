"""Contenders, each in a process of its own, timed in turns on the same work.

A `Workload` names its `Contender`s, ours and peers. Of each a process is started, by
this interpreter or by that of the peers' environment, all with the same settings of the
allocator. After a warm-up they are timed round after round, in an order that rotates,
and with them what the machine can do. What cannot be run is named, and the rest runs.
"""

import collections
import contextlib
import dataclasses
import datetime
import inspect
import json
import os
import platform
import select
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import limits
import numpy as np

ROOT = Path(__file__).parents[2]
WORKER = Path(__file__).with_name("worker.py")
PATIENCE = 200.0  # seconds for one answer
# What every contender of ours needs.
JEMJAX = ("jemjax", "jax", "jaxlib")

# Freed memory stays with the process: without these glibc returns every large buffer to
# the system, and XLA, which allocates its results anew at each call, pays for it most.
ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": "8589934592",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
    "MALLOC_TOP_PAD_": "268435456",
    "MALLOC_ARENA_MAX": "1",
}


@dataclasses.dataclass(frozen=True)
class Contender:
    """One way to do the work of a workload."""

    name: str
    setup: Callable[..., Callable[[], Any]]
    """setup(**sizes) -> a call without arguments that returns arrays; a function of a
    module that both interpreters can import, its libraries imported inside"""
    packages: tuple[str, ...]
    """as pip names them, what it needs; their versions are printed"""
    peer: bool = True
    """run by the interpreter of the peers' environment"""
    source: Path | None = None
    """folder of an earlier state of jemjax, imported in place of this one"""
    batches: int = 1
    """that one call makes; given to setup where it is not 1"""
    targets: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """by the name of a baseline: the ratio to it that is aimed at"""


@dataclasses.dataclass(frozen=True)
class Workload:
    """The same work for all contenders."""

    name: str
    title: str
    """what is computed, as a sentence of the table's header"""
    contenders: tuple[Contender, ...]
    baselines: tuple[str, ...]
    """names of the contenders whose time the others' is divided by"""
    sizes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """arguments of every setup"""
    items: int = 1
    """images in a batch"""
    share: bool = False
    """whether a ratio is a share of the baseline, at most its target; else it is how
    many times faster the baseline is, at least its target"""
    memory: bool = False
    """whether the table says what a call needs"""
    reference: Callable[..., Callable[[], Any]] | None = None
    """a setup whose float64 arrays those of every contender are compared with before
    it is timed; run by this interpreter"""
    tolerance: float = 1e-3
    """largest relative error of an array, by which a contender is not timed"""


LIMITS = (
    Contender("matmul", limits.matmul, ("jax",), peer=False),
    Contender("copy", limits.copy, ("jax",), peer=False),
)


class Failed(Exception):
    """A contender that cannot be run, with the reason."""


@contextlib.contextmanager
def checkout(revision: str) -> Iterator[Path]:
    """An earlier state of the repository in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        git = ["git", "-C", str(ROOT), "worktree"]
        add = [*git, "add", "--detach", folder, revision]
        done = subprocess.run(add, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"--against {revision}: {done.stderr.strip()}")
        try:
            yield Path(folder)
        finally:
            subprocess.run([*git, "remove", "--force", folder], check=True)


class Worker:
    """The process of a contender."""

    def __init__(
        self, contender: Contender, sizes: Mapping[str, Any], interpreter: Path
    ):
        self.contender, self.interpreter = contender, interpreter
        if contender.batches != 1:
            sizes = {**sizes, "batches": contender.batches}
        environment = {**os.environ, **ALLOCATOR}
        if contender.peer:
            environment.pop("PYTHONPATH", None)
        if contender.source is not None:
            environment["PYTHONPATH"] = str(contender.source)
        function = contender.setup
        self._said = tempfile.TemporaryFile("w+")
        try:
            self._process = subprocess.Popen(
                [
                    str(interpreter),
                    str(WORKER),
                    inspect.getfile(function),
                    function.__name__,
                    json.dumps(dict(sizes)),
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._said,
                text=True,
                env=environment,
                start_new_session=True,
            )
        except OSError as error:
            self._said.close()
            raise Failed(
                f"no interpreter {interpreter} ({error.strerror}); make the peers'"
                " environment as README.md says, and name it by --peers"
            ) from error

    def ask(self, action: str, *arguments: Any) -> dict[str, Any]:
        """Does something in the process.

        Raises:
            Failed: if it raised, ended, or did not answer.
        """
        assert self._process.stdin and self._process.stdout
        try:
            self._process.stdin.write(json.dumps([action, *arguments]) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended: there is no answer
        ready, _, _ = select.select([self._process.stdout], [], [], PATIENCE)
        if not ready:
            self.close()
            raise Failed(f"no answer within {PATIENCE:g} s")
        line = self._process.stdout.readline()
        if not line:
            self._said.seek(0)
            *_, last = ["no message", *self._said.read().strip().splitlines()]
            raise Failed(f"ended with code {self._process.wait()}: {last}")
        answer = json.loads(line)
        if "missing" in answer:
            raise Failed(
                f"{answer['missing']} is not installed in {self.interpreter};"
                f" {self.interpreter} -m pip install"
                f" {' '.join(self.contender.packages)}"
            )
        if "error" in answer:
            raise Failed(answer["error"])
        return answer

    @property
    def session(self) -> int:
        """The number of its processes' session."""
        return self._process.pid

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin and self._process.stdout
        try:
            self._process.stdin.close()  # it reads to the end, and leaves
            self._process.wait(10)
        except (BrokenPipeError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._said.close()


def run(
    workload: Workload,
    *,
    peers: Path,
    rounds: int,
    seconds: float,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Times the contenders of a workload.

    Args:
        workload: what to do.
        peers: the interpreter of the peers' environment.
        rounds: how often each contender has its turn.
        seconds: of a turn; a longer call is made once.
        say: is told what happens.

    Returns:
        What is written as JSON: for each contender "times" (of a batch, by round), or
        "failed", the reason; the limits, the versions, and the load by others.
    """
    workers: dict[str, Worker] = {}
    rows: dict[str, dict[str, Any]] = {}
    versions: dict[str, dict[str, str]] = {"jemjax": {}, "peers": {}}
    wanted = None
    if workload.reference is not None:
        wanted = _reference(workload)
    try:
        for contender in (*workload.contenders, *LIMITS):
            row: dict[str, Any] = {"name": contender.name}
            rows[contender.name] = row
            try:
                worker = Worker(
                    contender,
                    {} if contender in LIMITS else workload.sizes,
                    peers if contender.peer else Path(sys.executable),
                )
                workers[contender.name] = worker
                worker.ask("setup")
                if workload.memory:
                    row.update(worker.ask("memory"))
                row.update(_checked(worker, contender, wanted, workload.tolerance))
                first = worker.ask("timed", 0)["times"][0]
                worker.ask("timed", seconds / 2)
                row["first_call"] = first
                of = versions["peers" if contender.peer else "jemjax"]
                of.update(worker.ask("versions", contender.packages)["versions"])
                say(f"{contender.name}: ready, first call {first:.2f} s")
            except Failed as failure:
                _remove(contender.name, failure, workers, rows, say)
        load = Load([worker.session for worker in workers.values()])
        for number in range(rounds):
            names = collections.deque(workers)
            names.rotate(-number)
            for name in names:
                worker = workers[name]
                try:
                    times = worker.ask("timed", seconds)["times"]
                except Failed as failure:
                    _remove(name, failure, workers, rows, say)
                    continue
                batches = worker.contender.batches
                turns = rows[name].setdefault("times", [])
                turns.append([each / batches for each in times])
            say(f"round {number + 1} of {rounds}")
        foreign = load.foreign()
    finally:
        for worker in workers.values():
            worker.close()
    product, copied = (rows.pop(limit.name) for limit in LIMITS)
    return {
        "workload": workload.name,
        "title": workload.title,
        "rounds": rounds,
        "rows": list(rows.values()),
        "gflops": _best(limits.MATMUL_GFLOP, product),
        "gigabytes_per_second": _best(limits.COPY_GB, copied),
        "foreign_load": foreign,
        "versions": versions,
    }


def _remove(name, failure, workers, rows, say):
    rows[name]["failed"] = str(failure)
    say(f"{name}: {failure}")
    if name in workers:
        workers.pop(name).close()


def _best(amount: float, row: dict[str, Any]) -> float | None:
    return amount / min(map(min, row["times"])) if "times" in row else None


def _reference(workload: Workload) -> list[np.ndarray]:
    """The arrays that the contenders should return."""
    assert workload.reference is not None
    contender = Contender("reference", workload.reference, (), peer=False)
    worker = Worker(contender, workload.sizes, Path(sys.executable))
    try:
        worker.ask("setup")
        return _outputs(worker)
    finally:
        worker.close()


def _outputs(worker: Worker) -> list[np.ndarray]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "outputs.npz"
        worker.ask("save", str(path))
        with np.load(path) as file:
            return [file[name] for name in file.files]


def _checked(
    worker: Worker,
    contender: Contender,
    wanted: list[np.ndarray] | None,
    tolerance: float,
) -> dict[str, Any]:
    """The relative error of each array that a contender returns."""
    if wanted is None or contender in LIMITS:
        return {}
    found = _outputs(worker)
    shapes = [array.shape for array in found]
    expected = [array.shape for array in wanted]
    if shapes != expected:
        raise Failed(f"returns arrays of shapes {shapes}, expected {expected}")
    errors = [
        float(np.linalg.norm(array - want) / np.linalg.norm(want))
        for array, want in zip(found, wanted, strict=True)
    ]
    if not max(errors) <= tolerance:  # not, because of NaN
        raise Failed(f"relative errors {errors}, expected at most {tolerance:g}")
    return {"errors": errors}


class Load:
    """How many cores others kept busy, from now on (Linux; elsewhere unknown)."""

    def __init__(self, sessions: Iterable[int]):
        self._sessions = {*sessions, os.getsid(0)}
        self._start = self._now()

    def foreign(self) -> float | None:
        """Cores, on average."""
        now = self._now()
        if now is None or self._start is None:
            return None
        ticks = [after - before for after, before in zip(now, self._start, strict=True)]
        machine, idle, own = ticks
        cores = os.cpu_count() or 1
        return max(0.0, (machine - idle - own) / max(machine / cores, 1))

    def _now(self) -> tuple[int, int, int] | None:
        """Clock ticks of the machine, idle and in our sessions."""
        try:
            fields = Path("/proc/stat").read_text().split("\n")[0].split()[1:9]
        except OSError:
            return None
        ticks = list(map(int, fields))
        own = 0
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                of_process = path.read_text().rsplit(")", 1)[1].split()
            except OSError:
                continue  # it has ended
            if int(of_process[3]) in self._sessions:
                own += sum(map(int, of_process[11:15]))
        return sum(ticks), ticks[3] + ticks[4], own


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    model = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.split(":")[1].strip()
    except OSError:
        pass
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "memory_gib": round(memory / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
        "date": datetime.datetime.now().astimezone().isoformat(timespec="minutes"),
    }


def table(workload: Workload, result: dict[str, Any]) -> str:
    """A result as Markdown."""
    of_rows = {row["name"]: row for row in result["rows"]}
    unit = "images/s | " if workload.items > 1 else ""
    kind = "share of" if workload.share else "times"
    heads = [f"{kind} {name} (target)" for name in workload.baselines]
    if workload.memory:
        heads += ["MiB, peak", "MiB, temporary"]
    lines = [
        f"| | {unit}ms, median | ms, least | {' | '.join(heads)} |",
        "|---" * (3 + bool(unit) + len(heads)) + "|",
    ]
    failures = []
    for contender in workload.contenders:
        row = of_rows[contender.name]
        if "failed" in row:
            failures.append(f"- {contender.name}: {row['failed']}")
            lines.append(f"| {contender.name} |" + " - |" * (lines[0].count("|") - 2))
            continue
        time = _time(row)
        cells = [f"{workload.items / time:,.0f}"] if unit else []
        cells += [f"{1e3 * time:,.2f}", f"{1e3 * min(map(min, row['times'])):,.2f}"]
        for name in workload.baselines:
            cells.append(_ratio(workload, contender, time, name, of_rows))
        if workload.memory:
            needs = [row["peak_mib"], row["temporary_mib"]]
            cells += ["-" if need is None else f"{need:,.0f}" for need in needs]
        lines.append(f"| {contender.name} | {' | '.join(cells)} |")
    if any("errors" in row for row in of_rows.values()):
        lines += ["", "Relative errors against float64, array by array:", ""]
        for name, row in of_rows.items():
            errors = ", ".join(f"{error:.1e}" for error in row.get("errors", []))
            lines.append(f"- {name}: {errors or 'not compared'}")
    if failures:
        lines += ["", "Not run:", "", *failures]
    return "\n".join([workload.title, "", *lines, "", _conditions(result)])


def summary(workloads: Iterable[Workload], results: Iterable[dict[str, Any]]) -> str:
    """The ratios of many workloads with one baseline as Markdown, a line for each."""
    pairs = list(zip(workloads, results, strict=True))
    (baseline,) = {workload.baselines for workload, _ in pairs}.pop()
    names = dict.fromkeys(each.name for w, _ in pairs for each in w.contenders)
    names.pop(baseline)
    memory = any(workload.memory for workload, _ in pairs)
    # Beside plain JAX; or, of two states of jemjax, beside the other.
    other = "plain_jax" if "plain_jax" in names else next(iter(names))
    heads = ["", f"{baseline}, ms", *names] + [f"MiB, temporary ({other})"] * memory
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for workload, result in pairs:
        of_rows = {row["name"]: row for row in result["rows"]}
        contenders = {each.name: each for each in workload.contenders}
        cells = [workload.name.split("/", 1)[1]]
        failed = "failed" in of_rows[baseline]
        cells.append("-" if failed else f"{1e3 * _time(of_rows[baseline]):,.2f}")
        for name in names:
            run = name in of_rows and "failed" not in of_rows[name]
            cells.append(
                _ratio(
                    workload, contenders[name], _time(of_rows[name]), baseline, of_rows
                )
                if run
                else "-"
            )
        if memory:
            needs = [
                of_rows.get(name, {}).get("temporary_mib") for name in (baseline, other)
            ]
            ours, plain = (f"{need:,.1f}" if need else "-" for need in needs)
            cells.append(f"{ours} ({plain})")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _time(row: dict[str, Any]) -> float:
    """Median over the rounds of the median of each round."""
    return median(map(median, row["times"]))


def _ratio(
    workload: Workload,
    contender: Contender,
    time: float,
    baseline: str,
    of_rows: dict[str, dict[str, Any]],
) -> str:
    """Bold where it is as good as its target."""
    if baseline == contender.name:
        return "1"
    if "failed" in of_rows[baseline]:
        return "-"
    ratio = time / _time(of_rows[baseline])
    target = contender.targets.get(baseline)
    shown = f"{100 * ratio:.2g}%" if workload.share else f"{ratio:.3g}"
    if target is None:
        return shown
    aim = f"< {target:.0%}" if workload.share else f"{target:g}"
    reached = ratio < target if workload.share else ratio >= target
    return f"{f'**{shown}**' if reached else shown} ({aim})"


def _conditions(result: dict[str, Any]) -> str:
    """The limits, load and versions of a result, as sentences."""
    parts = []
    if result["gflops"] and result["gigabytes_per_second"]:
        parts.append(
            f"In the same rounds: matrix product {result['gflops']:.0f} GFLOP/s, memory"
            f" {result['gigabytes_per_second']:.1f} GB/s (the best of each)."
        )
    if result["foreign_load"] is not None:
        parts.append(f"Others kept {result['foreign_load']:.2f} cores busy.")
    for name, versions in result["versions"].items():
        if versions:
            of = ", ".join(
                f"{package} {number}" for package, number in versions.items()
            )
            parts.append(f"{name}: {of}.")
    return "\n".join(parts)


def header(about: dict[str, Any]) -> str:
    """The machine and the settings, as sentences."""
    settings = " ".join(f"{name}={value}" for name, value in ALLOCATOR.items())
    return (
        f"{about['date']}, {about['cpu']}, {about['cores']} cores,"
        f" {about['memory_gib']} GiB, {about['system']}. Contenders run in turns, each"
        " in a process of its own; medians over the rounds. All of them, peers too,"
        f" have the same settings of the allocator: `{settings}`. A ratio is bold where"
        " it reaches its target."
    )
