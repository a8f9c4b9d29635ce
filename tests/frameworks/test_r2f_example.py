"""The demonstration of R2F runs, on a model of a few seconds."""

import json

from examples.language.r2f import __main__ as demo
from examples.language.r2f import held


def test_a_small_run_is_written(tmp_path, monkeypatch):
    small = {"DEPTH": 1, "KNOWN": 6, "TUNED": 6, "FORGOTTEN": 2, "EPOCHS": 1, "TUNED_EPOCHS": 1}
    small |= {"FIT_BATCH": 8, "HELD_OUT": 2, "ATTACK_STEPS": 2, "NORMS": (0.5, demo.NORM)}
    for name, value in small.items():
        monkeypatch.setattr(demo, name, value)
    for name, value in {"WIDTH": 128, "INNER": 128, "SEQUENCES": 2, "DEPTH": 2}.items():
        monkeypatch.setattr(held, name, value)
    demo.main(["--seed", "3", "--out", str(tmp_path)])
    found = json.loads((tmp_path / "seed3.json").read_text())
    assert found["verdict"] in ("PASS", "FAIL", "NOT SHOWN")
    assert (tmp_path / "steps.png").exists()
