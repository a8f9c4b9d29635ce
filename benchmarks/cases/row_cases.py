"""The row cases: adaptive losses, forward and backward, against eager, compiled and Liger's."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import sfron_fast as sf

from ..harness import Arm, Case
from ..timer import rotating
from . import probes
from .row_arms import (
    BF16,
    FLOOR,
    FP32,
    TEMPERATURE,
    as_result,
    compiled,
    copies,
    differentiated,
    short,
    weighted,
)

# on a GPU: (samples, classes), or (samples, elements), and dtype
ENTROPIES = [
    (8192, 32_000, BF16),
    (8192, 128_256, BF16),
    (256, 1000, FP32),
    (256, 1000, BF16),
    (8192, 32_000, FP32),
    (8192, 128_256, FP32),
    (4096, 151_936, BF16),
    (256, 200, FP32),
    (256, 10, FP32),
]
SQUARES = [(256, 3 * 32 * 32, FP32), (64, 4 * 32 * 32, FP32), (4, 3 * 512 * 512, BF16)]
TARGETS = [(8192, 10, FP32), (8192, 1000, FP32), (1024, 32_000, FP32), (8192, 32_000, BF16)]


def cases(kind: str, device: str, tiny: bool) -> list[Case]:
    if kind == "cuda":
        entropies, squares, targets = ENTROPIES, SQUARES, TARGETS
    else:
        entropies = [
            (8192, 1000, FP32),
            (1024, 32_000, FP32),
            (256, 128_256, FP32),
            (256, 151_936, FP32),
            (256, 200, FP32),
            (256, 10, FP32),
        ]
        squares, targets = SQUARES[:1], TARGETS[:3]
    if tiny:
        entropies, squares = [(8, 100, BF16), (8, 100, FP32)], [(4, 48, FP32)]
        targets = [(8, 100, FP32)]
    return [
        *(cross_entropy_case(n, v, dtype, device, tiny) for n, v, dtype in entropies),
        *(mse_case(n, d, dtype, device, tiny) for n, d, dtype in squares),
        mse_case(*squares[0], device, tiny, relative=True),
        *(kl_case(n, v, dtype, device, tiny) for n, v, dtype in targets),
        *(
            kl_case(n, v, dtype, device, tiny, True)
            for n, v, dtype in dict.fromkeys((targets[0], targets[-1]))
        ),
    ]


def cross_entropy_case(
    samples: int, classes: int, dtype: torch.dtype, device: str, tiny: bool
) -> Case:
    """Floor: every logit read once, its gradient written once: the sum's.

    In place it is a read more, plain two.
    """
    size = samples * classes * dtype.itemsize
    tolerance = 1e-4 if dtype == torch.float32 else 1e-2  # eager rounds its gradient once, as ours

    def inputs(grad: bool) -> list[tuple[Tensor, Tensor]]:
        generator = torch.Generator(device).manual_seed(2)
        on: dict[str, Any] = {"generator": generator, "device": device}
        return [
            (
                torch.randn(samples, classes, dtype=dtype, **on).requires_grad_(grad),
                torch.randint(classes, (samples,), **on),
            )
            for _ in range(copies(size))
        ]

    def stock(logits: Tensor, labels: Tensor) -> Tensor:
        return weighted(F.cross_entropy(logits.float(), labels, reduction="none"))

    def over(pair: tuple[Tensor, Tensor]) -> list[Tensor]:
        logits, labels = pair
        ours(as_result(logits), labels, inplace=True).backward()
        return [logits]

    def summed(pair: tuple[Tensor, Tensor]) -> list[Tensor]:
        """The gradient comes without its normaliser."""
        logits, labels = pair
        total, normaliser = sf.adaptive_cross_entropy_sum_(
            as_result(logits), labels, TEMPERATURE, floor=FLOOR
        )
        total.backward()
        return [logits, normaliser]

    def in_place_arm(name: str, step: Callable[[tuple[Tensor, Tensor]], list[Tensor]]) -> Arm:
        """What one run writes is the logits of a later one; the check has its own."""
        arm = rotating(f"sfron_fast, {name}", step, inputs(False))

        def check() -> list[Tensor]:
            gradient, *normaliser = step(inputs(False)[0])
            return [gradient / normaliser[0] if normaliser else gradient]

        return Arm(arm.name, arm.run, check, tolerance)

    def liger(logits: Tensor, labels: Tensor) -> Tensor:
        from liger_kernel.transformers.functional import liger_cross_entropy

        return weighted(liger_cross_entropy(logits, labels, reduction="none"))

    def liger_arm() -> Arm:
        if device != "cuda":
            raise ValueError("Liger's kernels are written in Triton, which needs a GPU")
        import liger_kernel  # noqa: F401  # before anything is allocated

        step, ring = differentiated(liger), inputs(True)
        arm = rotating("Liger, weighted", step, ring)
        # it writes over its logits
        return Arm(arm.name, arm.run, lambda: step(inputs(True)[0]), tolerance)

    def arm(name: str, function: Callable[..., Tensor]) -> Arm:
        return rotating(name, differentiated(function), inputs(True), tolerance)

    ours = partial(sf.adaptive_cross_entropy, temperature=TEMPERATURE, floor=FLOOR)
    made = [
        partial(probes.probe, 2 * size, device),
        partial(arm, "eager torch", stock),
        lambda: arm("torch.compile", compiled(stock, tiny)),
        liger_arm,
        partial(in_place_arm, "sum", summed),
        partial(in_place_arm, "in place", over),
        partial(arm, "sfron_fast", ours),
    ]
    ring = copies(size) * size
    # logits, and gradients beside them
    held = [probes.probe_bytes(2 * size), *3 * [2 * ring], *2 * [ring], 2 * ring]
    # inputs of a check, what two arms did; what eager torch makes
    more = ring + 2 * size + 4 * 4 * samples * classes
    title = f"cross-entropy {samples:,} x {classes:,} {short(dtype)}"
    return Case(title, made, 2 * size, 1.5, held=held, more=more)


def mse_case(
    samples: int,
    elements: int,
    dtype: torch.dtype,
    device: str,
    tiny: bool,
    relative: bool = False,
) -> Case:
    """Floor: prediction and target read once, the gradient written once. ``relative``: to a
    reference, with a cap.
    """
    size = samples * elements * dtype.itemsize

    def inputs() -> list[tuple[Tensor, Tensor]]:
        on: dict[str, Any] = {
            "generator": torch.Generator(device).manual_seed(3),
            "device": device,
            "dtype": dtype,
        }
        made = [torch.randn(2, samples, elements, **on).unbind() for _ in range(copies(2 * size))]
        return [(prediction.clone().requires_grad_(), target) for prediction, target in made]

    usual = torch.logspace(-2.0, 0.0, samples, device=device) if relative else None
    cap = 100.0  # met by some: the losses are about 2

    def stock(prediction: Tensor, target: Tensor) -> Tensor:
        each = F.mse_loss(prediction.float(), target.float(), reduction="none").mean(1)
        return weighted(each) if usual is None else weighted(each / usual, cap)

    def authors(prediction: Tensor, target: Tensor) -> Tensor:
        """Weights of the batch's size together, the floor behind the power, a mean."""
        each = (prediction.float() - target.float()).square().mean(dim=1)
        each = each if usual is None else each / usual
        weights = 1.0 / (each.detach() ** TEMPERATURE + 1e-8)
        weights = weights / weights.sum() * len(each)
        if usual is not None:
            weights = weights * (each.detach() < cap)
        return (weights * each).mean()

    def arm(name: str, function: Callable[..., Tensor]) -> Arm:
        tolerance = 1e-4 if dtype == torch.float32 else 1e-2
        return rotating(name, differentiated(function), inputs(), tolerance)

    ours = partial(sf.adaptive_mse, temperature=TEMPERATURE, floor=FLOOR)
    if usual is not None:
        ours = partial(ours, reference=usual, cap=cap)
    made = [
        partial(probes.probe, 3 * size, device),
        partial(arm, "authors' style", authors),
        partial(arm, "eager torch", stock),
        lambda: arm("torch.compile", compiled(stock, tiny)),
        partial(arm, "sfron_fast", ours),
    ]
    title = f"{'relative ' if relative else ''}mse {samples:,} x {elements:,} {short(dtype)}"
    return Case(title, made, 3 * size, 1.0)


def kl_case(
    samples: int,
    classes: int,
    dtype: torch.dtype,
    device: str,
    tiny: bool,
    of_classes: bool = False,
) -> Case:
    """Floor: logits and teacher read once, the gradient written once. Ours reads both twice.

    ``of_classes``: a bias of the teacher that forbids every tenth class, and class weights of 0 and
    1.
    """
    size = samples * classes * dtype.itemsize
    heat = 4.0  # SCRUB's temperature

    def inputs() -> list[tuple[Tensor, Tensor]]:
        on: dict[str, Any] = {
            "generator": torch.Generator(device).manual_seed(4),
            "device": device,
            "dtype": dtype,
        }
        made = [torch.randn(2, samples, classes, **on).unbind() for _ in range(copies(2 * size))]
        return [(logits.clone().requires_grad_(), teacher) for logits, teacher in made]

    bias, weights = torch.zeros(classes, device=device), torch.ones(classes, device=device)
    bias[1::10], weights[2::10] = -torch.inf, 0.0
    given = {"class_bias": bias, "class_weights": weights} if of_classes else {}

    def selected(logits: Tensor, teacher: Tensor) -> Tensor:
        """0 times inf is 0."""
        log_q = F.log_softmax(logits.float() / heat, 1)
        p = F.softmax(teacher.float() / heat + bias, 1)
        terms = torch.xlogy(p, p) - p * log_q
        return (terms * weights).sum(1).mean() * heat**2

    def stock(logits: Tensor, teacher: Tensor) -> Tensor:
        pair = (F.log_softmax(x.float() / heat, 1) for x in (logits, teacher))
        return F.kl_div(*pair, log_target=True, reduction="batchmean") * heat**2

    def probabilities(logits: Tensor, teacher: Tensor) -> Tensor:
        """What SCRUB and BT call: a softmax in place of the teacher's log-softmax."""
        target = F.softmax(teacher.float() / heat, 1)
        return (
            F.kl_div(F.log_softmax(logits.float() / heat, 1), target, reduction="batchmean")
            * heat**2
        )

    def arm(name: str, function: Callable[..., Tensor]) -> Arm:
        tolerance = 1e-4 if dtype == torch.float32 else 1e-2
        return rotating(name, differentiated(function), inputs(), tolerance)

    others = (
        [
            partial(arm, "eager torch", selected),
            lambda: arm("torch.compile", compiled(selected, tiny)),
        ]
        if of_classes
        else [
            partial(arm, "eager torch", stock),
            partial(arm, "eager torch, probabilities", probabilities),
            lambda: arm("torch.compile", compiled(stock, tiny)),
        ]
    )
    made = [
        partial(probes.probe, 3 * size, device),
        *others,
        partial(arm, "sfron_fast", partial(sf.soft_target_kl, temperature=heat, **given)),
    ]
    title = f"soft-target KL {'of classes ' if of_classes else ''}{samples:,} x {classes:,}"
    return Case(f"{title} {short(dtype)}", made, 3 * size, 1.0)
