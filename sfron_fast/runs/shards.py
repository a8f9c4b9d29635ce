"""Checkpoints of a run on several ranks: tensors through torch.distributed.checkpoint in a folder
of the step, and beside it one small file with the rest, written last by the first rank.

Each rank has a part of its own in that file: its loaders' places and its generators.
"""

import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..distributed.shards import placed
from ..errors import require, warn
from .folder import SHARED_FORMAT, check_readable, save_whole

OWN = ("retain", "forget", "random", "task")  # of a rank; all else is the same on each
STEP = "step-"
COMPILED = "_orig_mod"


def bare(run: Any) -> torch.nn.Module:
    """The model without DDP and, on several ranks, torch.compile: its names are those of one
    process.
    """
    model = run.ranks.model
    return model if run.ranks.group is None else getattr(model, COMPILED, model)


def split_state(run: Any, state: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What goes into the small file, and the tensors."""
    weights, optimizer = state["model"], state["optimizer"]
    tensors = {f"model.{n}": w for n, w in weights.items() if isinstance(w, Tensor)}
    for index, states in optimizer["state"].items():
        tensors |= {f"optimizer.{index}.{key}": value for key, value in states.items()}
    rest = {n: w for n, w in weights.items() if not isinstance(w, Tensor)}
    small = {
        "model": rest,
        "optimizer": {"state": {}, "param_groups": optimizer["param_groups"]},
    }
    return {**state, **small, "format": SHARED_FORMAT}, tensors


def check_shared(run: Any, state: dict[str, Any]) -> None:
    """Raise ValueError for what the small file could not give back."""
    check_readable(split_state(run, state)[0])


def save_shared(run: Any, state: dict[str, Any]) -> None:
    """Write the checkpoint; until its small file is whole, the one before is what a run goes on
    from.
    """
    import torch.distributed.checkpoint as dcp

    ranks, folder = run.ranks, run.folder
    small, tensors = split_state(run, state)
    name = f"{STEP}{run.position}"
    dcp.save(tensors, checkpoint_id=folder.path / name, process_group=ranks.group)
    own = {key: small.pop(key) for key in OWN}
    everyone: Any = [None] * ranks.size if ranks.rank == 0 else None
    dist.gather_object(own, everyone, dist.get_global_rank(ranks.group, 0), group=ranks.group)
    with ranks.together():
        if ranks.rank == 0:
            save_whole({**small, "shards": name, "ranks": everyone}, folder.checkpoint)
            for earlier in folder.path.glob(f"{STEP}*"):
                if earlier.name != name:
                    shutil.rmtree(earlier, ignore_errors=True)


def gathered(run: Any, saved: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint of any number of ranks as this rank reads it; without ``OWN`` if they were as
    many no more.

    Warns:
        RuntimeWarning: then the pass begun is not finished: the loaders begin a new one.
    """
    shared, alone = "shards" in saved, run.ranks.group is None
    if alone and not shared:
        return saved
    parts = saved["ranks"] if shared else [{key: saved[key] for key in OWN if key in saved}]
    saved = {key: value for key, value in saved.items() if key not in OWN}
    prefix = f"{COMPILED}." if hasattr(bare(run), COMPILED) else ""
    weights, buffers = (
        {prefix + name.removeprefix(f"{COMPILED}."): w for name, w in saved[part].items()}
        for part in ("model", "buffers")
    )
    states = {i: dict(s) for i, s in saved["optimizer"]["state"].items()}
    params = [p for group in run.optimizer.param_groups for p in group["params"]]
    likes = bare(run).state_dict()
    if shared:
        for key, value in _load(run, saved["shards"], likes, params, prefix).items():
            kind, _, name = key.partition(".")
            if kind == "model":
                weights[prefix + name] = value
            else:
                index, _, what = name.partition(".")
                states.setdefault(int(index), {})[what] = value
    saved["buffers"] = buffers
    saved["model"] = {n: placed(w, likes.get(n)) for n, w in weights.items()}
    states = {i: {k: placed(v, params[i]) for k, v in s.items()} for i, s in states.items()}
    saved["optimizer"] = {**saved["optimizer"], "state": states}
    if len(parts) == run.ranks.size:
        return {**saved, **parts[run.ranks.rank]}
    warn(
        f"the run is resumed on {run.ranks.size} rank(s), where it had {len(parts)}: weights,"
        " optimizer and step are those of the checkpoint, but the loaders begin a new pass, and"
        " random generators go on as they are"
    )
    for name in ("retain", "forget"):
        getattr(run, name).passes = parts[0][name]["passes"]
    kind, ours = parts[0].get("task", {}).get("kind"), type(run.task).__qualname__
    same = kind in (None, ours)
    require(same, "task", f"the {kind} that the checkpointed run began with", ours)
    return saved


def _load(
    run: Any, name: str, likes: dict[str, Any], params: list[Tensor], prefix: str
) -> dict[str, Tensor]:
    """The tensors of a folder, in shards where those of this run are."""
    import torch.distributed.checkpoint as dcp

    path: Path = run.folder.path / name
    whole = (path / ".metadata").exists()
    remedy = "let all ranks have the same folder, or remove it to start again"
    require(whole, "checkpoint", f"tensors in {path}", "none", remedy)
    reader = dcp.FileSystemReader(path)
    tensors = {}
    saved: dict[str, Any] = reader.read_metadata().state_dict_metadata
    for key, found in saved.items():
        kind, _, rest = key.partition(".")
        like = likes.get(prefix + rest) if kind == "model" else params[int(rest.partition(".")[0])]
        size, dtype = found.size, found.properties.dtype
        if isinstance(like, Tensor) and like.shape == size:
            tensors[key] = torch.empty_like(like.detach(), dtype=dtype)
        else:
            tensors[key] = torch.empty(size, dtype=dtype)
    group = run.ranks.group
    dcp.load(tensors, storage_reader=reader, process_group=group, no_dist=group is None)
    return tensors
