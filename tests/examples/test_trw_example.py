"""The demonstration of TRW runs, on models of no seconds."""

import json

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
from examples.vision.trw import __main__ as demo
from examples.vision.trw import fixture, forgetting


def test_a_small_run_is_written(tmp_path, monkeypatch):
    small = {"REFERENCES": 3, "TESTED": (3, 8), "TRAIN": {"digits": 400}, "EPOCHS": {"digits": 3}}
    for name, value in small.items():
        monkeypatch.setattr(demo, name, value)
    monkeypatch.setitem(forgetting.STEPS, "epochs", 1)
    demo.main(["--seed", "3", "--out", str(tmp_path)])
    found = json.loads((tmp_path / "digits" / "seed3.json").read_text())
    assert found["verdict"] in ("PASS", "FAIL", "NOT SHOWN")
    classes = found["facts"]["classes"]
    assert set(classes) == {"3", "8"}
    names = {"original", "retrained again", "TRW", "TRW by rows", "rescaling", "relabelling"}
    assert set(classes["3"]["models"]) == names | {"uniform target"}
    assert len(classes["3"]["shares"]) == 3
    assert (tmp_path / "digits" / "trw.png").exists()


def test_images_are_drawn():
    drawn = fixture.draw(torch.rand(4, 1, 2, 3), torch.tensor([3, 1, 2, 0]), 3, seed=0)
    assert (len(drawn.train), len(drawn.test)) == (3, 1)


def facts(distances, spreads):
    names = ("original", "retrained again", "TRW", "rescaling", "relabelling", "uniform target")
    rows = {n: {"distance": d, "spreads": s} for n, d, s in zip(names, distances, spreads)}  # noqa: B905
    return {"floor": 0.1, "means": rows, "classes": {"0": {"models": rows}}}


def test_what_is_claimed():
    good = facts((1.0, 0.1, 0.2, 0.3, 0.6, 0.6), (9, 1, 1, 1, 9, 9))
    claims, controls = demo.judged(good)
    assert [c.found for c in claims] == pytest.approx([0.5, 9, 9, 1])
    assert [c.found for c in controls] == pytest.approx([2.5, 2.5])
    assert all(c.met for c in controls)
    # where rescaling is no further away than retrained models there is nothing to halve
    claims, _ = demo.judged(facts((1.0, 0.1, 0.2, 0.05, 0.6, 0.6), (9, 1, 1, 1, 9, 9)))
    assert not claims[0].met
