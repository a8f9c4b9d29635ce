"""What a step may allocate: state in its first cycle; then nothing that grows with the weights."""

import re
import subprocess
import sys

import pytest
import torch
from cases import only_long
from models import SHAPES, gradients, masks, parameters, run
from paths import SUPPORT, TESTS
from torch.profiler import ProfilerActivity, profile

from sfron_fast import SaliencyMask, SFRonAdamW, SFRonSGD

BOTH = pytest.mark.parametrize("kind", [SFRonSGD, SFRonAdamW])
SMALL = 4096  # bytes: scalars, and tables of a few dozen numbers for each of ten tensors


def training(kind, sizes=(100_003, 50_000, 3), dtype=torch.float32, **settings):
    """A masked, clipped optimizer over tensors of these sizes, with gradients, before its first
    step.
    """
    params = {f"p{i}": torch.nn.Parameter(torch.ones(n, dtype=dtype)) for i, n in enumerate(sizes)}
    chosen = {n: torch.arange(p.numel()) % 2 == 0 for n, p in params.items()}
    own = {"momentum": 0.9} if kind is SFRonSGD else {"amsgrad": True}
    optimizer = kind(
        params.items(),
        lr=0.1,
        weight_decay=0.1,
        saliency=SaliencyMask.from_bool(chosen),
        max_norm=1.0,
        clip_retain=True,
        **own,
        **settings,
    )
    for p in params.values():
        p.grad = torch.ones_like(p)
    return optimizer, params


def cycle(optimizer):
    optimizer.forget_step()
    optimizer.step()


def allocated(call):
    """Sizes in bytes of what torch allocated meanwhile."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        call()
    memory = [
        event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"
    ]
    return sorted((event.nbytes() for event in memory if event.nbytes() > 0), reverse=True)


def test_the_count_sees_an_allocation():
    assert allocated(lambda: torch.empty(1000))[0] >= 4000


@BOTH
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"slow_lr": 0.5},
        {"moments": "separate", "slow_lr": 0.5},
        {"moments": "none"},
        {"mask_semantics": "update"},
    ],
    ids=["defaults", "slow", "separate", "none", "update"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_of_the_parameters_size_is_allocated_after_the_first_cycle(kind, settings, dtype):
    optimizer, _ = training(kind, dtype=dtype, **settings)
    cycle(optimizer)
    for _ in range(2):
        sizes = allocated(lambda: cycle(optimizer))
        assert sum(sizes) <= SMALL, sizes[:5]


@BOTH
def test_state_is_what_the_knobs_ask_for(kind):
    """Bytes a parameter: each moment 4, the slow copy 4 or none, packed masks 1/8."""
    moments = 1 if kind is SFRonSGD else 3
    for settings, states in (
        ({}, moments),
        ({"slow_lr": 0.5}, moments + 1),
        ({"moments": "separate", "slow_lr": 0.5}, 2 * moments + 1),
    ):
        optimizer, params = training(kind, sizes=(6400, 640), **settings)
        first = sum(allocated(lambda o=optimizer: cycle(o)))
        weights = sum(p.numel() for p in params.values())
        masks_bytes = 2 * weights // 8  # resolved for the device, and as one flat list
        assert states * 4 * weights <= first <= states * 4 * weights + masks_bytes + SMALL
        held = sum(
            v.numel() * v.element_size()
            for s in optimizer.state.values()
            for v in s.values()
            if v.dim()
        )
        assert held == states * 4 * weights


@pytest.mark.checklist("B6")
@BOTH
def test_a_slow_step_of_one_keeps_no_copy(kind):
    optimizer, params = training(kind, slow_lr=1.0)
    cycle(optimizer)
    assert not any("slow" in optimizer.state[p] for p in params.values())


@pytest.mark.checklist("H2")
def test_masks_are_an_eighth_of_a_byte_a_weight():
    mask = SaliencyMask.from_bool(masks())
    assert all(mask[n].numel() == -(-torch.Size(s).numel() // 8) for n, s in SHAPES.items())
    big = SaliencyMask.from_bool({"w": torch.ones(1_000_000, dtype=torch.bool)})
    assert big["w"].untyped_storage().nbytes() == 125_000


RESIDENT = """
import re, sys
import torch
torch.set_num_threads(1)
sys.path[:0] = sys.argv[3:]
from test_dropin_memory import cycle, training
import sfron_fast

def status(key):
    return int(re.search(key + r":\\s+(\\d+)", open("/proc/self/status").read())[1])

kind = getattr(sfron_fast, sys.argv[1])
optimizer, params = training(kind, sizes=(8_000_003, 4_000_000), slow_lr=0.5)
for _ in range(2):
    cycle(optimizer)
open("/proc/self/clear_refs", "w").write("5")  # the peak starts at what is resident now
before = status("VmHWM")
if sys.argv[2] == "copy":
    kept = [p.detach().clone() for p in params.values()]
for _ in range(3):
    cycle(optimizer)
print(before, status("VmHWM"))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc")
@pytest.mark.parametrize("kind", [only_long("SFRonSGD"), "SFRonAdamW"])
def test_the_process_does_not_grow_during_steps(kind):
    """Also past torch's allocator: 12 million weights are 46 MiB, the peak of three cycles stays
    within 1 MiB.
    """
    grown = {}
    for what in ("steps", "copy"):
        out = subprocess.run(
            [sys.executable, "-c", RESIDENT, kind, what, str(SUPPORT), str(TESTS / "dropin")],
            capture_output=True,
            text=True,
            check=True,
        )
        before, peak = map(int, re.findall(r"\d+", out.stdout)[-2:])
        grown[what] = peak - before
    # KiB; a copy of all weights shows, though some of it may go where memory was freed
    assert grown["steps"] < 1024 < 15 * 1024 < grown["copy"], grown


def test_lists_of_one_dtype_and_others_take_the_same_memory():
    """Mixed groups keep their state in separate tensors: also nothing after the first cycle."""
    params = parameters(torch.float32)
    params["b"].data = params["b"].data.bfloat16()
    optimizer = SFRonAdamW(params.items(), slow_lr=0.5, max_norm=1.0)
    steps = gradients(4, torch.float32)
    for grads in steps:
        grads["b"] = grads["b"].bfloat16()
    run(optimizer, params, steps[:2], 1)
    for name, param in params.items():
        param.grad = steps[2][name]
    assert sum(allocated(lambda: cycle(optimizer))) <= SMALL
