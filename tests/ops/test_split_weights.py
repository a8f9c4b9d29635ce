"""Weights of bf16 parameters and corrections: what the pieces are, and that no update is lost."""

import math

import pytest
import torch
from judging import assert_same_bits

from sfron_fast import functional
from sfron_fast.ops import split_weights

BF16 = torch.bfloat16
KINDS = pytest.mark.parametrize("kind", [torch.int8, torch.int16], ids=str)


def spread_values():
    """Weights of every size, signs and edges of bf16 included."""
    generator = torch.Generator().manual_seed(0)
    whole = torch.randint(0, 1 << 32, (100_000,), generator=generator)
    bits = torch.where(whole < 1 << 31, whole, whole - (1 << 32)).to(torch.int32)
    x = bits.view(torch.float32)
    edges = torch.tensor([0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, 3.4028235e38, 1e-45])
    near = torch.tensor([1.0, 2.0, 0.5]).view(torch.int32)[:, None] + torch.arange(-70000, 70001)
    return torch.cat([x[~x.isnan()], edges, near.to(torch.int32).view(torch.float32).flatten()])


def test_two_pieces_of_16_bits_are_fp32_to_the_bit():
    x = spread_values()
    for step in (1, 2):
        param, correction = split_weights.split(x, step, torch.int16)
        assert_same_bits(split_weights.join(param, correction), x)
    assert split_weights.join(
        *split_weights.split(torch.tensor([math.nan]), 1, torch.int16)
    ).isnan()


@KINDS
def test_the_parameter_is_the_weight_rounded(kind):
    """Cut off instead, every forward pass would see weights that are too small."""
    x = spread_values()
    x = x[x.isfinite() & (x.abs() < 3e38) & (x.abs() > 1e-37)]
    param, correction = split_weights.split(x, 3, kind)
    joined = split_weights.join(param, correction)
    wide = (param.double() - joined.double()).abs()
    nearest = (joined.to(BF16).double() - joined.double()).abs()
    assert torch.equal(wide, nearest)
    bounds = torch.iinfo(kind)
    assert correction.min() == bounds.min
    assert correction.max() == bounds.max


def test_24_bits_are_off_by_less_than_the_last_of_them_and_by_nothing_on_average():
    x = torch.randn(2000, generator=torch.Generator().manual_seed(1))
    unit = torch.exp2(x.abs().log2().floor() - 15).double()  # 16 bits after the first
    off = [
        split_weights.join(*split_weights.split(x, step, torch.int8)).double() - x.double()
        for step in range(1, 513)
    ]
    assert all((o.abs() < unit).all() for o in off)
    assert (torch.stack(off).mean(0).abs() < 0.02 * unit).all()


@KINDS
def test_what_the_pieces_hold_is_not_rounded(kind):
    x = spread_values()
    pieces = split_weights.split(x, 1, kind)
    for step in range(2, 30):
        again = split_weights.split(split_weights.join(*pieces), step, kind)
        for new, old in zip(again, pieces, strict=True):
            assert_same_bits(new, old)


@KINDS
def test_a_parameter_that_is_written_moves_the_weight_with_it(kind):
    """By half a unit of bf16 it may be off, as what is written is then rounded anyway."""
    x, other = torch.randn(2, 5000, generator=torch.Generator().manual_seed(2))
    other[:100] = 0.0
    _, correction = split_weights.split(x, 1, kind)
    written = other.to(BF16)
    weight = split_weights.join(written, correction)
    unit = torch.exp2(written.float().abs().clamp(min=1e-30).log2().floor() - 7)
    assert ((weight - written.float()).abs() <= 0.5 * unit).all()


STEPS = 2000


def moved(weights, lr, kind, rule):
    """Weights after ``STEPS`` steps of gradient 1 at ``lr``, from bf16 ones.

    ``kind``: of corrections; None = without, fp32 = weights of fp32.
    """
    wide = kind == torch.float32
    params = [weights.clone() if wide else weights.to(BF16)]
    grads = [torch.ones_like(params[0])]
    counts = [torch.zeros(())]
    corrections = None if kind is None or wide else [torch.zeros(weights.shape, dtype=kind)]
    states = [[torch.zeros_like(weights)] for _ in range(2)]
    for _ in range(STEPS):
        if rule == "adamw":
            functional.adamw_step_(
                params, grads, *states, counts, lr=lr, weight_decay=0.0, corrections=corrections
            )
        else:
            functional.sgd_step_(params, grads, lr=lr, steps=counts, corrections=corrections)
    if corrections is None:
        return params[0].float()
    return split_weights.join(params[0], corrections[0])


@pytest.mark.parametrize("rule", ["adamw", "sgd"])
def test_updates_of_a_millionth_are_not_lost(rule):
    """2,000 steps at a learning rate of 1e-6 on weights of .02 to 1: with 24 bits they go as far as
    in fp32 within 1 %, with 32 exactly, and bf16 alone loses more than 90 %.
    """
    x = torch.linspace(0.02, 1.0, 1024).to(BF16).float()
    x = torch.cat([x, -x])
    base = moved(x, 1e-6, torch.float32, rule) - x
    of = {kind: moved(x, 1e-6, kind, rule) - x for kind in (torch.int8, torch.int16, None)}
    assert_same_bits(of[torch.int16], base)

    def slope(found, chosen):
        found, wanted = found[chosen].double(), base[chosen].double()
        return ((found * wanted).sum() / wanted.square().sum()).item()

    everything = torch.ones_like(x, dtype=torch.bool)
    assert abs(slope(of[torch.int8], everything) - 1.0) < 0.01
    assert slope(of[None], everything) < 0.1
    for low, high in ((0.02, 0.125), (0.125, 0.25), (0.25, 0.5), (0.5, 1.01)):
        part = (x.abs() >= low) & (x.abs() < high)
        assert abs(slope(of[torch.int8], part) - 1.0) < 0.01, (low, high)
