"""The demonstration of AMUN runs, on fewer draws."""

import json

import pytest
import torch

pytest.importorskip("sklearn")

from examples.systems.images import load
from examples.vision.amun import __main__ as demo
from examples.vision.amun import fixture


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    small = {"SIZE": 40, "FORGOTTEN": 4, "REPEATS": 2, "EPOCHS": 2, "WIDTH": 16}
    for name, value in small.items():
        monkeypatch.setattr(demo, name, value)
    monkeypatch.setitem(demo.TRAINING, "epochs", 10)


def test_a_small_run_is_written(tmp_path):
    demo.main(["--seed", "3", "--out", str(tmp_path)])
    found = json.loads((tmp_path / "seed3.json").read_text())
    assert found["verdict"] in ("PASS", "FAIL", "NOT SHOWN")
    rows, each = found["facts"]["rows"], found["facts"]["repeats"]
    assert rows["AMUN"]["AUC"] == pytest.approx(sum(f["AMUN"]["AUC"] for f in each) / 2)
    both = [f["retrained 1"]["test"] + f["retrained 2"]["test"] for f in each]
    assert rows["retrained"]["test"] == pytest.approx(sum(both) / 4)
    away = [abs(rows["AMUN"][k] - rows["retrained"][k]) for k in fixture.MEASURES]
    assert found["facts"]["gaps"]["AMUN"] == pytest.approx(sum(away) / 4)
    assert (tmp_path / "gaps.png").exists()


def test_images_are_split():
    x, y = torch.rand(60, 1, 9, 7, dtype=torch.float64), torch.arange(60) % 10
    parts = fixture.split(x, y, 40, 4, seed=0)
    sizes = [len(d) for d in (parts.forget, parts.retain, parts.train, parts.test)]
    assert sizes == [4, 36, 40, 20]
    together = torch.cat([parts.forget.tensors[0], parts.retain.tensors[0], parts.test.tensors[0]])
    assert sorted(together.sum((1, 2, 3)).tolist()) == sorted(x.sum((1, 2, 3)).tolist())


def test_noise_is_as_long_and_as_wrong():
    x, y = load(None)
    parts = fixture.split(x, y, 40, 4, seed=0)
    made = fixture.trained(lambda: demo.network(x.shape[1:]), parts.train, seed=0, **demo.TRAINING)
    runs, adversarial = demo.arms(made, parts, 0)
    noise = demo.noisy(parts, adversarial, torch.Generator().manual_seed(1))
    far = (noise.inputs - parts.forget.tensors[0]).flatten(1).norm(dim=1)
    torch.testing.assert_close(far, adversarial.distances)
    assert noise.labels is adversarial.labels
    assert runs.keys() == demo.RATES.keys()
