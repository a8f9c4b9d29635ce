"""Which code of 8 bits moments can be kept in: `python -m benchmarks.moment_codes`, 5 minutes.

3,000 steps of AdamW's rule on gradients whose size differs from column to column of a weight
[16, 1024] (log-normal; noise five times the mean), once with moments in fp32 and once with moments
in 8 bits, a scale for each group of a row. Every code is dithered. Wide: sigma 1, a range of some
hundreds within 256 columns; very wide: sigma 2.5, a range of a million. Distance: of the weights
from those of fp32, over what they moved; what other gradients of the same distribution change in
fp32 is the measure of what matters. Largest step: of the very wide ones from the tenth on, in units
of the learning rate. A code that takes a small exp_avg_sq for 0 makes steps of any size; the codes
that are not linear keep what is not 0 from that.
"""

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from sfron_fast.ops import moment_codes
from sfron_fast.ops.bits import thresholds

STEPS, SHAPE, NOISE = 3000, (16, 1024), 5.0
SIGMAS = (1.0, 2.5)
BETAS, EPS = (0.9, 0.999), 1e-8
GROUPS = (64, 256, 1024)
RESULT = Path(__file__).parent / "results" / "moment_codes.md"


def floats(codes: int, bits: int) -> Tensor:
    """0 and ``codes`` floats up to 1 with ``bits`` of mantissa."""
    steps = torch.arange(1 - codes, 1) + (127 << bits)
    return torch.cat([torch.zeros(1), (steps.to(torch.int32) << 23 - bits).view(torch.float32)])


# values of the codes 0 to 127 of exp_avg, and 0 to 255 of exp_avg_sq, relative to the largest
CODES: dict[str, tuple[Tensor, Tensor]] = {
    "linear": (torch.linspace(0, 1, 128), torch.linspace(0, 1, 256)),
    "square, square": (torch.linspace(0, 1, 128) ** 2, torch.linspace(0, 1, 256) ** 2),
    "square, 4th power": (torch.linspace(0, 1, 128) ** 2, torch.linspace(0, 1, 256) ** 4),
    "float, 4 bits": (floats(127, 4), floats(255, 4)),
    "float, 3 bits": (floats(127, 3), floats(255, 3)),
    "float, 2 bits": (floats(127, 2), floats(255, 2)),
}
CHOSEN = ("float, 3 bits", moment_codes.GROUP)


def through(values: Tensor, group: int, least: int) -> Callable[[Tensor, int], Tensor]:
    """Moments as a code of these values gives them back; ``least``: of what is not 0."""

    def coded(x: Tensor, step: int) -> Tensor:
        parts = x.abs().view(-1, group)
        scale = parts.amax(1, keepdim=True).clamp(min=moment_codes.LEAST_SCALE)
        size = parts / scale
        below = (torch.searchsorted(values, size, right=True) - 1).clamp(0, len(values) - 2)
        low, high = values[below], values[below + 1]
        threshold = (thresholds(x, step).view(-1, group) + 0.5) / 65536
        code = (below + (size - low > threshold * (high - low))).clamp(min=least)
        return (values[code] * scale).view_as(x) * x.sign()

    return coded


def gradients(sigma: float, seed: int) -> Callable[[int], Tensor]:
    generator = torch.Generator().manual_seed(0)
    scale = torch.exp(sigma * torch.randn(SHAPE[1], generator=generator)) * 1e-4
    mean = torch.randn(SHAPE, generator=generator)

    def at(step: int) -> Tensor:
        noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed + step))
        return scale * (mean + NOISE * noise)

    return at


def moved(
    grads: Callable[[int], Tensor],
    first: Callable[[Tensor, int], Tensor] | None = None,
    second: Callable[[Tensor, int], Tensor] | None = None,
) -> tuple[Tensor, float]:
    """How far the weights went at a learning rate of 1, and the largest step."""
    weight, m, v = (torch.zeros(SHAPE) for _ in range(3))
    largest = 0.0
    for step in range(1, STEPS + 1):
        g = grads(step)
        m = m * BETAS[0] + g * (1.0 - BETAS[0])
        v = v * BETAS[1] + g * g * (1.0 - BETAS[1])
        root = math.sqrt(1.0 - BETAS[1] ** step)
        update = m / (1.0 - BETAS[0] ** step) / (v.sqrt() / root + EPS)
        weight -= update
        if step > 10:
            largest = max(largest, update.abs().max().item())
        m = m if first is None else first(m, step)
        v = v if second is None else second(v, step)
    return weight, largest


def main() -> None:
    torch.set_num_threads(1)
    base = [moved(gradients(sigma, 1)) for sigma in SIGMAS]

    def line(name: str, group: object, found: list[tuple[Tensor, float]]) -> str:
        distances = [
            f"{100 * ((weight - start).norm() / start.norm()).item():.1f} %"
            for (weight, _), (start, _) in zip(found, base, strict=True)
        ]
        return f"| {name} | {group} | {' | '.join(distances)} | {found[-1][1]:.3g} |"

    lines = [
        "# Moments in 8 bits: codes and groups",
        "",
        __doc__.split("\n\n", 1)[1].strip(),
        "",
        f"Chosen: {CHOSEN[0]}, groups of {CHOSEN[1]} (`sfron_fast/ops/moment_codes.py`).",
        "",
        "| code of exp_avg, of exp_avg_sq | group | wide: distance | very wide | largest step |",
        "| --- | ---: | ---: | ---: | ---: |",
        line("fp32", "", base),
        line("fp32, other gradients", "", [moved(gradients(s, 1 << 20)) for s in SIGMAS]),
    ]
    for name, (first, second) in CODES.items():
        least = 0 if name == "linear" else 1
        for group in GROUPS:
            ways = through(first, group, 0), through(second, group, least)
            lines.append(line(name, group, [moved(gradients(s, 1), *ways) for s in SIGMAS]))
            print(lines[-1], flush=True)
    RESULT.write_text("\n".join([*lines, ""]))


if __name__ == "__main__":
    main()
