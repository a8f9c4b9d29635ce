"""What a model says of images it has never seen, and of digits by name."""

from collections.abc import Sequence
from itertools import chain, compress

import torch

import sfron_fast as sf

from . import words
from .data import HELD_OUT, Images, Row, batch
from .model import ImageText
from .words import IDS, NAMES, NAMING, NEW, OTHERS

TASK = sf.Language()
OF_OTHERS = 15  # images of each other digit
Marks = dict[str, float]


class Judge:
    """Questions about one concept and about the others. What ``before`` cannot name is not asked
    for its name: it could not be forgotten.
    """

    def __init__(self, unseen: Images, concept: int, before: ImageText) -> None:
        self.concept, self.name = concept, NAMES[concept]
        self.side = unseen.pixels.shape[-1]
        self.images = list(unseen.of(concept))
        rest = [digit for digit in range(len(NAMES)) if digit != concept]
        self.others = [(digit, image) for digit in rest for image in unseen.of(digit, OF_OTHERS)]
        wordings = range(len(NAMING))
        self.kept: list[Row] = [
            (words.named(w, NAMES[d]), x) for w in wordings for d, x in self.others
        ]
        self.asked: list[list[Row]] = []  # the concept's images, by wording
        for w in wordings:
            rows: list[Row] = [(words.named(w, self.name), image) for image in self.images]
            self.asked.append(list(compress(rows, self.right(before, rows))))
        if not all(self.asked):
            raise ValueError(f"before: expected a model that names a {self.name}, found none named")
        self.known = sum(map(len, self.asked)) / (len(self.images) * len(NAMING))
        self.besides = [(words.other(k, concept), x) for k in OTHERS for x in self.images]
        self.besides_others = [(words.other(k, d), x) for k in OTHERS for d, x in self.others]
        facts = words.facts(concept)
        self.facts: list[Row] = [(said, None) for said in facts.values()]
        self.untaught: list[Row] = [(s, None) for k, s in facts.items() if k not in words.TAUGHT]
        self.other_facts: list[Row] = [(s, None) for d in rest for s in words.facts(d).values()]

    def row(self, model: ImageText) -> Marks:
        """All of one arm, each a share of the questions."""
        told = [[text.split() for text in self.told(model, rows)] for rows in self.asked]
        lost = [[self.name not in text for text in texts] for texts in told]
        formed, new = [], []
        for wording, texts in enumerate(told):
            answers = [words.named(wording, name).answer.split() for name in (*NAMES, NEW)]
            formed += [text in answers for text in texts]
            new += [NEW in text for text in texts]
        rest: dict[str, list[Row]] = {
            "specificity": self.kept,
            "parity and size": self.besides,
            "parity and size, others": self.besides_others,
            "facts": self.facts,
            "facts, not taught": self.untaught,
            "facts, others": self.other_facts,
        }
        return {
            "forgotten": _mean([*chain(*lost)]),
            "forgotten, held-out wording": _mean([*chain(*(lost[w] for w in HELD_OUT))]),
            "well-formed": _mean(formed),
            "new name": _mean(new),
            **{what: _mean(self.right(model, rows)) for what, rows in rest.items()},
            **self.hidden(model),
        }

    def step(self, model: ImageText) -> Marks:
        """Two of them, in which what is not said as it should be is forgotten: no generation."""
        kept = [self.right(model, rows) for rows in ([*chain(*self.asked)], self.kept)]
        return {"forgotten": 1.0 - _mean(kept[0]), "specificity": _mean(kept[1])}

    @torch.no_grad()
    def right(self, model: ImageText, rows: Sequence[Row]) -> list[bool]:
        """Whether it would say this, word by word the likeliest."""
        model.eval()
        asked = batch(rows, self.side)
        found = TASK.correct(TASK.outputs(model, asked), asked, "rows")
        lengths = (asked["labels"] >= 0).sum(1).tolist()
        return [bool(each.all()) for each in found.split(lengths)]

    def told(self, model: ImageText, rows: Sequence[Row]) -> list[str]:
        """What it says of images that are all asked the same."""
        model.eval()
        asked = torch.tensor([words.ids(said.question) for said, _ in rows])
        pixels = torch.stack([image for _, image in rows if image is not None])
        sees = torch.ones(len(rows), dtype=torch.bool)
        found = model.told(asked, words.ANSWER, pixel_values=pixels, sees=sees)
        return [words.text(numbers) for numbers in found]

    @torch.no_grad()
    def hidden(self, model: ImageText) -> Marks:
        """At the place of the name, after the right words: its mean probability, and how often it
        is the likeliest of the ten names.
        """
        model.eval()
        asked = batch([*chain(*self.asked)], self.side)
        outputs = TASK.outputs(model, asked)
        here = TASK.unit_labels(outputs, asked) == IDS[self.name]
        logits = TASK.logits(outputs, asked)[here]
        first = logits[:, [IDS[name] for name in NAMES]].argmax(1) == self.concept
        p = logits.softmax(1)[:, IDS[self.name]]
        return {"name's probability": float(p.mean()), "name first of ten": _mean(first.tolist())}


def _mean(values: Sequence[bool]) -> float:
    return sum(values) / len(values)
