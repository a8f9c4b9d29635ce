"""QLoRA: adapters on weights in 4 bits, by bitsandbytes on the CPU."""

import pytest
import torch
from models import bits
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from test_transformers import arguments
from transformers import (
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
)

import sfron_fast as sf
from sfron_fast.integrations.transformers import ForgetCallback, RetainBudget, optimizer_factory

pytest.importorskip("bitsandbytes")


@pytest.fixture
def model(tmp_path):
    """Two layers, loaded in 4 bits; adapters that are not at their start."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "plain")
    four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    base = LlamaForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=four)
    for module in base.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # else a first look in eval mode repacks the weights, and no gradient passes them
            module.support_avx512bf16_for_cpu = False
    base = prepare_model_for_kbit_training(base)
    adapted = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.1, generator=torch.Generator().manual_seed(6))
    return adapted


def rows(count, seed):
    tokens = torch.randint(64, (count, 12), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": t, "labels": t, "attention_mask": torch.ones_like(t)} for t in tokens]


def batch(count, seed):
    found = rows(count, seed)
    return {key: torch.stack([row[key] for row in found]) for key in found[0]}


def moved(model, before):
    return {name for name, now in bits(model).items() if not torch.equal(now, before[name])}


def test_unlearn_and_trainer_move_the_adapters_alone(model, tmp_path):
    adapters = {n for n, p in model.named_parameters() if p.requires_grad}
    assert any(p.dtype == torch.uint8 for p in model.parameters())
    assert len(adapters) == 8
    start = bits(model)
    sets = {
        "forget": [batch(4, 1)],
        "retain": [batch(4, s) for s in (2, 3, 4)],
        "holdout": [batch(4, 5)],
    }
    recipe = sf.Recipe.language(ceiling=2.0, cycles=20, lr=1e-2, forget_lr=1e-2)
    settings = {"recipe": recipe, "task": sf.Language(), "retain_budget": 1.0}
    result = sf.unlearn(model, **sets, **settings)
    assert len(result.mask) == 8
    assert moved(model, start) == adapters

    start = bits(model)
    more = {"gradient_checkpointing": True, "gradient_accumulation_steps": 2, "bf16": True}
    args = arguments(tmp_path, max_steps=2, per_device_train_batch_size=4, **more)
    optimizer = {"optimizer": sf.SFRonAdamW, "lr": 1e-2, "saliency": result.mask, "max_norm": 1.0}
    trainer = Trainer(
        model,
        args,
        train_dataset=rows(8, 2),
        optimizer_cls_and_kwargs=(optimizer_factory, optimizer),
    )
    budget = RetainBudget(rows(4, 6), rows(4, 7))
    callback = ForgetCallback(trainer, rows(4, 1), retain_budget=budget)
    trainer.add_callback(callback)
    trainer.train()
    assert moved(model, start) == adapters
    assert callback.forget_metrics["forget_grad_norm"] > 0.0
    assert budget.logs()["budget_spent"] != 0.0
