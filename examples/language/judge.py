"""Judge a model against Retrain, by all that the field measures; run it from the project's root:

    python -m examples.language.judge --out build/language --pair 0 [--model FOLDER]

Without ``--model`` it judges Full and the second Retrain, and says whether the pair is sound: Full
has memorised what it shall forget, Retrain has not, and two Retrains are close.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from sfron_fast.evaluation import language as field

from .authors import QA, Benchmark
from .tokens import Example, examples, loader, paraphrases, wrong
from .train import load

BATCH = 64
NEW_TOKENS = 32  # answers have 8 to 20
EVERY = 9  # of the retain set, where each question has four wrong answers or is answered: 80 of 720
# what the gap is the mean distance of, beside the distance of the truth ratios
COMPARED = ("p forget", "ES", "EM", "ROUGE", "AUC", "utility", "p retain")
COLUMNS = ("gap", "D", "p value", *COMPARED, "privleak")


@dataclass(frozen=True)
class Measured:
    """One model by itself."""

    values: dict[str, float]  # of COMPARED
    ratios: Tensor  # the truth ratios of the forget set


def parse(description: str, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Which models are looked at."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="where train.py left its models")
    parser.add_argument("--pair", type=int, default=0)
    parser.add_argument("--model", type=Path, help="folder of another model; none = the pair's own")
    return parser.parse_args(arguments)


class Looks:
    """What one model says of splits."""

    def __init__(self, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
        self.model, self.tokenizer = model, tokenizer

    def stats(self, rows: Sequence[Example], name: str) -> field.TokenStats:
        """Of every token of the answers."""
        batches = loader(self.tokenizer, rows, BATCH)
        return field.token_stats(self.model, batches, name=name)

    def rouge(self, split: Sequence[QA], name: str) -> float:
        """Mean ROUGE-L recall of what the model answers."""
        scores = field.rouge_scores(
            self.model,
            self.tokenizer,
            loader(self.tokenizer, examples(self.tokenizer, split), BATCH),
            max_new_tokens=NEW_TOKENS,
            name=name,
        )
        return sum(score.recall for score in scores) / len(scores)

    def answers(self, split: Sequence[QA], name: str) -> field.TokenStats:
        """Of the answers as they are learnt."""
        return self.stats(examples(self.tokenizer, split), name)

    def options(self, split: Sequence[QA], name: str) -> tuple[field.TokenStats, field.TokenStats]:
        """Of the paraphrased answers, and of the wrong ones."""
        right = self.stats(paraphrases(self.tokenizer, split), f"{name}, paraphrased")
        return right, self.stats(wrong(self.tokenizer, split), f"{name}, wrong")


def measure(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, data: Benchmark
) -> Measured:
    """All values of one model that need no reference."""
    look = Looks(model, tokenizer)
    forget = look.answers(data.forget, "forget")
    holdout = look.answers(data.holdout, "holdout")
    p_retain = float(field.answer_probability(look.answers(data.retain, "retain")).mean())
    few = data.retain[::EVERY]
    retain_ratios = field.truth_ratio(*look.options(few, "retain"))
    useful = [p_retain, look.rouge(few, "retain"), field.true_is_better(retain_ratios)]
    for name in ("real_authors", "real_world"):
        split = getattr(data, name)
        right, others = look.options(split, name)
        useful += [
            float(field.option_probability(right, others).mean()),
            look.rouge(split, name),
            field.true_is_better(field.truth_ratio(right, others)),
        ]
    values = {
        "p forget": float(field.answer_probability(forget).mean()),
        "ES": float(field.extraction_strength(forget).mean()),
        "EM": float(field.exact_memorization(forget).mean()),
        "ROUGE": look.rouge(data.forget, "forget"),
        "AUC": field.auc(field.min_k(forget), field.min_k(holdout)),
        "utility": field.model_utility(useful),
        "p retain": p_retain,
    }
    return Measured(values, field.truth_ratio(*look.options(data.forget, "forget")))


def compare(found: Measured, retrained: Measured) -> dict[str, float]:
    """A row of the table: ``COLUMNS``."""
    test = field.forget_quality(found.ratios, retrained.ratios)
    away = [abs(found.values[name] - retrained.values[name]) for name in COMPARED]
    return {
        "gap": (sum(away) + test.distance) / (len(away) + 1),
        "D": test.distance,
        "p value": test.p_value,
        **found.values,
        "privleak": field.privleak(found.values["AUC"], retrained.values["AUC"]),
    }


def judge(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    data: Benchmark,
    retrained: Measured,
) -> dict[str, float]:
    """The row of one model; measure Retrain once for all of them."""
    return compare(measure(model, tokenizer, data), retrained)


def unsound(rows: Mapping[str, Mapping[str, float]]) -> list[str]:
    """What is wrong with a pair, from its rows; nothing if methods can be compared on it."""
    full, retrain = rows["full"], rows["retrain"]
    gates = {
        "Full p forget >= .95": full["p forget"] >= 0.95,
        "Full ES >= .95": full["ES"] >= 0.95,
        "Full D >= .5": full["D"] >= 0.5,
        "Retrain p forget <= .45": retrain["p forget"] <= 0.45,
    }
    if "retrain_second" in rows:
        gates["second Retrain D <= .15"] = rows["retrain_second"]["D"] <= 0.15
        gates["second Retrain gap <= .03"] = rows["retrain_second"]["gap"] <= 0.03
    return [name for name, passed in gates.items() if not passed]


def show(title: str, row: Mapping[str, float]) -> None:
    """One line a model."""
    print(f"{title:>15}: " + "  ".join(f"{name} {row[name]:.3g}" for name in COLUMNS), flush=True)


def main(arguments: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    """Rows by name of the model."""
    options = parse(__doc__, arguments)
    disable_progress_bar()  # of files that are read in no time
    pair = load(options.out, options.pair)
    retrained = measure(pair.models["retrain"], pair.tokenizer, pair.data)
    rows = {"retrain": compare(retrained, retrained)}
    models = {name: pair.models[name] for name in ("full", "retrain_second") if name in pair.models}
    if options.model is not None:
        models = {options.model.name: LlamaForCausalLM.from_pretrained(options.model)}
    show("retrain", rows["retrain"])
    for name, model in models.items():
        rows[name] = judge(model, pair.tokenizer, pair.data, retrained)
        show(name, rows[name])
    if options.model is None:
        found = unsound(rows)
        print(f"unsound: {', '.join(found)}" if found else "the pair is sound")
    return rows


if __name__ == "__main__":
    main()
