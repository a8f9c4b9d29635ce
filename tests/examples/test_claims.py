"""Claims and controls: the verdict, and what is written."""

import json
import math

import pytest

from examples.systems.claims import at_least, at_most, record, table, verdict, write

MET, MISSED = at_least("p", 0.5, 0.5), at_most("p", 0.6, 0.5)


@pytest.mark.parametrize(
    ("claims", "controls", "said"),
    [
        ([MET], [MET], "PASS"),
        ([MET, MISSED], [MET], "FAIL"),
        ([MET], [MET, MISSED], "NOT SHOWN"),  # a control that did not fail
        ([MISSED], [MISSED], "NOT SHOWN"),
        ([MET], [], "NOT SHOWN"),
        ([], [MET], "NOT SHOWN"),
    ],
)
def test_the_verdict(claims, controls, said):
    assert verdict(claims, controls) == said
    assert record(0, claims, controls, {}, 1.0)["verdict"] == said


def test_nan_is_a_miss():
    assert not at_least("p", math.nan, 0.0).met
    assert not at_most("p", math.nan, 1.0).met


def test_seeds_add_up_in_the_table(tmp_path, capsys):
    (tmp_path / "notes.md").write_text("What was found.\n")
    for seed in (1, 0):
        found = write(tmp_path, record(seed, [MET], [MISSED], {"more": [seed]}, 2.4), "A system")
    assert [result["seed"] for result in found] == [0, 1]
    assert json.loads((tmp_path / "seed1.json").read_text()) == found[1]
    assert found[1]["facts"] == {"more": [1]}
    text = (tmp_path / "README.md").read_text()
    assert text == f"# A system\n\n{table(found)}\nWhat was found.\n"
    assert "| claim: p | >= 0.5 | 0.5 | 0.5 |" in text
    assert "| control: p | <= 0.5 | **0.6** | **0.6** |" in text
    assert "| verdict | | NOT SHOWN | NOT SHOWN |" in text
    assert "control: p: 0.6 (<= 0.5) MISSED" in capsys.readouterr().out
