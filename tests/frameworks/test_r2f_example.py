"""The demonstration of R2F runs, on a model of a few seconds."""

import json

import pytest

from examples.language import facts
from examples.language.r2f import __main__ as demo
from examples.language.r2f import held


def test_a_small_run_is_written(tmp_path, monkeypatch):
    small = {"DEPTH": 1, "KNOWN": 6, "TUNED": 6, "FORGOTTEN": 2, "EPOCHS": 1, "TUNED_EPOCHS": 1}
    small |= {"FIT_BATCH": 8, "HELD_OUT": 2, "NORMS": (0.5, demo.NORM)}
    for name, value in small.items():
        monkeypatch.setattr(demo, name, value)
    monkeypatch.setitem(facts.ATTACK, "steps", 2)
    for name, value in {"WIDTH": 128, "INNER": 128, "SEQUENCES": 2, "DEPTH": 2}.items():
        monkeypatch.setattr(held, name, value)
    demo.main(["--seed", "3", "--out", str(tmp_path)])
    found = json.loads((tmp_path / "seed3.json").read_text())
    assert found["verdict"] in ("PASS", "FAIL", "NOT SHOWN")
    assert (tmp_path / "steps.png").exists()


@pytest.mark.long
def test_the_whole_demonstration(tmp_path):
    """Seed 7, which its settings were chosen on: the models have learnt, and the sums hold."""
    demo.main(["--seed", "7", "--out", str(tmp_path)])
    found = json.loads((tmp_path / "seed7.json").read_text())
    rows = found["facts"]["rows"]
    before = rows["before"]
    assert min(before["forget"], before["retain"]) >= 0.95
    assert rows["retrained"]["forget"] <= 0.45
    assert all(claim["met"] for claim in found["controls"])
