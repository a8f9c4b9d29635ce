"""The denoising task on models and schedulers of diffusers, tiny and from configs."""

import pages
import pytest
import torch
from diffusers import (
    DDPMScheduler,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    UNet2DConditionModel,
    UNet2DModel,
)
from diffusers.training_utils import EMAModel

import sfron_fast as sf
from sfron_fast import Denoising, Recipe

CPU, T = torch.device("cpu"), 100


def scheduler(prediction="epsilon"):
    return DDPMScheduler(T, prediction_type=prediction)


SMALL = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 8,
}


def unet():
    return unet_of(5)


def unet_of(classes):
    return UNet2DModel(
        **SMALL,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        num_class_embeds=classes,
    )


def dit():
    return DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=1,
        out_channels=2,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=4,
        norm_num_groups=1,
    )


def conditional(**settings):
    return UNet2DConditionModel(
        **SMALL,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=12,
        **settings,
    )


def images(count, seed=1):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, (count,), generator=generator)
    return torch.randn(count, 1, 8, 8, generator=generator), labels


def prompts(count, seed=1):
    x0, _ = images(count, seed)
    return x0, torch.randn(count, 3, 12, generator=torch.Generator().manual_seed(seed))


KINDS = {
    "unet": (unet, images, {"null": 4}),
    "dit": (dit, images, {"null": 4}),
    "conditional": (
        conditional,
        prompts,
        {"condition": "encoder_hidden_states", "null": torch.zeros(3, 12)},
    ),
}
each_kind = pytest.mark.parametrize("kind", list(KINDS))


def made(kind, **settings):
    make, batch, own = KINDS[kind]
    torch.manual_seed(0)
    return make(), batch, Denoising(scheduler(), **{**own, **settings})


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_noisy_images_and_targets_are_the_schedulers(prediction):
    theirs = scheduler(prediction)
    batch = Denoising(theirs).prepare(images(20), CPU)
    x0, noise, t = batch["x0"], batch["noise"], batch["t"]
    torch.testing.assert_close(batch["noisy"], theirs.add_noise(x0, noise, t))
    wanted = {"epsilon": noise, "sample": x0}.get(prediction)
    wanted = theirs.get_velocity(x0, noise, t) if wanted is None else wanted
    torch.testing.assert_close(batch["target"], wanted)


@each_kind
def test_losses_are_those_of_a_plain_call(kind):
    model, batch_of, task = made(kind)
    batch = task.prepare(batch_of(3), CPU)
    keyword = task.condition
    with torch.no_grad():
        said = model.eval()(batch["noisy"], batch["t"], **{keyword: batch["condition"]}).sample
        expected = (said[:, :1] - batch["noise"]).square().mean((1, 2, 3))
        torch.testing.assert_close(task.losses(model, batch), expected)


@each_kind
def test_a_run_is_repeatable(kind):
    recipe = Recipe.budgeted(cycles=3, lr=1e-3, forget_lr=1e-3)
    weights = []
    for seed in (1, 2):
        model, batch_of, task = made(kind)
        torch.manual_seed(seed)  # the task draws, and nobody else
        sets = {"forget": [batch_of(4, 5)], "retain": [batch_of(6, 6), batch_of(6, 7)]}
        result = sf.unlearn(model, **sets, recipe=recipe, task=task)
        assert result.skipped_steps == 0
        weights.append([p.detach().clone() for p in model.parameters()])
    for a, b in zip(*weights, strict=True):
        assert torch.equal(a, b)


@each_kind
def test_fisher_of_samples_is_a_loop_over_them(kind):
    model, batch_of, task = made(kind)
    model.eval()
    found = sf.estimate_fisher(model, [batch_of(3)], task=task, estimator="sample", draws=2)
    expected = {n: torch.zeros_like(p) for n, p in model.named_parameters() if p.requires_grad}
    with task.estimating(0, 1):
        for _ in range(2):
            batch = task.prepare(batch_of(3), CPU)
            for i in range(3):
                model.zero_grad()
                task.losses(model, batch)[i].backward()
                for name, p in model.named_parameters():
                    if p.grad is not None:
                        expected[name] += p.grad.square() / 6
    for name, value in expected.items():
        size = float(value.abs().max())
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4 * size + 1e-12)


def test_extra_conditioning_is_passed_on_or_asked_for():
    torch.manual_seed(0)
    model = conditional(
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=4 * 6 + 5,
    )
    task = Denoising(scheduler(), "encoder_hidden_states")
    x0, embedded = prompts(3)
    added = {"text_embeds": torch.randn(3, 5), "time_ids": torch.randn(3, 6)}
    batch = {"x0": x0, "encoder_hidden_states": embedded}
    whole = task.prepare({**batch, "added_cond_kwargs": added}, CPU)
    assert task.losses(model, whole).shape == (3,)
    with pytest.raises(ValueError, match="task: expected added_cond_kwargs in every batch"):
        task.losses(model, task.prepare(batch, CPU))


def test_flow_matching_is_refused_by_name():
    with pytest.raises(ValueError, match=r"scheduler: .*FlowMatchEuler.*flow matching"):
        Denoising(FlowMatchEulerDiscreteScheduler())


def test_the_scheduler_says_what_is_predicted():
    assert Denoising(scheduler("v_prediction")).schedule.prediction == "v"
    with pytest.raises(ValueError, match="prediction: expected 'v'"):
        Denoising(scheduler("v_prediction"), prediction="epsilon")


@pytest.mark.parametrize(("kind", "last"), [("unet", 4), ("dit", 4)])
def test_a_class_that_is_none_is_refused(kind, last):
    model, batch_of, task = made(kind)
    x0, labels = batch_of(3)
    task.losses(model, task.prepare((x0, labels.fill_(last)), CPU))
    with pytest.raises(ValueError, match=f"labels: expected classes 0 to {last}, found"):
        task.losses(model, task.prepare((x0, labels.fill_(last + 1)), CPU))


def test_an_average_of_diffusers():
    model, batch_of, _ = made("unet")
    ema = EMAModel(model.parameters(), decay=0.99)
    ema.step(model.parameters())
    task = Denoising(scheduler(), null=4, ema=ema)
    sets = {"forget": [batch_of(4)], "retain": [batch_of(6, 6)]}
    recipe = Recipe.budgeted(cycles=1, threshold=None)
    sf.unlearn(model, **sets, recipe=recipe, task=task)
    for mine, average in zip(model.parameters(), ema.shadow_params, strict=True):
        assert torch.equal(mine, average)
    assert ema.optimization_step == 0
    with torch.no_grad():
        next(model.parameters()).add_(1.0)
    with pytest.raises(ValueError, match=r"model: .*ema.copy_to"):
        sf.unlearn(model, **sets, recipe=recipe, task=task)


@pytest.mark.filterwarnings("ignore::RuntimeWarning:sfron_fast")
def test_every_block_of_the_page_runs(monkeypatch, capsys):
    """docs/diffusion.md, block after block, on one model."""
    for name in ("diffusion", "diffusion_ascent"):
        whole = getattr(Recipe, name)
        few = staticmethod(lambda whole=whole, **s: whole(**{"cycles": 2, "draws": 1, **s}))
        monkeypatch.setattr(sf.Recipe, name, few)
    torch.manual_seed(0)
    model = unet_of(11)
    x0, labels = images(24, 5)
    names = {"sf": sf, "torch": torch, "scheduler": scheduler(), "model": model}
    names["forget_loader"] = [(x0[:8], torch.full((8,), 3))]
    names["retain_loader"] = [(x0[8:], labels[8:])]
    names["judge"] = lambda x: x.flatten(1)[:, :10]
    before = [p.detach().clone() for p in model.parameters()]
    for block in pages.blocks("docs/diffusion.md"):
        names = pages.run(block, names)
    assert names["result"].history[0].keys() >= {"cycle", "fa"}
    assert 0 <= names["overlap"] <= 1
    assert capsys.readouterr().out.startswith("0.0 ")
    assert all(p.isfinite().all() for p in model.parameters())
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
