"""One result of several runs."""

import json

import pytest

from benchmarks.harness import make_row
from benchmarks.tools.median import main, median

ORIGIN = {"device": "a machine", "commit": "abc", "threads": 2, "load": 0.1}


def run(*times, notes=(), **origin):
    rows = [make_row(f"case {i}", "sfron_fast", [ms / 1e3] * 2, 0) for i, ms in enumerate(times)]
    messages = [{"case": "all", "arm": "", "message": note} for note in notes]
    return {
        "provenance": ORIGIN | origin,
        "rows": [vars(row) for row in rows],
        "messages": messages,
    }


def test_each_figure_is_the_median_of_the_runs_that_have_it():
    runs = [run(1.0, 9.0, notes=["a"]), run(5.0, load=3.0, notes=["a", "b"]), run(2.0, 7.0)]
    rows, origin, notes = median(runs)
    assert [(r.case, r.p50_ms) for r in rows] == [("case 0", 2.0), ("case 1", 8.0)]
    assert (origin["runs"], origin["load"]) == (3, 3.0)
    assert [note["message"] for note in notes] == ["a", "b"]


def test_a_case_that_one_run_had_no_time_for():
    late = {"case": "case 1", "arm": "", "message": "skipped"}
    runs = [run(1.0), run(3.0, 9.0)]
    runs[0]["messages"] = [late, {**late, "case": "case 2"}]
    rows, _, notes = median(runs)
    assert [(r.case, r.p50_ms) for r in rows] == [("case 0", 2.0), ("case 1", 9.0)]
    assert [note["case"] for note in notes] == ["case 2"]


def test_runs_of_two_commits_are_refused(tmp_path, capsys):
    with pytest.raises(ValueError, match="runs: expected one commit, found abc, abd"):
        median([run(1.0), run(1.0, commit="abd")])
    paths = [tmp_path / "one.json", tmp_path / "two.json"]
    for path, threads in zip(paths, (1, 2), strict=True):
        path.write_text(json.dumps(run(1.0, threads=threads)))
    with pytest.raises(SystemExit):
        main([*map(str, paths), "--out", str(tmp_path / "out")])
    assert "expected one threads, found 1, 2" in capsys.readouterr().err
    assert not (tmp_path / "out.json").exists()
    assert main([*[str(paths[0])] * 2, "--out", str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out.json").read_text())["provenance"]["runs"] == 2
