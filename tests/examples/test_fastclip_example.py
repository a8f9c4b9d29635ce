"""The demonstration of FastClip runs, on fewer draws and layers."""

import json

import pytest
import torch
from torch import nn

pytest.importorskip("sklearn")

from examples.vision.fastclip import __main__ as demo
from examples.vision.fastclip import exact


def test_a_small_run_is_written(tmp_path, monkeypatch):
    small = {"SIZE": 40, "FORGOTTEN": 4, "REPEATS": 1, "EPOCHS": 1, "BOUND": 3.0}
    small["WIDTHS"] = (8, 8, 8)
    for name, value in small.items():
        monkeypatch.setattr(demo, name, value)
    monkeypatch.setitem(demo.TRAINING, "epochs", 10)
    few = dict(list(exact.layers(0).items())[4:5])
    monkeypatch.setattr(demo, "layers", lambda seed: few)
    demo.main(["--seed", "3", "--out", str(tmp_path)])
    found = json.loads((tmp_path / "seed3.json").read_text())
    assert found["verdict"] in ("PASS", "FAIL", "NOT SHOWN")
    assert list(found["facts"]["layers"]) == ["linear", *(f"trained {n}" for n in (0, 2, 4, 7))]
    assert max(found["facts"]["arms"]["clipped"]["norms"].values()) <= 3.0 * 1.03
    assert found["claims"][0]["met"]
    assert found["claims"][1]["met"]
    assert (tmp_path / "fastclip.png").exists()


def test_the_dense_norm_is_that_of_a_known_matrix():
    layer = nn.Linear(4, 4)
    with torch.no_grad():
        layer.weight.copy_(torch.diag(torch.tensor([1.0, -3.0, 2.0, 0.5])))
    assert exact.dense_norm(layer, torch.zeros(1, 4)) == pytest.approx(3.0)
