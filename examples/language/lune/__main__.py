"""LUNE on a small Llama; run it from the project's root:

python -m examples.language.lune [--seed N] [--out DIR]

A model learns 40 authors and forgets four of them from wrong answers, by adapters alone. Settings
were chosen on seed 7.
"""

import copy
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

import sfron_fast as sf
from examples.systems.claims import at_least, at_most, parser, record, write
from examples.systems.training import fit
from sfron_fast import methods
from sfron_fast.evaluation import language as field
from sfron_fast.evaluation.relearning import relearned

from ..authors import QA
from ..model import make_model
from ..tokens import examples, loader, train_tokenizer
from . import fixture
from .figure import draw
from .fixture import HELD_OUT, TRAINED, Fixture, Row, asked
from .memory import held_by_training, peak_of

OUT = Path("benchmarks/results/systems/lune")
HEADS = 4
BATCH, EPOCHS, LR = 32, 12, 2e-3  # of the model that knows all
LUNE: dict[str, Any] = {"rank": 4, "alpha": 16.0, "epochs": 6, "lr": 6e-3, "cosine": True}
FULL: dict[str, Any] = {
    "epochs": 6,
    "lr": 1e-3,
    "cosine": True,
}  # full fine-tuning on the same answers
RELEARN = {"steps": 10, "lr": 3e-4}
NEW_TOKENS = 24  # answers have 8 to 20
TASK = sf.Language()


class Judge:
    """What a model of one seed knows, by what it answers."""

    def __init__(self, data: Fixture, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
        self.data, self.tokenizer, self.seed = data, tokenizer, seed

    def batches(self, split: Sequence[QA], batch: int = BATCH, shuffled: bool = True) -> Any:
        order = torch.Generator().manual_seed(self.seed) if shuffled else None
        return loader(self.tokenizer, examples(self.tokenizer, split), batch, order)

    def knows(self, model: LlamaForCausalLM, rows: Sequence[Row], wordings: Sequence[int]) -> float:
        """The share of questions whose answer holds the value."""
        batches = self.batches(asked(rows, wordings), 128, shuffled=False)
        told, _ = field.answers(model, self.tokenizer, batches, max_new_tokens=NEW_TOKENS)
        values = [row.value for row in rows for _ in wordings]
        return sum(v in text for v, text in zip(values, told, strict=True)) / len(values)

    def relearnt(self, model: LlamaForCausalLM, rows: Sequence[Row]) -> float:
        """What it knows of one half of the facts after a few steps on the other half."""
        batches = self.batches(asked(rows[::2], TRAINED), 20)
        return self.knows(relearned(model, batches, task=TASK, **RELEARN), rows[1::2], HELD_OUT)

    def row(self, model: LlamaForCausalLM) -> dict[str, float]:
        """All of one arm."""
        return {
            "gone": 1.0 - self.knows(model, self.data.forget, TRAINED),
            "gone, held-out wordings": 1.0 - self.knows(model, self.data.forget, HELD_OUT),
            "retain": self.knows(model, self.data.retain, TRAINED[:1]),
            "relearnt": self.relearnt(model, self.data.forget),
        }


def learn(judge: Judge) -> LlamaForCausalLM:
    """The model that knows all in all wordings."""
    model = make_model(judge.tokenizer, judge.seed, heads=HEADS, vocabulary=len(judge.tokenizer))
    batches = judge.batches(asked(judge.data.forget + judge.data.retain, range(4)))
    cpu = torch.device("cpu")
    fit(model, batches, EPOCHS, LR, loss=lambda b: TASK.mean_loss(model, TASK.prepare(b, cpu)))
    return model


def demonstrate(seed: int) -> dict[str, Any]:
    """One seed's result."""
    start = time.process_time()
    data = fixture.fixture(seed)
    judge = Judge(data, train_tokenizer(data.texts()), seed)
    full = learn(judge)
    wrong, refused = fixture.negatives(data.forget, seed), fixture.refusals(data.forget)

    def lune(split: Sequence[QA], retain: bool = False, **changes: Any) -> LlamaForCausalLM:
        kept = judge.batches(asked(data.retain, TRAINED)) if retain else None
        model = copy.deepcopy(full)
        settings = {**LUNE, "seed": seed, **changes}
        methods.lune(model, negatives=judge.batches(split), retain=kept, task=TASK, **settings)
        return model

    def all_weights(split: Any, **changes: Any) -> LlamaForCausalLM:
        settings = {**FULL, "optimizer": "adamw", "weight_decay": 0.01, **changes}
        return methods.finetune(copy.deepcopy(full), split, task=TASK, max_norm=1.0, **settings)

    arms = {"before": judge.row(full)}
    with held_by_training() as ours:
        adapted = lune(wrong)
    with methods.lora_off(adapted):
        back = judge.knows(adapted, data.forget, TRAINED)
    adapters = [p for n, p in adapted.named_parameters() if "lora_" in n]
    trained = sum(p.numel() for p in adapters)
    every = sum(p.numel() for p in full.parameters())
    arms["LUNE"] = judge.row(methods.merge_lora(adapted))
    arms["LUNE, retain term"] = judge.row(methods.merge_lora(lune(wrong, retain=True)))
    arms["one refusal"] = judge.row(methods.merge_lora(lune(refused)))
    with held_by_training() as theirs:
        arms["all weights"] = judge.row(all_weights(judge.batches(wrong)))
    one = next(iter(judge.batches(wrong, shuffled=False)))
    peaks = {
        "LUNE": peak_of(lambda: methods.lune(
            copy.deepcopy(full), negatives=[one], task=TASK, rank=LUNE["rank"]
        )),
        "all weights": peak_of(lambda: all_weights([one], epochs=1)),
    }  # fmt: skip
    ours_now, theirs_now = arms["LUNE"], arms["one refusal"]
    claims = [
        at_least("gone, wordings of the negatives", ours_now["gone"], 0.95),
        at_least("gone, held-out wordings", ours_now["gone, held-out wordings"], 0.9),
        at_most("share of the weights trained", trained / every, 0.05),
        at_most("gradient and optimizer memory, counted", trained / every, 0.125),
        at_most("the same, measured at its peak", max(ours) / max(theirs), 0.125),
    ]
    controls = [
        at_most("one refusal for all: retain", theirs_now["retain"], 0.1),
        at_least("adapters off: forget set known", back, 0.95),
    ]
    facts = {
        "arms": arms,
        "relearning floor": judge.relearnt(full, data.unseen),
        "weights": every,
        "adapters": trained,
        "gradient and optimizer bytes": {"LUNE": max(ours), "all weights": max(theirs)},
        "peak bytes of a step, copy of the model included": peaks,
        "settings": {"LUNE": LUNE, "all weights": FULL, "relearning": RELEARN},
    }
    return record(seed, claims, controls, facts, time.process_time() - start)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    options = parser(__doc__, OUT).parse_args(arguments)
    result = demonstrate(options.seed)
    for arm, row in result["facts"]["arms"].items():
        print(f"{arm:>18}: " + "  ".join(f"{name} {value:.3f}" for name, value in row.items()))
    print(f"relearning floor {result['facts']['relearning floor']:.3f}")
    draw(write(options.out, result, "LUNE: forgetting from wrong answers, by adapters alone"),
         options.out / "lune.png")  # fmt: skip
    return result


if __name__ == "__main__":
    main()
