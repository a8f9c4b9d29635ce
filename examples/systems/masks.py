"""Masks to compare with."""

import torch

import sfron_fast as sf


def at_random(mask: sf.SaliencyMask, seed: int) -> sf.SaliencyMask:
    """As many weights of each parameter as ``mask`` selects, drawn by ``seed``."""
    draw, masks = torch.Generator().manual_seed(seed), {}
    for name, count in mask.counts().items():
        flat = torch.zeros(mask.size(name), dtype=torch.bool)
        flat[torch.randperm(len(flat), generator=draw)[:count]] = True
        masks[name] = flat.view(mask.shapes[name])
    return sf.SaliencyMask.from_bool(masks)
