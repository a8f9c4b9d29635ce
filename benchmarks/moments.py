"""What moments of bf16 cost: `python -m benchmarks.moments`, 4 minutes on two cores.

The demo's ConvNet forgets its wrong labels with SFRonAdamW, 200 cycles of one forget and five
retain steps, from the same weights with the same batches: moments in fp32, in bf16
(``state_dtype``), and in fp32 but for exp_avg_sq, which is rounded to the nearest bf16 after every
step. What other batches change in fp32 is the measure of what matters.
"""

import copy
import statistics
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import sfron_fast as sf
from sfron_fast.demo import digits
from sfron_fast.evaluation import accuracy, predict

SEEDS = range(5)
CYCLES, RETAIN_STEPS = 200, 5
FP32, OTHER, BF16, NEAREST = (
    "fp32",
    "fp32, other batches",
    "bf16",
    "fp32, exp_avg_sq to the nearest bf16",
)
RESULT = Path(__file__).parent / "results" / "moments.md"


def forever(data: torch.utils.data.TensorDataset) -> Iterator[list[Tensor]]:
    while True:
        yield from digits.shuffled(data)


def to_nearest(optimizer: torch.optim.Optimizer) -> None:
    """exp_avg_sq of fp32 as bf16 would keep it, rounded to nearest."""
    for state in optimizer.state.values():
        state["exp_avg_sq"].copy_(state["exp_avg_sq"].to(torch.bfloat16))


def unlearned(
    original: torch.nn.Module, split: digits.Split, mask: sf.SaliencyMask, how: str, seed: int
) -> torch.nn.Module:
    model = copy.deepcopy(original)
    torch.manual_seed(3000 + seed + 100 * (how == OTHER))
    optimizer = sf.SFRonAdamW(
        model.named_parameters(),
        lr=1e-3,
        weight_decay=0.01,
        saliency=mask,
        max_norm=0.5,
        retain_steps=RETAIN_STEPS,
        slow_lr=0.5,
        state_dtype=torch.bfloat16 if how == BF16 else None,
    )
    forget, retain = forever(split.forget), forever(split.retain)
    model.train()

    def step(loss: Tensor, take: Callable[[], Any]) -> None:
        optimizer.zero_grad()
        loss.backward()
        take()
        if how == NEAREST:
            to_nearest(optimizer)

    for _ in range(CYCLES):
        inputs, targets = next(forget)
        step(-sf.adaptive_cross_entropy(model(inputs), targets), optimizer.forget_step)
        for _ in range(RETAIN_STEPS):
            inputs, targets = next(retain)
            step(F.cross_entropy(model(inputs), targets), optimizer.step)
    return model


def flat(tensors: Any) -> Tensor:
    return torch.cat([t.detach().double().flatten() for t in tensors])


def run(seed: int) -> dict[str, list[float]]:
    """Per way: distance of the weights from those of fp32, and the accuracies."""
    torch.set_num_threads(1)
    split = digits.make_split("wrong labels", seed)
    original = digits.train(split.train, seed)
    forget, retain = digits.ordered(split.forget), digits.ordered(split.retain)
    mask = sf.estimate_mask(original, forget=forget, retain=retain, estimator="batch")
    found, start, base = {}, flat(original.parameters()), None
    for how in (FP32, OTHER, BF16, NEAREST):
        model = unlearned(original, split, mask, how, seed)
        weights = flat(model.parameters())
        base = weights if base is None else base
        scores = [
            accuracy(predict(model, digits.ordered(data)))
            for data in (split.forget, split.retain, split.test)
        ]
        apart = (weights - base).norm() / (base - start).norm()
        found[how] = [100 * apart.item(), *scores]
    return found


def main() -> None:
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        results = list(pool.map(run, SEEDS))
    lines = [
        "# Moments of bf16",
        "",
        __doc__.split("\n\n", 1)[1].strip(),
        "",
        (
            f"Means of {len(SEEDS)} seeds. Distance: of the weights from those of fp32, over what"
            " they moved."
        ),
        "",
        "| moments | distance | forget accuracy | retain | test |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for how in results[0]:
        apart, *scores = (statistics.mean(result[how][i] for result in results) for i in range(4))
        lines.append(f"| {how} | {apart:.0f} % | {' | '.join(f'{s:.1f}' for s in scores)} |")
    RESULT.write_text("\n".join([*lines, ""]))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
