"""What `benchmarks.defaults` lets models forget: classifiers, a language model, a DDPM."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset, default_collate

import sfron_fast as sf
from sfron_fast.demo import digits

Judge = Callable[[nn.Module], dict[str, float]]


class Case(NamedTuple):
    """A model, what it shall forget, and how it is judged."""

    model: nn.Module
    retrained: nn.Module | None
    sets: dict[str, DataLoader[Any]]  # forget, retain
    holdout: DataLoader[Any] | None
    judge: Judge
    task: sf.Task | None = None


# --- classifiers ----------------------------------------------------------------------------------


def accuracy(model: nn.Module, data: Dataset[Any]) -> float:
    """Percent."""
    right = total = 0
    with torch.no_grad():
        for inputs, labels in DataLoader(data, 256):
            right += int((model.eval()(inputs).argmax(1) == labels).sum())
            total += len(labels)
    return 100.0 * right / total


def classifier(train: Callable[[Dataset[Any]], nn.Module], parts: dict[str, Dataset[Any]]) -> Case:
    """``parts``: forget, retain, val, test."""
    both: Any = torch.utils.data.ConcatDataset([parts["forget"], parts["retain"]])
    sets = {n: DataLoader(parts[n], 64, shuffle=True) for n in ("forget", "retain")}

    def judge(model: nn.Module) -> dict[str, float]:
        return {name: accuracy(model, parts[name]) for name in ("forget", "retain", "test")}

    held = DataLoader(parts["val"], 64)
    return Case(train(both), train(parts["retain"]), sets, held, judge)


def digits_case(kind: str, seed: int) -> Case:
    """Of the demo's model and data; random samples are those that have the wrong labels there."""
    split = digits.make_split("one class" if kind == "one class" else "wrong labels", seed)
    parts = {n: getattr(split, n) for n in ("forget", "retain", "val", "test")}
    if kind == "random samples":
        images, labels = digits.load_digits()
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(1000 + seed))
        chosen = order[: len(parts["forget"])]
        parts["forget"] = TensorDataset(images[chosen], labels[chosen])
    return classifier(lambda data: digits.train(data, seed), parts)


class Folder(Dataset[Any]):
    """Images in ``root/class/name.png``, as one has them."""

    def __init__(self, root: Path) -> None:
        from PIL import Image

        self.open = Image.open
        classes = sorted(path.name for path in root.iterdir())
        self.files = [(p, i) for i, c in enumerate(classes) for p in sorted((root / c).iterdir())]
        self.targets = [label for _, label in self.files]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.files[index]
        pixels = torch.from_numpy(np.array(self.open(path))).permute(2, 0, 1)
        return pixels.float().div(64.0).sub(2.0), label


class Residual(nn.Module):
    """Two convolutions with BatchNorm around a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.short = nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.short(x))


def resnet(width: int = 16) -> nn.Module:
    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU()]
    layers += [Residual(width, 2 * width, 2), Residual(2 * width, 4 * width, 2)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, 10))


def folder_case(kind: str, seed: int, cifar: Path, root: Path) -> Case:
    """150 images of each class to train on, 40 held out, 50 to test."""
    from PIL import Image

    from .experiments.data import MARGIN, load

    images, _, _ = load(cifar, 5000, 1, "cpu")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    sizes, made = {"train": 150, "val": 40, "test": 50}, {}
    begin = dict.fromkeys(range(10), 0)
    for part, size in sizes.items():
        for label in range(10):
            place = root / part / str(label)
            place.mkdir(parents=True)
            rows = order[images.labels[order] == label][begin[label] :][:size]
            begin[label] += size
            for row in rows.tolist():
                pixels = images.pixels[row, MARGIN:-MARGIN, MARGIN:-MARGIN].numpy()
                Image.fromarray(pixels).save(place / f"{row}.png")
        made[part] = Folder(root / part)
    label = (3 * seed + 1) % 10
    numbers = torch.randperm(1500, generator=torch.Generator().manual_seed(seed))
    if kind == "one class":
        there = torch.tensor(made["train"].targets) == label
        forget, retain = there.nonzero()[:, 0], (~there).nonzero()[:, 0]
        for part in ("val", "test"):
            rows = [i for i, other in enumerate(made[part].targets) if other != label]
            made[part] = Subset(made[part], rows)
    else:
        forget, retain = numbers[:100], numbers[100:]
    parts = {
        n: Subset(made["train"], r.tolist()) for n, r in (("forget", forget), ("retain", retain))
    }

    def train(data: Dataset[Any]) -> nn.Module:
        torch.manual_seed(seed)
        model, batches, epochs = resnet(), DataLoader(data, 64, shuffle=True), 25
        sgd = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=5e-4)
        steps = epochs * len(batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(sgd, 0.1, total_steps=steps)
        for _ in range(epochs):
            for inputs, labels in batches:
                sgd.zero_grad()
                F.cross_entropy(model(inputs), labels).backward()
                sgd.step()
                schedule.step()
        return model.eval()

    return classifier(train, parts | {n: made[n] for n in ("val", "test")})


# --- a language model, a diffusion model ----------------------------------------------------------

PEOPLE, FORGOTTEN, HELD, ANSWERS = 200, 20, 40, 5


def facts_case(seed: int) -> Case:
    """A name of three tokens and five answers of eight possible ones, for each of 200 people."""
    from transformers import LlamaConfig, LlamaForCausalLM

    draw = torch.Generator().manual_seed(seed)
    names = torch.randint(60, 128, (PEOPLE, 3), generator=draw)
    columns = [torch.ones(PEOPLE, 1, dtype=torch.int64), names]
    for answer in range(ANSWERS):
        value = 10 + 8 * answer + torch.randint(8, (PEOPLE, 1), generator=draw)
        columns += [torch.full_like(value, 2 + answer), value]
    ids = torch.cat(columns, 1)
    labels = torch.cat([torch.full_like(ids[:, :4], -100), ids[:, 4:]], 1)
    rows: Any = [{"input_ids": i, "labels": label} for i, label in zip(ids, labels, strict=True)]
    parts = {"forget": rows[:FORGOTTEN], "retain": rows[FORGOTTEN:-HELD], "test": rows[-HELD:]}

    def train(data: Any) -> nn.Module:
        torch.manual_seed(seed)
        small = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
        model: Any = LlamaForCausalLM(LlamaConfig(vocab_size=128, **small, **heads))
        adam, batches = torch.optim.AdamW(model.parameters(), 2e-3), DataLoader(data, 16, True)
        schedule = torch.optim.lr_scheduler.OneCycleLR(adam, 2e-3, 80 * len(batches))
        for _ in range(80):
            for batch in batches:
                adam.zero_grad()
                model(**batch).loss.backward()
                adam.step()
                schedule.step()
        return model.eval()

    def judge(model: nn.Module) -> dict[str, float]:
        found = {}
        for name, part in parts.items():
            batch = default_collate(part)
            with torch.no_grad():
                said = model.eval()(input_ids=batch["input_ids"]).logits.argmax(-1)
            right = said[:, 4:-1:2] == batch["input_ids"][:, 5::2]
            found[name] = 100.0 * float(right.double().mean())
        return found

    sets: dict[str, Any] = {n: DataLoader(parts[n], 10, True) for n in ("forget", "retain")}
    held: Any = DataLoader(parts["test"], 20)
    both = parts["forget"] + parts["retain"]
    return Case(train(both), train(parts["retain"]), sets, held, judge, sf.Language())


def ddpm_case(label: int, seed: int) -> Case:
    """Percent of the images of the class, and of the others, that a judge takes for theirs."""
    from examples.diffusion import compare_common as common
    from examples.diffusion import ddpm, denoisers
    from examples.diffusion import digits as pictures
    from sfron_fast.evaluation.diffusion import recognised, sample

    data = pictures.load()
    trusted = pictures.train_judge(data)
    model = ddpm.train("mlp", data.images, data.labels, seed, 1.0).eval()
    own, others = data.of(label), data.of(label, same=False)
    retrained = ddpm.train("mlp", *others, seed, 1.0).eval()

    def judge(found: nn.Module) -> dict[str, float]:
        labels = torch.arange(pictures.CLASSES).repeat_interleave(20)
        how: dict[str, Any] = {"task": common.task(0), "shape": pictures.SHAPE, "guidance": 1.0}
        images = sample(found, labels, **how, **common.SAMPLING)
        right = 100.0 * recognised(trusted, images, labels).double()
        here = labels == label
        return {"forget": float(right[here].mean()), "retain": float(right[~here].mean())}

    sets = {
        "forget": DataLoader(TensorDataset(*own), 64, shuffle=True),
        "retain": DataLoader(TensorDataset(*others), 64, shuffle=True),
    }
    task = sf.Denoising(denoisers.KEPT, null=pictures.NULL)
    return Case(model, retrained, sets, None, judge, task)
