"""An ordinary training script that forgets, by two lines; run it from the project's root:

    python -m examples.start.swap

The loop of `finetune` was written for torch's SGD. The two lines marked `# swapped` and `# added`
make it forget; what they need is above it. A tenth of the labels are wrong and learnt by heart:
these samples are what is forgotten. Without the two lines 97 % of them stay.
"""

import argparse
from collections.abc import Iterator, Sequence
from itertools import cycle

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

import sfron_fast as sf
from sfron_fast.demo.digits import Split, make_split, ordered, shuffled, train
from sfron_fast.evaluation import accuracy, predict

RETAIN_STEPS = 5  # ordinary steps for each that forgets
FORGET_WEIGHT, MAX_NORM = 25.0, 1.6  # chosen for these digits: benchmarks/demo_settings.py


def prepare(model: nn.Module, split: Split) -> tuple[sf.SaliencyMask, Iterator[list[Tensor]]]:
    """Which weights may forget, and forget batches without end."""
    forget = shuffled(split.forget)
    mask = sf.estimate_mask(model, forget=forget, retain=shuffled(split.retain))
    return mask, (batch for loader in cycle([forget]) for batch in loader)


def forget_now_and_then(
    model: nn.Module, opt: sf.SFRonSGD, batches: Iterator[list[Tensor]]
) -> None:
    """One forget step where a cycle begins: every ``RETAIN_STEPS`` steps."""
    if not opt.mid_cycle:
        x, y = next(batches)
        opt.zero_grad()
        (-FORGET_WEIGHT * sf.adaptive_cross_entropy(model(x), y)).backward()
        opt.forget_step()


def finetune(model: nn.Module, split: Split, epochs: int) -> None:
    """The training script."""
    mask, forget_batches = prepare(model, split)
    settings = {"lr": 0.01, "momentum": 0.9, "weight_decay": 5e-4}
    ours = {"saliency": mask, "max_norm": MAX_NORM, "retain_steps": RETAIN_STEPS}
    model.train()
    opt = sf.SFRonSGD(model.named_parameters(), **settings, **ours)  # swapped
    # opt = torch.optim.SGD(model.parameters(), **settings)
    for _ in range(epochs):
        for x, y in shuffled(split.retain):
            forget_now_and_then(model, opt, forget_batches)  # added
            opt.zero_grad()
            F.cross_entropy(model(x), y).backward()
            opt.step()


def main(arguments: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    """Accuracies in percent before and after, by set."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=12, help="of the script")
    parser.add_argument("--trained", type=int, default=25, help="epochs before it")
    options = parser.parse_args(arguments)
    split = make_split("wrong labels", seed=0)
    model = train(split.train, seed=0, epochs=options.trained)
    sets: dict[str, DataLoader] = {
        "forget": ordered(split.forget),
        "retain": ordered(split.retain),
        "test": ordered(split.test),
    }
    before = {name: accuracy(predict(model, batches)) for name, batches in sets.items()}
    torch.manual_seed(0)
    finetune(model, split, options.epochs)
    after = {name: accuracy(predict(model, batches)) for name, batches in sets.items()}
    for name in sets:
        print(f"{name:>8}: {before[name]:5.1f} % -> {after[name]:5.1f} %")
    return {"before": before, "after": after}


if __name__ == "__main__":
    main()
