"""One run of ``python -m sfron_fast unlearn``: checked, done or gone on with, and written."""

import hashlib
import json
import shutil
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..errors import require
from ..files import write_whole
from ..runs.folder import CHECKPOINT, MASK
from ..runs.recipe import Recipe
from ..runs.unlearn import unlearn
from ..tasks import Language
from . import model_card, pretrained
from .measures import measure
from .processes import ALONE, Processes
from .run_settings import BASELINES, PASSES, Settings, learning_rate
from .texts import Texts, check_apart

COMMAND, RUN = "command.json", "run"


def run(
    settings: Settings,
    files: dict[str, str],
    out: Path,
    processes: Processes = ALONE,
    progress: bool = True,
) -> dict[str, Any]:
    """Unlearn, measure before and after, write the folder ``out``; returns the report.

    Args:
        files: jsonl files named "forget", "retain" and, if there is one, "holdout".
        out: a new folder, or the one of this very run: it goes on from its last checkpoint
            (method sfron), or begins again.
        processes: those of ``processes.started``, on machines that all see the files and ``out``.

    Raises:
        ValueError: whatever can be refused, before the first step.
    """
    settings = settings.checked("holdout" in files)
    alone = settings.method == "sfron" or processes.size == 1
    require(alone, "method", "sfron under torchrun", settings.method, "start it without torchrun")
    tokenizer = pretrained.load_tokenizer(settings.model)
    sets = {
        name: Texts(path, tokenizer, max_length=settings.max_length, name=name)
        for name, path in files.items()
    }
    check_apart(**sets)
    digests = {
        name: hashlib.sha256(texts.path.read_bytes()).hexdigest() for name, texts in sets.items()
    }
    command = {"settings": asdict(settings), "sha256": digests}
    done: dict[str, Any] | None = processes.first(lambda: _claim(out, command))
    if done is not None:
        return done
    torch.manual_seed(settings.seed)
    model = pretrained.load_model(settings.model, settings.dtype, processes.device)
    pretrained.check_fits(model, sets)
    weights = sum(p.numel() for p in model.parameters())
    model = _prepared(model, settings)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    model = processes.shard(model)
    look = partial(measure, batch_size=settings.batch_size, processes=processes)
    before = look(model, sets)
    processes.first(lambda: _begin(out, command))
    with _noting() as said:
        found = _forget(model, sets, settings, out / RUN, processes, progress)
    report = {
        **command,
        "versions": model_card.versions(),
        "files": {name: {"texts": len(texts)} for name, texts in sets.items()},
        "processes": processes.size,
        "weights": weights,
        "trained_weights": trained,
        "before": before,
        **found,
        "warnings": said,
    }
    report["after"] = look(model, sets)
    report["limits"] = model_card.limits(report)
    if processes.size > 1:
        state = processes.gathered(model)
        if processes.rank == 0:
            model = _prepared(
                pretrained.load_model(settings.model, settings.dtype, "cpu"), settings
            )
            model.load_state_dict(state)
    processes.first(lambda: _finish(model, tokenizer, report, out))
    return report


def _prepared(model: Any, settings: Settings) -> Any:
    """With adapters and checkpointing, where they are wanted."""
    if settings.lora is not None:
        model = pretrained.with_lora(model, settings.lora, settings.seed)
    if settings.gradient_checkpointing:
        pretrained.with_checkpointing(model)
    return model


def _begin(out: Path, command: dict[str, Any]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / COMMAND, model_card.writing(json.dumps(command, indent=1) + "\n"))


def _finish(model: Any, tokenizer: Any, report: dict[str, Any], out: Path) -> None:
    """Write all that stays; the checkpoints go."""
    pretrained.save(model, tokenizer, out)
    if (out / RUN / MASK).exists():
        shutil.copy(out / RUN / MASK, out / MASK)
    model_card.write(report, out)
    shutil.rmtree(out / RUN, ignore_errors=True)


@contextmanager
def _noting() -> Iterator[list[str]]:
    """The RuntimeWarnings of what is done inside, which are shown as ever."""
    said: list[str] = []
    with warnings.catch_warnings():
        shown = warnings.showwarning

        def note(message: Any, category: Any, *rest: Any, **more: Any) -> None:
            if issubclass(category, RuntimeWarning):
                said.append(str(message))
            shown(message, category, *rest, **more)

        warnings.showwarning = note
        yield said


def _claim(out: Path, command: dict[str, Any]) -> dict[str, Any] | None:
    """The report, if this run is done already.

    Raises:
        ValueError: the folder is somebody else's.
    """
    there = {path.name for path in out.iterdir()} if out.is_dir() else set()
    require(out.is_dir() or not out.exists(), "out", "a folder", f"a file {out}")
    if COMMAND in there and json.loads((out / COMMAND).read_text()) == command:
        done = model_card.REPORT in there
        return json.loads((out / model_card.REPORT).read_text()) if done else None
    begun = (out / RUN / CHECKPOINT).exists()
    other = there - {COMMAND} if begun else there - {COMMAND, RUN}
    found = f"{out} with {', '.join(sorted(other)[:3])}"
    remedy = "give another --out, or the command that began this one"
    require(not other, "out", "a new folder, or the one of this command", found, remedy)
    shutil.rmtree(out / RUN, ignore_errors=True)  # a mask of a run without a step
    return None


def _forget(
    model: Any,
    sets: dict[str, Texts],
    settings: Settings,
    folder: Path,
    processes: Processes,
    progress: bool,
) -> dict[str, Any]:
    """The run itself; what the report says of it."""
    part = {"rank": processes.rank, "ranks": processes.size}
    loaders = {
        name: texts.loader(
            settings.batch_size, seed=None if name == "holdout" else settings.seed, **part
        )
        for name, texts in sets.items()
    }
    lr = learning_rate(settings, sum(p.numel() for p in model.parameters()))
    if settings.method != "sfron":
        return _baseline(model, loaders, settings, lr, progress)
    cycles = settings.steps(len(loaders["forget"]))
    overrides: dict[str, Any] = {"cycles": cycles, "lr": lr, "forget_lr": lr / 2}
    overrides |= settings.dtypes()
    # of a ceiling of sequences half of the answers would stay (docs/language-models.md)
    overrides |= {"ceiling_of": "token"} if "holdout" in sets else {"ceiling": None}
    result = unlearn(
        model,
        forget=loaders["forget"],
        retain=loaders["retain"],
        holdout=loaders.get("holdout"),
        recipe=Recipe.language(**overrides),
        task=Language(),
        retain_budget=settings.budget,
        checkpoint=folder,
        progress=progress,
    )
    counts = result.mask.counts()
    selected, total = sum(counts.values()), sum(map(result.mask.size, counts))
    return {
        "lr": lr,
        "mask": {"digest": result.mask.digest(), "density": selected / total},
        "budget_spent": result.budget_spent,
        "skipped_steps": result.skipped_steps,
        "forgotten_steps": result.forgotten_steps,
        "seconds": result.seconds,
    }


def _baseline(
    model: Any, loaders: dict[str, Any], settings: Settings, lr: float, progress: bool
) -> dict[str, Any]:
    """One of the published methods."""
    more: dict[str, Any] = {"ids": _ids} if settings.method == "npo" else {}
    epochs = settings.epochs or PASSES

    def told(epoch: int, _: Any) -> None:
        if progress:
            print(f"{settings.method}: epoch {epoch} of {epochs}", flush=True)

    begun = time.perf_counter()
    BASELINES[settings.method](
        model,
        forget=loaders["forget"],
        retain=loaders["retain"],
        task=Language(),
        epochs=epochs,
        lr=lr,
        on_epoch=told,
        **more,
    )
    seconds = time.perf_counter() - begun
    nothing = dict.fromkeys(("mask", "budget_spent", "skipped_steps", "forgotten_steps"))
    return {"lr": lr, **nothing, "seconds": seconds}


def _ids(batch: Any) -> torch.Tensor:
    ids: torch.Tensor = batch["id"]
    return ids
