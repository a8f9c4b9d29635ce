"""A Fisher on disk, and what Fishers and masks say of themselves."""

import pytest
import torch
from models import build, loader
from safetensors.torch import save_file

import sfron_fast as sf


def test_a_fisher_comes_back_as_it_was(tmp_path):
    model, path = build(), tmp_path / "fisher.safetensors"
    forget, retain = (sf.estimate_fisher(model, loader(12, 4, seed=s)) for s in (1, 2))
    forget.save(path)
    found = sf.Fisher.load(path)
    assert found.metadata == forget.metadata
    assert found.keys() == forget.keys()
    assert all(torch.equal(found[name], forget[name]) for name in forget)
    again = sf.SaliencyMask.from_fisher(forget=found, retain=retain)
    assert again == sf.SaliencyMask.from_fisher(forget=forget, retain=retain)
    more = sf.estimate_fisher(model, loader(12, 4, seed=2), start=found)  # it goes on from it
    assert more.metadata["samples"] == 24


def test_files_that_are_none(tmp_path):
    path = tmp_path / "fisher.safetensors"
    with pytest.raises(FileNotFoundError, match=r"^path: expected a Fisher's file, found nothing"):
        sf.Fisher.load(path)
    mask = sf.estimate_mask(build(), forget=loader(8, 4), retain=loader(8, 4, seed=2))
    mask.save(path)
    with pytest.raises(ValueError, match=r"path: expected a Fisher in format .*found sfron_fast"):
        sf.Fisher.load(path)
    sf.estimate_fisher(build(), loader(8, 4)).save(path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"^path: expected a whole file of a Fisher"):
        sf.Fisher.load(path)
    header = {"format": "sfron_fast.fisher.v1", "metadata": "{}"}
    save_file({"a": torch.ones(2, dtype=torch.int32)}, path, metadata=header)
    with pytest.raises(ValueError, match=r"fp32 tensors"):
        sf.Fisher.load(path)


def test_reprs_are_one_short_line():
    model = build()
    fisher = sf.estimate_fisher(model, loader(8, 4))
    mask = sf.SaliencyMask.from_bool({"a": torch.tensor([1, 0, 0]), "b": torch.ones(2, 2)})
    assert repr(mask) == "<SaliencyMask of 5 of 7 weights (71.4 %) in 2 tensors>"
    assert repr(fisher) == (
        "<Fisher of 114 weights in 4 tensors: estimator sample, samples 8, batches 2,"
        " batch_size 4, world_size 1, 0 without gradient>"
    )
