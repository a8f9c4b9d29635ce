"""What every op over a language model's head must show.

They are not in the table of test_every_op.py: its judges take an op's formula and its native kernel
apart, and these have neither kernel nor SCHEMA of their own. They are composed of matrix products
and row arithmetic, and what is special to one, its truth among it, lies in the file of its name.
"""

import math
from functools import partial

import pytest
import torch
import torch.distributed as dist
from cases import LAYOUTS, shifted
from head_cases import head_case, small_tiles
from judging import assert_same_bits
from paths import TESTS

import sfron_fast as sf
from sfron_fast import heads

ROWS = 37
INDEX = torch.arange(ROWS) // 5


@pytest.fixture(autouse=True)
def _several_tiles(monkeypatch):
    small_tiles(monkeypatch)


def kl(hidden, weight, labels, **settings):
    """To the model itself with the labels lowered: no two distributions are alike."""
    return sf.linear_soft_target_kl(
        hidden, weight, hidden.detach(), weight.detach(), labels=labels, label_shift=2.0, **settings
    )


HEADS = {
    "linear_logp": sf.linear_logp,
    "linear_logp_stats": sf.linear_logp_stats,
    "linear_soft_target_kl": kl,
    "linear_adaptive_cross_entropy": partial(sf.linear_adaptive_cross_entropy, sample_index=INDEX),
    "linear_adaptive_cross_entropy, 4 products": partial(
        sf.linear_adaptive_cross_entropy, sample_index=INDEX, workspace=0
    ),
}
EACH = pytest.mark.parametrize("name", HEADS)


def outcome(name, hidden, weight, labels, bias):
    """All that it returns, and the gradients of what has one."""
    leaves = [t.detach().requires_grad_() for t in (hidden, weight, bias)]
    found = HEADS[name](leaves[0], leaves[1], labels, bias=leaves[2])
    found = found if isinstance(found, tuple) else (found,)
    results = [(f"output {i}", t.detach()) for i, t in enumerate(found)]
    derived = [t.sum() for t in found if t.requires_grad]
    if derived:
        (sum(derived) * -0.7).backward()
        results += [(f"gradient {i}", t.grad) for i, t in enumerate(leaves)]
    return results


def tensors(dtype=torch.float32):
    case = head_case(ROWS, dtype=dtype)
    return [case.hidden, case.weight, case.labels, case.bias]


def assert_same(found, wanted):
    for (key, now), (_, then) in zip(found, wanted, strict=True):
        assert_same_bits(now, then, key)


def test_the_table_holds_every_head():
    public = {name for name in heads.__all__ if name.startswith("linear")}
    assert {name.split(",")[0] for name in HEADS} == public
    for name in public:
        text = (TESTS / "ops" / f"test_{name}.py").read_text()
        for wanted in ("opcheck" if "adaptive" not in name else "compile", "the_judge_catches"):
            assert wanted in text, (name, wanted)


@EACH
@pytest.mark.parametrize("layout", [*LAYOUTS.values(), shifted], ids=[*LAYOUTS, "misaligned"])
def test_layouts(name, layout):
    """The same bits however the tensors lie in memory, and none of them is written to."""
    laid = [layout(t) for t in tensors()]
    before = [t.clone() for t in laid]
    assert_same(outcome(name, *laid), outcome(name, *tensors()))
    for now, then in zip(laid, before, strict=True):
        assert_same_bits(now, then)


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_again_gives_the_same_bits(name, dtype):
    assert_same(outcome(name, *tensors(dtype)), outcome(name, *tensors(dtype)))


@EACH
def test_rows_without_a_label_may_hold_anything(name):
    """``head_case`` has NaN there; with infinities it is the same, and their gradient is 0."""
    hidden, weight, labels, bias = tensors()
    found = outcome(name, hidden, weight, labels, bias)
    assert all(t.isfinite().all() for _, t in found)
    other = hidden.masked_fill((labels == -100).unsqueeze(1), math.inf)
    assert_same(outcome(name, other, weight, labels, bias), found)
    gradients = dict(found)
    if "gradient 0" in gradients:
        assert not gradients["gradient 0"][labels == -100].any()


@EACH
def test_autocast_casts_as_a_linear_layer(name):
    hidden, weight, labels, bias = tensors()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = dict(outcome(name, hidden, weight, labels, bias))
    wanted = dict(outcome(name, *(t.bfloat16() for t in (hidden, weight)), labels, bias.bfloat16()))
    for key, result in found.items():
        assert result.dtype in (torch.float32, torch.bool)
        assert torch.equal(result, wanted[key].to(result.dtype)), key


@EACH
def test_a_sharded_head_is_refused(name):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        hidden, weight, labels, _ = tensors()
        weight = dist.tensor.distribute_tensor(weight, mesh, [dist.tensor.Shard(0)])
        with pytest.raises(ValueError, match=r"weight: .*DTensor; call within the forward pass"):
            HEADS[name](hidden, weight, labels)
    finally:
        dist.destroy_process_group()


WRONG = {
    "hidden 3d": ("hidden", lambda given: given | {"hidden": given["hidden"][None]}),
    "hidden int": ("hidden", lambda given: given | {"hidden": given["hidden"].nan_to_num().int()}),
    "weight shape": ("weight", lambda given: given | {"weight": given["weight"][:, 1:]}),
    "weight empty": ("weight", lambda given: given | {"weight": given["weight"][:0]}),
    "weight dtype": ("weight", lambda given: given | {"weight": given["weight"].bfloat16()}),
    "bias shape": ("bias", lambda given: given | {"bias": given["bias"][1:]}),
    "labels dtype": ("labels", lambda given: given | {"labels": given["labels"].int()}),
    "no class": ("labels", lambda given: given | {"labels": given["labels"] + 203}),
    "cap": ("softcap", lambda given: given | {"softcap": 0.0}),
    "scale": ("logit_scale", lambda given: given | {"logit_scale": math.nan}),
}


@EACH
@pytest.mark.parametrize("wrong", WRONG)
def test_refusals(name, wrong):
    """Named, and before a gradient is made."""
    blamed, spoil = WRONG[wrong]
    given = dict(zip(("hidden", "weight", "labels", "bias"), tensors(), strict=True))
    with pytest.raises(ValueError, match=f"^{blamed}: expected"):
        HEADS[name](**spoil(given))
