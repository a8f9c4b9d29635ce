"""Moments of bf16 beside fp32 weights: half the memory, and a rounding of exp_avg_sq that does not
stand still.
"""

import math

import pytest
import torch
from judging import assert_same_bits

from sfron_fast import SaliencyMask, SFRonAdamW, SFRonSGD, functional
from sfron_fast.ops import reference

BF16 = torch.bfloat16


@pytest.mark.parametrize("gradients", ["steady", "fading", "gone"])
def test_exp_avg_sq_follows_the_one_in_fp32(gradients):
    """Over 3,000 steps: unbiased, and near; rounded to nearest it is off by a third and more."""
    torch.manual_seed(0)
    wide, narrow = (
        [torch.zeros(1024, dtype=dtype) for _ in range(2)] for dtype in (torch.float32, BF16)
    )
    nearest = torch.zeros(1024, dtype=BF16)
    params, counts = [torch.zeros(1024)] * 2, [torch.zeros(()), torch.zeros(())]
    size = {
        "steady": lambda t: 1.0,
        "fading": lambda t: math.exp(-t / 1000),
        "gone": lambda t: float(t < 2000),
    }
    for step in range(3000):
        grad = torch.randn(1024) * 1e-3 * size[gradients](step)
        for state, param, count in zip((wide, narrow), params, counts, strict=True):
            functional.adamw_step_(
                [param], [grad], [state[0]], [state[1]], [count], lr=0.0, beta1=0.9, beta2=0.999
            )
        nearest = (nearest.float() * 0.999 + grad * grad * 0.001).to(BF16)
    error = narrow[1].double() / wide[1].double() - 1.0
    assert error.mean().abs() < 0.01
    assert error.square().mean().sqrt() < 0.06
    assert (nearest.double() / wide[1].double() - 1.0).mean().abs() > 0.3
    assert (narrow[0] - wide[0]).norm() < 0.01 * wide[0].norm() + 1e-37


def test_a_threshold_decides_in_place_of_a_half():
    unit = 2.0**-7  # of bf16 from 1 to 2
    x = (1.0 + torch.tensor([0.0, 0.25, 0.5, 0.75]) * unit).repeat(1000)
    for step in (1, 2, 777):
        rounded = reference.dithered(x, step).float()
        assert set(rounded.tolist()) == {1.0, 1.0 + unit}
        assert (rounded[::4] == 1.0).all()
        for part in range(4):  # of neighbours as many as of steps are rounded up
            assert abs((rounded[part::4] > 1.0).double().mean().item() - part / 4) < 0.02
    often = torch.stack([reference.dithered(x[:40], step) for step in range(1, 401)]).float()
    assert ((often - x[:40]).mean(0).abs() < 0.02 * unit).all()


def test_what_bf16_holds_is_not_rounded():
    held = torch.tensor([0.0, -0.0, 1.0, -3.5, math.inf, -math.inf, 3.3895e38, 1e-40], dtype=BF16)
    for step in range(1, 50):
        assert_same_bits(reference.dithered(held.float(), step), held, f"step {step}")
    assert reference.dithered(torch.full((100,), math.nan), 3).isnan().all()


@pytest.mark.parametrize("amsgrad", [False, True])
def test_runs_end_where_those_in_fp32_end(amsgrad):
    """A quadratic, 200 cycles: the slow weights differ by little of what they moved."""
    ends = []
    for dtype in (None, BF16):
        torch.manual_seed(1)
        start, target, mask = torch.randn(300), torch.randn(300), torch.rand(300) < 0.5
        weight = torch.nn.Parameter(start.clone())
        optimizer = SFRonAdamW(
            [("w", weight)],
            lr=0.01,
            state_dtype=dtype,
            slow_lr=0.5,
            max_norm=1.0,
            amsgrad=amsgrad,
            retain_steps=2,
            saliency=SaliencyMask.from_bool({"w": mask}),
        )
        for step in range(600):
            noise = 0.1 * torch.randn(300)
            weight.grad = (weight.detach() - target) * (-0.1 if step % 3 == 0 else 1.0) + noise
            (optimizer.forget_step if step % 3 == 0 else optimizer.step)()
        assert optimizer.state[weight]["exp_avg_sq"].dtype == (dtype or torch.float32)
        assert optimizer.state[weight]["slow"].dtype == torch.float32
        ends.append(weight.detach() - start)
    assert (ends[1] - ends[0]).norm() < 0.01 * ends[0].norm()
    assert not torch.equal(*ends)


@pytest.mark.parametrize("kind", [SFRonSGD, SFRonAdamW])
def test_moments_take_half_the_memory(kind):
    weights = [torch.nn.Parameter(torch.ones(1000)) for _ in range(2)]
    optimizer = kind(weights, state_dtype=BF16, **({"momentum": 0.9} if kind is SFRonSGD else {}))
    for weight in weights:
        weight.grad = torch.ones(1000)
    optimizer.step()
    moments = [v for state in optimizer.state.values() for v in state.values() if v.dim()]
    assert {m.dtype for m in moments} == {BF16}


def test_moments_of_two_dtypes_are_refused():
    lists = [[torch.ones(3)] for _ in range(2)]
    message = r"exp_avg_sqs\[0\]: expected torch.bfloat16, as its exp_avg, found torch.float32"
    with pytest.raises(ValueError, match=message):
        functional.adamw_step_(
            *lists, [torch.ones(3, dtype=BF16)], [torch.ones(3)], [torch.zeros(())], lr=0.1
        )
    assert torch.equal(lists[0][0], torch.ones(3))
