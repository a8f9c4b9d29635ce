"""The Triton kernels of a tile of logits without a GPU: interpreted, compiled for sm_90, and used
by the ops.
"""

import os
import subprocess
import sys

import pytest
import torch
from head_cases import error, full_logits, head_case, small_tiles
from paths import ROOT, TESTS

import sfron_fast as sf
from sfron_fast.ops import linear_logp, linear_one_pass, linear_rows, linear_tiles


def test_interpreted():
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", "-q"]
    done = subprocess.run(
        [*command, str(TESTS / "ops/interpreted_linear_rows.py")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "PYTEST_ADDOPTS": ""},
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout or "[100%]" in done.stdout


def test_compiles_without_spills():
    pytest.importorskip("triton")
    from benchmarks.tools import triton_report

    launches = triton_report.linear_launches(8192, 16_384, torch.bfloat16, None)
    launches += triton_report.linear_launches(8192, 16_384, torch.float32, 30.0)
    assert {launch.kernel for launch in launches} == {
        "_log_sums_kernel",
        "_gradient_kernel",
        "_moments_kernel",
        "_kl_sums_kernel",
        "_kl_gradient_kernel",
    }
    for launch in {launch.key(): launch for launch in launches}.values():
        row = triton_report.compiled_row(launch)
        assert not triton_report.complaints(launch, row)


def narrow_product(left, right, out, add=False):
    """What a GPU does: bf16 in, fp32 summed and stored."""
    assert left.dtype == right.dtype == torch.bfloat16
    found = left.float() @ right.float()
    out.copy_(out + found if add else found)


@pytest.mark.parametrize("name", ["logp", "one pass", "chunks"])
def test_products_of_bf16_as_on_a_gpu(monkeypatch, name):
    """Hidden states and the gradient at the logits are multiplied as bf16, weighted rows on the
    side of the hidden states: over five decades each gradient is right to a few roundings.
    """
    small_tiles(monkeypatch)
    monkeypatch.setattr(linear_tiles, "product", narrow_product)
    for module in (linear_logp, linear_one_pass):
        monkeypatch.setattr(module, "multiplied", lambda tensor: tensor)
    case = head_case(dtype=torch.bfloat16)
    if name == "logp":
        found = case.results(sf.linear_logp)
        truth = case.to(torch.float64).results(full_logits)
    else:
        weights = case.upstream[0]
        case.upstream = torch.ones(1)

        def weighted(hidden, weight, labels, *, bias, **numbers):
            logp, _ = full_logits(hidden, weight, labels, bias=bias)
            return ((-logp * weights.to(logp.dtype)).sum(),)

        def ours(hidden, weight, labels, *, bias, **numbers):
            rows = 4 * 203 * (9 + 16) if name == "chunks" else None
            return sf.linear_adaptive_cross_entropy(
                hidden,
                weight,
                labels,
                bias=bias,
                normalise=False,
                weigh=lambda losses, samples: weights[samples],
                workspace=rows,
            )[:1]

        truth, found = case.to(torch.float64).results(weighted), case.results(ours)
    for key, wanted in truth.items():
        bound = 2 * torch.finfo(torch.bfloat16).eps if key.startswith("d ") else 1e-5
        assert error(found[key], wanted) < bound, key


def test_every_tile_goes_through_what_serves(monkeypatch):
    """As on a GPU: what is served instead gets every tile, in the dtype that is multiplied."""
    small_tiles(monkeypatch)
    calls = []

    def serving(name, values):
        def call(*arguments):
            calls.append(name)
            return kernels[name](*arguments)

        return call

    kernels = {
        "linear_log_sums_": linear_rows.add_log_sums,
        "linear_gradient": linear_rows.gradient,
    }
    monkeypatch.setattr(linear_rows, "serving", serving)
    case = head_case(classes=203)
    truth, found = case.to(torch.float64).results(full_logits), case.results(sf.linear_logp)
    assert calls == ["linear_log_sums_"] * 4 + ["linear_gradient"] * 4
    for key, wanted in truth.items():
        assert error(found[key], wanted) < 2e-6, key
    assert linear_tiles.tile_classes(8192, 131_072, torch.device("cuda")) == 8192
