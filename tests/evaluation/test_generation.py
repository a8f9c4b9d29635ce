"""Sampling and what is said of samples: against known answers."""

import math

import numpy as np
import pytest
import torch
from denoisers import CLASSES, FEATURES, KEPT, NULL, denoiser

from sfron_fast import Denoising
from sfron_fast.evaluation.diffusion import (
    evaluate_generation,
    frechet_distance,
    grid,
    realism,
    recognised,
    sample,
    save_grid,
)

CENTRES = torch.randn(CLASSES + 1, FEATURES, generator=torch.Generator().manual_seed(0))


class Known(torch.nn.Module):
    """The exact prediction where every image of a class is its centre."""

    def __init__(self, prediction):
        super().__init__()
        self.prediction, self.calls = prediction, 0

    def forward(self, x, t, class_labels):
        self.calls += 1
        centre = CENTRES[class_labels]
        kept = KEPT[t].unsqueeze(1).float()
        noise = (x - kept.sqrt() * centre) / (1 - kept).sqrt()
        return {
            "epsilon": noise,
            "sample": centre,
            "v": kept.sqrt() * noise - (1 - kept).sqrt() * centre,
        }[self.prediction]


@pytest.mark.parametrize("steps", [1, 7, 50])
@pytest.mark.parametrize("prediction", ["epsilon", "v", "sample"])
def test_an_exact_model_gives_its_images(prediction, steps):
    task = Denoising(KEPT, null=NULL, prediction=prediction)
    labels = torch.tensor([0, 3, 1])
    model = Known(prediction)
    for guidance in (0.0, 1.5):
        model.calls = 0
        found = sample(model, labels, task=task, shape=(6,), steps=steps, guidance=guidance)
        assert model.calls == steps
        wanted = (1 + guidance) * CENTRES[labels] - guidance * CENTRES[NULL]
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=2e-3)
    clamped = sample(model, labels, task=task, shape=(6,), steps=steps, guidance=0.0, clamp=0.5)
    torch.testing.assert_close(clamped, CENTRES[labels].clamp(-0.5, 0.5), rtol=1e-3, atol=2e-3)


def test_ddim_is_the_loop():
    """Of a model that is no exact one, step by step in fp64."""
    model, task = denoiser(torch.float64).eval(), Denoising(KEPT, null=NULL)
    labels = torch.tensor([2, 0])
    found = sample(model, labels, task=task, shape=(6,), steps=5, guidance=0.5, seed=3)
    from sfron_fast.data.draws import normal, sample_keys

    x = normal(sample_keys(torch.arange(2), 3, "sample"), (6,)).double()
    times = [49, 37, 24, 12, 0]
    with torch.no_grad():
        for now, then in zip(times, [*times[1:], None], strict=True):
            t = torch.tensor([now, now])
            own, plain = (model(x, t, class_labels=c) for c in (labels, torch.full((2,), NULL)))
            noise, kept = 1.5 * own - 0.5 * plain, float(KEPT[now])
            image = (x - (1 - kept) ** 0.5 * noise) / kept**0.5
            left = 1.0 if then is None else float(KEPT[then])
            x = left**0.5 * image + (1 - left) ** 0.5 * noise
    torch.testing.assert_close(found.double(), x, rtol=1e-3, atol=1e-3)


def test_samples_do_not_depend_on_the_batch_or_on_what_was_drawn_before():
    model, task = denoiser(), Denoising(KEPT, null=NULL)
    labels = torch.arange(CLASSES).repeat(3)
    first = sample(model, labels, task=task, shape=(6,), steps=3)
    torch.manual_seed(1)
    model.train()
    second = sample(model, labels, task=task, shape=(6,), steps=3, batch_size=5)
    assert model.training
    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-5)
    assert not torch.equal(first, sample(model, labels, task=task, shape=(6,), steps=3, seed=1))


def test_frechet_distance_of_known_gaussians():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4000, 5, generator=generator, dtype=torch.float64)
    assert frechet_distance(x, x) == pytest.approx(0.0, abs=1e-9)
    assert frechet_distance(x, x + 2.0) == pytest.approx(5 * 4.0, rel=1e-9)
    # covariances s^2 C: the trace of (s - 1)^2 C
    trace = float(torch.cov(x.T).trace())
    centred = x - x.mean(0)
    assert frechet_distance(centred, 3 * centred) == pytest.approx(4 * trace, rel=1e-9)
    a, b = x[:300], x[300:700] @ torch.randn(5, 5, generator=generator, dtype=torch.float64)
    c, d = (np.cov(v.numpy().T) for v in (a, b))
    roots = np.linalg.eigvals(c @ d).real.clip(0) ** 0.5
    apart = float((a.mean(0) - b.mean(0)).square().sum())
    expected = apart + c.trace() + d.trace() - 2 * roots.sum()
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)


def test_realism_tells_real_from_far_images():
    generator = torch.Generator().manual_seed(2)
    real, made = (torch.randn(300, 3, generator=generator) for _ in range(2))
    assert realism(real, made) > 80
    assert realism(real, made + 50) == 0
    assert realism(torch.arange(5.0)[:, None], torch.tensor([[2.0], [9.0]])) == 50


def test_generation_is_judged_by_class():
    """An exact model; a judge that knows the centres, and takes class 2 for class 1."""
    task = Denoising(KEPT, null=NULL)

    def judge(images):
        return -torch.cdist(images, CENTRES[:CLASSES])[:, [0, 1, 1, 3]]

    settings = {"task": task, "shape": (6,), "per_class": 5, "steps": 10}
    found = evaluate_generation(
        Known("epsilon"), judge=judge, forget=[2], retain=[0, 1, 3], **settings
    )
    assert [f.guidance for f in found] == [0.0, 1.0]
    assert found[0].fa == 0.0
    assert found[0].ra == 100.0
    assert found[0].distance is None
    wanted = CENTRES[[2, 0, 1, 3]]
    assert found[0].saturation == pytest.approx(100 * float((wanted.abs() >= 1).double().mean()))
    real = CENTRES[[0, 1, 3]].repeat(4, 1)
    seen = evaluate_generation(
        Known("epsilon"),
        judge=judge,
        forget=[2],
        retain=[0, 1, 3],
        features=lambda x: x[:, :2],
        real=real,
        guidance=[0.0],
        **settings,
    )[0]
    assert seen.distance == pytest.approx(0.0, abs=0.2)
    assert seen.realism is not None


def test_recognised():
    found = recognised(lambda x: x, torch.eye(3), torch.tensor([0, 2, 2]))
    assert found.tolist() == [True, False, True]


def test_grids(tmp_path):
    images = torch.stack([torch.full((2, 3), v) for v in (-1.0, 0.0, 5.0)])
    whole = grid(images, columns=2)
    assert whole.shape == (5, 7, 3)
    assert whole[0, 0].tolist() == [0] * 3
    assert whole[0, 4].tolist() == [128] * 3
    assert whole[3, 0].tolist() == [255] * 3
    image = pytest.importorskip("matplotlib.image")
    save_grid(images, tmp_path / "grid.png", columns=2, scale=2)
    assert image.imread(tmp_path / "grid.png").shape[:2] == (10, 14)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"steps": 0}, "steps"),
        ({"steps": 51}, "steps"),
        ({"guidance": -1.0}, "guidance"),
        ({"guidance": math.nan}, "guidance"),
        ({"task": None}, "task"),
        ({"task": Denoising(KEPT)}, "guidance"),
    ],
)
def test_sampling_is_refused_by_name(settings, named):
    given = {"task": Denoising(KEPT, null=NULL), "shape": (6,), **settings}
    with pytest.raises(ValueError, match=f"^{named}"):
        sample(denoiser(), torch.tensor([0]), **given)


def test_more_refusals():
    task = Denoising(KEPT, null=NULL)
    rest = {"task": task, "judge": lambda x: x, "shape": (6,)}
    with pytest.raises(ValueError, match=r"retain: expected classes that are not forgotten"):
        evaluate_generation(denoiser(), forget=[1], retain=[0, 1], **rest)
    with pytest.raises(ValueError, match=r"^real"):
        evaluate_generation(denoiser(), forget=[1], retain=[0], features=lambda x: x, **rest)
    with pytest.raises(ValueError, match=r"made: expected finite features"):
        frechet_distance(torch.zeros(3, 2), torch.full((3, 2), math.nan))
    with pytest.raises(ValueError, match=r"^images"):
        grid(torch.zeros(2, 5, 3, 3))
    with pytest.raises(ValueError, match=r"^count"):
        sample(denoiser(), None, task=Denoising(KEPT, condition=None), shape=(6,))
