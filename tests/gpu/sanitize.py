"""Every op on small odd lists, GPU against CPU: a short program for compute-sanitizer.

`compute-sanitizer --tool memcheck --error-exitcode 9 python3 tests/gpu/sanitize.py`, with
PYTORCH_NO_CUDA_MEMORY_CACHING=1, as otherwise tensors share allocations and an access beyond one of
them is not seen. Needs no pytest. `--rehearse` runs it on the CPU.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor

import sfron_fast as sf
from sfron_fast import functional as F
from sfron_fast.ops import lists
from sfron_fast.ops import registry as ops

SIZES = (0, 1, 7, 8, 9, 63, 65, 2047, 2049, 5000)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LISTS = (
    "masked_grad_norm",
    "sgd_step_",
    "adamw_step_",
    "interpolate_",
    "fisher_accumulate_",
    "saliency_mask",
)
ROWS = (
    "adaptive_cross_entropy",
    "adaptive_cross_entropy_backward_",
    "adaptive_cross_entropy_sum_",
    "adaptive_cross_entropy_scale_",
    "adaptive_mse",
    "soft_target_kl",
    "sample_square_accumulate_",
)

ENTROPIES = ((5, 1, 10), (3, 1, 1000), (2, 1, 9001), (3, 4, 77))  # samples, tokens, classes
SQUARES = ((5, 3), (3, 1025), (2, 70001))
TARGETS = ((5, 3), (300, 10), (3, 1025), (3, 9001))
LAYERS = ((3, 1, 5, 7), (3, 35, 70, 130))  # samples, positions, outputs, features


def tensors(seed: int, dtype: torch.dtype, shift: int, positive: bool = False) -> list[Tensor]:
    """``shift`` elements off their allocation's beginning, so that 16-byte accesses are not always
    possible.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(n + shift, generator=generator) for n in SIZES]
    return [(t.abs() if positive else t).to(dtype)[shift:] for t in drawn]


def masks(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randint(0, 256, ((n + 7) // 8,), dtype=torch.uint8, generator=generator)
        for n in SIZES
    ]


def there(value, device: str):
    """Copies on a device, as far off their allocation's beginning as before."""
    if isinstance(value, Tensor):
        room = torch.empty(value.storage_offset() + value.numel(), dtype=value.dtype, device=device)
        return room[value.storage_offset() :].view(value.shape).copy_(value)
    return [there(item, device) for item in value] if isinstance(value, list) else value


def list_ops(dtype: torch.dtype, shift: int, device: str) -> dict[str, list[Tensor]]:
    """What each list op leaves on a device, from the same inputs."""
    p, g, m, s = (there(tensors(i, dtype, shift), device) for i in range(4))
    v = there(tensors(4, dtype, shift, positive=True), device)
    left: dict[str, list[Tensor]] = {}
    bits = there(masks(5), device)
    norm = F.masked_grad_norm(g, bits)
    left["masked_grad_norm"] = [norm]
    wide = [there(tensors(i, torch.float32, shift, positive=True), device) for i in (6, 7)]
    F.fisher_accumulate_(wide[0], g, 0.25)
    packed, counts = F.saliency_mask(*wide, 0.8)
    left["fisher_accumulate_"], left["saliency_mask"] = (
        [w.clone() for w in wide[0]],
        [
            *packed,
            counts,
        ],
    )
    # the same number on both devices
    clip = {"norm": torch.tensor(3.0, device=device), "max_norm": 1.0}
    numbers = torch.tensor((0.1, 0.01, 0.5), dtype=torch.float64, device=device)
    forget = {"lr": 0.1, "weight_decay": 0.01, "masks": bits, "slow_save": s, **clip}
    for freeze in (False, True):
        F.sgd_step_(p, g, m, momentum=0.9, freeze_masked=freeze, **forget)
    F.sgd_step_(p, g, m, lr=0.1, momentum=0.9, nesterov=True, slow_from=s, numbers=numbers)
    left["sgd_step_"] = [*p, *m, *s]
    q, first = there(tensors(8, dtype, shift), device), there(tensors(9, dtype, shift), device)
    most = there(tensors(10, dtype, shift, positive=True), device)
    steps = [torch.zeros((), device=device) for _ in SIZES]
    F.adamw_step_(q, g, first, v, steps, **forget)
    F.adamw_step_(q, g, first, v, steps, most, lr=0.1, slow_from=s, slow_lr=0.5, numbers=numbers)
    left["adamw_step_"] = [*q, *first, *v, *most, *steps]
    F.interpolate_(s, q, 0.3)
    left["interpolate_"] = [*s, *q]
    return left


def flat_ops(dtype: torch.dtype, shift: int, device: str) -> dict[str, list[Tensor]]:
    """As ``list_ops``, every list but the first of a call as one tensor; its padding is part of
    what is left.
    """
    p, g = (there(tensors(i, dtype, shift), device) for i in (0, 1))
    s, m, v, w = (
        [there(flattened(tensors(i, kind, 0, positive=True), shift), device)]
        for i, kind in ((2, dtype), (3, dtype), (4, dtype), (5, torch.float32))
    )
    bits, steps = (
        [lists.flatten_masks(there(masks(6), device), p)],
        [torch.zeros(len(SIZES), device=device)],
    )
    left: dict[str, list[Tensor]] = {"masked_grad_norm": [F.masked_grad_norm(g, bits)]}
    clip = {"norm": torch.tensor(3.0, device=device), "max_norm": 1.0}
    F.sgd_step_(p, g, m, lr=0.1, momentum=0.9, masks=bits, freeze_masked=True, slow_save=s, **clip)
    F.adamw_step_(p, g, m, v, steps, lr=0.1, masks=bits, slow_from=s, slow_lr=0.5)
    left["sgd_step_"] = left["adamw_step_"] = [*p, *m, *v, *s, *steps]
    F.interpolate_(p, s, 0.3)
    left["interpolate_"] = [*p, *s]
    F.fisher_accumulate_(w, g, 0.25)
    forget = there(tensors(7, torch.float32, shift, positive=True), device)
    packed, counts = F.saliency_mask(forget, w, 0.8)
    left["fisher_accumulate_"], left["saliency_mask"] = [w[0].clone()], [*packed, counts]
    return left


def flattened(parts: list[Tensor], shift: int) -> Tensor:
    """The flat list of ``parts``, ``shift`` elements off its allocation's beginning."""
    whole = torch.full((shift + lists.flat_size(parts),), 7.0).to(parts[0].dtype)[shift:]
    for view, part in zip(lists.spread([whole], parts), parts, strict=True):
        view.copy_(part)
    return whole


def flat_states(device: str) -> list[Tensor]:
    """The optimizers, whose state lies in flat lists; forget and retain steps."""
    params = [torch.nn.Parameter(t) for t in there(tensors(11, torch.float32, 0), device)]
    for p, g in zip(params, there(tensors(12, torch.float32, 0), device), strict=True):
        p.grad = g
    named = [(f"p{i}", p) for i, p in enumerate(params)]
    mask = sf.SaliencyMask.from_bool({n: p.detach().cpu() > 0 for n, p in named})
    for make in (sf.SFRonSGD, sf.SFRonAdamW):
        optimizer = make(named, lr=0.1, saliency=mask, max_norm=1e6, slow_lr=0.5, retain_steps=1)
        for _ in range(2):
            optimizer.forget_step()
            optimizer.step()
    return [p.detach() for p in params]


def row_ops(dtype: torch.dtype, device: str) -> dict[str, list[Tensor]]:
    """Losses and gradients of the row ops, with ignored labels; squares of samples."""
    left: dict[str, list[Tensor]] = {name: [] for name in ROWS}
    for samples, tokens, classes in ENTROPIES:
        generator = torch.Generator().manual_seed(classes)
        logits = (
            torch.randn(samples, tokens, classes, generator=generator)
            .to(dtype)
            .to(device)
            .requires_grad_()
        )
        labels = torch.randint(classes, (samples, tokens), generator=generator).to(device)
        labels[0, tokens - 1 :] = -100 if tokens > 1 else labels[0, 0]
        loss = sf.adaptive_cross_entropy(logits, labels)
        loss.backward()
        left["adaptive_cross_entropy"] += [loss.detach(), logits.grad]
        loss = sf.adaptive_cross_entropy(logits * 1.0, labels, inplace=True)
        left["adaptive_cross_entropy_backward_"] += torch.autograd.grad(loss, logits)
        if tokens == 1:
            total, normaliser = sf.adaptive_cross_entropy_sum_(
                logits.squeeze(1) * 1.0, labels.squeeze(1)
            )
            left["adaptive_cross_entropy_sum_"] += [total.detach(), normaliser]
            left["adaptive_cross_entropy_scale_"] += torch.autograd.grad(total * -2.0, logits)
    for shape in SQUARES:
        generator = torch.Generator().manual_seed(shape[1])
        made = [torch.randn(shape, generator=generator).to(dtype).to(device) for _ in range(2)]
        loss = sf.adaptive_mse(made[0].requires_grad_(), made[1])
        loss.backward()
        left["adaptive_mse"] += [loss.detach(), made[0].grad]
    for shape in TARGETS:
        generator = torch.Generator().manual_seed(shape[1])
        made = [torch.randn(shape, generator=generator).to(dtype).to(device) for _ in range(2)]
        weights = torch.tensor([1.0, 0.0, *[-0.5] * (shape[0] - 2)], device=device)
        bias, k = (torch.rand(shape[1], generator=generator).to(device) for _ in range(2))
        bias[1:2], k[:1] = -torch.inf, 0.0
        of_classes = {"class_bias": bias, "class_weights": k}
        for given, more in ((weights, {}), (None, {}), (weights, of_classes)):
            loss = sf.soft_target_kl(made[0].requires_grad_(), made[1], given, 2.0, **more)
            left["soft_target_kl"] += [loss.detach(), *torch.autograd.grad(loss, made[0])]
    for samples, positions, *lanes in LAYERS:
        generator = torch.Generator().manual_seed(positions)
        made = [torch.randn(samples, positions, n, generator=generator) for n in lanes]
        factors = [m.to(dtype).to(device) for m in made]
        accumulator = torch.ones(lanes, device=device)
        left["sample_square_accumulate_"].append(
            sf.functional.sample_square_accumulate_(accumulator, *factors, 0.5)
        )
    return left


def worst(found: list[Tensor], wanted: list[Tensor]) -> float:
    """Largest difference, relative to the largest value of its tensor."""
    pairs = [
        (a.cpu().double(), b.double()) for a, b in zip(found, wanted, strict=True) if a.numel() > 0
    ]
    return max(((a - b).abs().max() / b.abs().max().clamp_min(1e-30)).item() for a, b in pairs)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rehearse", action="store_true", help="on the CPU")
    parser.add_argument("--any-kernel", action="store_true", help="reference kernels may serve")
    options = parser.parse_args()
    device = "cpu" if options.rehearse else "cuda"
    wrong = []
    # others: the same bits
    exact: dict[str, float | None] = {"masked_grad_norm": 1e-6, **dict.fromkeys(ROWS)}
    for dtype in DTYPES:
        results = [
            (run(dtype, shift, device), run(dtype, shift, "cpu"))
            for run in (list_ops, flat_ops)
            for shift in (0, 1)
        ]
        results.append((row_ops(dtype, device), row_ops(dtype, "cpu")))
        if dtype == torch.float32:
            results.append(
                ({"optimizers": flat_states(device)}, {"optimizers": flat_states("cpu")})
            )
        for found, wanted in results:
            for name in found:
                rounding = (
                    1e-5
                    if dtype == torch.float32
                    else 2.0**-7
                    if dtype == torch.bfloat16
                    else 2.0**-9
                )
                most = exact.get(name, 1e-5 if name == "optimizers" else 0.0)
                error = worst(found[name], wanted[name])
                if not error <= (rounding if most is None else most):
                    wrong.append(f"{name}, {dtype}: off by {error:.1e}")
    if device == "cuda":
        torch.cuda.synchronize()
    # now: one that fails is replaced
    served = {name: ops.kernel_for(name, device) for name in (*LISTS, *ROWS)}
    print(", ".join(f"{name}: {kernel}" for name, kernel in served.items()))
    if not options.any_kernel:
        wrong += [
            f"{name} runs on its reference kernel"
            for name, kernel in served.items()
            if kernel == "reference"
        ]
    print("\n".join(wrong) or f"every op on {device} agrees with the CPU")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
