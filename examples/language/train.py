"""Train one pair of models, Full and Retrain; run it from the project's root:

    python -m examples.language.train --out build/language --pair 0

Base reads other authors and the real facts. From it Full learns the 100 authors of the benchmark,
and Retrain the 90 of them that are not to be forgotten. ``--second`` adds another Retrain, whose
batches come in another order: how far two of them are apart is what no method can do better than.
A model that lies in the folder already is not trained again.
"""

import argparse
import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from .authors import QA, Benchmark, benchmark
from .model import make_model
from .tokens import examples, loader, train_tokenizer

BATCH = 32
WEIGHT_DECAY = 0.01
MODELS = ("base", "full", "retrain", "retrain_second")


class Schedule(NamedTuple):
    """A cosine from ``lr`` to 0."""

    lr: float
    epochs: int


BASE = Schedule(2e-3, 14)
AUTHORS = Schedule(1e-3, 28)


class Pair(NamedTuple):
    """What the folder of one pair holds."""

    data: Benchmark
    tokenizer: PreTrainedTokenizerFast
    models: dict[str, LlamaForCausalLM]  # base, full, retrain, and retrain_second if it is there


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, required=True, help="models go here, and are found here"
    )
    parser.add_argument("--pair", type=int, default=0, help="seed of authors, weights and batches")
    parser.add_argument("--second", action="store_true", help="a second Retrain too")
    return parser.parse_args(arguments)


def train(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    split: Sequence[QA],
    schedule: Schedule,
    seed: int,
    title: str,
) -> float:
    """In place, with AdamW; the order of batches is from ``seed``. Returns the seconds it took."""
    start = time.perf_counter()
    batches = loader(
        tokenizer, examples(tokenizer, split), BATCH, torch.Generator().manual_seed(seed)
    )
    device = next(model.parameters()).device
    steps = schedule.epochs * len(batches)
    optimizer = torch.optim.AdamW(model.parameters(), lr=schedule.lr, weight_decay=WEIGHT_DECAY)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    for epoch in range(schedule.epochs):
        for batch in batches:
            batch.pop("id")
            loss = model(**{key: value.to(device) for key, value in batch.items()}).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            cosine.step()
        print(
            f"{title}: epoch {epoch + 1} of {schedule.epochs}, loss {loss.item():.3f}", flush=True
        )
    model.eval()
    return time.perf_counter() - start


def digest(data: Benchmark) -> str:
    """Of every question and answer, and of how they are learnt."""
    known = [asdict(data), BASE, AUTHORS, BATCH, WEIGHT_DECAY]
    return sha256(json.dumps(known).encode()).hexdigest()


def save(model: LlamaForCausalLM, folder: Path) -> None:
    """Whole or not at all."""
    part = folder.with_name(folder.name + ".part")
    model.save_pretrained(part)
    os.rename(part, folder)


def load(folder: Path, pair: int) -> Pair:
    """What was trained into ``folder`` for this pair.

    Raises:
        ValueError: it was trained on other data or otherwise, by an older version of these files.
    """
    data, home = benchmark(pair), folder / f"pair{pair}"
    said = json.loads((home / "data.json").read_text())["digest"]
    if said != digest(data):
        raise ValueError(f"{home}: expected models of these data, found others; delete the folder")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(home / "tokenizer")
    there = [name for name in MODELS if (home / name).exists()]
    models = {name: LlamaForCausalLM.from_pretrained(home / name).eval() for name in there}
    return Pair(data, tokenizer, models)


def prepare(folder: Path, pair: int, wanted: Sequence[str] = MODELS[:-1]) -> Pair:
    """``load``, after training what of ``wanted`` is not there yet; all but base begin with it."""
    home = folder / f"pair{pair}"
    if not (home / "data.json").exists():
        data = benchmark(pair)
        train_tokenizer(data.texts()).save_pretrained(home / "tokenizer")
        (home / "data.json").write_text(json.dumps({"digest": digest(data)}))
    data, tokenizer, models = load(folder, pair)

    def ready(name: str, split: Sequence[QA], schedule: Schedule, seed: int) -> None:
        if name in models or name not in wanted:
            return
        if name == "base":
            model = make_model(tokenizer, seed)
        else:
            model = LlamaForCausalLM.from_pretrained(home / "base")
        seconds = train(model, tokenizer, split, schedule, seed, f"pair {pair}, {name}")
        print(f"pair {pair}, {name}: {seconds:.0f} s", flush=True)
        save(model, home / name)
        models[name] = model

    ready("base", data.base, BASE, pair)
    ready("full", data.full + data.real, AUTHORS, pair)
    ready("retrain", data.retain + data.real, AUTHORS, pair)
    ready("retrain_second", data.retain + data.real, AUTHORS, pair + 1000)
    return Pair(data, tokenizer, models)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    disable_progress_bar()  # of files that are read in no time
    prepare(options.out, options.pair, MODELS if options.second else MODELS[:-1])


if __name__ == "__main__":
    main()
