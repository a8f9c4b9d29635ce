"""The cases of head and loss in one: mean cross-entropy from hidden states, forward and backward.

The mean, as that is what every rival computes; ours takes any weights at the same cost. Products of
matrices take the time, so there is no probe; memory is the other figure.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import sfron_fast as sf

from ..harness import Arm, Case
from .row_arms import BF16, FP32, compiled, short

# (rows, features, classes, dtype, frozen head)
GPU = [(8192, 4096, 131_072, BF16, False), (8192, 4096, 131_072, BF16, True)]
CPU = [
    (1024, 256, 131_072, FP32, False),
    (1024, 1024, 32_000, FP32, False),
    (1024, 1024, 32_000, FP32, True),
    (1024, 1024, 32_000, BF16, False),
]
TINY = [(24, 16, 203, FP32, False), (24, 16, 203, FP32, True), (24, 16, 203, BF16, False)]


def cases(kind: str, device: str, tiny: bool) -> list[Case]:
    shapes = TINY if tiny else GPU if kind == "cuda" else CPU
    return [case(*shape, device=device, tiny=tiny) for shape in shapes]


Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def case(
    rows: int,
    features: int,
    classes: int,
    dtype: torch.dtype,
    frozen: bool,
    *,
    device: str,
    tiny: bool,
) -> Case:
    generator = torch.Generator(device).manual_seed(5)

    def inputs() -> tuple[Tensor, Tensor, Tensor]:
        generator.manual_seed(5)
        hidden = torch.randn(rows, features, generator=generator, device=device)
        weight = torch.randn(classes, features, generator=generator, device=device)
        labels = torch.randint(classes, (rows,), generator=generator, device=device)
        weight.mul_(features**-0.5)
        return (
            hidden.to(dtype).requires_grad_(),
            weight.to(dtype).requires_grad_(not frozen),
            labels,
        )

    def arm(name: str, loss: Loss) -> Arm:
        hidden, weight, labels = inputs()

        def run() -> list[Tensor]:
            hidden.grad = weight.grad = None
            loss(hidden, weight, labels).backward()
            return [t.grad for t in (hidden, weight) if t.grad is not None]

        return Arm(name, run, run, 1e-4 if dtype == FP32 else 3e-2)

    def eager(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        """Where bf16 products are slow, as a careful user writes it: in fp32."""
        if device == "cpu":
            hidden, weight = hidden.float(), weight.float()
        return F.cross_entropy(F.linear(hidden, weight).float(), labels)

    def by_chunks(size: int) -> Loss:
        """TRL's way: chunks of rows whose logits the backward pass makes again."""

        def loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
            def part(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
                return eager(h, w, y) * (len(y) / rows)

            parts = zip(hidden.split(size), labels.split(size), strict=True)
            found = [checkpoint(part, h, weight, y, use_reentrant=False) for h, y in parts]
            return torch.stack(found).sum()

        return loss

    def torch_arm(size: int) -> Arm:
        if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
            raise ValueError(f"torch {torch.__version__} has no linear_cross_entropy")
        options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=size, chunking_method=None)

        def loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
            return F.linear_cross_entropy(hidden, weight, labels, options=options)

        return arm(f"torch, chunks of {size:,}", loss)

    def liger_arm() -> Arm:
        if device != "cuda":
            raise ValueError("Liger's kernels are written in Triton, which needs a GPU")
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        return arm("Liger", liger_fused_linear_cross_entropy)

    def cut_cross_entropy_arm() -> Arm:
        if device != "cuda":
            raise ValueError("its kernels are written in Triton, which needs a GPU")
        from cut_cross_entropy import linear_cross_entropy

        # exact: by default it leaves out what is small in the gradient
        return arm("cut-cross-entropy", partial(linear_cross_entropy, impl="cce_exact"))

    def two_passes(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return -sf.linear_logp(hidden, weight, labels)[0].mean()

    def one_pass(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return sf.linear_adaptive_cross_entropy(hidden, weight, labels, temperature=0.0).loss

    sizes = (8, 16) if tiny else (256, 1024) if device == "cpu" else (2048, 8192)
    made: list[Callable[[], Arm]] = [
        partial(arm, "full logits", eager),
        lambda: arm("full logits, torch.compile", compiled(eager, tiny)),
        partial(arm, f"chunks of {sizes[0]:,} rows, made again", by_chunks(sizes[0])),
        *(partial(torch_arm, size) for size in sizes),
        liger_arm,
        cut_cross_entropy_arm,
        partial(arm, "sfron_fast, logp", two_passes),
        partial(arm, "sfron_fast", one_pass),
    ]
    head = ", frozen" if frozen else ""
    title = f"head {rows:,} x {features:,} x {classes:,} {short(dtype)}{head}"
    return Case(title, made, seconds=4.0, needs=0.0 if tiny else 120.0)
