"""The CUDA list kernels: the CPU's bits, repeated, captured, on huge and on numerous tensors."""

import itertools
import os
import subprocess
import sys

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from sfron_fast import functional as sf
from sfron_fast.ops import lists
from sfron_fast.ops import registry as ops

SIZES = (0, 1, 7, 8, 9, 63, 64, 65, 2047, 2048, 2049, 100_003)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OPS = (
    "masked_grad_norm",
    "sgd_step_",
    "adamw_step_",
    "interpolate_",
    "fisher_accumulate_",
    "saliency_mask",
)


def random_list(seed, dtype=torch.float32, sizes=SIZES, shift=0, positive=False):
    """CPU tensors; ``shift`` elements off their storage's beginning, hence off a multiple of 16
    bytes.
    """
    generator = torch.Generator().manual_seed(seed)
    flat = [torch.randn(n + shift, generator=generator) for n in sizes]
    return [(t.abs() if positive else t).to(dtype)[shift:] for t in flat]


def random_masks(seed, sizes=SIZES):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randint(0, 256, ((n + 7) // 8,), dtype=torch.uint8, generator=generator)
        for n in sizes
    ]


def to_cuda(value):
    """Copies that keep a tensor's offset in its storage."""
    if isinstance(value, torch.Tensor):
        offset = value.storage_offset()
        room = torch.empty(offset + value.numel(), dtype=value.dtype, device="cuda")
        return room[offset:].view(value.shape).copy_(value)
    return [to_cuda(item) for item in value] if isinstance(value, list) else value


def both(call, *lists, **options):
    """Run on the CPU and on the GPU from equal inputs; the lists must then be equal, bit by bit."""
    cuda = [to_cuda(item) for item in lists]
    cuda_options = {key: to_cuda(value) for key, value in options.items()}
    call(*lists, **options)
    call(*cuda, **cuda_options)
    written = [*lists, *options.values()], [*cuda, *cuda_options.values()]
    for cpu_list, cuda_list in zip(*written, strict=True):
        if isinstance(cpu_list, torch.Tensor):
            assert torch.equal(cpu_list, cuda_list.cpu())
        if isinstance(cpu_list, list):
            for i, (a, b) in enumerate(zip(cpu_list, cuda_list, strict=True)):
                assert torch.equal(a, b.cpu()), (
                    f"tensor {i} of {len(cpu_list)}, {a.numel()} elements of {a.dtype}"
                )


def test_the_native_kernels_serve_cuda():
    assert [ops.kernel_for(name, "cuda") for name in OPS] == ["native"] * len(OPS)


@pytest.mark.checklist("B8")
@pytest.mark.parametrize("shift", [0, 1, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_cpu_equals_cuda_simple_ops(dtype, shift):
    for slow_lr in (0.0, 0.3, 0.7, 1.0):
        slow, fast = random_list(0, dtype, shift=shift), random_list(1, dtype)
        both(lambda s, f, alpha=slow_lr: sf.interpolate_(s, f, alpha), slow, fast)
        numbers = torch.tensor([slow_lr], dtype=torch.float64)
        both(
            sf.interpolate_,
            random_list(0, dtype, shift=shift),
            random_list(1, dtype),
            slow_lr=0.9,
            numbers=numbers,
        )
    fisher, grads = random_list(2, positive=True), random_list(3, dtype, shift=shift)
    both(lambda f, g: sf.fisher_accumulate_(f, g, 0.37), fisher, grads)
    both(
        sf.fisher_accumulate_,
        fisher,
        grads,
        weight=0.9,
        numbers=torch.tensor([0.37], dtype=torch.float64),
    )


def test_cpu_equals_cuda_saliency_mask():
    for shift in (0, 1):
        forget, retain = random_list(0, shift=shift, positive=True), random_list(1, positive=True)
        masks, counts = sf.saliency_mask(forget, retain, 0.8)
        cuda_masks, cuda_counts = sf.saliency_mask(to_cuda(forget), to_cuda(retain), 0.8)
        assert torch.equal(counts, cuda_counts.cpu())
        assert all(torch.equal(a, b.cpu()) for a, b in zip(masks, cuda_masks, strict=True))


def options_of(flags, dtype):
    """Keyword arguments of a step for a set of names."""
    scalars = {"norm": 3.0, "grad_scale": 4.0, "found_inf": 1.0, "bad_norm": float("inf")}
    found = {
        ("norm" if name == "bad_norm" else name): torch.tensor(scalars[name])
        for name in flags & set(scalars)
    }
    found |= {"max_norm": 1.5, "skipped": torch.tensor(3)} if "norm" in found else {}
    found |= {"masks": random_masks(7)} if "masks" in flags else {}
    found |= {"masks": random_masks(7), "freeze_masked": True} if "freeze" in flags else {}
    found |= {"slow_save": random_list(8, dtype)} if "slow_save" in flags else {}
    found |= {"slow_from": random_list(9, dtype), "slow_lr": 0.3} if "slow_from" in flags else {}
    found |= (
        {"numbers": torch.tensor((0.02, 0.1, 0.6), dtype=torch.float64)}
        if "numbers" in flags
        else {}
    )
    found |= {"maximize": True} if "maximize" in flags else {}
    found |= {"weight_decay": 0.05} if "decay" in flags else {}
    return found


FLAGS = [
    set(),
    {"masks", "norm"},
    {"freeze", "decay"},
    {"slow_save", "decay", "grad_scale"},
    {"slow_from", "maximize"},
    {"numbers", "slow_from", "masks"},
    {"found_inf", "slow_from"},
    {"bad_norm", "slow_save"},
    {"masks", "norm", "grad_scale", "slow_save", "slow_from", "numbers", "maximize", "decay"},
]


@pytest.mark.checklist("B8")
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("flags", FLAGS, ids=lambda flags: "+".join(sorted(flags)) or "plain")
@pytest.mark.parametrize("dtype", DTYPES)
def test_cpu_equals_cuda_steps(dtype, flags, shift):
    for state in {dtype, torch.float32}:
        for nesterov, first in itertools.product((False, True), repeat=2):
            lists = random_list(0, dtype, shift=shift), random_list(1, dtype), random_list(2, state)
            more = {"nesterov": nesterov, "first": first, "momentum": 0.9, "lr": 0.1}
            both(sf.sgd_step_, *lists, **{**more, **options_of(flags, dtype)})
        both(sf.sgd_step_, *lists[:2], **{"lr": 0.1, **options_of(flags, dtype)})
        for decoupled, amsgrad in itertools.product((False, True), repeat=2):
            steps = [torch.tensor(float(3 * i)) for i in range(len(SIZES))]
            lists = [
                random_list(0, dtype, shift=shift),
                random_list(1, dtype),
                random_list(2, state),
            ]
            lists += [random_list(3, state, positive=True), steps]
            more = {"max_exp_avg_sqs": random_list(4, state, positive=True)} if amsgrad else {}
            both(
                sf.adamw_step_,
                *lists,
                **{"lr": 0.1, "decoupled": decoupled, **more, **options_of(flags, dtype)},
            )


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_is_close_and_repeatable(dtype):
    grads, masks = random_list(0, dtype, shift=1), random_masks(1)
    cpu, cuda, cuda_masks = sf.masked_grad_norm(grads, masks), to_cuda(grads), to_cuda(masks)
    results = [sf.masked_grad_norm(cuda, cuda_masks).cpu() for _ in range(20)]
    assert all(torch.equal(result, results[0]) for result in results)
    # one ulp: the additions are in double
    torch.testing.assert_close(results[0], cpu, rtol=1.2e-7, atol=0)


class Training:
    """A masked, clipped forget step and an interpolating retain step over lists on the GPU.

    ``whole``: everything but parameters and gradients is flat, as the optimizers keep it.
    """

    def __init__(self, sizes=(0, 5, 64, 2049, 100_003), adam=True, whole=False):
        self.params = to_cuda(random_list(0, sizes=sizes))
        self.grads = to_cuda(random_list(1, sizes=sizes))
        shapes = [lists.flat_size(self.params)] if whole else sizes
        self.state = [[torch.zeros(n, device="cuda") for n in shapes] for _ in range(2)]
        self.steps = [
            torch.zeros(s, device="cuda") for s in ([(len(sizes),)] if whole else [()] * len(sizes))
        ]
        self.slow = [torch.empty(n, device="cuda") for n in shapes]
        self.masks = to_cuda(random_masks(2, sizes))
        self.masks = [lists.flatten_masks(self.masks, self.params)] if whole else self.masks
        self.numbers = torch.tensor((0.01, 0.1, 0.5), dtype=torch.float64, device="cuda")
        self.adam = adam

    def step(self, **options):
        if self.adam:
            sf.adamw_step_(
                self.params,
                self.grads,
                *self.state,
                self.steps,
                lr=1.0,
                numbers=self.numbers,
                **options,
            )
        else:
            sf.sgd_step_(
                self.params,
                self.grads,
                self.state[0],
                momentum=0.9,
                lr=1.0,
                numbers=self.numbers,
                **options,
            )

    def cycle(self):
        norm = sf.masked_grad_norm(self.grads, self.masks)
        self.step(masks=self.masks, norm=norm, max_norm=1.0, slow_save=self.slow, maximize=True)
        self.step(slow_from=self.slow)


each_form = pytest.mark.parametrize("whole", [False, True], ids=["lists", "flat"])


@pytest.mark.checklist("E3")
@each_form
@pytest.mark.parametrize("adam", [True, False], ids=["adamw", "sgd"])
def test_graph_replay_equals_eager_while_numbers_change(adam, whole):
    """Captured with ordinary or with flat lists; eager always with ordinary ones."""
    eager, captured = Training(adam=adam), Training(adam=adam, whole=whole)
    start = [
        t.clone()
        for t in (*captured.params, *captured.state[0], *captured.state[1], *captured.steps)
    ]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        captured.cycle()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.cycle()
    for now, before in zip(
        (*captured.params, *captured.state[0], *captured.state[1], *captured.steps),
        start,
        strict=True,
    ):
        now.copy_(before)
    # eager steps between the replays must not disturb the captured tables
    other = Training(adam=adam, whole=whole)
    for k in range(5):
        numbers = torch.tensor((0.01 * (k + 1), 0.1 / (k + 1), 0.5 + 0.1 * k), dtype=torch.float64)
        eager.numbers.copy_(numbers)
        captured.numbers.copy_(numbers)
        for t in (eager, captured):
            for i, grad in enumerate(t.grads):
                grad.copy_(random_list(10 + k, sizes=[grad.numel()])[0] * (i + 1))
        eager.cycle()
        other.cycle()
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(eager.params, captured.params, strict=True)), k
        counts = lists.spread_scalars(captured.steps, captured.params)
        assert all(torch.equal(a, b) for a, b in zip(eager.steps, counts, strict=True)), k


@pytest.mark.parametrize("op", ["interpolate_", "fisher_accumulate_"])
def test_graph_replay_follows_a_changing_number(op):
    """The captured number is 0.9; every replay takes what ``numbers`` then holds, as the CPU does
    with that number.
    """
    call = getattr(sf, op)
    captured, other = ([to_cuda(random_list(seed)) for seed in (0, 1)] for _ in range(2))
    numbers = torch.full((1,), 0.5, dtype=torch.float64, device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call(*captured, 0.9, numbers=numbers)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call(*captured, 0.9, numbers=numbers)
    for k in range(5):
        expected = [random_list(10 * k + seed) for seed in (2, 3)]
        for now, new in zip(captured, expected, strict=True):
            for a, b in zip(now, new, strict=True):
                a.copy_(b)
        call(*expected, 0.2 * (k + 1))
        call(*other, 0.3)  # eager calls between the replays must not disturb the captured table
        numbers.fill_(0.2 * (k + 1))
        graph.replay()
        for now, new in zip(captured, expected, strict=True):
            assert all(torch.equal(a.cpu(), b) for a, b in zip(now, new, strict=True)), k


@pytest.mark.checklist("E4")
@each_form
def test_steps_never_wait_for_the_device(whole):
    training = Training(whole=whole)
    training.cycle()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            training.cycle()
            training.grads = [grad.clone() for grad in training.grads]  # new storage each time
    finally:
        torch.cuda.set_sync_debug_mode("default")


@each_form
def test_nothing_is_allocated_after_the_first_step(whole):
    training = Training(whole=whole)
    for _ in range(2):
        training.cycle()
    torch.cuda.synchronize()
    free, _ = torch.cuda.mem_get_info()
    before = torch.cuda.memory_stats()
    for _ in range(10):
        training.cycle()
    torch.cuda.synchronize()
    after = torch.cuda.memory_stats()
    assert after["num_device_alloc"] == before["num_device_alloc"]
    assert after["allocated_bytes.all.current"] == before["allocated_bytes.all.current"]
    assert torch.cuda.mem_get_info()[0] == free  # nor past torch's allocator


@each_form
@pytest.mark.parametrize("adam", [True, False], ids=["adamw", "sgd"])
def test_ten_thousand_tensors_take_two_launches(adam, whole):
    """Ours: torch's own kernel fills the new tensor of the norm where it is told to be
    deterministic.
    """
    training = Training(sizes=(64,) * 10_000, adam=adam, whole=whole)
    training.cycle()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        norm = sf.masked_grad_norm(training.grads, training.masks)
        training.step(masks=training.masks, norm=norm, max_norm=1.0)
        torch.cuda.synchronize()
    kernels = [event.name for event in seen.events() if "sfron::" in event.name]
    assert len(kernels) == 2, kernels


def test_short_lists_copy_nothing_to_the_device():
    """As in a step inside backward: thousands of lists of one, each travels in its launch."""
    params, grads = (
        to_cuda(random_list(0, sizes=(64,) * 200)),
        to_cuda(random_list(1, sizes=(64,) * 200)),
    )
    sf.sgd_step_(params[:1], grads[:1], lr=0.1)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for param, grad in zip(params[1:], grads[1:], strict=True):
            sf.sgd_step_([param], [grad], lr=0.1)
        torch.cuda.synchronize()
    names = [event.name for event in seen.events()]
    assert sum("sfron::" in name for name in names) == 199
    assert not [name for name in names if "HtoD" in name]
    expected = [
        p - 0.1 * g
        for p, g in zip(random_list(0, sizes=(64,)), random_list(1, sizes=(64,)), strict=True)
    ]
    torch.testing.assert_close(params[0].cpu(), expected[0])


def test_a_host_that_runs_ahead_of_the_device():
    """Long lists, each in new memory, while the device is busy: a table must not change before it
    is read.
    """
    lists = [
        [to_cuda(random_list(seed, sizes=(64,) * 100)) for seed in (k, k + 500)] for k in range(150)
    ]
    torch.cuda.synchronize()
    torch.cuda._sleep(200_000_000)  # cycles: a tenth of a second
    for slow, fast in lists:
        sf.interpolate_(slow, fast, 1.0)
    for k, (slow, _) in enumerate(lists):
        expected = random_list(k + 500, sizes=(64,) * 100)
        assert all(torch.equal(a.cpu(), b) for a, b in zip(slow, expected, strict=True)), k


def test_a_kernel_is_first_used_under_capture():
    """What loads its code must not spoil the capture: in a new process, where nothing is loaded
    yet.
    """
    code = """
import torch
from sfron_fast import functional as sf
lists = [[torch.full((100,), v, device="cuda")] for v in (1.0, 2.0, 3.0, 4.0)]
steps = [torch.zeros((), device="cuda")]
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    sf.adamw_step_(lists[0], lists[1], [lists[2][0]], [lists[3][0]], steps, lr=0.1)
assert steps[0].item() == 0.0
graph.replay()
graph.replay()
assert steps[0].item() == 2.0
"""
    subprocess.run(
        [sys.executable, "-c", code], check=True, env={**os.environ, "CUDA_MODULE_LOADING": "LAZY"}
    )


def test_ten_thousand_tensors_equal_the_cpu():
    sizes = [1 + i % 130 for i in range(10_000)]
    lists = random_list(0, sizes=sizes), random_list(1, sizes=sizes), random_list(2, sizes=sizes)
    both(sf.sgd_step_, *lists, lr=0.1, momentum=0.9, masks=random_masks(3, sizes))


@pytest.mark.long
def test_more_than_2_31_elements():
    numel = 2**31 + 77
    slow = torch.zeros(numel, dtype=torch.bfloat16, device="cuda")
    fast = torch.ones(numel, dtype=torch.bfloat16, device="cuda")
    sf.interpolate_([slow], [fast], 0.5)
    assert slow.min() == slow.max() == 0.5
    mask = torch.zeros((numel + 7) // 8, dtype=torch.uint8, device="cuda")
    mask[-1] = 0xFF
    norm = sf.masked_grad_norm([fast], [mask])
    assert norm.item() == pytest.approx(0.5 * (numel % 8) ** 0.5, rel=1e-6)
    sf.sgd_step_([slow], [fast], lr=1.0, masks=[mask], freeze_masked=True)
    assert slow[-5:].eq(0).all()
    assert slow[: numel // 8 * 8].min() == 0.5
