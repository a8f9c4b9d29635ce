"""What version 0.1.0 wrote is read by this one, and goes on to the weights that 0.1.0 reached."""

import importlib.util
import shutil

import pytest
import torch
from models import bits, same
from paths import TESTS

import sfron_fast as sf

FOLDER = TESTS / "written_by_0_1"
SPEC = importlib.util.spec_from_file_location("written_by_0_1", FOLDER / "make.py")
made = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(made)


@pytest.fixture(scope="module")
def expected():
    return torch.load(FOLDER / "expected.pt", weights_only=True)


def resume(model, samples, **settings):
    retain, forget = made.loaders(samples)
    return sf.unlearn(model, forget=forget, retain=retain, **settings)


def test_a_mask(expected):
    mask = sf.SaliencyMask.load(FOLDER / "mask.safetensors")
    assert same({name: mask.to_bool(name) for name in expected["mask"]}, expected["mask"])


@pytest.mark.parametrize("name", list(made.OPTIMIZERS))
def test_an_optimizer_inside_a_cycle(name, expected):
    saved = torch.load(FOLDER / f"{name}.pt", weights_only=True)
    model = made.network(saved["model"])
    assert not same(bits(model), expected["results"][name])
    kind, settings = made.OPTIMIZERS[name]
    mask = sf.SaliencyMask.load(FOLDER / "mask.safetensors")
    optimizer = kind(model.named_parameters(), saliency=mask, **settings)
    optimizer.load_state_dict(saved["optimizer"])
    assert optimizer.mid_cycle
    made.advance(optimizer, model, expected["gradients"], made.SAVED_AFTER, made.STEPS)
    assert same(bits(model), expected["results"][name])


def test_an_unlearning_run_inside_a_cycle(expected, tmp_path):
    folder = shutil.copytree(FOLDER / "run", tmp_path / "run")
    model = made.network(expected["start"])
    ended = []
    resume(
        model,
        expected["samples"],
        recipe=made.RECIPE,
        checkpoint=folder,
        on_cycle=lambda cycle, _: ended.append(cycle),
    )
    assert ended == [2, 3]  # the first was over
    found, wanted = bits(model), expected["results"]["run"]
    probe = made.probe(made.network(expected["start"]), expected["samples"])
    if all(map(torch.equal, probe, expected["probe"])):
        assert same(found, wanted)
    for name in wanted:  # another machine may multiply matrices in another order
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-4, atol=1e-5)
