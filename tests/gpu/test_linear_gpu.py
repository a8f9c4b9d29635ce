"""The ops over a language model's head on CUDA: matrix products that store fp32, Triton's rows.

Collected only with a GPU.
"""

import pytest
import torch
from head_cases import error, full_logits, head_case

import sfron_fast as sf
from sfron_fast.ops import linear_tiles
from sfron_fast.ops.linear_logp_stats import formula


@pytest.fixture(autouse=True)
def _several_tiles(monkeypatch):
    monkeypatch.setitem(linear_tiles.TILE_CLASSES, "cuda", 1024)


SETTINGS = {"plain": {}, "both": {"softcap": 3.0, "logit_scale": 0.25}, "no bias": {"bias": False}}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_logp(dtype, name):
    case = head_case(300, 64, 5003, dtype, size=0.3, decades=3, **SETTINGS[name]).on("cuda")
    truth, found = case.to(torch.float64).results(full_logits), case.results(sf.linear_logp)
    # the gradient at the logits is rounded for the product, and the products
    bound = 1e-5 if dtype == torch.float32 else 3 * torch.finfo(dtype).eps
    for key, wanted in truth.items():
        assert error(found[key], wanted) < (bound if key.startswith("d ") else 1e-5), key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_pass_and_two_agree(dtype):
    case = head_case(300, 64, 5003, dtype, size=0.3).on("cuda")
    index = torch.arange(300, device="cuda") // 10
    found = []
    for workspace in (0, 4 * 5003 * (40 + 64), None):
        leaves = [t.clone().requires_grad_() for t in (case.hidden, case.weight)]
        result = sf.linear_adaptive_cross_entropy(
            *leaves, case.labels, sample_index=index, workspace=workspace
        )
        result.loss.backward()
        found.append([result.loss.detach(), *(t.grad for t in leaves)])
    for other in found[1:]:
        for got, wanted in zip(other, found[0], strict=True):
            assert error(got, wanted.double()) < (1e-5 if dtype == torch.float32 else 2e-2)


def test_stats():
    case = head_case(300, 64, 5003, size=0.3).on("cuda")
    found = sf.linear_logp_stats(case.hidden, case.weight, case.labels, bias=case.bias)
    given = case.to(torch.float64)
    numbers = (given.bias, None, 1.0, -100)
    wanted = formula(given.hidden, given.weight, given.labels, *numbers)
    assert torch.equal(found.correct, wanted.correct)
    for name in ("logp", "entropy", "variance"):
        assert error(getattr(found, name), getattr(wanted, name)) < 1e-4, name


def test_soft_target_kl():
    case = head_case(300, 64, 5003, size=0.3, ignored=0, bias=False).on("cuda")
    hidden = case.hidden.requires_grad_()
    teacher = torch.randn_like(hidden), torch.randn_like(case.weight) * 0.3
    loss = sf.linear_soft_target_kl(hidden, case.weight, *teacher)
    loss.backward()
    double = hidden.detach().double().requires_grad_()
    rows = double @ case.weight.double().t(), teacher[0].double() @ teacher[1].double().t()
    wanted = sf.soft_target_kl(*rows)
    wanted.backward()
    assert error(loss.detach(), wanted.detach()) < 1e-5
    assert error(hidden.grad, double.grad) < 1e-5
