"""The trainer for open-unlearning, against a stand-in of what it is given there."""

import importlib.util
import inspect
import sys
from types import ModuleType

import pytest
import torch
import yaml
from models import bits
from paths import ROOT
from tiny import arguments, gpt, sequences
from torch.utils.data import Dataset
from transformers import Trainer

FOLDER = ROOT / "examples" / "language" / "open_unlearning"


class FinetuneTrainer(Trainer):
    """What its trainers inherit from: a Trainer that is told of evaluators and templates."""

    def __init__(self, *args, evaluators=None, template_args=None, tokenizer=None, **kwargs):
        self.evaluators, self.template_args = evaluators, template_args
        super().__init__(*args, processing_class=tokenizer, **kwargs)


class ForgetRetainDataset(Dataset):
    """Pairs, as long as the forget set."""

    def __init__(self, forget, retain):
        self.forget, self.retain = forget, retain

    def __len__(self):
        return len(self.forget)

    def __getitem__(self, index):
        return {"forget": self.forget[index], "retain": self.retain[index]}


def collator(rows):
    batch = {key: torch.stack([row[key] for row in rows]) for key in ("input_ids", "labels")}
    attended = torch.ones_like(batch["input_ids"])
    return {**batch, "attention_mask": attended, "index": torch.arange(len(rows))}


@pytest.fixture
def registry(monkeypatch):
    package, base = ModuleType("trainer"), ModuleType("trainer.base")
    base.FinetuneTrainer = FinetuneTrainer
    monkeypatch.setitem(sys.modules, "trainer", package)
    monkeypatch.setitem(sys.modules, "trainer.base", base)
    spec = importlib.util.spec_from_file_location("trainer.unlearn.sfron", FOLDER / "sfron.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return {"SFRon": module.SFRon}


def test_it_trains_as_their_trainers_do(registry, tmp_path):
    """By its config: epochs over the forget set, only masked weights in forget steps."""
    config = yaml.safe_load((FOLDER / "SFRon.yaml").read_text())
    assert config["defaults"] == ["finetune"]
    trainer_class, model = registry[config["handler"]], gpt(torch.float32)
    known = inspect.signature(trainer_class.__init__).parameters
    assert set(config["method_args"]) == set(known) - {"self", "args", "kwargs"}
    args = arguments(
        tmp_path,
        logging_steps=1,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        **{**config["args"], "learning_rate": float(config["args"]["learning_rate"]) * 1e3},
    )
    pairs = ForgetRetainDataset(sequences(7, seed=3), sequences(12, seed=4))
    trainer = trainer_class(
        model=model,
        args=args,
        train_dataset=pairs,
        eval_dataset=None,
        tokenizer=None,
        data_collator=collator,
        evaluators=None,
        template_args={},
        **config["method_args"],
    )
    start = bits(model)
    trainer.train()
    assert trainer.state.global_step == 10 * 2  # 7 samples, 4 a step
    logged = [e for e in trainer.state.log_history if "forget_loss" in e]
    assert len(logged) == 20
    assert logged[-1]["forget_loss"] > logged[0]["forget_loss"]
    assert 0.05 < logged[-1]["mask_density"] < 0.95
    assert logged[-1]["forget_clip_factor"] <= 1
    after = bits(model)
    assert all(not torch.equal(start[name], after[name]) for name in start)
    group = trainer.optimizer.optimizer.param_groups[0]
    assert group["forget_lr"] == pytest.approx(0.005)
