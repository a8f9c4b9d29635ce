"""Every block of docs/frameworks.md and docs/language-models.md runs as it stands."""

import json

import pages
import pytest
import pytorch_lightning as lightning
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from models import bits, build, loader, random_mask, same
from peft import LoraConfig, get_peft_model
from pytorch_lightning.utilities import CombinedLoader
from tiny import arguments, gpt, half, letters, sequences
from transformers import Trainer

import sfron_fast as sf
from sfron_fast.integrations import forget_metrics, forget_step
from sfron_fast.integrations.transformers import ForgetCallback

PAGE = "docs/frameworks.md"
BLOCKS = {}
for found in pages.blocks(PAGE):
    BLOCKS.setdefault(found.heading, []).append(found)


def run(heading, number=0, **names):
    given = {"sf": sf, "F": F, "torch": torch, "forget_step": forget_step, **names}
    given["forget_metrics"] = forget_metrics
    return pages.run(BLOCKS[heading][number], given)


def test_every_block_is_run_here():
    assert list(BLOCKS) == [
        "Hugging Face Trainer",
        "A budget for a Trainer",
        "Head and loss in one",
        "Accelerate",
        "Lightning",
        "PEFT",
        "timm",
    ]
    assert [heading for heading, found in BLOCKS.items() if len(found) > 1] == [
        "Hugging Face Trainer"
    ]


@pytest.mark.filterwarnings("ignore::RuntimeWarning:sfron_fast")
def test_language_models(monkeypatch, capsys, tmp_path):
    language = sf.Recipe.language
    few = staticmethod(lambda **settings: language(**{"cycles": 6, **settings}))
    monkeypatch.setattr(sf.Recipe, "language", few)  # its 50 cycles take a while
    sets = [sequences(8, seed=seed) for seed in (1, 2, 3)]
    loaders = [[{k: torch.stack([r[k] for r in rows]) for k in rows[0]}] * 2 for rows in sets]
    model = gpt(torch.float32)
    start = bits(model)
    block, from_files = pages.blocks("docs/language-models.md")
    names = dict(zip(("forget_loader", "retain_loader", "holdout_loader"), loaders, strict=True))
    pages.run(block, {"sf": sf, "model": model, **names})
    assert "of the budget spent" in capsys.readouterr().out
    assert not same(bits(model), start)
    for number, name in enumerate(("forget", "retain", "holdout")):
        rows = [{"text": f"the {i} of set {number}"} for i in range(10, 22)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.chdir(tmp_path)
    named = {"sf": sf, "model": gpt(torch.float32, length=32), "tokenizer": letters()}
    assert pages.run(from_files, named)["result"].budget_spent is not None


@pytest.mark.checklist("G3")
def test_hugging_face_trainer(tmp_path):
    model = gpt(torch.float32)
    args = arguments(tmp_path, max_steps=2)
    start = bits(model)
    names = ("retain_set", "forget_set", "kept_set", "holdout_set")
    sets = {name: sequences(8, seed=seed) for seed, name in enumerate(names, 1)}
    given = {"model": model, "args": args, "Trainer": Trainer, "mask": half(model), **sets}
    names = run("Hugging Face Trainer", **given)
    trainer = names["trainer"]
    assert not same(bits(model), start)
    mask = names["settings"]["saliency"]
    assert run("Hugging Face Trainer", 1, **names)["settings"]["saliency"] != mask
    trainer.pop_callback(ForgetCallback)
    run("A budget for a Trainer", trainer=trainer, **sets)


def test_head_and_loss_in_one():
    model = gpt(torch.float32)
    start, ids = bits(model), torch.stack([e["input_ids"] for e in sequences(4)])
    given = run("Head and loss in one", model=model, mask=half(model), ids=ids, forget_weight=0.5)
    assert given["losses"].shape == (4,)
    assert given["logp"].shape == ids.shape
    assert not same(bits(model), start)


@pytest.mark.checklist("G4")
def test_accelerate():
    model = build()
    opt, start = (
        sf.SFRonSGD(model.named_parameters(), lr=0.1, saliency=random_mask(model)),
        bits(model),
    )
    run(
        "Accelerate",
        accelerator=Accelerator(cpu=True),
        model=model,
        opt=opt,
        forget_loader=loader(8, 4),
        retain_loader=loader(8, 4, seed=2),
    )
    assert not same(bits(model), start)
    assert not opt.mid_cycle


@pytest.mark.checklist("G5")
def test_lightning(tmp_path):
    class Module(lightning.LightningModule):
        automatic_optimization = False
        training_step = run("Lightning")["training_step"]

        def __init__(self):
            super().__init__()
            self.net = build()

        def forward(self, inputs):
            return self.net(inputs)

        def configure_optimizers(self):
            mask = random_mask(self.net)
            settings = {"lr": 0.1, "saliency": mask, "retain_steps": 3, "max_norm": 1.0}
            return sf.SFRonSGD(self.net.named_parameters(), **settings)

    module = Module()
    start, data = (
        bits(module.net),
        CombinedLoader({"retain": loader(16, 4), "forget": loader(16, 4)}),
    )
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data)
    assert not same(bits(module.net), start)
    assert 0 < trainer.logged_metrics["forget_clip_factor"] <= 1
    # the second cycle began with the fourth batch
    assert trainer.optimizers[0].param_groups[0]["retain_pending"] == 2


@pytest.mark.checklist("G6")
def test_peft():
    batches = [(e["input_ids"][None], e["labels"][None]) for e in sequences(4)]
    given = run(
        "PEFT",
        model=gpt(torch.float32),
        get_peft_model=get_peft_model,
        LoraConfig=LoraConfig,
        forget_loader=batches[:2],
        retain_loader=batches[2:],
    )
    assert all("lora_" in name for name in given["opt"].param_groups[0]["param_names"])
    assert len(given["mask"]) == 4


def test_timm():
    model = build("bn")
    opt = run("timm", model=model, mask=random_mask(model))["opt"]
    assert [group["weight_decay"] for group in opt.param_groups] == [0.05, 0.0]
