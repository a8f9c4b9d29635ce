"""Pipelines of diffusers in a folder: unlearned, and written again with all else as it was."""

import json
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..errors import by_keyword, require, warn
from ..runs.recipe import Recipe
from ..runs.unlearn import UnlearnResult, unlearn
from ..tasks import Denoising
from ..version import __version__

__all__ = ["unlearn_folder"]

NETWORKS = ("unet", "transformer")
CARD, RECORD = "unlearning.md", "unlearning.json"
WEIGHTS = ("*.safetensors", "*.bin", "*.index.json")
MakeTask = Callable[[Any], Denoising]  # of the pipeline's scheduler


@by_keyword
def unlearn_folder(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    forget: Iterable[Any],
    retain: Iterable[Any],
    recipe: Recipe,
    task: MakeTask | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    **settings: Any,
) -> UnlearnResult:
    """Unlearn the network of a pipeline in ``src``, and write the pipeline to ``dst``, with the
    weights of that network alone changed: every other file has its bytes.

    The network is trained in ``dtype`` and written in its own, in one file of safetensors.
    ``unlearning.md`` and ``unlearning.json`` say what was done (recipe, mask digest,
    seed, weights changed).

    Args:
        src: a folder with ``model_index.json``, as ``save_pretrained`` writes it, with a network
            called ``unet`` or ``transformer``.
        dst: a folder that does not exist yet.
        forget, retain: batches of images or latents as the network takes them (encode and scale
            them first) and their conditions (encode prompts first).
        task: makes the task of the pipeline's scheduler; None = ``Denoising(scheduler)`` for a
            network with classes, and for one of prompts without dropping any.
        dtype: of the weights in training: fp32, or bf16 for a network that is stored so, best with
            ``weight_bits=24`` in the recipe, as updates round to nothing without. Prompts that are
            encoded already come in this dtype too.
        settings: of ``unlearn``.

    Raises:
        ValueError: no such pipeline, a ``dst`` that is there, or as ``unlearn``; nothing is
            written then.

    Warns:
        RuntimeWarning: the changes round to nothing in the dtype they are written in.
    """
    source, goal = Path(src), Path(dst)
    require(not goal.exists(), "dst", "a folder that does not exist yet", str(goal))
    choices = (torch.float32, torch.bfloat16)
    require(dtype in choices, "dtype", "torch.float32 or torch.bfloat16", dtype)
    name, scheduler, network = _load(source, dtype)
    kind = "class_labels" if _classes(network) else "encoder_hidden_states"
    own = Denoising(scheduler, kind) if task is None else task(scheduler)
    found = type(own).__name__
    require(isinstance(own, Denoising), "task", "a function that makes Denoising", found)
    variant, stored = _stored(source / name)
    others = set(stored.values()) - {dtype}
    exact = dtype == torch.float32 or not others
    remedy = "with dtype=torch.float32 they lose nothing"
    require(exact, "dtype", f"weights stored in {dtype}", f"{sorted(map(str, others))}", remedy)
    before = {n: p.detach().clone() for n, p in network.state_dict().items()}
    network.to(device)
    result = unlearn(network, forget=forget, retain=retain, recipe=recipe, task=own, **settings)
    after = {
        n: p.detach().cpu().to(stored.get(n, p.dtype)) for n, p in network.state_dict().items()
    }
    changed = sum(int((w != before[n].to(w.dtype)).sum()) for n, w in after.items())
    if not changed:
        warn("no weight of the network changed in the dtype it is written in; raise lr")
    record = {
        "network": name,
        "recipe": asdict(recipe),
        "mask": result.mask.digest(),
        "seed": own.places.seed,
        "dtype": str(dtype).removeprefix("torch."),
        "weights": sum(w.numel() for w in after.values()),
        "changed": changed,
        "versions": {"sfron_fast": __version__, "torch": torch.__version__},
        "stopped_early": result.stopped_early,
        "skipped_steps": result.skipped_steps,
    }
    _write(source, goal, f"{name}/{variant}.safetensors", after, record)
    return result


def _load(source: Path, dtype: torch.dtype) -> tuple[str, Any, Any]:
    """The network's name in the pipeline, the scheduler, and the network in ``dtype`` and eval
    mode.
    """
    import diffusers

    index = source / "model_index.json"
    what = "a folder with model_index.json, as a pipeline's save_pretrained writes it"
    require(index.is_file(), "src", what, str(source))
    parts = json.loads(index.read_text(encoding="utf-8"))
    found = [name for name in NETWORKS if parts.get(name, [None])[0] == "diffusers"]
    require(len(found) == 1, "src", f"one network called {' or '.join(NETWORKS)}", sorted(parts))
    (name,) = found
    require("scheduler" in parts, "src", "a scheduler", sorted(parts))
    made = []
    for part, extra in (("scheduler", {}), (name, {"torch_dtype": dtype})):
        kind = getattr(diffusers, parts[part][1])
        made.append(kind.from_pretrained(source / part, local_files_only=True, **extra))
    scheduler, network = made
    return name, scheduler, network.eval()


def _classes(network: Any) -> bool:
    """Whether it is conditioned on classes."""
    config = network.config
    names = ("num_class_embeds", "num_embeds_ada_norm")
    prompts = getattr(config, "cross_attention_dim", None) is not None
    return not prompts and any(getattr(config, n, None) for n in names)


def _stored(folder: Path) -> tuple[str, dict[str, torch.dtype]]:
    """What the folder's files of weights are called, and the dtype of each weight in them.

    Raises:
        ValueError: there is no file of safetensors, or several variants.
    """
    from safetensors import safe_open

    files = sorted(folder.glob("*.safetensors"))
    variants = {file.name.split("-0")[0].removesuffix(".safetensors") for file in files}
    remedy = "save the pipeline with safe_serialization=True, and one variant of it"
    require(len(variants) == 1, "src", "weights in safetensors", sorted(variants), remedy)
    found = {}
    for file in files:
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - it is no mapping
                found[name] = opened.get_tensor(name).dtype
    return variants.pop(), found


def _write(
    source: Path, goal: Path, file: str, weights: dict[str, torch.Tensor], record: dict[str, Any]
) -> None:
    """A copy of the pipeline with these weights in ``file``, put in place when it is whole."""
    from safetensors.torch import save_file

    whole = goal.with_name(f".{goal.name}.{os.getpid()}.tmp")
    try:
        shutil.copytree(source, whole)
        for pattern in WEIGHTS:
            for old in (whole / file).parent.glob(pattern):
                old.unlink()
        contiguous = {n: w.contiguous() for n, w in weights.items()}
        save_file(contiguous, whole / file, {"format": "pt"})
        text = json.dumps(record, indent=1, default=str) + "\n"  # a dtype has no name there
        (whole / RECORD).write_text(text, encoding="utf-8")
        (whole / CARD).write_text(_card(record), encoding="utf-8")
        whole.rename(goal)
    finally:
        shutil.rmtree(whole, ignore_errors=True)


def _card(record: dict[str, Any]) -> str:
    recipe = record["recipe"]
    rows = [
        ("method", recipe["name"]),
        ("network", record["network"]),
        ("weights changed", f"{record['changed']:,} of {record['weights']:,}"),
        ("mask, sha256", record["mask"]),
        ("seed of noise and timesteps", record["seed"]),
        ("weights in training", record["dtype"]),
        ("steps skipped", record["skipped_steps"]),
        *((f"recipe: {key}", value) for key, value in recipe.items() if key != "name"),
    ]
    lines = [f"| {key} | {value} |" for key, value in rows]
    made = record["versions"]
    return (
        f"# Unlearned\n\nMade by sfron_fast {made['sfron_fast']}, torch {made['torch']}. All other"
        f" files are those of the pipeline it began from.\n\n| | |\n| --- | --- |\n"
        + "\n".join(lines)
        + "\n\nIt is not known from this file whether what was forgotten comes back after further"
        " training, nor what it cost: sample before and after, at guidance 0 too.\n"
    )
