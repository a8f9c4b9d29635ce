"""The experiment in pieces, done once each: a JSON file and perhaps models, written whole."""

import json
import re
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.harness import provenance
from sfron_fast.evaluation import (
    Evaluated,
    accuracy,
    collect,
    per_sample_loss,
    predict,
    score,
)
from sfron_fast.files import write_whole
from sfron_fast.runs.folder import save_whole

from . import data, methods
from .settings import SCALES

EVALUATION_BATCH, SHOWN = 1000, 500  # losses kept of each set for the figure


@dataclass(frozen=True)
class Piece:
    """One thing to do. "Train" makes the model that all settings of a seed start from."""

    method: str
    seed: int
    setting: str = "random"
    settings: str = "{}"  # the method's, as JSON
    label: str = ""  # of a candidate or a point of a sweep
    judged: str = "test"  # "val": only what may decide on settings, neither test set nor Retrain

    @property
    def name(self) -> str:
        """Of its file, without the suffix."""
        place = f"seed{self.seed}" if self.method == "Train" else f"{self.setting}-seed{self.seed}"
        return re.sub(
            r"[^A-Za-z0-9.=_-]+",
            "_",
            f"{place}-{self.method}{'-' + self.label if self.label else ''}",
        )


@dataclass(frozen=True)
class Run:
    """Where the data is, where results go, and at which scale."""

    data: Path
    out: Path
    scale: str
    device: str

    def file(self, piece: Piece) -> Path:
        """The piece's result."""
        return self.out / "pieces" / f"{piece.name}.json"

    def weights(self, piece: Piece) -> Path:
        """The model of Train or Retrain."""
        return self.out / "models" / f"{piece.name}.pt"

    def result(self, piece: Piece) -> dict[str, Any] | None:
        """What the piece left, if it was run with these settings at this scale."""
        path = self.file(piece)
        if not path.exists():
            return None
        found = json.loads(path.read_text())
        return found if found["made_with"] == self._made_with(piece) else None

    def lacks_model(self, piece: Piece) -> bool:
        """Whether the piece trains a model that is not there: the results do not keep models."""
        return piece.method in ("Train", "Retrain") and not self.weights(piece).exists()

    def _made_with(self, piece: Piece) -> dict[str, Any]:
        return {
            "scale": asdict(SCALES[self.scale]),
            "piece": asdict(piece),
            "data": self.images()[2],
        }

    def images(self) -> tuple[data.Images, data.Images, int]:
        """Training and test images, and a checksum."""
        scale = SCALES[self.scale]
        return data.load(self.data, scale.train_size, scale.test_size, self.device)

    def split(self, piece: Piece) -> data.Split:
        """The piece's data."""
        train, test, _ = self.images()
        return data.make_split(train, test, piece.setting, piece.seed)

    def do(self, piece: Piece) -> dict[str, Any]:
        """Run the piece and keep its result."""
        split, scale, trains = (
            self.split(piece),
            SCALES[self.scale],
            piece.method in ("Train", "Retrain"),
        )
        result: dict[str, Any] = {"metrics": {}, "curve": [], "losses": {}, "density": None}
        if trains:
            # not the start of the original, as two trainings of the same data differ too
            part, seed = (
                (split.train, piece.seed)
                if piece.method == "Train"
                else (split.retain, 3000 + piece.seed)
            )
            model, seconds = methods.train(scale, part, seed, self.device)
            self.weights(piece).parent.mkdir(parents=True, exist_ok=True)
            save_whole(model.state_dict(), self.weights(piece))
        elif piece.method == "Original":
            train = Piece("Train", piece.seed)
            model, seconds = self.model(train), (self.result(train) or {})["seconds"]
        else:
            model, seconds = self._unlearn(piece, split, result)
        result["seconds"] = seconds
        if piece.judged == "val":
            result["metrics"] = validate(model, split)
        elif piece.method != "Train":
            evaluated = evaluate(model, split)
            reference = (
                evaluated
                if piece.method == "Retrain"
                else _reference(self, piece.setting, piece.seed)
            )
            result["metrics"] = score(evaluated, reference, seconds)
            if not piece.label:
                sets = {"forget": evaluated.forget, "test": evaluated.holdout}
                losses = {n: per_sample_loss(p)[:SHOWN].tolist() for n, p in sets.items()}
                result["losses"] = {
                    n: [float(f"{v:.3g}") for v in values] for n, values in losses.items()
                }
        gpu = torch.cuda.get_device_name() if self.device == "cuda" else None
        result |= {"made_with": self._made_with(piece), "provenance": {**provenance(), "gpu": gpu}}
        path = self.file(piece)
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(result, allow_nan=False) + "\n"
        write_whole(path, lambda to: to.write_text(text))
        return result

    def _unlearn(
        self, piece: Piece, split: data.Split, result: dict[str, Any]
    ) -> tuple[nn.Module, float]:
        some = split.retain[
            torch.arange(min(len(split.forget), 2000), device=split.retain.labels.device)
        ]

        def look(model: nn.Module) -> None:
            sets = (split.forget[torch.arange(len(some), device=some.labels.device)], some)
            result["curve"].append([accuracy(predict(model, _ordered(images))) for images in sets])

        original = self.model(Piece("Train", piece.seed))
        if not piece.label:
            look(original)
        torch.manual_seed(2000 + piece.seed)
        task = methods.Task(original, split, SCALES[self.scale], self.device)
        unlearned = methods.apply_method(
            piece.method,
            json.loads(piece.settings),
            task,
            (lambda _: None) if piece.label else look,
        )
        if unlearned.mask is not None:
            selected, total = (
                sum(unlearned.mask.counts().values()),
                sum(map(unlearned.mask.size, unlearned.mask)),
            )
            result["density"] = selected / total
        return unlearned.model, unlearned.seconds

    def model(self, piece: Piece) -> nn.Module:
        """The model that Train or Retrain left."""
        model = methods.make_model(SCALES[self.scale], self.device)
        model.load_state_dict(
            torch.load(self.weights(piece), weights_only=True, map_location=self.device)
        )
        return model


def _ordered(images: data.Images) -> data.Batches:
    return data.Batches(images, EVALUATION_BATCH)


def evaluate(model: nn.Module, split: data.Split) -> Evaluated:
    """Predictions on forget, retain and test set."""
    return collect(
        model,
        forget=_ordered(split.forget),
        retain=_ordered(split.retain),
        holdout=_ordered(split.test),
    )


def validate(model: nn.Module, split: data.Split) -> dict[str, float]:
    """Accuracies that may decide on settings: forget, retain and validation set, in percent."""
    sets = {"FA": split.forget, "RA": split.retain, "VA": split.val}
    return {name: accuracy(predict(model, _ordered(images))) for name, images in sets.items()}


@lru_cache(maxsize=2)
def _reference(run: Run, setting: str, seed: int) -> Evaluated:
    retrain = Piece("Retrain", seed, setting)
    return evaluate(run.model(retrain), run.split(retrain))


# --- running them ---------------------------------------------------------------------------------


class Clock:
    """Whether there is time for another piece, as long as the longest so far."""

    def __init__(self, minutes: float | None) -> None:
        self.end = None if minutes is None else time.time() + 60.0 * minutes
        self.longest = 0.0

    def allows_another(self) -> bool:
        return self.end is None or time.time() + self.longest < self.end


def run_all(run: Run, phases: list[list[Piece]], workers: int, clock: Clock) -> bool:
    """Do what is not done yet, phase by phase, each worker with one thread; whether all is done.

    One worker is this process, with all its threads.
    """
    total, done = sum(map(len, phases)), 0
    more = any(run.result(piece) is None for phase in phases for piece in phase)
    pool = (
        ProcessPoolExecutor(workers, get_context("spawn"), _start_worker) if workers > 1 else None
    )
    try:
        for phase in phases:
            missing = [
                piece
                for piece in phase
                if run.result(piece) is None or (more and run.lacks_model(piece))
            ]
            done += len(phase) - len(missing)
            jobs = (
                pool.map(_timed, *zip(*((run, p, clock) for p in missing), strict=True))
                if pool and missing
                else (_timed(run, p, clock) for p in missing)
            )
            for piece, seconds in zip(missing, jobs, strict=True):
                if seconds is None:
                    continue
                done += 1
                clock.longest = max(clock.longest, seconds)
                print(f"{done}/{total} {piece.name}: {seconds:.0f} s", flush=True)
            if any(run.result(piece) is None for piece in phase):
                return False
    finally:
        if pool is not None:
            pool.shutdown()
    return True


def _start_worker() -> None:
    torch.set_num_threads(1)


def _timed(run: Run, piece: Piece, clock: Clock) -> float | None:
    """Seconds the piece took, or None if there was no time left for it."""
    if not clock.allows_another():
        return None
    start = time.perf_counter()
    run.do(piece)
    seconds = time.perf_counter() - start
    clock.longest = max(clock.longest, seconds)  # of this process's copy
    return seconds


def with_settings(piece: Piece, settings: dict[str, Any]) -> Piece:
    """The piece run with these settings of its method."""
    return replace(piece, settings=json.dumps(settings, sort_keys=True))
