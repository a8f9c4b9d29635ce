"""Diffusion models on several ranks: the draws, and so the run, of one process."""

import warnings

import torch
import torch.distributed as dist
from denoisers import KEPT, NULL, denoiser, images
from ranks import on_ranks
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import sfron_fast as sf

SETS = {
    "forget": [images(6, seed=1, label=2), images(5, seed=2, label=2)],
    "retain": [images(8, seed=seed) for seed in (3, 4, 5)],
}


class Usual:
    """A reference that falls with the timestep."""

    def at(self, t):
        return 2.0 / (1.0 + t.float())


RUNS = {
    "adaptive": (sf.Recipe.budgeted(cycles=4, lr=1e-2, forget_lr=1e-2, draws=2), {}),
    "relative": (
        sf.Recipe.diffusion_ascent(cycles=4, draws=1, ceiling=20.0),
        {"reference": Usual()},
    ),
    "replaced": (sf.Recipe.diffusion(cycles=4, draws=1, lr=1e-2), {"instead": sf.Relabel(0)}),
}


def task(settings):
    return sf.Denoising(KEPT, null=NULL, drop=0.3, **settings)


def mine():
    """Samples in turn, as DistributedSampler deals them out."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    return {
        name: [tuple(t[rank::ranks] for t in batch) for batch in batches]
        for name, batches in SETS.items()
    }


def sharded(model):
    return fully_shard(model)


def same_runs():
    for name, (recipe, settings) in RUNS.items():
        alone = denoiser()
        start = {n: p.clone() for n, p in alone.state_dict().items()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = sf.unlearn(alone, **SETS, recipe=recipe, task=task(settings))
        moved = max(float((p - start[n]).abs().max()) for n, p in alone.state_dict().items())
        assert moved > 1e-3
        for wrap in (DistributedDataParallel, sharded):
            model = wrap(denoiser())
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = sf.unlearn(model, **mine(), recipe=recipe, task=task(settings))
            assert found.mask == expected.mask, (name, wrap)
            bare = getattr(model, "module", model)
            for (key, p), wanted in zip(
                bare.state_dict().items(), alone.state_dict().values(), strict=True
            ):
                whole = p.full_tensor() if hasattr(p, "full_tensor") else p
                torch.testing.assert_close(whole, wanted, rtol=1e-3, atol=1e-4, msg=f"{name} {key}")


def test_ranks_run_as_one_process():
    on_ranks(2, same_runs)
