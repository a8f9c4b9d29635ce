"""`make gpu` and its benchmark without a GPU: every line but the device's clock."""

import gc
import json
import os
import subprocess
import sys
import textwrap
import time
import zipfile
from itertools import islice, pairwise, product
from pathlib import Path

import pytest
import torch
from cases import only_long

from benchmarks import harness, plots, readme
from benchmarks import rows as select
from benchmarks import run as bench
from benchmarks.cases import arms as bench_arms
from benchmarks.cases.arms import STOCK
from benchmarks.cases.lists import dit_xl2, resnet18
from benchmarks.cases.peers import PEERS
from benchmarks.harness import Arm, Row
from benchmarks.timer import Clock, Contest, cpu_allocations, turns
from benchmarks.tools import gpu_run, gpu_steps
from benchmarks.tools.gpu_run import Summary, run_all
from benchmarks.tools.gpu_steps import Step

PACKAGE = Path(gpu_steps.ROOT) / "sfron_fast"
ROWS = [
    Row("step", "probe: copy", 1.0, 1.0, 1.0, 7, 8, 9.0),
    Row("step", "stock", 3.0, 4.0, 5.0, 7, 8, 2.0, peak_mb=9.0),
    Row("step", "sfron_fast", 1.0, 2.0, 3.0, 7, 8, 4.0),
    Row("loss", "sfron_fast", 1.0, 2.0, 3.0, 7, 0, 0.0),
    Row("net cycle (1M)", "stock", 7.0, 8.0, 9.0, 7, 0, 0.0),
    Row("net cycle (1M)", "sfron_fast", 5.0, 6.0, 7.0, 7, 0, 0.0),
    Row("net cycle: forward", "stock", 6.0, 7.0, 8.0, 7, 0, 0.0),
    Row("net cycle: mask", "stock", 1.0, 1.0, 1.0, 7, 0, 0.0),
    Row("net cycle: forward", "sfron_fast", 6.0, 6.0, 8.0, 7, 0, 0.0),
    Row("sweep, 1,000 weights, adamw forget", "sfron_fast", 1.0, 2.0, 3.0, 7, 0, 0.0),
]


def test_model_shapes():
    counts = [
        (len(shapes), sum(torch.Size(s).numel() for s in shapes))
        for shapes in (dit_xl2(), resnet18())
    ]
    assert counts == [(291, 674_834_720), (62, 11_173_962)]


def test_a_new_file_of_cases_needs_no_entry(tmp_path, monkeypatch):
    """As docs/kernels.md says of a new op."""
    (tmp_path / "new_cases.py").write_text(
        "from benchmarks.harness import Case\n\n\n"
        "def cases(kind, device, tiny):\n"
        "    return [Case(f'new op, {kind}, {device}, {tiny}', [], 1)]\n"
    )
    before = [case.name for case in bench.chosen_cases("cpu", "cpu", True)]
    monkeypatch.setattr(bench.cases, "__path__", [*bench.cases.__path__, str(tmp_path)])
    # so that afterwards it is no module any more
    monkeypatch.setitem(sys.modules, "benchmarks.cases.new_cases", None)
    del sys.modules["benchmarks.cases.new_cases"]
    after = [case.name for case in bench.chosen_cases("cpu", "cpu", True)]
    assert [name for name in after if name not in before] == ["new op, cpu, cpu, True"]
    assert [name for name in after if name in before] == before


def test_a_name_of_no_case_is_refused_with_the_nearest(capsys):
    assert bench.main(["--device", "cpu", "--rehearse", "--list"]) == 0
    names = capsys.readouterr().out.splitlines()
    assert names == list(dict.fromkeys(names))
    assert set(bench.MODELS) < set(names)
    with pytest.raises(SystemExit):
        bench.main(["--device", "cpu", "--rehearse", "--only", "Fisher acumulate"])
    said = capsys.readouterr().err
    assert "found 'Fisher acumulate'; near: " in said
    assert "Fisher accumulate" in said


@pytest.mark.parametrize("kind", [only_long("cpu"), "cuda"])
def test_every_case_runs_and_its_arms_agree(kind, tmp_path, capsys):
    status = bench.main(
        ["--device", kind, "--rehearse", "--no-plots", "--out", str(tmp_path / "x")]
    )
    assert status == 0, capsys.readouterr().out
    result = json.loads((tmp_path / "x.json").read_text())
    last = {row["case"]: row["arm"] for row in result["rows"]}
    assert last.keys() >= {case.name for case in bench.chosen_cases(kind, "cpu", tiny=True)}
    for model in bench.MODELS:
        assert {
            row["arm"]
            for row in result["rows"]
            if row["case"].startswith(f"{model} cycle: backward")
        } == {"authors' style", "stock, fused", "sfron_fast"}
    assert all(arm.startswith("sfron_fast") for case, arm in last.items() if ": " not in case)
    absent = {"liger_arm", "cut_cross_entropy_arm"}
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):  # torch 2.11
        absent.add("torch_arm")
    assert all(
        m["arm"] in absent or m["arm"].removeprefix("peer ") in PEERS for m in result["messages"]
    )
    assert result["provenance"]["rehearsal"]
    assert len((tmp_path / "x.csv").read_text().splitlines()) == 1 + len(result["rows"])


def test_without_a_gpu_the_benchmark_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.main(["--device", "cuda"]) == 1
    assert "no CUDA device" in capsys.readouterr().err


def test_an_arm_that_fails_or_disagrees_is_not_timed():
    def fail():
        raise RuntimeError("broken")

    arms = [
        Arm(name, lambda: None, check)
        for name, check in (
            ("first", lambda: [torch.ones(3)]),
            ("broken", fail),
            ("wrong", lambda: [torch.tensor([1.0, 1.0, 1.1])]),
            ("nan", lambda: [torch.full((3,), torch.nan)]),
            ("shape", lambda: [torch.ones(2)]),
            ("same", lambda: [torch.ones(3) + 1e-5]),
        )
    ]
    notes = {}
    contest = Contest("case", 0, Clock("cpu"), notes.__setitem__)
    contest.time(contest.agreeing(arms), 0.0)
    assert [row.arm for row in contest.rows([arm.name for arm in arms])] == ["first", "same"]
    assert notes.keys() == {"broken", "wrong", "nan", "shape"}
    assert "RuntimeError: broken" in notes["broken"]


def test_a_failing_case_does_not_stop_the_others_and_fails_the_run(tmp_path, monkeypatch, capsys):
    def broken():
        raise ValueError("no such arm")

    good = Arm("sfron_fast", lambda: None)
    chosen = [
        bench.Case("bad", [lambda: Arm("x", lambda: 1 / 0)]),
        bench.Case("good", [broken, lambda: good]),
        bench.Case("late", [lambda: good], needs=1e9),
    ]
    monkeypatch.setattr(bench, "chosen_cases", lambda kind, device, tiny: chosen)
    monkeypatch.setattr(bench, "MODELS", ())
    assert bench.main(["--rehearse", "--no-plots", "--out", str(tmp_path / "gpu")]) == 1
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert [row["case"] for row in result["rows"]] == ["good"]
    assert [m["message"].split(":")[0] for m in result["messages"]] == [
        "failed",
        "cannot be made",
        "skipped",
    ]


HELD = [
    ("authors' style, masks on CPU", {"cpu_masks": True}),
    ("authors' style", {}),
    *((how, {}) for how in STOCK),
    ("ours", {}),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("kind", "work"), [("adamw", "plain"), *product(("adamw", "sgd"), ("forget", "pair"))]
)
def test_arms_hold_what_their_groups_are_planned_by(kind, work, dtype):
    """On a GPU; here masks on the CPU lie beside the rest."""
    shapes = [(64, 1024), (32768,)]
    about = {
        "shapes": shapes,
        "kind": kind,
        "work": work,
        "dtype": dtype,
        "slow_lr": 0.5 if work == "pair" else 1.0,
    }
    alive = []
    gc.collect()
    for who, more in HELD if work != "plain" else [(STOCK[0], {}), HELD[-1]]:
        make = (
            bench_arms.ours
            if who == "ours"
            else bench_arms.best_stock
            if who in STOCK
            else bench_arms.authors_style
        )
        options = {"how": who} if who in STOCK else more

        def begin(make=make, options=options):
            alive.append(make(**about, **options))
            alive[-1].check()
            alive[-1].run()

        found = sum(cpu_allocations(begin)) - (98304 if more else 0)
        assert found == pytest.approx(bench_arms.held(shapes, who, kind, work, dtype), rel=0.01), (
            who
        )


def test_a_case_is_timed_in_as_many_groups_as_its_memory_needs(tmp_path):
    def arm(name, value):
        return lambda: Arm(name, lambda: None, lambda: [torch.full((2,), value)])

    makers = [
        lambda: Arm("probe", lambda: None),
        *(arm(name, 1.0) for name in "abc"),
        arm("wrong", 2.0),
        arm("sfron_fast", 1.0),
    ]
    case = harness.Case("case", makers, 8, 0.0, held=(1, 5, 4, 3, 2, 2), more=1)
    assert case.groups(18) == [[0, 1, 2, 3, 4, 5]]
    assert case.groups(17) == [[0, 1, 2, 3, 5], [0, 4, 5]]
    assert case.groups(9) == [[0, 1, 5], [0, 2, 5], [0, 3, 4, 5]]
    assert case.groups(8) == []
    run = bench.Run(tmp_path / "x", harness.provenance(), Clock("cpu"), "cpu", 0.0, limit=9)
    run.case(case)
    assert [row.arm for row in run.rows] == ["probe", "a", "b", "c", "sfron_fast"]
    assert {row.arm: row.repetitions for row in run.rows} == {
        "probe": 6,
        "a": 2,
        "b": 2,
        "c": 2,
        "sfron_fast": 6,
    }
    assert [(m["arm"], m["message"].split(":")[0]) for m in run.messages] == [
        ("memory", "all arms at once would hold 0 GiB of 0"),
        ("wrong", "differs from a by 1.0e+00"),
    ]
    assert not harness.failures(run.messages)
    run.limit = 8
    run.case(case)
    assert "two of them are too many" in run.messages[-1]["message"]


def test_every_case_of_the_gpu_fits_in_70_gib():
    """And those that would not at once are told."""
    cases = [
        *bench.list_cases.cases("cuda", "cpu", False),
        *bench.row_cases.cases("cuda", "cpu", False),
    ]
    groups = {case.name: len(case.groups(bench.ROOM)) for case in cases if case.held}
    assert all(groups.values()), groups
    assert all(len(case.held) in (0, len(case.arms)) for case in cases)
    several = {name for name, count in groups.items() if count > 1}
    assert {"DiT-XL/2, adamw forget", "DiT-XL/2, adamw pair, alpha 0.5"} <= several


def test_a_table_holds_one_run(tmp_path):
    for commit in ("a", "b"):
        harness.write_csv(ROWS, {"device": "cpu", "commit": commit}, tmp_path / "cpu")
    lines = (tmp_path / "cpu.csv").read_text().splitlines()
    assert len(lines) == 1 + len(ROWS)
    assert all(line.endswith(",cpu,b") for line in lines[1:])


def test_plots(tmp_path, monkeypatch):
    harness.write_json(ROWS, harness.provenance(), tmp_path / "gpu")
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert select.fractions(rows) == {"step": {"stock": 0.25, "sfron_fast": 0.5}}
    assert select.speedups(select.kernels(rows)) == {"step": {"stock": 2.0}}
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "no plots" in plots.draw(tmp_path / "gpu.json")
    monkeypatch.undo()
    pytest.importorskip("matplotlib")
    assert "gpu_roofline.png" in plots.draw(tmp_path / "gpu.json")
    kinds = ("roofline", "speedup", "phases", "sweep")
    assert all((tmp_path / f"gpu_{kind}.png").stat().st_size > 1000 for kind in kinds)


def test_a_bar_is_the_fastest_other_arm():
    times = {"probe": 1.0, "authors' style": 8.0, "stock a": 4.0, "stock b": 1.5, "sfron_fast": 2.0}
    rows = [
        {"case": case, "arm": arm, "p50_ms": ms}
        for case in (select.HEADLINES[0], "other")
        for arm, ms in times.items()
    ]
    shown = select.speedups(plots.headlines(rows))
    assert shown.keys() == {select.HEADLINES[0]}
    axes = plots.speedup(shown).axes[0]
    assert [t.get_text() for t in axes.texts] == ["0.75x"]
    assert "in 0 of 1 cases" in axes.figure.get_suptitle()


def test_what_the_figures_show():
    rows = [vars(row) for row in ROWS]
    assert {row["case"] for row in select.kernels(rows)} == {"step", "loss"}
    assert select.phases(rows) == {
        "net cycle": {"stock": {"forward": 7.0, "mask": 1.0}, "sfron_fast": {"forward": 6.0}}
    }
    case, arms = next(iter(select.ALLOCATING.items()))
    told = [{"case": case, "arm": a, "peak_mb": 9.0} for a in (arms[0], "sfron_fast, bf16 moments")]
    assert select.memory([*rows, *told]) == {case: {arms[0]: 9.0}}
    assert plots.allocated(select.memory(told)).axes[0].texts[0].get_text() == "9 MiB"
    assert select.sweep(rows) == {"sfron_fast": [(1000, 2000.0)]}


def test_the_tables_of_the_readme():
    authors = Row("step", "authors' style", 8.0, 9.0, 9.0, 7, 8, 1.0)
    rows = [vars(row) for row in (authors, *ROWS)]
    results = {"provenance": harness.provenance(), "rows": rows}
    assert "| step | stock | 4.00 | 2.00 | 2.00x |" in readme.table(results)
    found = readme.headline(results)
    assert "| step | 2.00 | 0.50 | 2.00x (stock) | 4.50x |" in found
    cycle = (  # measured whole, not a sum of phases
        "| net cycle (1M) | stock | 8.0 | 7.0 to 9.0 | 1.0 (12 %) |"
    )
    assert cycle in found
    assert cycle in readme.table(results)
    assert "Slower than another arm: nowhere." in found
    slow = [vars(ROWS[1]), vars(Row("step", "sfron_fast", 1.0, 5.0, 3.0, 7, 8, 4.0))]
    found = readme.headline({**results, "rows": slow})
    assert "Slower than another arm: step (0.80 of stock)." in found
    with pytest.raises(ValueError, match="step: expected this package's arm last, found 'stock'"):
        readme.table({**results, "rows": slow[:1]})
    # no arm is called ours where ours did not run
    assert "x" not in harness.show(ROWS[:2]).replace("x86", "")


def test_what_stands_for_a_backward_pass_is_not_counted():
    def run():
        with harness.uncounted:
            time.sleep(0.5)

    assert Clock("cpu").device_seconds(run) < 0.25
    assert Clock("cpu").device_seconds(lambda: time.sleep(0.5)) > 0.25


def test_no_arm_of_a_round_follows_itself():
    for count in (1, 2, 3, 7):
        rounds = list(islice(turns(range(count)), 200))
        assert all(sorted(order) == list(range(count)) for order in rounds)
        assert count == 1 or all(a[-1] != b[0] for a, b in pairwise(rounds))
        assert count < 3 or {order[-1] for order in rounds} == set(range(count))


def test_the_clip_in_the_step_and_moving_gradients_are_equal_work():
    """What one run leaves must not ease the next; the first step is checked by every case."""
    for kind, work in product(("adamw", "sgd"), ("forget", "pair")):
        made = [
            bench_arms.best_stock([(64, 9), (7,)], kind, work, 0.5, how) for how in bench_arms.STOCK
        ]
        for arm in made:
            arm.run()
        changes = [arm.check() for arm in made]
        assert all(harness.difference(found, changes[0]) < 1e-3 for found in changes[1:])
    problem = bench_arms.Problem([(4,)])
    problem.prepare("pair")
    seen = []
    for _ in range(3):
        seen.append(problem.params[0].grad.data_ptr())
        problem.next_gradients()
    assert seen[0] == seen[2] != seen[1]


def test_steps_are_independent_and_limited(tmp_path):
    def shell(name, text, limit=20.0, **more):
        return Step(name, limit, ["sh", "-c", text], cwd=tmp_path, **more)

    chosen = [
        shell("fails", "echo why; exit 3"),
        shell("hangs", "sleep 60 & sleep 60", 0.3),
        shell("lacks", "", missing="no tool"),
        Step("absent", 5, ["no-such-program"], cwd=tmp_path),
        shell("works", "echo $SAY", env={"SAY": "hello"}),
    ]
    summary = Summary(tmp_path)
    run_all(chosen, summary, "a GPU", 100.0)
    lines = (tmp_path / "summary.txt").read_text().splitlines()
    states = ["FAILED", "TIMED OUT", "skipped", "FAILED", "ok"]
    assert [line[17:].split("  ")[0] for line in lines] == states
    assert summary.failed == 3
    log = (tmp_path / "log-1.txt").read_text()
    assert "why" in log
    assert "hello" in log
    again = Summary(tmp_path, keep=True)  # of steps chosen by name: the others' results stay
    run_all([shell("fails", "echo better")], again, "a GPU", 100.0)
    lines = (tmp_path / "summary.txt").read_text().splitlines()
    assert [line[2:9].split()[0] for line in lines] == [
        "hangs",
        "lacks",
        "absent",
        "works",
        "fails",
    ]
    assert lines[-1][17:19] == "ok"
    assert "hello" in (log := (tmp_path / "log-1.txt").read_text())
    assert "better" in log
    run_all([shell("late", "true")], summary, "a GPU", 1.0)
    assert "the time is used up" in (tmp_path / "summary.txt").read_text()


def test_per_op_tests_are_the_files_that_take_a_device():
    found = [Path(path).stem.removeprefix("test_") for path in gpu_steps.device_tests()]
    assert found[:2] == ["every_op", "steps"]
    lists = {"masked_grad_norm", "sgd_step", "adamw_step", "interpolate", "fisher_accumulate"}
    rows = {"adaptive_cross_entropy", "adaptive_mse", "soft_target_kl"}
    assert {*lists, *rows, "saliency_mask", "tensor_settings", "flat_ops"} <= set(found)
    assert not {"in_place", "cross_entropy_sum", "optim"} & set(found)


def test_without_a_gpu_steps_are_skipped_or_rehearsed(tmp_path):
    for part in gpu_run.PARTS:
        (tmp_path / str(part)).mkdir()
    every = {
        part: gpu_steps.steps(sys.executable, "-", tmp_path, tmp_path / str(part), part)
        for part in gpu_run.PARTS
    }
    names = {part: [s.name for s in chosen] for part, chosen in every.items()}
    first = ["env", "build", "precompile"]
    assert names == {
        1: [*first, "tests/gpu", "wheel"],
        2: [*first, "benchmark"],
        3: [*first, "memcheck", "racecheck", "per-op tests"],
    }
    rehearsed = {s.name for chosen in every.values() for s in chosen if s.rehearsal}
    assert rehearsed == {"benchmark", "memcheck", "racecheck"}
    for part, chosen in every.items():
        kept = [s for s in chosen if s.name in ("tests/gpu", "per-op tests", "memcheck")]
        run_all([*kept, Step("build", 1.0, ["false"])], Summary(tmp_path, part), "", 100.0)
    lines = (tmp_path / "summary.txt").read_text().splitlines()
    assert [line[:17].split()[0] for line in lines] == ["1", "1", "2", "3", "3", "3"]
    assert [line[17:].split("  ")[0] for line in lines] == ["skipped"] * 3 + ["rehearsed"] + [
        "skipped"
    ] * 2
    assert all("no CUDA device" in line for line in lines)
    files = [path.name for path in tmp_path.iterdir() if path.is_file()]
    # beside gpu.json and gpu.csv
    assert sorted(files) == ["log-1.txt", "log-2.txt", "log-3.txt", "summary.txt"]


def test_what_a_killed_step_said_is_kept_and_the_log_stays_small(tmp_path, monkeypatch):
    """Failures are told when they are known; a step is asked to end before it is killed; the
    longest log is cut.
    """
    monkeypatch.setattr(gpu_run, "MOST_LOG", 4000)
    (tmp_path / "test_two.py").write_text(
        "import os\ndef test_bad():\n    assert 1 + 1 == 3, 'wrong sum'\ndef test_dies():\n   "
        " os._exit(3)\n"
    )
    command = [
        *gpu_steps.pytest_command(sys.executable),
        "-c",
        str(gpu_steps.ROOT / "pyproject.toml"),
        "--rootdir",
        str(tmp_path),
        "test_two.py",
    ]
    asked = ["sh", "-c", "trap 'echo asked to end; exit 1' INT; sleep 60 & wait"]
    chosen = [
        Step("pytest", 300.0, command, env={"PYTHONPATH": str(gpu_steps.ROOT)}, cwd=tmp_path),
        Step("waits", 1.0, asked),
        Step("talks", 9.0, ["seq", "100000"]),
    ]
    run_all(chosen, Summary(tmp_path, 3), "a GPU", 999.0)
    log = (tmp_path / "log-3.txt").read_text()
    assert (
        log.index("test_two.py::test_bad FAILED")
        < log.index("AssertionError: wrong sum")
        < log.index("::test_dies")
    )
    assert "asked to end" in log
    assert "bytes left out" in log
    assert log.endswith("\n100000\n")
    assert len(log) < 20_000
    states = [
        line[17:].split("  ")[0] for line in (tmp_path / "summary.txt").read_text().splitlines()
    ]
    assert states == ["FAILED", "TIMED OUT", "ok"]


def test_triton_kernels_are_compiled_before_they_are_launched(tmp_path):
    """By their launchers, without a device; what tests and benchmark launch is known."""
    pytest.importorskip("triton")
    code = """
        import sys; sys.path.insert(0, "tests/gpu")
        import precompile, torch
        calls = precompile.calls()
        assert len(calls) > 150
        assert ("cross_entropy", (8192, 1, 128256), torch.bfloat16) in calls
        precompile.prepare(90)
        assert not precompile.attempt(("squared_error", (3, 63), torch.float32))
        assert "TypeError" in precompile.attempt(("squared_error", None, torch.float32))
        print(sorted(path.name for path in precompile.compiled()))
    """
    env = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(gpu_steps.ROOT)}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    result = subprocess.run(command, cwd=gpu_steps.ROOT, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert eval(result.stdout) == [
        "_adaptive_mse_bwd_kernel.cubin",
        "_adaptive_mse_fwd_kernel.cubin",  # of losses as they are, and relative to a reference
        "_adaptive_mse_fwd_kernel.cubin",
    ]


STAND_INS = """
import contextlib
import torch
from sfron_fast.ops import calls

# a capture remembers the calls, a replay makes them again, with what the tensors then hold
class Graph:
    def replay(self):
        for call, arguments, numbers, result in self.calls:
            again = call(*arguments, **numbers)
            if again is not None:
                result.copy_(again)

@contextlib.contextmanager
def graph(graph):
    call, graph.calls = calls.over_lists, []
    def remembered(*arguments, **numbers):
        result = call(*arguments, **numbers)
        graph.calls.append((call, arguments, numbers, result))
        return result
    calls.over_lists = remembered
    yield
    calls.over_lists = call

class Stream:
    def wait_stream(self, other):
        pass

torch.cuda.Stream = torch.cuda.current_stream = Stream
torch.cuda.stream = lambda stream: contextlib.nullcontext()
torch.cuda.CUDAGraph, torch.cuda.graph = Graph, graph
torch.set_num_threads(1)
"""
LEFT_OUT = (
    "never_wait",
    "allocated",
    "launches",
    "2_31",
    "copy_nothing",
    "runs_ahead",
    "under_capture",
    "(cuda_steps and (dtype1 or dtype2))",
)


@pytest.mark.skipif(not list(PACKAGE.glob("_C*.so")), reason="the kernels are not built")
def test_the_gpu_tests_pass_on_the_cpu(tmp_path):
    """As written, but for the device's name: what they claim is true of the CPU's kernels.

    Left out: what asks the device, and two thirds of the longest.
    """
    text = (Path(gpu_steps.ROOT) / "tests/gpu/test_cuda_ops.py").read_text()
    assert '"cuda"' in text
    (tmp_path / "test_rehearsed.py").write_text(text.replace('"cuda"', '"cpu"'))
    (tmp_path / "conftest.py").write_text(STAND_INS)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "-c",
        str(gpu_steps.ROOT / "pyproject.toml"),
        "--rootdir",
        str(tmp_path),
        "-k",
        f"not ({' or '.join(LEFT_OUT)})",
        str(tmp_path),
    ]
    result = subprocess.run(command, cwd=gpu_steps.ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]


@pytest.mark.skipif(not list(PACKAGE.glob("_C*.so")), reason="the kernels are not built")
def test_a_wheel_is_loaded_from_its_own_folder(tmp_path):
    dist, scratch = tmp_path / "dist", tmp_path / "scratch"
    dist.mkdir()
    scratch.mkdir()
    assert "no wheel" in gpu_steps.wheel(sys.executable, scratch, dist).missing
    with zipfile.ZipFile(dist / "sfron_fast-0-cp310-abi3-linux_x86_64.whl", "w") as archive:
        for file in [*PACKAGE.rglob("*.py"), *PACKAGE.glob("_C*.so")]:
            archive.write(file, file.relative_to(PACKAGE.parent))
    summary = Summary(tmp_path)
    run_all([gpu_steps.wheel(sys.executable, scratch, dist)], summary, "", 100.0)
    assert "wheel          ok" in (tmp_path / "summary.txt").read_text(), (
        tmp_path / "log-1.txt"
    ).read_text()
