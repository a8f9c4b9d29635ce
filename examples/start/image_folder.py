"""A classifier forgets some pictures of a folder; run it from the project's root:

    python -m examples.start.image_folder [--data FOLDER]

FOLDER has a folder for each class, as torchvision's ImageFolder wants it, in `train/` and in
`holdout/`, and `forget.txt`: what is to be forgotten, one path below `train/` a line. Without
`--data` such a folder is made: scikit-learn's digits, a tenth of them filed under the wrong digit.
The report (`--out`) compares with a model that was trained without these pictures.
"""

import argparse
import copy
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import sfron_fast as sf
from sfron_fast.demo.digits import make_split
from sfron_fast.evaluation.report import Report

BATCH = 64


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="see above; none = digits, in OUT/digits")
    parser.add_argument("--out", type=Path, default=Path("build/start/image_folder"))
    parser.add_argument("--side", type=int, default=8, help="pictures are scaled to so many pixels")
    parser.add_argument("--epochs", type=int, default=25, help="of the training before")
    parser.add_argument("--cycles", type=int, default=40, help="of unlearning")
    parser.add_argument("--max-norm", type=float, default=1.6, help="clip of the forget gradient")
    return parser.parse_args(arguments)


def write_digits(folder: Path) -> Path:
    """PNG files of the demo's digits, and the list of those in the wrong class."""
    split, wrong = make_split("wrong labels", seed=0), []
    parts = {"train/f": split.forget, "train/r": split.retain, "holdout/h": split.test}
    for part, pairs in parts.items():
        place, letter = part.split("/")
        for number, (image, label) in enumerate(pairs):
            path = folder / place / str(int(label)) / f"{letter}{number:04}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((image[0] * 255).byte().numpy()).save(path)
            if letter == "f":
                wrong.append(path.relative_to(folder / "train").as_posix())
    (folder / "forget.txt").write_text("\n".join(wrong) + "\n")
    return folder


def read(folder: Path, classes: Sequence[str], names: Sequence[str], side: int) -> TensorDataset:
    """Pictures fp32 [count, 3, side, side] in [-1, 1] and their classes, of these files."""

    def picture(name: str) -> Tensor:
        image = Image.open(folder / name).convert("RGB").resize((side, side))
        bytes_ = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        return bytes_.view(side, side, 3).permute(2, 0, 1) / 127.5 - 1.0

    labels = [classes.index(name.split("/")[0]) for name in names]
    return TensorDataset(torch.stack([picture(name) for name in names]), torch.tensor(labels))


def load(folder: Path, side: int) -> tuple[dict[str, TensorDataset], int]:
    """The sets by name (a caller's forget.txt must name files that are there), and the classes."""
    train = folder / "train"
    classes = sorted(path.name for path in train.iterdir() if path.is_dir())

    def names(part: Path) -> list[str]:
        return sorted(path.relative_to(part).as_posix() for path in part.glob("*/*"))

    forget, known = (folder / "forget.txt").read_text().split("\n"), names(train)
    forget = [name for name in forget if name]
    if missing := sorted(set(forget) - set(known)):
        raise SystemExit(f"forget.txt: expected paths below {train}, found {missing[0]}")
    retain = [name for name in known if name not in set(forget)]
    holdout = folder / "holdout"
    sets = {"forget": (train, forget), "retain": (train, retain)}
    sets["holdout"] = (holdout, names(holdout))
    return {key: read(part, classes, chosen, side) for key, (part, chosen) in sets.items()}, len(
        classes
    )


def make_model(classes: int, side: int, width: int = 32) -> nn.Module:
    """Logits [count, classes] of pictures [count, 3, side, side]."""

    def block(inputs: int, outputs: int) -> list[nn.Module]:
        conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        return [conv, nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2)]

    body = *block(3, width), *block(width, 2 * width), nn.Flatten()
    return nn.Sequential(*body, nn.Linear(2 * width * (side // 4) ** 2, classes))


def train(data: TensorDataset, classes: int, side: int, epochs: int) -> nn.Module:
    torch.manual_seed(0)
    model, batches = make_model(classes, side), DataLoader(data, BATCH, shuffle=True)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=5e-4)
    for _ in range(epochs):
        for x, y in batches:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    return model


def main(arguments: Sequence[str] | None = None) -> Report:
    """What was measured of the model before, of one trained anew, and of the unlearned one."""
    options = parse(arguments)
    folder = options.data or write_digits(options.out / "digits")
    sets, classes = load(folder, options.side)
    everything = TensorDataset(
        *(torch.cat([sets["forget"].tensors[i], sets["retain"].tensors[i]]) for i in (0, 1))
    )
    shape = classes, options.side, options.epochs
    original, retrained = train(everything, *shape), train(sets["retain"], *shape)

    model = copy.deepcopy(original)
    result = sf.unlearn(
        model,
        forget=DataLoader(sets["forget"], BATCH, shuffle=True),
        retain=DataLoader(sets["retain"], BATCH, shuffle=True),
        recipe=sf.Recipe.official(cycles=options.cycles, max_norm=options.max_norm),
    )

    looks = {name: DataLoader(part, 512) for name, part in sets.items()}
    report = Report({"pictures": f"{len(sets['forget'])} of {len(everything)} training pictures"})
    for name, found in (("Original", original), ("Retrain", retrained), ("SFR-on", model)):
        seconds = result.seconds if found is model else None
        metrics = sf.evaluate(found, **looks, reference=retrained, rte=seconds)
        report.add("pictures", name, 0, metrics)
    print(report.table())
    print("written:", report.save(options.out) / "report.md")
    return report


if __name__ == "__main__":
    main()
