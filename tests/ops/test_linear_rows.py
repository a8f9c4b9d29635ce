"""The rows of a tile of logits: by hand, with mistakes, with infinities; the Triton kernels without
a GPU, interpreted and compiled for sm_90; and their use by the ops over heads.
"""

import math

import pytest
import torch
from head_cases import error, full_logits, head_case, small_tiles
from interpreting import passes_interpreted
from judging import assert_within
from linear_row_ops import GRADIENT, LOG_SUMS, gradient_bounds, sums_bounds

import sfron_fast as sf
from sfron_fast.ops import linear_logp, linear_one_pass, linear_rows, linear_tiles, registry

KERNELS = (registry.op, registry.default_kernel)


@pytest.mark.parametrize("kernel", KERNELS)
def test_hand_example(kernel):
    """Logits ln 1, ln 2, ln 4 and a label in the middle: (1 + 4) / 4; then ln 8, without a label:
    5 / 4 * 4 / 8 + 1. Gradients 2 e^(x - ln 4), times 1 - (x / softcap)^2.
    """
    add, convert = (kernel(name) for name in ("linear_log_sums_", "linear_gradient_"))
    tile, labels = torch.tensor([[1.0, 2.0, 4.0]]).log(), torch.tensor([6])
    maximum, others, picked = (torch.tensor([x]) for x in (-math.inf, 0.0, math.nan))
    add(tile, labels, 5, maximum, others, picked)
    torch.testing.assert_close(others, torch.tensor([1.25]))
    assert (maximum, picked) == (tile[0, 2], tile[0, 1])
    add(torch.tensor([[8.0]]).log(), labels, 8, maximum, others, picked)
    torch.testing.assert_close(others, torch.tensor([1.625]))
    assert picked == tile[0, 1]

    factor, label = torch.tensor([2.0]), torch.tensor([-3.0])
    for softcap, slopes in ((None, [1.0, 1.0, 1.0]), (2 * math.log(4), [1, 15 / 16, 3 / 4])):
        logits = tile.clone()
        convert(logits, labels, 5, logits.amax(1), factor, label, softcap, logits)
        wanted = torch.tensor([[0.5, -3.0, 2.0]]) * torch.tensor(slopes)
        torch.testing.assert_close(logits, wanted)


def unscaled(tensors):
    """So that what is added to is as it was before a larger maximum came."""
    grown = tensors["values"].amax(1) - tensors["maximum"]
    return tensors["others"] * grown.clamp_min(0).exp()


# what the formula is given in place of an argument, and the ops that take it
BOTH = (LOG_SUMS, GRADIENT)
MUTANTS = {
    "one label for all rows": (BOTH, "labels", lambda t: t["labels"] * 0 + t["labels"][1]),
    "no label": (BOTH, "labels", lambda t: t["labels"] * 0 + 10**6),
    "the label beside": (BOTH, "labels", lambda t: t["labels"] ^ 1),
    "earlier tiles forgotten": ((LOG_SUMS,), "others", lambda t: t["others"] * 0),
    "an earlier maximum forgotten": ((LOG_SUMS,), "maximum", lambda t: t["maximum"] - math.inf),
    "sums not scaled anew": ((LOG_SUMS,), "others", unscaled),
    "one factor for all rows": ((GRADIENT,), "factor", lambda t: t["factor"] * 0 + t["factor"][0]),
    "no shift": ((GRADIENT,), "shift", lambda t: t["shift"] * 0),
    "softmax at the label": ((GRADIENT,), "label", lambda t: t["label"] * 0),
    "no cap": ((GRADIENT,), "softcap", lambda t: None),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mistakes_are_noticed(name):
    """By what judges the kernels."""
    ops, argument, change = MUTANTS[name]
    for op in ops:
        case = op.full((9, 70))[-1]
        bounds = (sums_bounds if op is LOG_SUMS else gradient_bounds)(case)
        changed = change(case.tensors)
        (case.tensors if argument in case.tensors else case.scalars)[argument] = changed
        case.run(registry.default_kernel(op.name))
        with pytest.raises(AssertionError, match="wrong"):
            assert_within({key: case.tensors[key] for key in bounds}, bounds)


@pytest.mark.parametrize("columns", [5, 70, 2049])
def test_infinities(columns):
    """As in plain torch: what breaks a row breaks it, and no other row."""
    torch.manual_seed(0)
    tiles = torch.randn(2, 8, columns) * 5
    tiles[0, 0, 3], tiles[0, 1], tiles[1, 2, 0] = math.inf, -math.inf, math.nan
    tiles[1, 3, 4], tiles[1, 1], tiles[0, 4, 1] = -math.inf, -math.inf, math.inf
    tiles[1, 5, 2], tiles[0, 6, 0], tiles[0, 6, 1] = math.inf, math.inf, 300.0
    labels = torch.tensor([2, 1, 0, columns + 4, 1, 0, 2, 1])
    found = []
    for kernel in KERNELS:
        state = [torch.full((8,), -math.inf), torch.zeros(8), torch.full((8,), math.nan)]
        for i, tile in enumerate(tiles):
            kernel("linear_log_sums_")(tile, labels, i * columns, *state)
        sums = linear_tiles.LogSums(labels, tiles[0])
        sums.maximum, sums.others, sums.picked = state
        logp, shift, log_sum = sums.result()
        outs = [torch.empty_like(tile) for tile in tiles]
        for i, tile in enumerate(tiles):
            rows = shift, (-log_sum).exp(), torch.expm1(logp)
            kernel("linear_gradient_")(tile, labels, i * columns, *rows, None, outs[i])
        found.append((logp, shift + log_sum, *outs))
    for mine, plain in zip(*found, strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-5, atol=1e-30, equal_nan=True)
    assert found[0][0].isnan().sum() == 3  # no finite logit, a NaN, a label that is inf


def test_interpreted():
    pytest.importorskip("triton")
    passes_interpreted("ops/interpreted_linear_rows.py")


def test_compiles_without_spills():
    pytest.importorskip("triton")
    from benchmarks.tools import triton_launches, triton_report

    launches = triton_launches.linear_launches(8192, 16_384, torch.bfloat16, None)
    launches += triton_launches.linear_launches(8192, 16_384, torch.float32, 30.0)
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
        "linear_gradient_": linear_rows.gradient,
    }
    monkeypatch.setattr(linear_rows, "serving", serving)
    case = head_case(classes=203)
    truth, found = case.to(torch.float64).results(full_logits), case.results(sf.linear_logp)
    assert calls == ["linear_log_sums_"] * 4 + ["linear_gradient_"] * 4
    for key, wanted in truth.items():
        assert error(found[key], wanted) < 2e-6, key
    assert linear_tiles.tile_classes(8192, 131_072, torch.device("cuda")) == 8192
