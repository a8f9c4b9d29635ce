"""Triton without a GPU: run by the interpreter, compiled to machine code for sm_90, launched as
promised, or replaced.

Nothing here runs on a GPU; tests/gpu/test_triton_ops.py does, where there is one.
"""

import math
import re
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
from cases import only_long
from interpreting import passes_interpreted
from judging import assert_same_lists, named
from paths import ROOT
from row_cases import cross_entropy, squared_error
from torch.utils._python_dispatch import TorchDispatchMode

import sfron_fast.ops.triton as row_kernels
from sfron_fast import __main__
from sfron_fast.ops import reference
from sfron_fast.ops import registry as ops

INTERPRETED = [
    "cross_entropy and not special",
    "special or raw or soft",
    "not cross_entropy and not raw and not soft",
]
ALLOCATIONS = {"empty.memory_format", "empty_like.default", "new_empty.default"}


@pytest.mark.checklist("B8")
@pytest.mark.parametrize("group", [*INTERPRETED, only_long("long")])
def test_interpreted(group):
    pytest.importorskip("triton")
    select = ["-m", "long"] if group == "long" else ["-k", group]
    passes_interpreted("ops/interpreted_triton.py", *select)


@pytest.mark.parametrize("dtype", ["bfloat16", only_long("float32")])
def test_compiles_without_spills(dtype):
    """A part of `make kernels`: the extremes of the shapes in use, and 16-byte loads wherever rows
    are aligned.
    """
    pytest.importorskip("triton")
    from benchmarks.tools import triton_launches, triton_report

    picked = getattr(torch, dtype)
    launches = triton_launches.cross_entropy_launches(8192, 1, 152064, picked)
    launches += triton_launches.cross_entropy_launches(4, 40, 32000, picked)
    launches += triton_launches.mse_launches(4, 3 * 512 * 512, picked, "3x512x512")
    for of_classes in (False, True):
        launches += triton_launches.kl_launches(1024, 32000, picked, of_classes)
    for positions, outputs, features in triton_launches.LAYERS:
        launches += triton_launches.sample_launches(64, positions, outputs, features, picked)
    if dtype == "bfloat16":  # rows that are not aligned
        launches += triton_launches.cross_entropy_launches(1024, 1, 50257, picked)
        for of_classes in (False, True):
            launches += triton_launches.kl_launches(1024, 50257, picked, of_classes)
    launches = list({launch.key(): launch for launch in launches}.values())
    rows = triton_report.analysis(launches)
    for launch, row in zip(launches, rows, strict=True):
        assert not triton_report.complaints(launch, row)
    if dtype == "bfloat16":
        rows = [row for row in rows if row["issue_load"] != ""]
        # numbers of classes take two loads and five operations more for each logit
        plain = [row for row in rows if "of classes" not in row["for"]]
        assert max(row["issue_load"] for row in plain) <= 0.8
        assert (
            max(row["instructions_per_element"] for row in rows if row["for"] == "V=152064, sum")
            <= 22
        )
        assert min(row["bytes_in_flight"] for row in rows) >= 30_000
        assert all(row["blocks"] == 2 for row in rows if row["for"] == "V=152064, sum")


def test_the_last_program_reads_what_others_wrote():
    """Of every kernel that counts arrivals, in PTX: each store to global memory, a barrier, the
    counter's acquire and release, and only then a load past L1."""
    pytest.importorskip("triton")
    from benchmarks.tools import triton_launches, triton_report

    launches = triton_launches.cross_entropy_launches(256, 1, 1000, torch.float32)
    launches += triton_launches.cross_entropy_launches(256, 1, 9000, torch.float32)
    launches += triton_launches.cross_entropy_launches(9000, 2, 10, torch.float32)
    launches += triton_launches.cross_entropy_launches(4, 40, 10, torch.float32)
    launches += triton_launches.mse_launches(4, 3 * 512 * 512, torch.float32, "")
    for shape in ((256, 1000), (256, 9000), (9000, 10)):
        launches += triton_launches.kl_launches(*shape, torch.float32)
    checked = set()
    for launch in {launch.key(): launch for launch in launches}.values():
        if "counter_ptr" not in launch.signature or launch.constants.get("FINISH") is False:
            continue
        ptx = triton_report.compiled(launch).asm["ptx"]
        steps = re.findall(r"\b(st\.global|bar\.sync|atom\.\S+|ld\.global\S*)", ptx)
        (arrival,) = [i for i, step in enumerate(steps) if step.startswith("atom.")]
        assert {"gpu", "acq_rel"} <= set(steps[arrival].split("."))
        before, after = steps[:arrival], steps[arrival + 1 :]
        assert "st.global" in before
        last_store = len(before) - 1 - before[::-1].index("st.global")
        assert "bar.sync" in before[last_store:], launch.kernel
        first_load = next(i for i, step in enumerate(after) if step.startswith("ld.global"))
        # one thread counts, all of them have to wait
        assert after.index("bar.sync") < first_load, launch.kernel
        loads = {step for step in after if step.startswith("ld.")}
        if "kl" in launch.kernel:
            loads.discard("ld.global.b32")  # the weights, an input
        assert loads <= {"ld.global.cg.b32", "ld.global.cg.b64"}, launch.kernel
        checked.add(launch.kernel)
    assert checked == {
        "_adaptive_cross_entropy_fwd_kernel",
        "_adaptive_cross_entropy_long_fwd_kernel",
        "_adaptive_cross_entropy_samples_fwd_kernel",
        "_adaptive_mse_fwd_kernel",
        "_soft_target_kl_fwd_kernel",
        "_soft_target_kl_long_fwd_kernel",
        "_soft_target_kl_sum_kernel",
        "_samples_totals_kernel",
    }


class Recorded(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls.append(func.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("tokens", "launches"), [(1, 1), (7, 2)])
@pytest.mark.parametrize("classes", [10, 1000, 152064])
def test_cross_entropy_launches(monkeypatch, classes, tokens, launches):
    """One launch forward and one backward, two each for sequences; no torch call but to allocate
    outputs.
    """
    pytest.importorskip("triton")
    from benchmarks.tools.triton_launches import recorded
    from sfron_fast.ops.triton import adaptive_cross_entropy as op
    from sfron_fast.ops.triton import common

    monkeypatch.setattr(common, "arrival_counter", lambda like: like)
    logits = torch.empty((256, tokens, classes), dtype=torch.bfloat16, device="meta")
    labels = torch.empty((256, tokens), dtype=torch.int64, device="meta")
    with recorded() as made, Recorded() as torch_calls:
        loss, losses, weights, _, log_sums = op.adaptive_cross_entropy(
            logits, labels, 0.5, 1e-6, -100
        )
        assert len(made) == launches
        gradient = op.adaptive_cross_entropy_backward(loss, logits, labels, weights, log_sums, -100)
    assert len(made) == 2 * launches
    assert set(torch_calls.calls) <= ALLOCATIONS
    with recorded() as made, Recorded() as torch_calls:
        op.adaptive_cross_entropy_backward_(loss, logits, labels, weights, log_sums, -100)
    assert len(made) == launches
    assert set(torch_calls.calls) <= ALLOCATIONS  # a number for each token of several
    if tokens == 1:
        with recorded() as made, Recorded() as torch_calls:
            total, *_ = op.adaptive_cross_entropy_sum_(logits, labels, 0.5, 1e-6, -100, -2.0)
            op.adaptive_cross_entropy_scale_(logits, total)
        assert len(made) == 2  # the second finds a factor of 1 and does nothing
        assert set(torch_calls.calls) <= ALLOCATIONS
    assert losses.dtype == log_sums.dtype == torch.float32
    assert gradient.dtype == logits.dtype


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (2, 5_000_000), (256, 3072), (100_000, 10)], ids=str)
def test_mse_launches(monkeypatch, shape, relative):
    pytest.importorskip("triton")
    from benchmarks.tools.triton_launches import recorded
    from sfron_fast.ops.triton import adaptive_mse as op
    from sfron_fast.ops.triton import common

    monkeypatch.setattr(common, "arrival_counter", lambda like: like)
    prediction, target = (torch.empty(shape, device="meta") for _ in range(2))
    with recorded() as made, Recorded() as torch_calls:
        reference = torch.empty(shape[0], device="meta") if relative else None
        numbers = 0.5, 1e-6, True, 3.0
        loss, _, weights, _ = op.adaptive_mse(prediction, target, reference, *numbers)
        op.adaptive_mse_backward(loss, prediction, target, weights, True)
    assert len(made) == (2 if shape[0] <= 4096 else 4)  # sums of groups of samples, and the weights
    assert set(torch_calls.calls) <= ALLOCATIONS
    (depth, rows, lanes), chunks, steps = op.partition(*shape, torch.float32)
    assert depth * lanes * chunks * steps >= shape[1]
    assert depth * lanes * rows <= op.BLOCK
    if shape[1] * shape[0] > 10**6:  # enough programs to fill a GPU
        assert made[0].programs >= 132


@pytest.mark.parametrize("of_classes", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (8192, 10), (8192, 1000), (1024, 32000)], ids=str)
def test_kl_launches(monkeypatch, shape, weighted, of_classes):
    pytest.importorskip("triton")
    from benchmarks.tools.triton_launches import recorded
    from sfron_fast.ops.triton import common
    from sfron_fast.ops.triton import soft_target_kl as op

    monkeypatch.setattr(common, "arrival_counter", lambda like: like)
    logits, teacher = (torch.empty(shape, device="meta") for _ in range(2))
    weights = torch.empty(shape[0], device="meta") if weighted else None
    given = [weights, *[torch.empty(shape[1], device="meta") if of_classes else None] * 2]
    with recorded() as made, Recorded() as torch_calls:
        loss, _, log_sums = op.soft_target_kl(logits, teacher, *given, 2.0)
        op.soft_target_kl_backward(loss, logits, teacher, *given, log_sums, 2.0)
    assert len(made) == (2 if shape[0] <= 4096 else 3)  # the sums of groups of samples
    assert set(torch_calls.calls) <= ALLOCATIONS
    if shape[1] * shape[0] > 10**6:  # enough programs to fill a GPU
        assert all(launch.programs >= 132 for launch in made if "sum" not in launch.kernel)


@pytest.mark.parametrize("positions", [(), (128,), (7, 9)], ids=str)
def test_sample_square_launches(positions):
    """One launch and nothing else where samples are matrices in memory; else copies."""
    pytest.importorskip("triton")
    from benchmarks.tools.triton_launches import recorded
    from sfron_fast.ops.triton import sample_square_accumulate as op

    deltas = torch.empty((64, *positions, 768), device="meta")
    inputs = torch.empty((64, *positions, 3072), device="meta")
    accumulator = torch.empty((768, 3072), device="meta")
    with recorded() as made, Recorded() as torch_calls:
        op.sample_square_accumulate_(accumulator, deltas, inputs, 1.0, 2)
    assert len(made) == 1
    assert made[0].programs >= 132
    assert not torch_calls.calls
    wide = torch.empty((64, *positions, 6144), device="meta")[..., ::2]
    with recorded() as made:
        op.sample_square_accumulate_(accumulator, deltas, wide, 1.0, 2)
    bytes_each = inputs[0].numel() * 4
    assert len(made) == -(-64 // max(op.WORKSPACE // bytes_each, 1))
    assert len({launch.key() for launch in made}) == 1


def test_numbers_are_run_time_scalars():
    """A new temperature, floor or batch size must not compile anything."""
    pytest.importorskip("triton")
    from benchmarks.tools.triton_launches import recorded
    from sfron_fast.ops.triton import adaptive_cross_entropy as op

    kinds = set()
    for samples, temperature, floor, ignore in (
        (256, 0.5, 1e-6, -100),
        (255, 1.0, 1.0, 1),
        (144, 0.0, 2.0, 16),
    ):
        logits, labels = (
            torch.empty((samples, 1, 32000), device="meta"),
            torch.empty((samples, 1), device="meta"),
        )
        with recorded() as made:
            op.adaptive_cross_entropy(logits, labels.long(), temperature, floor, ignore)
        kinds.add(made[0].key())
    assert len(kinds) == 1
    for kernel in (v for n, v in vars(op).items() if n.endswith("_kernel")):
        integers = [p for p in kernel.params if not p.is_constexpr and not p.name.endswith("_ptr")]
        # floats are never specialised
        names = (
            "temperature_high",
            "temperature_low",
            "floor",
            "gradient_scale",
        )
        assert all(p.do_not_specialize or p.name in names for p in integers)


def test_registered_for_cuda():
    for name in set(row_kernels.MODULES) & set(ops.SCHEMAS):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"sfron_fast::{name}", "CUDA")
        assert "triton" not in ops.kernel_for(name, "cpu")


def test_importing_the_package_does_not_import_triton():
    code = (
        "import sys, sfron_fast; sys.exit('triton' in sys.modules and 'torch._inductor' not in"
        " sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.fixture
def forgetful(monkeypatch):
    monkeypatch.setattr(row_kernels, "_reasons", {})
    monkeypatch.setattr(row_kernels, "_told", False)


def _serve(name, case):
    """The CUDA kernel of an op, called on CPU tensors, and what the reference says."""
    got = row_kernels.op_kernel(name, ops.check_of(name), getattr(reference, name))(
        *case.tensors, *case.numbers
    )
    assert_same_lists(named(got), named(getattr(reference, name)(*case.tensors, *case.numbers)))


def test_without_triton_the_reference_serves_and_says_so_once(forgetful, monkeypatch):
    def missing(name):
        raise ModuleNotFoundError("No module named 'triton'")

    monkeypatch.setattr(row_kernels.importlib, "import_module", missing)
    with pytest.warns(RuntimeWarning, match="No module named 'triton'.*pip install triton"):
        _serve("adaptive_cross_entropy", cross_entropy((3, 1, 5), torch.float32))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _serve("adaptive_mse", squared_error((3, 5), torch.float32))
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    assert ops.kernel_for("adaptive_mse", "cuda") == "reference"
    assert (
        "triton      absent: importing Triton failed: No module named 'triton'"
        in __main__.environment()
    )


def test_a_kernel_that_cannot_be_built_is_replaced_and_says_so_once(forgetful, monkeypatch):
    calls = []

    def broken(*args):
        calls.append(1)
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(
        row_kernels, "launcher", lambda name: None if name in row_kernels._reasons else broken
    )
    with pytest.warns(RuntimeWarning, match="Failed to find C compiler"):
        _serve("adaptive_mse", squared_error((3, 5), torch.float32))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _serve("adaptive_mse", squared_error((3, 5), torch.float32))
    assert len(calls) == 1
    assert row_kernels.reason("adaptive_mse") == "RuntimeError: Failed to find C compiler"


def test_a_failure_within_a_capture_is_no_reason_to_fall_back(forgetful, monkeypatch):
    """CUDA loads no kernel while it captures; afterwards the op is served as before."""

    def unloaded(*args):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(row_kernels, "launcher", lambda name: unloaded)
    monkeypatch.setattr(row_kernels, "capturing", lambda like: True)
    check = ops.check_of("adaptive_mse")
    kernel = row_kernels.op_kernel("adaptive_mse", check, reference.adaptive_mse)
    x = torch.randn(3, 5)
    with pytest.raises(
        RuntimeError, match=r"adaptive_mse: expected .* capture .*not permitted.*call the op once"
    ):
        kernel(x, x, None, 0.5, 1e-6, True, math.inf)
    assert not row_kernels._reasons


def test_capture_is_asked_of_the_device_of_the_tensor(monkeypatch):
    class Device:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            current.append(self.device)

        def __exit__(self, *error):
            current.pop()

    current = [0]
    monkeypatch.setattr(torch.cuda, "device", Device)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: current[-1] == 1)
    for device in (0, 1):
        assert row_kernels.capturing(SimpleNamespace(is_cuda=True, device=device)) == (device == 1)


def test_bad_input_and_memory_are_not_reasons_to_fall_back(forgetful, monkeypatch):
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(row_kernels, "launcher", lambda name: full)
    check = ops.check_of("adaptive_mse")
    kernel = row_kernels.op_kernel("adaptive_mse", check, reference.adaptive_mse)
    x = torch.randn(3, 5)
    with pytest.raises(torch.OutOfMemoryError):
        kernel(x, x, None, 0.5, 1e-6, True, math.inf)
    with pytest.raises(ValueError, match="temperature: expected"):
        kernel(x, x, None, -1.0, 1e-6, True, math.inf)
    assert not row_kernels._reasons


def test_double_goes_to_the_reference(forgetful, monkeypatch):
    monkeypatch.setattr(row_kernels, "launcher", lambda name: pytest.fail)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _serve("adaptive_mse", squared_error((3, 5), torch.float64))
