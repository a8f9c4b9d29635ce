"""How a parameter is called, whatever wraps the model, and a digest of all of them."""

import hashlib

import torch
from torch import nn

from .shards import whole

_WRAPPERS = ("module", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "base_layer")
_PEFT = ["base_model", "model"]


def canonical_name(name: str) -> str:
    """A parameter's name without what DataParallel, DDP, torch.compile, checkpointing, FSDP or PEFT put into it."""
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    return ".".join(parts[2:] if parts[:2] == _PEFT and len(parts) > 2 else parts)


def model_digest(model: nn.Module) -> str:
    """sha256 over the names, shapes, dtypes and values of a model's parameters."""
    sha = hashlib.sha256()
    for name, p in model.named_parameters():
        sha.update(f"{canonical_name(name)}{list(p.shape)}{p.dtype}".encode())
        sha.update(whole(p.detach()).cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()
