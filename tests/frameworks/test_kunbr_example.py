"""The demonstration of KUnBR runs, on a model of a few seconds."""

import json

import pytest

from examples.language import facts
from examples.language.kunbr import __main__ as demo


def test_facts_are_what_they_say():
    everyone = facts.people(3, 20)
    whole = facts.together(everyone)
    rows, wrong = whole.rows(), whole.rows(2)
    assert len(whole) == 80
    assert len({tuple(p) for p in whole.prompt.tolist()}) == 80
    assert (rows["labels"][:, : facts.PROMPT] == -100).all()
    assert (rows["labels"][:, facts.PROMPT :] == rows["input_ids"][:, facts.PROMPT :]).all()
    assert (wrong["input_ids"] != rows["input_ids"]).any(1).all()
    assert int(rows["input_ids"].max()) < facts.VOCABULARY
    assert (whole.asked(2).rows()["input_ids"] != rows["input_ids"]).sum(1).eq(1).all()
    loader = facts.Loader(whole, 32, 0)
    read = [row for batch in loader for row in batch["input_ids"].tolist()]
    assert sorted(read) == sorted(rows["input_ids"].tolist())
    assert loader.given == 80
    half, other = facts.halves(whole, 1)
    assert sorted(half.prompt.tolist() + other.prompt.tolist()) == sorted(whole.prompt.tolist())


def test_a_small_run_is_written(tmp_path, monkeypatch):
    small = {"DEPTH": 4, "SIZE": 1, "TOP": 1, "PEOPLE": 8, "FORGOTTEN": 2, "LEARN_EPOCHS": 2}
    small |= {"EPOCHS": 1, "BLOCK_EPOCHS": 1, "ALL_EPOCHS": 2, "RETAIN_EPOCHS": 1}
    small |= {"BATCH": 4, "READ_ONCE": 8}
    for name, value in small.items():
        monkeypatch.setattr(demo, name, value)
    monkeypatch.setitem(facts.ATTACK, "steps", 2)
    demo.main(["--seed", "3", "--out", str(tmp_path)])
    found = json.loads((tmp_path / "seed3.json").read_text())
    assert found["verdict"] in ("PASS", "FAIL", "NOT SHOWN")
    equal = next(c for c in found["claims"] if c["text"].startswith("sequences"))
    assert equal["met"]
    assert (tmp_path / "relearning.png").exists()


@pytest.mark.long
def test_the_whole_demonstration(tmp_path):
    """Seed 7, which its settings were chosen on: the models have learnt, and the sums hold."""
    demo.main(["--seed", "7", "--out", str(tmp_path)])
    found = json.loads((tmp_path / "seed7.json").read_text())
    rows = found["facts"]["rows"]
    before = rows["original"]
    assert min(before["forget"], before["retain"]) >= 0.95
    assert rows["retrained"]["forget"] <= 0.45
    assert all(claim["met"] for claim in found["claims"][3:])  # tokens
