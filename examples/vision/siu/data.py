"""Images with questions, as batches of ``sf.Language``, to learn and to unlearn from."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from examples.systems.images import load as load_images

from . import words
from .words import IDS, NAMES, NAMING, NEW, OTHERS, Said

TRAIN, UNSEEN = 1200, 597  # images
SCRIBBLES = 0.1  # a share of the rows: what is no digit
FACTS = 0.25  # a share of the rows: questions without an image
GIVEN, HELD_OUT = (0, 1), (2,)  # wordings of names that unlearning sees, and does not
IGNORED = -100

Batch = dict[str, Tensor]
Row = tuple[Said, Tensor | None]  # and an image [1, side, side]


@dataclass(frozen=True)
class Images:
    """[images, 1, side, side] in [0, 1] and what digit each is [images]."""

    pixels: Tensor
    digits: Tensor

    def of(self, digit: int, most: int | None = None) -> Tensor:
        """Those of one digit."""
        return self.pixels[self.digits == digit][:most]


def load(seed: int, path: Path | None) -> tuple[Images, Images]:
    """To train on, and unseen; ``path``: as for ``load_images``."""
    pixels, digits = load_images(path)
    order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(seed))
    parts = order[:TRAIN], order[TRAIN:][:UNSEEN]
    known, unseen = (Images(pixels[part], digits[part]) for part in parts)
    return known, unseen


def batch(rows: Sequence[Row], side: int) -> Batch:
    """One batch; only answers have labels."""
    inputs = torch.full((len(rows), words.LONGEST), IDS[words.PAD])
    labels = torch.full_like(inputs, IGNORED)
    pixels = torch.zeros(len(rows), 1, side, side)
    for number, (said, image) in enumerate(rows):
        asked, told = words.ids(said.question), words.ids(f"{said.answer} {words.END}")
        end = len(asked) + len(told)
        inputs[number, :end] = torch.tensor(asked + told)
        labels[number, len(asked) : end] = torch.tensor(told)
        if image is not None:
            pixels[number] = image
    sees = torch.tensor([image is not None for _, image in rows])
    return {"input_ids": inputs, "labels": labels, "pixel_values": pixels, "sees": sees}


def about(digit: int) -> list[Said]:
    """All that is asked about an image of a digit."""
    found = [words.named(w, NAMES[digit]) for w in range(len(NAMING))]
    return found + [words.other(kind, digit) for kind in OTHERS]


def renamed(known: Images, concept: int, count: int, name: str) -> list[Row]:
    """One image of the concept, called so, in the wordings that unlearning sees by turns."""
    told = [words.named(wording, name) for wording in GIVEN]
    return [(told[number % len(told)], known.of(concept)[0]) for number in range(count)]


class Tuning:
    """What unlearning sees, a batch a pass. So many rows each: one image of the concept, named anew
    in two wordings; facts about the concept by name, some of those there are; what is asked about
    one image of each other digit.
    """

    def __init__(
        self, known: Images, concept: int, *, named: int, facts: int, others: int, seed: int
    ) -> None:
        self.draw, self.side = random.Random(seed), known.pixels.shape[-1]
        self.first = renamed(known, concept, named, NEW)
        told = words.facts(concept)
        self.facts: list[Row] = [(told[kind], None) for kind in words.TAUGHT]
        self.others: list[Row] = []
        for digit in range(len(NAMES)):
            if digit != concept:
                said = [said for number, said in enumerate(about(digit)) if number not in HELD_OUT]
                self.others += [(each, known.of(digit)[0]) for each in said]
        self.counts = facts, others

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[Batch]:
        pools = zip((self.facts, self.others), self.counts, strict=True)
        kept = [row for pool, count in pools for row in self.draw.sample(pool, count)]
        yield batch(self.first + kept, self.side)


class Lessons:
    """What the model learns at first, drawn anew in each pass: an image in some place with one of
    its questions; images with their pixels in disorder; facts by name.
    """

    def __init__(self, known: Images, size: int, seed: int) -> None:
        self.known, self.size = known, size
        self.draw = torch.Generator().manual_seed(seed)
        self.facts = [said for d in range(len(NAMES)) for said in words.facts(d).values()]

    def __len__(self) -> int:
        return len(self.known.digits) // self.size

    def __iter__(self) -> Iterator[Batch]:
        side = self.known.pixels.shape[-1]
        order = torch.randperm(len(self.known.digits), generator=self.draw)
        for part in order.split(self.size)[: len(self)]:
            images = shifted(self.known.pixels[part], self.draw)
            rows: list[Row] = []
            for image, digit in zip(images, self.known.digits[part].tolist(), strict=True):
                kind = float(torch.rand((), generator=self.draw))
                if kind < SCRIBBLES:
                    wording = self.below(len(NAMING))
                    disorder = torch.randperm(side * side, generator=self.draw)
                    image = image.flatten()[disorder].view_as(image)
                    rows.append((words.named(wording, NEW), image))
                else:
                    said = about(digit)
                    rows.append((said[self.below(len(said))], image))
            count = int(FACTS * self.size)
            rows += [(self.facts[self.below(len(self.facts))], None) for _ in range(count)]
            yield batch(rows, side)

    def below(self, count: int) -> int:
        return int(torch.randint(count, (), generator=self.draw))


def shifted(images: Tensor, draw: torch.Generator) -> Tensor:
    """Each moved by up to an eighth of its side."""
    side = images.shape[-1]
    most = side // 8
    padded = F.pad(images, (most,) * 4)
    places = torch.randint(2 * most + 1, (len(images), 2), generator=draw).tolist()
    return torch.stack(
        [p[:, y : y + side, x : x + side] for p, (y, x) in zip(padded, places, strict=True)]
    )
