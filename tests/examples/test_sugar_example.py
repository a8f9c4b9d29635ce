"""The demonstration of SUGAR runs, on a model of a second."""

import json

import numpy as np
import pytest
import torch

from examples.vision.sugar import __main__ as demo
from examples.vision.sugar import generator


def test_a_small_run_is_written(tmp_path, monkeypatch):
    for name, value in {"EPOCHS": 2, "STEPS": 20}.items():
        monkeypatch.setattr(generator, name, value)
    for name, value in {"REQUESTS": 2, "OTHERS": 32}.items():
        monkeypatch.setattr(demo, name, value)
    for settings in (demo.SURROGATE, demo.UNLEARN):
        monkeypatch.setitem(settings, "epochs", 5)
    images = np.random.default_rng(0).integers(0, 256, (150, 5, 5), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", images=images)
    demo.main(["--seed", "3", "--out", str(tmp_path), "--data", str(tmp_path / "images.npz")])
    found = json.loads((tmp_path / "seed3.json").read_text())
    assert found["verdict"] in ("PASS", "FAIL", "NOT SHOWN")
    assert (tmp_path / "sugar.png").exists()
    assert found["facts"]["data"] == "images.npz"
    assert len(found["facts"]["one by one"]["SUGAR"]) == 2


def test_a_miss_is_a_miss():
    """Verdicts from figures that were made up."""
    kept = {"retain error": 0.1, "likeness": 0.0}
    lost = {"retain error": 0.5, "likeness": 0.05}
    both = {"SUGAR": kept, demo.EXTRAPOLATED: lost}
    facts = {"at once": {"10": both, "20": both}}
    facts["one by one"] = {"SUGAR": [lost, kept], demo.OFF: [kept, lost]}
    claims, controls = demo.judged(facts)
    assert all(row.met for row in claims + controls)
    facts["at once"]["20"] = {**both, "SUGAR": {"retain error": 0.2, "likeness": 0.2}}
    facts["one by one"][demo.OFF] = [kept, kept]
    claims, controls = demo.judged(facts)
    assert [row.met for row in claims] == [True, True, False, False, True]
    assert [row.met for row in controls] == [True, True, False]


def test_identity_networks_know_versions_of_an_image(monkeypatch):
    monkeypatch.setattr(generator, "STEPS", 150)
    images = generator.read(None)[0][:100]
    network = generator.train_identity(generator.VAE(images.shape[1]), images, seed=0)
    draw = torch.Generator().manual_seed(1)
    seen = images + 0.2 * torch.randn(images.shape, generator=draw)
    with torch.no_grad():
        named = (network(seen) @ network(images).T).argmax(1)
    assert (named == torch.arange(100)).float().mean() > 0.95


@pytest.mark.long
def test_the_whole_demonstration(tmp_path):
    """Seed 7, which its settings were chosen on."""
    demo.main(["--seed", "7", "--out", str(tmp_path)])
    found = json.loads((tmp_path / "seed7.json").read_text())
    assert all(claim["met"] for claim in found["controls"])
    rows = found["facts"]["at once"]["10"]
    assert max(row["recognised"] for row in rows.values()) <= 0.1
