"""The regression guard: a ratio that fell is named, an absolute time never matters."""

import json

import pytest

from benchmarks.tools import guard


def row(case, arm, ms):
    return {"case": case, "arm": arm, "p50_ms": ms}


OLD = [
    row("step", "probe: scale", 9.0),
    row("step", "stock", 30.0),
    row("step", "sfron_fast", 10.0),
    row("mask", "stock", 8.0),
    row("mask", "sfron_fast", 2.0),
]


def changed(**times):
    return [{**r, "p50_ms": times.get(f"{r['case']}_{r['arm']}", r["p50_ms"])} for r in OLD]


def test_ratios_by_hand():
    assert guard.ratios(OLD) == {
        ("step", "stock"): 3.0,
        ("step", "probe / sfron_fast"): 0.9,
        ("mask", "stock"): 4.0,
    }


def test_a_machine_of_half_the_speed_is_no_regression():
    assert guard.compare([{**r, "p50_ms": 2 * r["p50_ms"]} for r in OLD], OLD, 0.01) == ([], [])


def test_what_fell_is_named():
    fell, alone = guard.compare(changed(mask_sfron_fast=3.0), OLD, 0.15)
    assert fell == ["mask, against stock: 4.00 -> 2.67"]
    assert alone == []
    assert guard.compare(changed(mask_sfron_fast=2.2), OLD, 0.15)[0] == []


def test_what_computes_is_not_held_against_the_probe():
    slow = [
        row("loss", "probe: scale", 1.0),
        row("loss", "eager", 9.0),
        row("loss", "sfron_fast", 3.0),
    ]
    assert guard.compare([{**slow[0], "p50_ms": 0.5}, *slow[1:]], slow, 0.15)[0] == []


@pytest.mark.parametrize(("second", "status"), [(3.0, 1), (2.0, 0)])
def test_what_fell_is_measured_again(tmp_path, capsys, monkeypatch, second, status):
    results = {"new": changed(mask_sfron_fast=3.0), "old": OLD}
    for name, rows in results.items():
        (tmp_path / f"{name}.json").write_text(json.dumps({"provenance": {}, "rows": rows}))
    asked = []

    def again(command, **_):
        asked.append(command[command.index("--only") + 1])
        rows = [r for r in changed(mask_sfron_fast=second) if r["case"] == asked[-1]]
        (tmp_path / "again.json").write_text(json.dumps({"provenance": {}, "rows": rows}))

    monkeypatch.setattr(guard.subprocess, "run", again)
    paths = [str(tmp_path / f"{name}.json") for name in results]
    assert guard.main([*paths, "--again", "2"]) == status
    assert asked == ["mask"] * (1 + status)  # the second time only if it fell the first
    assert guard.main(paths) == 1
    assert "mask, against stock: 4.00 -> 2.67" in capsys.readouterr().out


def test_what_is_missing_is_said():
    _, alone = guard.compare(OLD[:3], OLD, 0.15)
    assert alone == ["mask, against stock: only in one of the results"]


def test_an_arm_of_ours_that_is_gone_fell():
    new = [r for r in OLD if (r["case"], r["arm"]) != ("step", "sfron_fast")]
    assert guard.compare(new, OLD, 0.15)[0] == ["step: sfron_fast is gone"]
    # not run at all
    assert guard.compare([r for r in OLD if r["case"] != "step"], OLD, 0.15)[0] == []


def test_not_a_number_fell():
    assert guard.compare(changed(mask_sfron_fast=float("nan")), OLD, 0.15)[0] == [
        "mask, against stock: 4.00 -> nan"
    ]


@pytest.mark.parametrize(
    ("new", "said"),
    [
        ({"rows": []}, "0 of 3 ratios compared"),
        (
            {"rows": OLD, "messages": [{"case": "loss", "arm": "", "message": "failed: x"}]},
            "loss: : failed: x",
        ),
        ({"rows": OLD, "provenance": {"commit": "abc", "rehearsal": True}}, "rehearsal"),
    ],
)
def test_no_comparison_is_no_success(tmp_path, capsys, new, said):
    for name, more in (("old", {}), ("new", new)):
        result = {"provenance": {"commit": "abc"}, "rows": OLD, **more}
        (tmp_path / f"{name}.json").write_text(json.dumps(result))
    assert guard.main([str(tmp_path / "new.json"), str(tmp_path / "old.json")]) == 1
    assert said in capsys.readouterr().out


@pytest.mark.parametrize(("time", "status"), [(2.0, 0), (4.0, 1)])
def test_command(tmp_path, capsys, time, status):
    origin = {"commit": "abc", "date": "2026-01-01"}
    for name, rows in (("old", OLD), ("new", changed(mask_sfron_fast=time))):
        (tmp_path / f"{name}.json").write_text(json.dumps({"provenance": origin, "rows": rows}))
    assert guard.main([str(tmp_path / "new.json"), str(tmp_path / "old.json")]) == status
    assert ("mask, against stock: 4.00 -> 2.00" in capsys.readouterr().out) == bool(status)


def test_a_result_is_compared_with_one_of_its_instruction_set(tmp_path):
    paths = {name: tmp_path / f"{name}.json" for name in ("new", "cpu", "cpu_avx2")}
    for name, isa in (("new", "AVX2"), ("cpu", "AVX512")):
        paths[name].write_text(json.dumps({"rows": [], "provenance": {"isa": isa}}))
    assert guard.of_the_same_kind(paths["new"], paths["cpu"]) == paths["cpu"]
    paths["cpu_avx2"].write_text("{}")
    assert guard.of_the_same_kind(paths["new"], paths["cpu"]) == paths["cpu_avx2"]
    assert guard.of_the_same_kind(paths["cpu"], paths["cpu"]) == paths["cpu"]
