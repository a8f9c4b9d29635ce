"""The denoising task: what an image's loss is, and that its draws depend on its place alone."""

import copy

import pytest
import torch
from denoisers import CLASSES, KEPT, NULL, STEPS, denoiser, images
from torch.utils.data import DataLoader, TensorDataset

import sfron_fast as sf
from sfron_fast import Denoising, Recipe
from sfron_fast.tasks import Memorise, Relabel, Unconditional

CPU = torch.device("cpu")


def task(**settings):
    return Denoising(KEPT, **{"null": NULL, **settings})


def prepared(one, batch, name="forget"):
    return one.prepare(batch, CPU, name)


# --- losses ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("prediction", ["epsilon", "v", "sample"])
def test_losses_are_those_of_a_loop(prediction, reduction):
    model, one = denoiser(torch.float64), task(prediction=prediction, reduction=reduction)
    x0, labels = images(7, torch.float64)
    batch = prepared(one, (x0, labels))
    found = one.losses(model, batch)
    for i in range(7):
        t, noise = int(batch["t"][i]), batch["noise"][i].double()
        kept = float(KEPT[t])
        noisy = kept**0.5 * x0[i] + (1 - kept) ** 0.5 * noise
        wanted = {
            "epsilon": noise,
            "v": kept**0.5 * noise - (1 - kept) ** 0.5 * x0[i],
            "sample": x0[i],
        }[prediction]
        said = model(noisy[None], torch.tensor([t]), class_labels=labels[i : i + 1])[0]
        loss = (said - wanted).square()
        expected = loss.sum() if reduction == "sum" else loss.mean()
        assert found[i].item() == pytest.approx(expected.item(), rel=1e-12)


def test_adaptive_loss_is_the_formula_of_the_losses():
    model, one = denoiser(), task()
    batch = prepared(one, images(9))
    loss, losses = one.adaptive_loss(model, batch, 0.5, 1e-6)
    each = one.losses(model, batch)
    assert torch.allclose(losses, each, rtol=1e-6)
    assert loss.item() == pytest.approx((sf.adaptive_weights(each) * each).sum().item(), rel=1e-6)
    grads = torch.autograd.grad(loss, list(model.parameters()))
    plain = (sf.adaptive_weights(each) * each).sum()
    for a, b in zip(grads, torch.autograd.grad(plain, list(model.parameters())), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)


class Usual:
    """A reference that falls with the timestep."""

    def at(self, t):
        return 2.0 / (1.0 + t.float())


def test_with_a_reference_losses_are_relative_and_the_ceiling_too():
    model, one = denoiser(), task(reference=Usual())
    batch = prepared(one, images(20))
    each, usual = one.losses(model, batch).detach(), 2.0 / (1.0 + batch["t"].float())
    expected = (sf.adaptive_weights(each, reference=usual) * each).sum()
    assert one.adaptive_loss(model, batch, 0.5, 1e-6)[0].item() == pytest.approx(
        expected.item(), rel=1e-5
    )
    cap = float((each / usual).median()) * 1.001
    capped = (sf.adaptive_weights(each, reference=usual, cap=cap) * each).sum()
    found, losses = one.ceiling_loss(model, batch, 0.5, 1e-6, cap, one.usual(batch))
    assert 0 < capped < expected
    assert found.item() == pytest.approx(capped.item(), rel=1e-5)
    assert torch.allclose(losses, each)


def test_the_variance_half_is_left_alone():
    class Both(torch.nn.Module):
        """[samples, 2 channels, 2]: the noise and a variance."""

        def __init__(self):
            super().__init__()
            self.noise, self.variance = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)

        def forward(self, x, t):
            return torch.cat([self.noise(x), self.variance(x)], 1)

    model, one = Both(), Denoising(KEPT, condition=None)
    one.mean_loss(model, prepared(one, torch.randn(5, 3, 2))).backward()
    assert model.noise.weight.grad.abs().sum() > 0
    assert model.variance.weight.grad is None or not model.variance.weight.grad.any()


def test_narrow_predictions_and_wide_targets():
    model, one = denoiser(torch.bfloat16), task()
    batch = prepared(one, images(6))
    loss, losses = one.adaptive_loss(model, batch, 0.5, 1e-6)
    loss.backward()
    assert losses.dtype == torch.float32
    wide = denoiser()
    assert torch.allclose(losses, one.losses(wide, batch), rtol=0.1)


def test_forms_of_a_batch():
    x0, labels = images(5)
    model = denoiser()
    expected = task().losses(model, prepared(task(), (x0, labels)))
    forms = [
        [x0, labels],
        {"x0": x0, "class_labels": labels},
        {"latents": x0, "labels": labels},
        {"pixel_values": x0, "label": labels},
        {"images": x0, "condition": labels},
    ]
    for form in forms:
        one = task()
        assert one.samples(form) == 5
        assert torch.equal(one.losses(model, prepared(one, form)), expected)

    def by_hand(model, x, t, condition):
        return (model(x, t, class_labels=condition),)

    one = task(condition=by_hand)
    assert torch.equal(one.losses(model, prepared(one, (x0, labels))), expected)


# --- draws ----------------------------------------------------------------------------------------


def drawn(batch):
    return batch["t"], batch["noise"], batch["condition"]


def assert_same_draws(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_draw_what_one_process_draws(ranks):
    x0, labels = images(12)
    alone = task(drop=0.5)
    alone.begin(denoiser(), 0, 1)
    for _ in range(3):
        whole = drawn(prepared(alone, (x0, labels), "retain"))
    for rank in range(ranks):
        one = task(drop=0.5)
        one.begin(denoiser(), rank, ranks)
        for _ in range(3):
            part = drawn(prepared(one, (x0[rank::ranks], labels[rank::ranks]), "retain"))
        assert_same_draws(part, [t[rank::ranks] for t in whole])


def test_ids_say_whose_draws_they_are():
    x0, labels = images(6)
    ids = torch.tensor([11, 3, 7, 100, 0, 5])
    whole = drawn(prepared(task(), {"x0": x0, "labels": labels, "id": ids}))
    order = torch.tensor([4, 0, 2])
    part = {"x0": x0[order], "labels": labels[order], "id": ids[order]}
    assert_same_draws(drawn(prepared(task(), part)), [t[order] for t in whole])


def test_what_is_drawn_differs_by_place_loader_and_seed():
    batch = images(200)
    one = task()
    first, second = (prepared(one, batch)["noise"] for _ in range(2))
    others = [first, second, prepared(one, batch, "retain")["noise"]]
    others.append(prepared(task(seed=1), batch)["noise"])
    for i, a in enumerate(others):
        for b in others[:i]:
            assert abs((a * b).mean()) < 0.15
    times = prepared(one, batch)["t"]
    assert times.min() >= 0
    assert times.max() < STEPS
    assert times.unique().numel() > STEPS * 0.8


def test_an_empty_batch_takes_no_place():
    batch, empty = images(4), (torch.empty(0, 6), torch.empty(0, dtype=torch.int64))
    one, other = task(), task()
    prepared(one, empty)
    assert_same_draws(drawn(prepared(one, batch)), drawn(prepared(other, batch)))


def test_conditions_are_dropped_for_guidance_in_training_alone():
    x0, labels = images(2000)
    one = task(drop=0.25, drop_forget=0.0)
    share = (prepared(one, (x0, labels), "retain")["condition"] == NULL).float().mean()
    assert share == pytest.approx(0.25, abs=0.04)
    for name in ("forget", "holdout", "loader"):
        assert torch.equal(prepared(one, (x0, labels), name)["condition"], labels)
    with one.estimating(0, 1):
        assert torch.equal(prepared(one, (x0, labels), "retain")["condition"], labels)
    embedded = torch.randn(2000, 3, 4)
    prompt = torch.randn(3, 4)
    one = task(condition="encoder_hidden_states", null=prompt, drop=0.25)
    found = prepared(one, (x0, embedded), "retain")["condition"]
    empty = (found == prompt).all(2).all(1)
    assert empty.float().mean() == pytest.approx(0.25, abs=0.04)
    assert torch.equal(found[~empty], embedded[~empty])


def test_both_fisher_passes_draw_the_same_and_leave_the_run_alone():
    batch, one = images(5), task()
    before = one.state_dict()
    seen = []
    for name in ("forget", "retain"):
        with one.estimating(0, 1):
            seen.append([drawn(prepared(one, batch, name)) for _ in range(2)])
    for a, b in zip(*seen, strict=True):
        assert_same_draws(a, b)
    assert not torch.equal(seen[0][0][1], seen[0][1][1])
    assert one.state_dict() == before


# --- Fisher ---------------------------------------------------------------------------------------


def test_fisher_squares_each_draw_of_each_sample():
    model, one = denoiser(torch.float64), task()
    x0, labels = images(6, torch.float64)
    found = sf.estimate_fisher(model, [(x0, labels)], task=one, estimator="sample", draws=3)
    expected = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    other = task()
    with other.estimating(0, 1):
        for _ in range(3):
            batch = prepared(other, (x0, labels), "loader")
            for i in range(6):
                model.zero_grad()
                other.losses(model, batch)[i].backward()
                for name, p in model.named_parameters():
                    expected[name] += p.grad.square() / 18
    for name, value in found.items():
        assert torch.allclose(value.double(), expected[name], rtol=1e-5, atol=1e-12), name
    assert found.metadata["draws"] == 3


def test_every_estimate_draws_the_same():
    model, one = denoiser(), task()
    batches = [images(5), images(3, seed=2)]
    first, again = (sf.estimate_fisher(model, batches, task=one) for _ in range(2))
    assert first.metadata["estimator"] == "sample"  # plain layers are known
    for name in first:
        assert torch.equal(first[name], again[name])


# --- runs -----------------------------------------------------------------------------------------

RECIPE = Recipe.paper(cycles=6, retain_steps=2, lr=0.05, forget_lr=0.05)


class Stop(Exception):
    pass


class Wrapped:
    """A loader around a DataLoader with a generator of its own."""

    def __init__(self, seed, label=None):
        dataset = TensorDataset(*images(24, seed=seed, label=label))
        self.loader = DataLoader(
            dataset, 8, shuffle=True, generator=torch.Generator().manual_seed(seed)
        )

    def __iter__(self):
        return iter(self.loader)


def run(folder=None, stop=None, wrapped=False, dtype=torch.float32, **settings):
    def on_cycle(cycle, model):
        if cycle == stop:
            raise Stop

    model = denoiser(dtype)
    sets = (
        (Wrapped(3, label=0), Wrapped(4))
        if wrapped
        else (Wrapped(3, label=0).loader, Wrapped(4).loader)
    )
    more = {} if folder is None else {"checkpoint": folder, "checkpoint_every": 3}
    result = sf.unlearn(
        model,
        forget=sets[0],
        retain=sets[1],
        recipe=settings.pop("recipe", RECIPE),
        task=settings.pop("task", None) or task(),
        on_cycle=on_cycle,
        **more,
        **settings,
    )
    return model, result


def test_a_run_is_repeatable_whatever_was_drawn_before():
    first, _ = run()
    torch.manual_seed(5)
    used = task()
    prepared(used, images(3))
    again, _ = run(task=used)
    for a, b in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_resumed_run_has_the_bits_of_one_never_stopped(tmp_path, wrapped):
    whole, _ = run(tmp_path / "whole", wrapped=wrapped)
    with pytest.raises(Stop):
        run(tmp_path / "stopped", stop=4, wrapped=wrapped)
    torch.manual_seed(77)
    resumed, _ = run(tmp_path / "stopped", wrapped=wrapped)
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_resumed_run_of_bf16_weights_goes_on_with_what_rounding_left_off(tmp_path):
    settings = {
        "dtype": torch.bfloat16,
        "recipe": Recipe.diffusion(cycles=6, draws=1, lr=1e-4, weight_bits=24),
    }

    def kind():
        return task(instead=Relabel(2))

    whole, _ = run(tmp_path / "whole", task=kind(), **settings)
    with pytest.raises(Stop):
        run(tmp_path / "stopped", stop=4, task=kind(), **settings)
    resumed, _ = run(tmp_path / "stopped", task=kind(), **settings)
    for a, b, c in zip(
        *(m.parameters() for m in (whole, resumed, denoiser(torch.bfloat16))), strict=True
    ):
        assert torch.equal(a, b)
        assert a.shape != (16, 6) or not torch.equal(a, c)
    with pytest.raises(ValueError, match="a run with this recipe"):
        run(tmp_path / "stopped", task=kind(), **{**settings, "recipe": Recipe.diffusion(cycles=6)})


def test_a_run_is_resumed_with_its_own_seed(tmp_path):
    with pytest.raises(Stop):
        run(tmp_path, stop=4)
    with pytest.raises(ValueError, match="seed"):
        run(tmp_path, task=task(seed=3))


def test_the_budget_is_for_any_task():
    _, result = run(
        retain_budget=0.5,
        holdout=[images(16, seed=8)],
        recipe=Recipe.budgeted(cycles=8, lr=1e-3),
    )
    assert result.budget_spent is not None


def test_averaged_weights_begin_the_run_and_are_set_at_its_end():
    model = denoiser()
    ema = torch.optim.swa_utils.AveragedModel(model)
    sets = {"forget": [images(8, label=0)], "retain": [images(8)]}
    sf.unlearn(model, **sets, recipe=RECIPE, task=task(ema=ema))
    for mine, average in zip(model.parameters(), ema.module.parameters(), strict=True):
        assert torch.equal(mine, average)
    assert ema.n_averaged == 0
    with torch.no_grad():
        next(model.parameters()).add_(1.0)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="model: expected the averaged weights of ema"):
        sf.unlearn(model, **sets, recipe=RECIPE, task=task(ema=ema))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


# --- refusals -------------------------------------------------------------------------------------


class FlowMatch:
    sigmas = torch.linspace(1, 0, 10)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"scheduler": FlowMatch()}, "scheduler: .*flow matching .* is not supported"),
        ({"scheduler": KEPT.flip(0)}, "scheduler"),
        ({"scheduler": torch.ones(3, 3)}, "scheduler"),
        ({"condition": 3}, "condition"),
        ({"null": "empty"}, "null"),
        ({"null": None, "drop": 0.1}, "null"),
        ({"drop": 1.5}, "drop"),
        ({"drop_forget": -0.1}, "drop_forget"),
        ({"prediction": "noise"}, "prediction"),
        ({"reduction": "none"}, "reduction"),
        ({"reference": 1.0}, "reference"),
        ({"instead": "relabel"}, "instead"),
        ({"seed": 0.5}, "seed"),
    ],
    ids=range(13),
)
def test_settings_are_refused_by_name(settings, named):
    with pytest.raises(ValueError, match=f"^{named}"):
        Denoising(settings.pop("scheduler", KEPT), **{"null": NULL, **settings})


@pytest.mark.parametrize(
    ("batch", "found"),
    [
        ((torch.zeros(3, 6, dtype=torch.uint8), torch.zeros(3)), "torch.uint8"),
        (torch.zeros(3, 6), "NoneType"),
        ((torch.zeros(3, 6), torch.zeros(2, dtype=torch.int64)), r"\(2,\)"),
        ({"labels": torch.zeros(3)}, "dict"),
    ],
)
def test_batches_are_refused_by_the_loaders_name(batch, found):
    with pytest.raises(ValueError, match=f"^retain: expected .*, found .*{found}"):
        prepared(task(), batch, "retain")


def test_a_prediction_of_another_shape_is_refused():
    one = task()
    with pytest.raises(ValueError, match=r"task: expected a prediction \[4, 6\], found \[4, 5\]"):
        one.losses(denoiser(outputs=5), prepared(one, images(4)))


def test_objectives_refuse_what_they_cannot_take():
    with pytest.raises(ValueError, match="to: expected a class for each"):
        Relabel({0: 1}).condition(torch.tensor([0, 2]))
    with pytest.raises(ValueError, match=r"^to"):
        Relabel("cat")
    with pytest.raises(ValueError, match=r"^alternatives"):
        Memorise(torch.zeros(0, 6))
    with pytest.raises(ValueError, match=r"^teacher: expected a model"):
        Unconditional("before")
    with pytest.raises(ValueError, match=r"^guidance"):
        Unconditional(denoiser(), -1.0)
    model = denoiser()
    one = task(instead=Unconditional(model))
    with pytest.raises(ValueError, match=r"teacher: expected another model"):
        one.replacement_losses(model, prepared(one, images(3)))
    one = task(instead=Memorise(torch.zeros(4, 5)))
    with pytest.raises(ValueError, match=r"alternatives: expected images as x0"):
        one.replacement_losses(model, prepared(one, images(3)))
    with pytest.raises(ValueError, match=r"reseeded\(\)"):
        sf.noise_overlap(
            torch.nn.Linear(6, 4),
            forget=[images(4)],
            retain=[images(4)],
            task=sf.Classification(),
        )
    assert CLASSES == NULL


# --- what is usual at a timestep ------------------------------------------------------------------


def test_the_profile_is_the_mean_loss_of_each_bin():
    model, one = denoiser(), task()
    batches = [images(30), images(9, seed=2)]
    before = one.state_dict()
    found = sf.loss_profile(model, batches, task=one, bins=5, draws=4)
    assert one.state_dict() == before
    other, sums, counts = task(), [0.0] * 5, [0] * 5
    with other.estimating(0, 1):
        for batch in batches:
            for _ in range(4):
                drawn_batch = prepared(other, batch)
                losses = other.losses(model, drawn_batch).tolist()
                for t, loss in zip(drawn_batch["t"].tolist(), losses, strict=True):
                    sums[t // 10] += loss
                    counts[t // 10] += 1
    assert found.counts.tolist() == counts
    expected = [s / c for s, c in zip(sums, counts, strict=True)]
    assert found.losses.tolist() == pytest.approx(expected, rel=1e-5)
    times = torch.tensor([0, 9, 10, 49])
    assert found.at(times).tolist() == found.losses[[0, 0, 1, 4]].tolist()


@pytest.mark.parametrize(
    ("settings", "named"),
    [({"bins": 0}, "bins"), ({"bins": STEPS + 1}, "bins"), ({"draws": 0}, "draws")],
)
def test_a_profile_is_refused(settings, named):
    with pytest.raises(ValueError, match=f"^{named}"):
        sf.loss_profile(denoiser(), [images(5)], task=task(), **settings)
    with pytest.raises(ValueError, match="loader: expected a sample in each of 50 bins"):
        sf.loss_profile(denoiser(), [images(5)], task=task(), bins=50, draws=1)


def test_masks_of_other_noise_overlap_more_with_more_draws():
    model = denoiser()
    sets = {"forget": [images(12, label=0)], "retain": [images(12)]}
    few = sf.noise_overlap(model, **sets, task=task(), draws=16)
    assert 0.5 < few <= 1.0
    assert sf.noise_overlap(model, **sets, task=task(), draws=64) > few
    one = {"forget": [images(1, label=0)], "retain": [images(1)]}
    with pytest.warns(RuntimeWarning, match=r"share 0\.\d+ of what either selects; raise draws"):
        found = sf.noise_overlap(model, **one, task=task(), draws=1, threshold=3.0)
    assert found < 0.5
