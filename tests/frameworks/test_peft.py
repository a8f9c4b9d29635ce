"""PEFT: masks over the adapters of a LoRA run; and one mask behind every wrapper."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from models import bits
from peft import LoraConfig, get_peft_model
from tiny import arguments, gpt, half, sequences
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
)
from transformers import Trainer

from sfron_fast import SaliencyMask, SFRonAdamW, SFRonSGD, estimate_fisher
from sfron_fast.integrations.transformers import ForgetCallback, optimizer_factory
from sfron_fast.runs.gradients import gradients_reach


def lora(**more):
    """A model with adapters that are not at their start, where half of their gradients are 0."""
    model = get_peft_model(
        gpt(torch.float32), LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, **more)
    )
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.1, generator=torch.Generator().manual_seed(6))
    return model


def batches(seed):
    examples = sequences(8, seed)
    tokens, labels = (torch.stack([e[k] for e in examples]) for k in ("input_ids", "labels"))
    return list(zip(tokens.split(4), labels.split(4), strict=True))


def next_token_loss(output, labels):
    return F.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def trainable(model):
    return [(n, p) for n, p in model.named_parameters() if p.requires_grad]


@pytest.mark.checklist("G6")
def test_mask_over_the_adapters(tmp_path):
    """From Fisher to unlearned adapters in a Trainer; base weights and masked adapter weights keep
    their bits.
    """
    model = lora()
    fishers = [estimate_fisher(model, batches(seed), next_token_loss) for seed in (3, 4)]
    mask = SaliencyMask.from_fisher(forget=fishers[0], retain=fishers[1], threshold=1.0)
    assert len(mask) == len(trainable(model)) == 4
    assert all("lora_" in name for name in mask)
    assert all(0.05 < share < 0.95 for share in mask.density().values())
    args = arguments(tmp_path, max_steps=2, per_device_train_batch_size=4)
    factory = (
        optimizer_factory,
        {"optimizer": SFRonSGD, "lr": 0.1, "saliency": mask, "max_norm": 1.0},
    )
    trainer = Trainer(model, args, train_dataset=sequences(8, 4), optimizer_cls_and_kwargs=factory)
    between = []

    class Recording(ForgetCallback):
        def on_step_begin(self, *event, **more):
            before = bits(model)
            super().on_step_begin(*event, **more)
            between.append((before, bits(model)))

    trainer.add_callback(Recording(trainer, sequences(8, 3)))
    start = bits(model)
    trainer.train()
    names, after = {n for n, _ in trainable(model)}, bits(model)
    assert all(torch.equal(after[n], start[n]) for n in start if n not in names)
    assert len(between) == 2
    for before, after in between:
        for name in names:
            assert not (before[name] != after[name])[~mask.to_bool(name)].any(), name
            assert (before[name] != after[name])[mask.to_bool(name)].float().mean() > 0.9, name


@pytest.mark.checklist("G6")
@pytest.mark.parametrize("everything", [False, True])
def test_a_mask_for_base_weights_is_an_error_that_names_both(everything):
    model = lora()
    named = list(model.named_parameters()) if everything else trainable(model)
    mask = half(gpt(torch.float32))
    with pytest.raises(ValueError, match="expected a mask for each of") as error:
        SFRonAdamW(named, saliency=mask)
    message = str(error.value)
    assert (
        "found none for 4 (base_model.model.transformer.h.0.attn.c_attn.lora_A.default.weight"
        in message
    )
    assert f"the mask is for {len(mask)} (transformer.wte.weight" in message
    assert "build it on this model as it is trained, adapters included" in message


@pytest.mark.checklist("G6")
def test_a_mask_for_adapters_wants_only_them():
    model = lora()
    with pytest.raises(
        ValueError, match=r"they are frozen: pass only parameters with requires_grad"
    ):
        SFRonAdamW(model.named_parameters(), saliency=half(model))
    SFRonAdamW(trainable(model), saliency=half(model))


# --- F5: wrappers ---------------------------------------------------------------------------------


def checkpointed(model):
    apply_activation_checkpointing(
        model, check_fn=lambda module: isinstance(module, nn.Linear | nn.LayerNorm)
    )
    return model


def with_adapters(model):
    """PEFT around a model whose own weights are trained as well."""
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))
    for name, p in wrapped.named_parameters():
        p.requires_grad_("lora_" not in name)
    return wrapped


WRAPPERS = {
    "module.": nn.DataParallel,
    "_orig_mod.": torch.compile,
    "_checkpoint_wrapped_module.": checkpointed,
    "base_model.model.": with_adapters,
    "base_layer.": with_adapters,
    "module.base_model.model._orig_mod.": lambda model: nn.DataParallel(
        with_adapters(torch.compile(model))
    ),
}


@pytest.mark.checklist("F5")
@pytest.mark.parametrize("prefix", WRAPPERS)
def test_one_mask_for_a_model_and_its_wrapped_self(prefix):
    plain, wrapped = gpt(torch.float32), WRAPPERS[prefix](gpt(torch.float32))
    names = [n for n, _ in trainable(wrapped)]
    assert any(prefix in n for n in names)
    assert len(names) == len(list(plain.named_parameters()))
    mask, back = half(plain), half(wrapped)
    assert mask == back  # so a mask made behind the wrapper fits the model without it
    assert mask.digest() == back.digest()
    weights = []
    for named, saliency in ((plain.named_parameters(), back), (trainable(wrapped), mask)):
        params = dict(named)
        for p in params.values():
            p.grad = torch.ones_like(p)
        before = {n: p.detach().clone() for n, p in params.items()}
        SFRonSGD(params.items(), lr=1.0, saliency=saliency).forget_step()
        for name, p in params.items():
            assert torch.equal(p != before[name], saliency.to_bool(name)), name
        weights.append([p.detach() for p in params.values()])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


# --- activation checkpointing ---------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
def test_adapters_forget_under_checkpointing(reentrant, tmp_path):
    """In a Trainer, with bf16 and accumulation: every adapter moves, in either form."""
    model = get_peft_model(
        gpt(torch.float32), LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    )
    args = arguments(
        tmp_path,
        max_steps=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        bf16=True,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": reentrant},
    )
    factory = (optimizer_factory, {"optimizer": SFRonAdamW, "lr": 0.1, "saliency": half(model)})
    trainer = Trainer(model, args, train_dataset=sequences(8, 4), optimizer_cls_and_kwargs=factory)
    trainer.add_callback(ForgetCallback(trainer, sequences(8, 3)))
    start = bits(model)
    trainer.train()
    after = bits(model)
    assert all(torch.equal(start[n], after[n]) for n in start if "lora_" not in n)
    for name, _ in trainable(model):
        assert not torch.equal(start[name], after[name]), name


def test_blocks_whose_inputs_need_no_gradient_are_named():
    """The older form of checkpointing gives their adapters none, but for a hook that newer
    versions of transformers set by themselves.
    """
    model = get_peft_model(
        gpt(torch.float32),
        LoraConfig(r=2, target_modules=["c_attn", "lm_head"], fan_in_fan_out=True),
    )
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model.disable_input_require_grads()
    tokens, labels = batches(1)[0]
    reached = {}
    for mended in (False, True):
        if mended:
            model.enable_input_require_grads()
        model.zero_grad()
        next_token_loss(model.train()(tokens), labels).backward()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            reached[mended] = gradients_reach(model)
        told = [str(w.message) for w in said if "got no gradient" in str(w.message)]
        assert len(told) == (not mended)
        if told:
            assert "4 of 6 trainable parameters got no gradient" in told[0]
            assert "enable_input_require_grads" in told[0]
    assert reached[True] == []
    assert all("c_attn.lora_" in name for name in reached[False])
