"""The figures: what they draw, that they render, what they refuse."""

from __future__ import annotations

import builtins
import math
from itertools import pairwise

import pytest
import torch

pytest.importorskip("matplotlib")

from sfron_fast.evaluation import figures

CURVES = {"SFR-on": [(99.0, 99.0), (95.0, 97.0), (91.5, 98.5)], "GA": [(99.0, 99.0), (80.0, 85.0)]}
LOSSES = {"forget": torch.tensor([0.0, 1e-12, 0.3, 2.0]), "test": [0.1, 0.5, 4.0]}
DRAWN = {
    "tradeoff": lambda: figures.tradeoff(CURVES, (91.0, 99.0)),
    "tradeoff without reference": lambda: figures.tradeoff({"GA": [(1.0, 2.0)]}),
    "losses": lambda: figures.loss_histograms(
        {"Original": LOSSES, "SFR-on": LOSSES, "Retrain": LOSSES}
    ),
    "losses of one value": lambda: figures.loss_histograms(
        {"Original": {"forget": [0.5], "test": [0.5]}}
    ),
    "mask": lambda: figures.mask_density({"conv.weight": 0.0, "fc.weight": 1.0}, total=0.4),
    "time": lambda: figures.time_per_method({"Retrain": (400.0, 8.0), "SFR-on": (2.0, 0.1)}),
}


@pytest.mark.parametrize("name", DRAWN)
def test_figures_render_without_pyplot_state(name, tmp_path, recwarn):
    figure = DRAWN[name]()
    figure.savefig(tmp_path / "f.png", format="png", dpi=100)
    data = (tmp_path / "f.png").read_bytes()
    assert data.startswith(b"\x89PNG\r\n")
    assert int.from_bytes(data[16:20], "big") >= 300  # width in pixels
    assert not [str(w.message) for w in recwarn]
    import matplotlib.pyplot as plt

    assert plt.get_fignums() == []


def texts(axes):
    return [text.get_text() for text in axes.texts]


def test_tradeoff_draws_the_data_and_labels_each_end():
    axes = DRAWN["tradeoff"]().axes[0]
    paths = [list(zip(*line.get_data(), strict=True)) for line in axes.lines]
    assert CURVES["SFR-on"] in paths
    assert CURVES["GA"] in paths
    assert [(91.0, 99.0)] in paths
    assert sorted(texts(axes)) == ["GA", "Original", "Retrain", "SFR-on"]
    at = {text.get_text(): tuple(text.xy) for text in axes.texts}
    ends = {"SFR-on": (91.5, 98.5), "GA": (80.0, 85.0)}
    assert at == ends | {"Original": (99.0, 99.0), "Retrain": (91.0, 99.0)}


def test_tradeoff_names_the_original_only_where_all_paths_start():
    axes = figures.tradeoff({"A": [(99, 99), (1, 1)], "B": [(98, 99), (1, 2)]}, (0, 99)).axes[0]
    assert sorted(texts(axes)) == ["A", "B", "Retrain"]


def test_tradeoff_labels_do_not_cover_each_other():
    near = {f"method {i}": [(99.0, 99.0), (90.0 + 0.02 * i, 98.0)] for i in range(5)}
    figure = figures.tradeoff({**near, "far": [(99.0, 99.0), (50.0, 60.0)]}, (90.0, 98.0))
    boxes = [t.get_window_extent() for t in figure.axes[0].texts if t.get_text()]  # no lines
    assert len(boxes) == 8
    assert not [1 for i, a in enumerate(boxes) for b in boxes[:i] if a.overlaps(b)]


def test_loss_histograms_hold_every_sample_once():
    figure = DRAWN["losses"]()
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["Original", "SFR-on", "Retrain"]
    for axes in figure.axes:
        assert axes.get_xscale() == "log"
        for patch in axes.patches:
            tops = [y for _, y in patch.get_path().vertices]
            assert 0.0 < max(tops) <= 100.0
        filled_areas = [p for p in axes.patches if p.get_fill()]
        assert len(filled_areas) == 2
        for patch in filled_areas:
            # The outline goes along the top from left to right and back along the axis.
            steps = pairwise(patch.get_path().vertices)
            tops = [y0 for (x0, y0), (x1, y1) in steps if y0 == y1 and x1 > x0]
            assert sum(tops) == pytest.approx(100.0)


def test_mask_density_is_in_percent_with_its_total():
    axes = figures.mask_density({"a": 0.25, "b": 0.5}, total=0.3).axes[0]
    assert [bar.get_width() for bar in axes.patches] == [25.0, 50.0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b"]
    assert axes.get_ylim()[0] > axes.get_ylim()[1]  # the first layer on top
    assert "all weights: 30.0 %" in texts(axes)
    assert "mean of the layers: 37.5 %" in texts(
        figures.mask_density({"a": 0.25, "b": 0.5}).axes[0]
    )


def test_time_per_method_compares_with_retraining():
    times = {"Retrain": (1234.0, 8.0), "SFR-on": (12.34, 0.1), "slow": (2468.0, 0.0)}
    first, second, third = texts(figures.time_per_method(times).axes[0])
    assert first == "1,234 s"
    assert second == "12.3 s   100× as fast as Retrain"  # noqa: RUF001
    assert third == "2,468 s   0.5× as fast as Retrain"  # noqa: RUF001
    assert texts(figures.time_per_method({"SFR-on": (2.0, 0.0)}).axes[0]) == ["2 s"]


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: figures.tradeoff({"A": []}, (1.0, 1.0)), r"curves\['A'\]"),
        (lambda: figures.loss_histograms({}), "models"),
        (
            lambda: figures.loss_histograms({"A": {"forget": [1.0], "test": []}}),
            r"models\['A'\]\['test'\]",
        ),
        (lambda: figures.loss_histograms({"A": {"forget": [1.0]}}), r"models\['A'\]\['test'\]"),
        (
            lambda: figures.loss_histograms({"A": {"forget": [math.nan], "test": [1.0]}}),
            r"\['forget'\]",
        ),
        (
            lambda: figures.loss_histograms({"A": {"forget": [-1.0], "test": [1.0]}}),
            r"\['forget'\]",
        ),
        (lambda: figures.mask_density({}), "densities"),
        (lambda: figures.mask_density({"a": 25.0}), r"densities\['a'\]: expected a share"),
        (lambda: figures.mask_density({"a": 0.5}, total=30.0), "total: expected a share"),
        (lambda: figures.time_per_method({}), "times"),
        (lambda: figures.time_per_method({"A": (0.0, 0.0)}), r"times\['A'\]"),
    ],
)
def test_figures_refuse(draw, message):
    with pytest.raises(ValueError, match=message):
        draw()


def test_missing_matplotlib_names_the_extra(monkeypatch):
    real = builtins.__import__

    def without(name, *rest):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"pip install sfron-fast\[eval\]"):
        figures.time_per_method({"A": (1.0, 0.0)})


def test_ends_at_one_place_are_told_by_a_legend():
    apart = {name: [(90.0, 90.0), (10.0 * i, 80.0)] for i, name in enumerate("abcdefg")}
    together = {name: [(90.0, 90.0), (0.0, 80.0 + i / 10)] for i, name in enumerate("abcdefg")}
    assert figures.tradeoff(apart).axes[0].get_legend() is None
    shown = figures.tradeoff(together, (0.0, 81.0)).axes[0].get_legend().get_texts()
    assert [text.get_text() for text in shown] == ["Retrain", *"abcdefg", "Original"]
