"""`python -m benchmarks.heads`, tiny: that it runs, and what it makes of its figures."""

import pytest
import torch

from benchmarks import heads
from benchmarks.harness import make_row


def test_rehearsal(tmp_path, monkeypatch):
    from benchmarks.cases import linear_cases

    # torch.compile, and the profiler for memory, take most of the time
    monkeypatch.setattr(linear_cases, "compiled", lambda function, tiny: None)
    heads.main(["--rehearse", "--out", str(tmp_path / "heads.md")])
    lines = (tmp_path / "heads.md").read_text().splitlines()
    rows = [line.split(" | ") for line in lines if line.startswith("| ")]
    measured = {row[1] for row in rows if "24 x 16 x 203" in row[0]}
    assert {heads.FULL, heads.LOGP, heads.OURS} <= measured
    assert sum("met" in cell or "missed" in cell for row in rows for cell in row) == 10
    assert any("Liger" in line for line in lines)  # what was left out is said


def test_scratch_and_goals():
    shape = (1024, 256, 131_072, torch.float32, False)
    case = heads.Measured(shape, {})
    for arm, ms, peak in ((heads.FULL, 2000.0, 1600.0), (heads.LOGP, 1800.0, 150.0)):
        row = make_row("", arm, [ms / 1e3] * 3, 0)
        row.peak_mb = peak
        case.rows[arm] = row
    case.rows[heads.OURS] = case.rows[heads.FULL]
    assert case.scratch(heads.LOGP) == pytest.approx(150 - 1 - 128)
    line = heads.goals([case, case, case, case])[2]
    assert line.endswith("| 1 | 0.90 | met | 1.00 | met |")
    assert "| 24 | 21.00 | met | 1471.00 | **missed** |" in heads.goals([case] * 4)[3]
