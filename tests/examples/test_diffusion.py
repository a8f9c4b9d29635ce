"""The example of a diffusion model runs, small; what it measures is another matter."""

import json

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")


@pytest.mark.filterwarnings("ignore::RuntimeWarning:sfron_fast")
@pytest.mark.parametrize("model", ["mlp", "unet"])
def test_every_arm_runs(tmp_path, monkeypatch, model):
    from examples.diffusion import compare_arms, compare_common, ddpm, digits

    for module in (compare_common, ddpm):
        monkeypatch.setattr(module, "SAMPLING", {"steps": 2, "clamp": 1.0})
        monkeypatch.setattr(module, "PER_CLASS", 4)
    monkeypatch.setattr(compare_arms, "PASSES", 4)
    monkeypatch.setattr(compare_common, "DRAWS", 1)
    few_images = digits.Digits(*(part[:100] for part in digits.load()))
    monkeypatch.setattr(ddpm, "load", lambda: few_images)
    only = [] if model == "mlp" else ["--only", "SFR-on"]
    arguments = ["--model", model, "--classes", "3", "--scale", "0.005", "--attack", "2", *only]
    ddpm.main([*arguments, "--out", str(tmp_path)])
    rows = json.loads((tmp_path / "results.json").read_text())
    arms = {row["arm"] for row in rows}
    assert {"base", "SFR-on", "SFR-on, attacked"} <= arms
    if model == "mlp":
        assert {"Retrain", "SalUn", "ESD", "DiMUM", "SFR-on, ascent", "fine-tuning"} <= arms
    assert len(rows) == 2 * len(arms)  # two guidances
    assert (tmp_path / f"{model}_3_0_SFR-on.png").exists()
    again = {p: p.stat().st_mtime_ns for p in tmp_path.glob("*.pt")}
    ddpm.main([*arguments, "--only", "nothing", "--out", str(tmp_path)])
    assert {p: p.stat().st_mtime_ns for p in tmp_path.glob("*.pt")} == again
