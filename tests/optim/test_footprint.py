"""What an optimizer is said to hold is what it holds; and so is the plan of a whole run."""

from itertools import product
from pathlib import Path

import pytest
import torch
from torch import nn

import sfron_fast as sf
from benchmarks.timer import cpu_allocations
from sfron_fast.__main__ import main
from sfron_fast.integrations import memory
from sfron_fast.optim.footprint import footprint

SHAPES = {"a": (17, 288), "b": (33,), "c": (64, 3)}  # only the first has moments in 8 bits
ROOT = Path(__file__).parents[2]


def parameters(dtype):
    torch.manual_seed(0)
    return {name: nn.Parameter(torch.randn(shape, dtype=dtype)) for name, shape in SHAPES.items()}


@pytest.mark.parametrize("rule", [sf.SFRonAdamW, sf.SFRonSGD])
@pytest.mark.parametrize(("dtype", "bits"), [("float32", None), ("bfloat16", 24), ("bfloat16", 32)])
def test_state_and_gradients_to_the_byte(rule, dtype, bits):
    for state_dtype, moments, slow_lr in product(
        (None, torch.bfloat16, torch.int8), ("shared", "separate", "none"), (1.0, 0.5)
    ):
        params = parameters(getattr(torch, dtype))
        mask = sf.SaliencyMask.from_bool({n: torch.ones(p.shape) > 0 for n, p in params.items()})
        more = {"momentum": 0.9} if rule is sf.SFRonSGD else {}
        settings = {"state_dtype": state_dtype, "moments": moments, "slow_lr": slow_lr, **more}
        if bits and state_dtype is torch.bfloat16:
            continue  # refused
        optimizer = rule(params.items(), lr=1e-3, weight_bits=bits, saliency=mask, **settings)
        planned = footprint(optimizer)
        for step in (optimizer.forget_step, optimizer.step):
            for p in params.values():
                p.grad = torch.randn_like(p)
            step()
        held = [t for state in optimizer.state.values() for t in state.values()]
        state = sum(t.numel() * t.element_size() for t in held if isinstance(t, torch.Tensor))
        weights = sum(p.numel() * p.element_size() for p in params.values())
        parts = ("weights", "moments", "slow weights")
        assert sum(planned[part] for part in parts) == weights + state, settings
        assert planned["gradients"] == weights
        places = [-(-size // 16) * 16 for size in ((17 * 288 + 7) // 8, (33 + 7) // 8)]
        assert planned["mask"] == sum(places) + 64 * 3 // 8


def test_the_peak_of_a_run():
    """Fisher in one buffer, then a cycle with slow weights; no state dict on the device."""
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(512, 512) for _ in range(6)])
    batches = [(torch.randn(2, 512), torch.randint(512, (2,))) for _ in range(2)]
    weights = 4 * sum(p.numel() for p in model.parameters())
    found = {}

    def fisher():
        found["mask"] = sf.estimate_mask(
            model, forget=batches[:1], retain=batches[1:], low_memory=True
        )

    def peak(call):
        return max(held for held in _running(cpu_allocations(call)))

    said = weights // 4 * memory.FISHER + weights / 32 + 512 * 512 * memory.PACKING
    assert peak(fisher) == pytest.approx(said, rel=0.05)
    optimizer = sf.SFRonAdamW(model.named_parameters(), saliency=found["mask"], slow_lr=0.5)

    def cycle():
        for step, (x, y) in zip((optimizer.forget_step, optimizer.step), batches, strict=True):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            step()
        optimizer.state_dict()

    planned = footprint(optimizer)
    made = sum(planned.values()) - planned["weights"] - planned["mask"]  # both are there already
    assert peak(cycle) == pytest.approx(made, rel=0.05)


def test_a_state_dict_is_loaded_tensor_by_tensor():
    """Moments in fp32 become codes one after the other; torch's cast of all of them is left out."""
    params = [nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16)) for _ in range(128)]
    optimizers = [sf.SFRonAdamW(params, state_dtype=torch.int8) for _ in range(2)]
    optimizers[0].init_state()
    state = optimizers[0].state_dict()
    held = sum(t.nbytes for s in optimizers[0].state.values() for t in s.values())
    most = max(_running(cpu_allocations(lambda: optimizers[1].load_state_dict(state))))
    assert held <= most < 1.5 * held


def _running(changes):
    total = 0
    for change in changes:
        total += change
        yield total


def test_the_plan_of_a_large_model(capsys):
    asked = ["memory", "--params", "8e9", "--weight-bits", "24", "--state-dtype", "int8"]
    assert main(asked) == 0
    said = capsys.readouterr().out
    assert "fits 80 GB, 141 GB" in said
    parts = memory.needed(memory.Plan(params=8e9, weight_bits=24, state_dtype="int8"))["cycle"]
    # 2 + 1, 2, twice 2 and their scales, a bit
    each = {"weights": 3.0, "gradients": 2.0, "moments": 4 + 4 * 4 / 256, "mask": 1 / 8}
    for name, bytes_a_weight in each.items():
        assert parts[name] / 8e9 == pytest.approx(bytes_a_weight, rel=1e-3), name
    sharded = memory.needed(memory.Plan(params=8e9, ranks=8))["cycle"]
    alone = memory.needed(memory.Plan(params=8e9))["cycle"]
    assert sharded["moments"] == pytest.approx(alone["moments"] / 8, rel=1e-3)
    assert sharded["gathered"] > 0 == alone["gathered"]
    slow = {"params": 8e9, "weight_bits": 24, "slow": True}
    here, there = (
        memory.needed(memory.Plan(**slow, slow_device=place))["cycle"]["slow weights"]
        for place in (None, "cpu")
    )
    assert here == pytest.approx(3 * 8e9, rel=1e-3)
    # the embedding with its corrections, and a part
    assert there == pytest.approx(3 * memory.VOCABULARY * 4096 + (1 << 26), rel=0.2)
    assert main([*asked, "--slow-device", "cpu"]) == 0
    assert "slow weights" in capsys.readouterr().out
    for wrong, message in (
        (["--params", "-1"], "params: expected"),
        (["--params", "8e9", "--ranks", "0"], "ranks: expected an integer >= 1"),
        (["--params", "8e9", "--dtype", "float32", "--weight-bits", "24"], "weight_bits: expected"),
    ):
        assert main(["memory", *wrong]) == 2
        assert message in capsys.readouterr().err


def test_the_sizes_in_the_readme_are_those_of_the_command():
    lines = (ROOT / "README.md").read_text().split("\n")
    compact = memory.KINDS["bf16 with `weight_bits=24`, moments in int8"]
    here, there = ({**compact, **memory.SLOW[f", slow weights{on}"]} for on in ("", " on the host"))
    more = {
        "the same with slow weights": here,
        'the same with slow weights on the host (`slow_device="cpu"`)': there,
    }
    for name, settings in (memory.KINDS | more).items():
        (line,) = [line for line in lines if line.startswith(f"| {name} |")]
        cells = [cell.strip() for cell in line.split("|")[2:-1]]
        card = memory.CARDS.index(80)
        weights = memory.largest(80, **settings)
        assert cells[card] == f"{weights / 1e9:.1f}B"
