"""The comparison of diffusion models runs, small and again; its gates judge what they are given."""

import copy
import json

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

ARMS = ["SFR-on", "SFR-on, ascent", "gradient ascent", "SFR-on, EMA .9999", "noise", "fine-tuning"]
ARMS += ["ESD, no retain steps"]


@pytest.fixture
def small(monkeypatch, tmp_path):
    """What takes seconds at full size, in hundredths; runs ``compare`` with further arguments."""
    from examples.diffusion import compare, compare_arms, compare_common, ddpm, digits

    few_images = digits.Digits(*(part[:100] for part in digits.load()))
    for module in (compare, ddpm):
        monkeypatch.setattr(module, "load", lambda: few_images)
    sampling = {"steps": 2, "clamp": 1.0}
    for module in (compare, compare_common, ddpm):
        monkeypatch.setattr(module, "SAMPLING", sampling)
    for module in (compare_common, ddpm):
        monkeypatch.setattr(module, "PER_CLASS", 4)
    monkeypatch.setattr(compare_arms, "PASSES", 4)
    monkeypatch.setattr(compare_common, "DRAWS", 1)

    def attacks(model, data, label, stops, seed):
        found = ddpm.attacks(model, data, label, range(1, 1 + len(stops)), seed)
        return zip(stops, (after for _, after in found), strict=True)

    monkeypatch.setattr(compare, "attacks", attacks)
    where = ["--out", str(tmp_path / "out"), "--results", str(tmp_path / "results")]
    return lambda *more: compare.main(["--scale", "0.005", *where, *more])


@pytest.mark.filterwarnings("ignore::RuntimeWarning:sfron_fast")
def test_runs_goes_on_and_reports(small, tmp_path):
    from examples.diffusion import compare_report

    some = ["--seeds", "0", "--classes", "3", "--arms"]
    small(*some, *ARMS[:3])
    path = tmp_path / "results/seed0_class3.json"
    before = json.loads(path.read_text())
    assert list(before["rows"]) == ["base", "Retrain", *ARMS[:3]]
    assert 0.0 <= before["masks"]["overlap"] <= 1.0
    assert list(before["rows"]["SFR-on"]["attack"]) == ["100", "300", "1000"]
    seconds = before["rows"]["SFR-on"]["seconds"]
    assert seconds > before["masks"]["seconds"] > 0.0  # the arm that did not make the mask pays

    small(*some, *ARMS)
    after = json.loads(path.read_text())
    assert list(after["rows"]) == ["base", "Retrain", *ARMS]
    assert {k: after["rows"][k] for k in before["rows"]} == before["rows"]

    text = compare_report.report(tmp_path / "results", tmp_path / "out")
    assert text == (tmp_path / "results/README.md").read_text()
    assert "| fine-tuning |" in text
    assert "not shown" in text
    assert {p.name for p in (tmp_path / "results").glob("*.png")} == {"trade.png", "grid.png"}
    with pytest.raises(ValueError, match="other --results"):
        small(*some, "SFR-on", "--scale", "0.006")


@pytest.mark.filterwarnings("ignore::RuntimeWarning:sfron_fast")
def test_choice_tries_the_grid(small, tmp_path, monkeypatch):
    from examples.diffusion import compare, compare_report

    monkeypatch.setattr(compare, "CHOSEN", (1,))
    monkeypatch.setattr(compare_report, "CHOSEN", (1,))
    small("--choose", "--arms", "fine-tuning")
    assert "| fine-tuning | 0.0005:" in compare_report.choice(tmp_path / "results")


def at(fa, ra, fd=0.9, real=90.0):
    return {"fa": fa, "ra": ra, "fd": fd, "real": real, "saturated": 10.0}


def row(fa, ra, seconds=1.0, back=0.0, **of):
    steps = {n: at(back, ra, **of) for n in ("100", "300", "1000")}
    both = {"0": at(fa, ra, **of), "1": at(fa, ra, **of)}
    return {**both, "seconds": seconds, "attack": steps}


GOOD = {
    "base": row(100.0, 99.5),
    "Retrain": row(0.0, 99.8, seconds=40.0),
    "SFR-on": row(0.0, 99.6),
    "SFR-on, 16 passes": row(2.0, 99.0),
    "SFR-on, ascent": row(3.0, 99.5, back=60.0),
    "ascent, no slow step": row(30.0, 97.0),
    "ascent, raw adaptive": row(40.0, 99.0),
    "ESD": row(5.0, 98.0, back=80.0),
    "DiMUM, 600 passes": row(0.0, 99.0),
    "fine-tuning": row(100.0, 99.9),
    "ascent, gamma 3": row(99.0, 99.9),
    "ascent, unconditional only": row(100.0, 90.0),
    "SFR-on, EMA .9999": row(100.0, 99.5),
    "gradient ascent, until forgotten": row(10.0, 30.0),
    "ESD, no retain steps": row(0.0, 70.0, back=80.0),
    "noise": row(10.0, 10.0, fd=50.0, real=0.0),
}
BAD = {  # of each arm, what makes a gate miss, and a word of that gate
    "base": (row(90.0, 99.5), "base: mean FA"),
    "SFR-on": (row(0.0, 99.6, seconds=4.0), "1/15"),
    "SFR-on, 16 passes": (row(9.0, 99.0), "16 passes: mean FA"),
    "SFR-on, ascent": (row(3.0, 99.5, back=20.0), "the attack brings FA back"),
    "ascent, no slow step": (row(1.0, 99.9), "than ascent, no slow step"),
    "ESD": (row(5.0, 98.0, back=20.0), "ESD: the attack"),
    "DiMUM, 600 passes": (row(0.0, 99.0, back=9.0), "FA <= 5 after"),
    "fine-tuning": (row(50.0, 99.9), "fine-tuning must fail"),
    "gradient ascent, until forgotten": (row(10.0, 99.0), "once FA < 25"),
    "noise": (row(10.0, 10.0, fd=50.0, real=80.0), "noise must fail"),
}


def results(rows, overlap=0.7):
    return [
        {"seed": s, "class": c, "rows": copy.deepcopy(rows), "masks": {"overlap": overlap}}
        for s in (0, 1)
        for c in (0, 3, 5)
    ]


def verdicts(pairs):
    from examples.diffusion.compare_gates import EVERY, verdict

    return {gate.name: verdict(gate, pairs)[0] for every in EVERY.values() for gate in every}


def test_good_rows_meet_every_gate():
    assert set(verdicts(results(GOOD)).values()) == {"met"}
    assert [k for k, v in verdicts(results(GOOD, 0.5)).items() if v != "met"] == [
        "masks of two noise seeds: overlap >= 0.55"
    ]


@pytest.mark.parametrize("arm", BAD)
def test_bad_rows_miss_theirs(arm):
    bad, word = BAD[arm]
    missed = [k for k, v in verdicts(results(GOOD | {arm: bad})).items() if v == "MISS"]
    assert any(word in name for name in missed), missed


def test_a_pair_without_the_arm_shows_nothing():
    pairs = results(GOOD)
    del pairs[0]["rows"]["ESD"]
    assert [k for k, v in verdicts(pairs).items() if v == "not shown"] == [
        k for k in verdicts(pairs) if k.startswith("ESD:")
    ]


def test_sign_test():
    """Exact, two-sided, ties left out: 2 (1 + 5) / 2^5 of one in five."""
    from examples.diffusion.compare_gates import signs

    found = signs([1, 1, 1, 1, 9, 4], [2, 2, 2, 2, 2, 4])
    assert found == (4, 1, 1)
    assert found.p == pytest.approx(0.375)
    assert signs([1] * 6, [2] * 6).p == pytest.approx(2 / 64)
    assert signs([1.0], [1.0]).p == 1.0
