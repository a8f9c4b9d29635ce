"""A pipeline in a folder: what is unlearned is written again, and nothing else is touched."""

import json
import warnings

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from safetensors.torch import load_file

import sfron_fast as sf
from sfron_fast import Denoising, Recipe, Relabel
from sfron_fast.integrations.diffusers import unlearn_folder

RECIPE = Recipe.budgeted(cycles=2, lr=1e-2, forget_lr=1e-2)
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


def pipeline(folder, dtype=torch.float32):
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        num_class_embeds=5,
    )
    DDPMPipeline(unet.to(dtype), DDPMScheduler(100)).save_pretrained(folder)
    (folder / "notes.txt").write_text("kept")
    return folder


def images(count, seed):
    generator = torch.Generator().manual_seed(seed)
    x0 = torch.randn(count, 1, 8, 8, generator=generator)
    return x0, torch.randint(4, (count,), generator=generator)


def sets():
    return {"forget": [images(4, 1)], "retain": [images(6, 2)]}


def contents(folder):
    files = (p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_the_networks_weights_change(tmp_path, dtype):
    source, goal = pipeline(tmp_path / "before", dtype), tmp_path / "after"
    old = contents(source)
    result = unlearn_folder(
        source, goal, **sets(), recipe=RECIPE, task=lambda s: Denoising(s, null=4, seed=7)
    )
    assert contents(source) == old
    new = contents(goal)
    assert set(new) - set(old) == {"unlearning.md", "unlearning.json"}
    assert {name for name in old if new[name] != old[name]} == {WEIGHTS}
    record = json.loads(new["unlearning.json"])
    assert record["mask"] == result.mask.digest()
    assert record["seed"] == 7
    assert Recipe(**{**record["recipe"], "betas": tuple(record["recipe"]["betas"])}) == RECIPE
    before, after = load_file(source / WEIGHTS), load_file(goal / WEIGHTS)
    assert {t.dtype for t in after.values()} == {dtype}
    assert record["changed"] == sum(int((after[n] != before[n]).sum()) for n in before) > 0
    again = DDPMPipeline.from_pretrained(goal, torch_dtype=dtype)
    for name, p in again.unet.state_dict().items():
        assert torch.equal(p, after[name])


def test_the_weights_are_those_of_unlearn(tmp_path):
    source = pipeline(tmp_path / "before")
    unlearn_folder(source, tmp_path / "after", **sets(), recipe=RECIPE)
    unet = UNet2DModel.from_pretrained(source / "unet")
    sf.unlearn(unet, **sets(), recipe=RECIPE, task=Denoising(DDPMScheduler(100)))
    found = load_file(tmp_path / "after" / WEIGHTS)
    for name, p in unet.state_dict().items():
        assert torch.equal(found[name], p)


def test_bf16_weights_that_lose_nothing(tmp_path):
    """The recipe's ``weight_bits`` reaches the optimizer: steps that bf16 alone rounds away add up;
    what is written is what ``unlearn`` leaves.
    """
    source = pipeline(tmp_path / "before", torch.bfloat16)
    before, moved = load_file(source / WEIGHTS), {}
    for bits in (None, 24):
        recipe = Recipe.diffusion(
            cycles=12, lr=2e-5, draws=1, weight_bits=bits, threshold=None, optimizer="adamw"
        )
        made = {"task": lambda s: Denoising(s, null=4, instead=Relabel(2)), "recipe": recipe}
        goal = tmp_path / str(bits)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            unlearn_folder(source, goal, **sets(), **made, dtype=torch.bfloat16)
            unet = UNet2DModel.from_pretrained(source / "unet", torch_dtype=torch.bfloat16)
            task = made["task"](DDPMScheduler(100))
            sf.unlearn(unet, **sets(), recipe=recipe, task=task)
        found = load_file(goal / WEIGHTS)
        for name, p in unet.state_dict().items():
            assert torch.equal(found[name], p), name
        moved[bits] = sum(int((found[n] != before[n]).sum()) for n in before)
        record = json.loads((goal / "unlearning.json").read_text())
        assert record["dtype"] == "bfloat16"
        assert record["recipe"]["weight_bits"] == bits
        assert record["changed"] == moved[bits]
    assert moved[24] > 1.5 * moved[None]


def test_weights_are_trained_in_bf16_only_where_they_are_stored_so(tmp_path):
    source, rest = pipeline(tmp_path / "before"), {**sets(), "recipe": RECIPE}
    with pytest.raises(ValueError, match=r"dtype: expected weights stored in torch.bfloat16"):
        unlearn_folder(source, tmp_path / "after", **rest, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"dtype: expected torch.float32 or torch.bfloat16"):
        unlearn_folder(source, tmp_path / "after", **rest, dtype=torch.float16)
    assert [p.name for p in tmp_path.iterdir()] == ["before"]


def test_refusals_write_nothing(tmp_path):
    source, goal = pipeline(tmp_path / "before"), tmp_path / "after"
    rest = {**sets(), "recipe": RECIPE}
    with pytest.raises(ValueError, match=r"dst: expected a folder that does not exist"):
        unlearn_folder(source, source, **rest)
    with pytest.raises(ValueError, match=r"src: expected a folder with model_index.json"):
        unlearn_folder(source / "unet", goal, **rest)
    with pytest.raises(ValueError, match=r"task: expected a function that makes Denoising"):
        unlearn_folder(source, goal, **rest, task=lambda scheduler: sf.Classification())
    with pytest.raises(ValueError, match="retain"):
        unlearn_folder(source, goal, forget=sets()["forget"], retain=[], recipe=RECIPE)
    (source / WEIGHTS).rename(source / "unet/other.bin")
    with pytest.raises((ValueError, OSError)):
        unlearn_folder(source, goal, **rest)
    assert [p.name for p in tmp_path.iterdir()] == ["before"]
