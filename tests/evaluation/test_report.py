"""The report's numbers, its table, Markdown, JSON and files, and the figures as PNG."""

from __future__ import annotations

import json
import math
import statistics

import pytest
import torch

pytest.importorskip("matplotlib")

from sfron_fast.evaluation import figures
from sfron_fast.evaluation.report import Report

ORIGINAL = {"FA": 100.0, "RA": 99.0, "TA": 90.0, "MIA": 95.0}
RETRAIN = {"FA": 91.0, "RA": 99.5, "TA": 90.5, "MIA": 80.0, "RTE": 400.0}


def filled():
    report = Report({"digits": "100 of 1,437 digits"}, notes=["reference chosen by its last epoch"])
    for seed, fa in ((1, 92.0), (2, 95.0), (3, 96.5)):
        values = {"RTE": 2.0 * seed, "FA": fa, "RA": 98.0, "TA": 89.0, "MIA": 81.0}
        values |= {"D_KL_forget": 0.125, "Avg.D": 1.0}
        report.add("digits", "SFR-on", seed, values)
    report.add("digits", "FT", 1, {"FA": 99.0, "RA": 99.9, "TA": 91.0, "MIA": 94.0, "other": 1.0})
    for seed in (1, 2):
        report.add("digits", "Retrain", seed, {**RETRAIN, "FA": 90.0 + seed})
    report.add("digits", "Original", 1, ORIGINAL)
    return report


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.mark.checklist("H7")
def test_to_dict_mean_and_sample_deviation():
    result = filled().to_dict()["settings"]["digits"]
    assert list(result) == ["Original", "Retrain", "SFR-on", "FT"]
    fa = result["SFR-on"]["FA"]
    assert fa["mean"] == pytest.approx((92.0 + 95.0 + 96.5) / 3)
    assert fa["std"] == pytest.approx(statistics.stdev([92.0, 95.0, 96.5]))
    assert fa["std"] == pytest.approx(math.sqrt((2.5**2 + 0.5**2 + 2.0**2) / 2))
    assert result["Original"]["FA"] == {"mean": 100.0, "std": 0.0}
    assert "D_KL_forget" not in result["Retrain"]


def test_to_dict_keeps_every_run_and_says_where_it_comes_from():
    result = filled().to_dict()
    assert {"setting": "digits", "method": "Original", "seed": 1, "metrics": ORIGINAL} in result[
        "runs"
    ]
    assert len(result["runs"]) == 7
    assert result["descriptions"] == {"digits": "100 of 1,437 digits"}
    provenance = result["provenance"]
    assert provenance["seeds"] == [1, 2, 3]
    assert provenance["threads"] == torch.get_num_threads()
    assert provenance["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert set(provenance) == {"versions", "platform", "device", "threads", "date", "seeds"}


@pytest.mark.checklist("H7")
def test_markdown_table():
    lines = filled().markdown().splitlines()
    header = next(i for i, line in enumerate(lines) if line.startswith("| method"))
    names = cells(lines[header])
    assert names[:6] == ["method", "FA [%]", "RA [%]", "TA [%]", "MIA [%]", "D_KL_forget"]
    body = [cells(line) for line in lines[header + 2 : header + 6]]
    rows = {row[0]: dict(zip(names, row, strict=True)) for row in body}
    assert list(rows) == ["Original", "Retrain", "SFR-on", "FT"]
    assert rows["SFR-on"]["FA [%]"] == "94.50 ± 2.29 (+3.00)"  # Retrain's mean is 91.5
    assert rows["SFR-on"]["MIA [%]"] == "81.00 ± 0.00 (+1.00)"
    assert rows["SFR-on"]["RA [%]"] == "98.00 ± 0.00 (-1.50)"
    assert rows["SFR-on"]["D_KL_forget"] == "0.1250 ± 0.0000"
    assert rows["SFR-on"]["RTE [s]"] == "4.00 ± 2.00"
    assert rows["Original"]["FA [%]"] == "100.00 (+8.50)"  # one seed: no deviation is shown
    assert rows["Retrain"]["FA [%]"] == "91.50 ± 0.71"  # no gap to itself
    assert rows["Retrain"]["D_KL_forget"] == "–"  # noqa: RUF001
    assert rows["FT"]["other"] == "1.0000"


@pytest.mark.checklist("H7")
def test_markdown_says_what_the_numbers_are():
    text = filled().markdown()
    for phrase in (
        "FA, forget accuracy: ",
        "RA, retain accuracy: ",
        "TA, test accuracy: ",
        "MIA, membership inference attack: ",
        "Kullback-Leibler divergence",
        "Avg.D, average distance: ",
        "RTE, run-time efficiency: ",
        "Logistic regression with balanced classes on the prediction entropy",
        "Reference: models trained anew without the forget set",
        "Seeds: 1, 2, 3.",
        "Approximate unlearning is not a deletion guarantee.",
        "reference chosen by its last epoch",
        "Values without ± are from one seed.",
        torch.__version__.split("+")[0],
    ):
        assert phrase in text
    assert "MIA_m:" not in text  # not measured here


@pytest.mark.checklist("H7")
def test_markdown_without_a_reference_says_so():
    report = Report()
    report.add("a", "SFR-on", 0, {"FA": 50.0})
    report.add("a", "SFR-on", 1, {"FA": 60.0})
    text = report.markdown()
    assert "| SFR-on | 55.00 ± 7.07 |" in text
    assert "Reference: none" in text
    assert "one seed" not in text
    report.add("b", "Retrain", 0, {"FA": 50.0})
    assert "There is none for a." in report.markdown()


def test_table_is_aligned_and_complete():
    text = filled().table()
    assert text.startswith("digits: 100 of 1,437 digits\n")
    blocks = [block.splitlines() for block in text.strip().split("\n\n")[1:]]
    assert len(blocks) == 2  # too wide for one
    for block in blocks:
        assert [line.split("  ")[0].strip() for line in block] == [
            "method",
            "Original",
            "Retrain",
            "SFR-on",
            "FT",
        ]
        assert max(map(len, block)) <= 120
        right_edge = {len(line) for line in block}
        assert len(right_edge) == 1
    for part in ("94.50 ± 2.29 (+3.00)", "4.00 ± 2.00", "0.1250 ± 0.0000"):
        assert part in text


@pytest.mark.parametrize(
    "value", [math.nan, math.inf, -math.inf, None, "1", True, torch.tensor(1.0)]
)
def test_add_refuses_a_value_that_is_not_a_finite_number(value):
    report = Report()
    with pytest.raises(
        ValueError, match=r"metrics\['TA'\]: expected a finite number.*s / m / seed 3"
    ):
        report.add("s", "m", 3, {"FA": 1.0, "TA": value})
    assert report.to_dict()["settings"] == {}  # nothing recorded


def test_add_takes_numpy_numbers():
    numpy = pytest.importorskip("numpy")
    report = Report()
    report.add("s", "m", numpy.int64(4), {"FA": numpy.float32(0.5), "TA": 7})
    assert json.loads(json.dumps(report.to_dict()))["runs"][0]["metrics"] == {"FA": 0.5, "TA": 7.0}


def test_add_refuses_what_would_spoil_a_mean():
    report = filled()
    with pytest.raises(ValueError, match="seed: expected one not yet added, found 1"):
        report.add("digits", "Original", 1, ORIGINAL)
    with pytest.raises(ValueError, match=r"metrics: expected \['FA', 'RA', 'TA', 'MIA'\]"):
        report.add("digits", "Original", 2, {"FA": 1.0})
    with pytest.raises(ValueError, match=r"setting: expected one of \['digits'\], found 'digit'"):
        report.add("digit", "Original", 2, ORIGINAL)
    with pytest.raises(ValueError, match="metrics: expected at least one"):
        report.add("digits", "Original", 2, {})
    with pytest.raises(ValueError, match="seed: expected an integer"):
        report.add("digits", "Original", 0.5, ORIGINAL)


def test_save(tmp_path):
    report = filled()
    folder = report.save(
        tmp_path / "new" / "report", {"time": figures.time_per_method({"FT": (1.0, 0.0)})}
    )
    assert folder == tmp_path / "new" / "report"
    assert sorted(p.name for p in folder.iterdir()) == ["report.json", "report.md", "time.png"]
    assert (folder / "time.png").read_bytes().startswith(b"\x89PNG\r\n")

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    stored = json.loads((folder / "report.json").read_text(encoding="utf-8"), parse_constant=refuse)
    fresh = report.to_dict()
    stored["provenance"].pop("date"), fresh["provenance"].pop("date")
    assert stored == fresh
    assert "![time](time.png)" in (folder / "report.md").read_text(encoding="utf-8")


def test_save_replaces_a_file_whole_or_not_at_all(tmp_path):
    report = filled()
    report.save(tmp_path, {"a": figures.time_per_method({"FT": (1.0, 0.0)})})
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    class Broken:
        def savefig(self, path, **_):
            path.write_bytes(b"half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        report.save(tmp_path, {"a": Broken()})
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_save_leaves_a_reader_of_the_old_file_with_the_old_file(tmp_path):
    report = filled()
    report.save(tmp_path)
    with (tmp_path / "report.json").open(encoding="utf-8") as opened:
        report.add("digits", "Original", 2, ORIGINAL)
        report.save(tmp_path)
        assert len(json.load(opened)["runs"]) == 7
    assert len(json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["runs"]) == 8


@pytest.mark.parametrize("name", ["../escape", "a/b", "", ".hidden", "with space"])
def test_save_refuses_figure_names_that_are_not_file_names(tmp_path, name):
    with pytest.raises(ValueError, match="figures: expected names of letters"):
        filled().save(tmp_path / "out", {name: None})
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_a_report_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"settings: expected .*found str"):
        Report("digits")
    with pytest.raises(ValueError, match=r"metrics: expected .*found float"):
        Report().add("digits", "FT", 0, 1.0)
    with pytest.raises(ValueError, match="report: expected at least one run, found none"):
        Report().save(tmp_path / "out")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"folder: expected a folder.*found a file at"):
        filled().save(tmp_path / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
