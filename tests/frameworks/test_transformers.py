"""Hugging Face Trainer, on the CPU, with tiny random models."""

import os
import socket
import subprocess
import sys

import pytest
import tiny
import torch
import torch.nn.functional as F
from models import bits, same
from tiny import gpt, half, sequences
from transformers import (
    BatchEncoding,
    BertConfig,
    BertForSequenceClassification,
    Trainer,
)

from sfron_fast import SFRonAdamW, SFRonSGD, adaptive_cross_entropy, estimate_fisher
from sfron_fast.integrations.transformers import (
    ForgetCallback,
    RetainBudget,
    fuse_head,
    make_optimizer,
    optimizer_factory,
)


def arguments(folder, **more):
    usual = {"logging_strategy": "no", "per_device_train_batch_size": 2, "max_steps": 4}
    adamw = {"learning_rate": 0.01, "weight_decay": 0.1, "adam_epsilon": 1e-3}
    return tiny.arguments(folder, **{**usual, **adamw, **more})


# this eps, because the gradients of some biases are rounding errors around 0
ADAM = {"lr": 0.01, "eps": 1e-3}
FORMS = {
    "optimizers": lambda model: {
        "optimizers": (SFRonAdamW(model.named_parameters(), **ADAM), None)
    },
    "class": lambda model: {"optimizer_cls_and_kwargs": (SFRonAdamW, ADAM)},
    "factory": lambda model: {
        "optimizer_cls_and_kwargs": (
            optimizer_factory,
            {"optimizer": SFRonAdamW, "weight_decay": 0.1, **ADAM},
        )
    },
}


@pytest.mark.checklist("G1")
@pytest.mark.checklist("G2")
@pytest.mark.parametrize("form", FORMS)
def test_trains_as_torch_does(form, tmp_path):
    """Without forget steps, each way to give a Trainer its optimizer; against torch.optim.AdamW in
    the same Trainer.
    """
    weights = []
    for ours in (True, False):
        model = gpt()
        theirs = {
            "optimizers": {"optimizers": (torch.optim.AdamW(model.parameters(), **ADAM), None)},
            "class": {"optimizer_cls_and_kwargs": (torch.optim.AdamW, ADAM)},
            "factory": {},  # the Trainer's own AdamW
        }[form]
        given = FORMS[form](model) if ours else theirs
        trainer = Trainer(model, arguments(tmp_path), train_dataset=sequences(8), **given)
        start = bits(model)
        trainer.train()
        weights.append(bits(model))
        assert not same(start, weights[-1])
    optimizer = FORMS["optimizers"](model)["optimizers"][0]
    assert not hasattr(optimizer, "train")  # the Trainer would call them, per batch
    assert not hasattr(optimizer, "eval")
    for name, weight in weights[0].items():
        torch.testing.assert_close(weight, weights[1][name], rtol=1e-11, atol=1e-13)


def test_an_error_in_loading_names_the_forget_set(tmp_path):
    class Broken(list):
        def __getitem__(self, i):
            raise KeyError("pixels")

    model = gpt()
    trainer = Trainer(
        model,
        arguments(tmp_path),
        train_dataset=sequences(8),
        optimizer_cls_and_kwargs=(optimizer_factory, {"optimizer": SFRonAdamW, **ADAM}),
    )
    trainer.add_callback(ForgetCallback(trainer, Broken(sequences(4))))
    with pytest.raises(
        RuntimeError, match="forget_dataset: loading a forget batch failed: KeyError"
    ):
        trainer.train()


@pytest.mark.checklist("G1")
def test_masked_class_form_points_to_the_factory(tmp_path):
    model = gpt()
    plain = (SFRonSGD, {"lr": 0.01, "saliency": half(model)})
    trainer = Trainer(
        model, arguments(tmp_path), train_dataset=sequences(8), optimizer_cls_and_kwargs=plain
    )
    with pytest.raises(
        ValueError, match=r"found unnamed ones; .*optimizer_factory of sfron_fast\.integrations"
    ):
        trainer.train()


@pytest.mark.checklist("G1")
def test_factory_groups_are_the_trainers(tmp_path):
    model = gpt()
    model.transformer.wte.requires_grad_(False)
    theirs = Trainer(model, arguments(tmp_path, weight_decay=0.3)).create_optimizer()
    ours = make_optimizer(model, optimizer=SFRonSGD, weight_decay=0.3, lr=0.5, saliency=half(model))
    assert [g["weight_decay"] for g in ours.param_groups] == [0.3, 0.0]
    for a, b in zip(ours.param_groups, theirs.param_groups, strict=True):
        assert a["weight_decay"] == b["weight_decay"]
        assert a["masked"]
        assert list(map(id, a["params"])) == list(map(id, b["params"]))
        assert [
            dict(model.named_parameters())[n] is p
            for n, p in zip(a["param_names"], a["params"], strict=True)
        ]
    assert any("bias" in n for n in ours.param_groups[1]["param_names"])


# --- forget steps ---------------------------------------------------------------------------------

SETTINGS = {
    "optimizer": SFRonSGD,
    "momentum": 0.9,
    "lr": 0.1,
    "weight_decay": 0.1,
    "max_norm": 0.5,
    "retain_steps": 2,
}
SHARED = {
    "gradient_accumulation_steps": 2,
    "max_grad_norm": 0.2,
    "train_sampling_strategy": "sequential",
}
TEMPERATURE = 0.7


def weight_at(cycle):
    return 3.0 - cycle


def unlearner(model, args, mask, *, retain, forget, weight=weight_at, budget=None, **more):
    settings = {**SETTINGS, "saliency": mask, **more}
    trainer = Trainer(
        model, args, train_dataset=retain, optimizer_cls_and_kwargs=(optimizer_factory, settings)
    )
    told = {"forget_weight": weight, "temperature": TEMPERATURE, "retain_budget": budget}
    callback = ForgetCallback(trainer, forget, **told)
    trainer.add_callback(callback)
    return trainer, callback


def stacked(examples):
    return tuple(torch.stack([e[key] for e in examples]) for key in ("input_ids", "labels"))


def token_losses(model, examples, dtype):
    """[samples, tokens - 1], 0 where there is no label; and which have one."""
    tokens, labels = stacked(examples)
    logits, targets = (
        torch.cat([model(t).logits for t in tokens.split(2)])[:, :-1].to(dtype),
        labels[:, 1:],
    )
    losses = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none", ignore_index=-100)
    return losses, targets != -100


def by_hand(model, mask, retain, forget, max_norm, *, order):
    """The same with torch alone: batches of 2, two of them a phase, two cycles of one forget and
    two retain steps.
    """
    optimizer = torch.optim.SGD(
        [
            {
                "params": [
                    p for n, p in model.named_parameters() if "ln_" not in n and "bias" not in n
                ],
                "weight_decay": 0.1,
            },
            {
                "params": [p for n, p in model.named_parameters() if "ln_" in n or "bias" in n],
                "weight_decay": 0.0,
            },
        ],
        momentum=0.9,
    )
    norms = {"forget": [], "retain": []}
    for update in range(4):
        for group in optimizer.param_groups:
            group["lr"] = 0.1 * (1 - update / 4)  # the Trainer's linear schedule
        if update % 2 == 0:
            optimizer.zero_grad()
            batches = [forget[i % len(forget)] for i in range(2 * update, 2 * update + 4)]
            losses, labelled = token_losses(model, batches, torch.float64)
            samples = losses.sum(1) / labelled.sum(1)
            weights = samples.detach().clamp_min(1e-6) ** -TEMPERATURE
            (-weight_at(update // 2) * (weights / weights.sum() * samples).sum()).backward()
            for what in order:
                if what == "mask":
                    for name, p in model.named_parameters():
                        p.grad *= mask.to_bool(name)
                else:
                    norms["forget"].append(
                        torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
                    )
            optimizer.step()
        optimizer.zero_grad()
        batches = [retain[i % len(retain)] for i in range(4 * update, 4 * update + 4)]
        # transformers' own loss is fp32 always
        losses, labelled = token_losses(model, batches, torch.float32)
        (losses.sum() / labelled.sum()).backward()
        norms["retain"].append(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.2))
        optimizer.step()
    assert (min(norms["forget"]) > max_norm) == (max_norm < 1)
    assert min(norms["retain"]) > 0.2


@pytest.mark.checklist("G3")
@pytest.mark.checklist("B4")
@pytest.mark.parametrize("max_norm", [0.5, 1e3])
def test_forget_callback_is_mask_then_clip_by_hand(max_norm, tmp_path):
    """Both phases accumulate two batches whose label counts differ; the forget set is passed
    through twice.

    SGD, because Adam makes steps of gradients that are rounding errors around 0, such as some
    biases'.
    """
    retain, forget, mask = sequences(8, seed=3), sequences(6, seed=4), half(gpt())
    model, wanted, wrong = gpt(), gpt(), gpt()
    args = arguments(tmp_path, learning_rate=0.1, **SHARED)
    trainer, callback = unlearner(
        model, args, mask, retain=retain, forget=forget, weight=weight_at, max_norm=max_norm
    )
    trainer.train()
    by_hand(wanted, mask, retain, forget, max_norm, order=("mask", "clip"))
    by_hand(wrong, mask, retain, forget, max_norm, order=("clip", "mask"))
    for ours, theirs in zip(model.parameters(), wanted.parameters(), strict=True):
        # fp32: the norm, and the Trainer's loss
        torch.testing.assert_close(ours, theirs, rtol=0, atol=5e-8)
    apart = max(
        (a - b).abs().max() for a, b in zip(wanted.parameters(), wrong.parameters(), strict=True)
    )
    assert (apart > 1e-2) == (max_norm < 1)
    assert trainer.state.global_step == 4
    assert 0 < callback.forget_loss < 20


@pytest.mark.checklist("G3")
def test_forget_loss_is_that_of_all_batches_together(tmp_path):
    forget = sequences(4, seed=4)
    model, mask = gpt(), half(gpt())
    args = arguments(
        tmp_path, gradient_accumulation_steps=2, max_steps=2, train_sampling_strategy="sequential"
    )
    trainer, callback = unlearner(model, args, mask, retain=sequences(8), forget=forget)
    tokens, labels = stacked(forget)
    wanted = adaptive_cross_entropy(model(tokens).logits[:, :-1], labels[:, 1:], TEMPERATURE)
    trainer.train()
    torch.testing.assert_close(callback.forget_loss, wanted.detach(), rtol=1e-12, atol=0)


@pytest.mark.checklist("G3")
@pytest.mark.checklist("C5")
@pytest.mark.parametrize("stop", [3, 4])
def test_resumed_run_has_the_bits_of_one_never_stopped(stop, tmp_path):
    """Checkpoints within and between cycles; dropout, shuffled batches, slow weights, native
    kernels.
    """
    retain, forget, mask = sequences(10, seed=3), sequences(6, seed=4), half(gpt())

    def run(folder, resume=None, **more):
        model = gpt(torch.float32, dropout=0.3)
        args = arguments(folder, max_steps=6, save_strategy="steps", save_steps=stop, **more)
        trainer, _ = unlearner(model, args, mask, retain=retain, forget=forget, slow_lr=0.5)
        trainer.train(resume_from_checkpoint=resume)
        return bits(model), trainer.optimizer.state_dict()

    whole, state = run(tmp_path)
    resumed, resumed_state = run(tmp_path / "again", str(tmp_path / f"checkpoint-{stop}"))
    assert same(whole, resumed)
    assert state["param_groups"] == resumed_state["param_groups"]
    for index, entries in state["state"].items():
        assert same(entries, resumed_state["state"][index])


def test_another_order_of_forget_batches_would_show(tmp_path):
    """What the test above rests on: forget batches matter to the last bit."""
    retain, mask, weights = sequences(10, seed=3), half(gpt()), []
    for seed in (4, 5):
        model = gpt(torch.float32)
        trainer, _ = unlearner(
            model, arguments(tmp_path), mask, retain=retain, forget=sequences(6, seed=seed)
        )
        trainer.train()
        weights.append(bits(model))
    assert not any(torch.equal(weights[0][n], weights[1][n]) for n in weights[0])


def test_forget_steps_without_logits(tmp_path):
    """Of a model with a fused head, as of one without."""
    found = []
    for prepare in (lambda model: model, fuse_head):
        model = prepare(gpt(torch.float32))
        sets = {"retain": sequences(8, seed=3), "forget": sequences(6, seed=4)}
        trainer, callback = unlearner(model, arguments(tmp_path, **SHARED), half(gpt()), **sets)
        trainer.train()
        found.append({**bits(model), "forget_loss": callback.forget_loss})
    assert model.lm_head._compared
    for name, wanted in found[0].items():
        torch.testing.assert_close(found[1][name], wanted, rtol=1e-5, atol=1e-6)


RANK = """
import sys, torch
from accelerate.state import AcceleratorState, DistributedType
from models import bits
from sfron_fast.integrations.transformers import RetainBudget
from test_transformers import SHARED, arguments, gpt, half, sequences, unlearner

def run(name, **more):
    more["per_device_eval_batch_size"] = 2
    args = arguments(sys.argv[1], ddp_backend="gloo", **SHARED, **more)
    assert args.world_size == 2
    budget = RetainBudget(sequences(4, seed=5), sequences(4, seed=6))
    sets = {"retain": sequences(16, seed=3), "forget": sequences(8, seed=4)}
    trainer, callback = unlearner(gpt(), args, half(gpt()), budget=budget, **sets)
    trainer.train()
    spent = torch.tensor(budget.logs()["budget_spent"])
    found = {**bits(trainer.model), "forget_loss": callback.forget_loss, "budget_spent": spent}
    found = {n: t.full_tensor() if hasattr(t, "full_tensor") else t for n, t in found.items()}
    torch.save(found, f"{sys.argv[1]}/{name}{args.process_index}.pt")
    return trainer

run("ddp")
AcceleratorState._reset_state()
plain = AcceleratorState.__init__

def sharded(self, *args, fsdp_plugin=None, **more):
    plain(self, *args, **more)
    self.fsdp_plugin = fsdp_plugin or self.fsdp_plugin
    self.distributed_type = DistributedType.FSDP

# accelerate itself shards on no CPU
AcceleratorState.fsdp_plugin, AcceleratorState.__init__ = None, sharded
config = {"fsdp_version": 2, "transformer_layer_cls_to_wrap": ["GPT2Block"]}
trainer = run("fsdp", fsdp=True, fsdp_config=config)
assert trainer.accelerator.is_fsdp2
assert all(hasattr(p, "full_tensor") for p in trainer.model.parameters())
torch.distributed.destroy_process_group()  # its threads may outlive the interpreter
"""


@pytest.mark.checklist("G3")
def test_two_ranks_are_one_with_batches_of_twice_the_size(tmp_path):
    """DDP, then FSDP2, over gloo: the ranks' forget batches differ, and so do their normalisers;
    two batches accumulate.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(tmp_path)],
            stderr=subprocess.PIPE,
            text=True,
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    model = gpt()
    args = arguments(tmp_path, per_device_train_batch_size=4, **SHARED)
    budget = RetainBudget(sequences(4, seed=5), sequences(4, seed=6))
    sets = {"retain": sequences(16, seed=3), "forget": sequences(8, seed=4)}
    trainer, callback = unlearner(model, args, half(gpt()), budget=budget, **sets)
    trainer.train()
    spent = torch.tensor(budget.logs()["budget_spent"])
    wanted = {**bits(model), "forget_loss": callback.forget_loss, "budget_spent": spent}
    for process in ranks:
        _, said = process.communicate(timeout=300)
        assert process.returncode == 0, said
    for kind in ("ddp", "fsdp"):
        first, second = (torch.load(tmp_path / f"{kind}{rank}.pt") for rank in range(2))
        assert same(first, second)
        for name, weight in wanted.items():
            torch.testing.assert_close(first[name], weight, rtol=0, atol=5e-8)


def test_forget_steps_go_to_the_log(tmp_path):
    """At the Trainer's logging steps, beside what it logs itself; weights without a gradient are
    named.
    """
    model, mask = gpt(), half(gpt())
    model.register_parameter("unused", torch.nn.Parameter(torch.ones(2, dtype=torch.float64)))
    mask = half(model)
    args = arguments(tmp_path, max_steps=8, logging_strategy="steps", logging_steps=4)
    sets = {"retain": sequences(8, seed=3), "forget": sequences(6, seed=4)}
    trainer, callback = unlearner(model, args, mask, **sets, weight=1.0, max_norm=0.5)
    with pytest.warns(
        RuntimeWarning, match="1 of 29 trainable parameters got no gradient.* unused"
    ):
        trainer.train()
    history = trainer.state.log_history
    logged = [entry for entry in history if "forget_loss" in entry]
    assert [entry["step"] for entry in logged] == [4, 8]
    assert [entry["step"] for entry in history if "loss" in entry] == [4, 8]
    last = logged[-1]
    assert last["forget_loss"] == callback.forget_loss.item()
    assert last["forget_clip_factor"] == pytest.approx(min(1.0, 0.5 / last["forget_grad_norm"]))
    assert last["forget_clip_factor"] < 1
    assert last["skipped_steps"] == 0
    counts = mask.counts()
    assert last["mask_density"] == sum(counts.values()) / sum(p.numel() for p in model.parameters())


def bert():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_labels=3,
    )
    return BertForSequenceClassification(config)


def test_classifiers(tmp_path):
    model = bert()
    data = [{**e, "labels": torch.tensor(i % 3)} for i, e in enumerate(sequences(4))]
    trainer, callback = unlearner(model, arguments(tmp_path), half(model), retain=data, forget=data)
    tokens, labels = stacked(data)
    loss, normaliser = callback.loss(model.eval(), {"input_ids": tokens, "labels": labels})
    losses = F.cross_entropy(model(tokens).logits, labels, reduction="none")
    torch.testing.assert_close(normaliser, (losses**-TEMPERATURE).sum())
    torch.testing.assert_close(loss, (losses ** (1 - TEMPERATURE)).sum() / normaliser)
    start = bits(model)
    trainer.train()
    assert not same(start, bits(model))


def test_fisher_of_padded_batches():
    """BatchEncoding is unpacked, so an attention mask counts: padding changes nothing."""
    model = bert().double().eval()
    data, labels = sequences(6), torch.arange(6) % 3
    tokens = torch.stack([e["input_ids"] for e in data])
    attended = F.pad(torch.ones_like(tokens), (0, 3))
    padded = BatchEncoding({"input_ids": F.pad(tokens, (0, 3)), "attention_mask": attended})

    def loss_fn(output, targets):
        return F.cross_entropy(output.logits, targets)

    ours = estimate_fisher(model, [(padded, labels)], loss_fn, estimator="batch")
    loss_fn(model(tokens), labels).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(ours[name], p.grad**2, rtol=1e-9, atol=1e-18)
    # torch.func.vmap has no rule for what transformers' masks are made of
    found = estimate_fisher(model, [(padded, labels)], loss_fn)
    assert found.metadata["estimator"] == "sample"
    total = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    for i in range(6):
        model.zero_grad()
        loss_fn(model(tokens[i : i + 1]), labels[i : i + 1]).backward()
        for name, p in model.named_parameters():
            total[name] += p.grad**2 / 6
    for name, wanted in total.items():
        torch.testing.assert_close(found[name], wanted, rtol=1e-9, atol=1e-18)


def test_what_is_wrong_is_said_before_anything_changes(tmp_path):
    model, data = gpt(), sequences(6)
    trainer = Trainer(model, arguments(tmp_path), train_dataset=data)
    for bad in ([], iter(data), None):
        with pytest.raises(
            ValueError, match="forget_dataset: expected a dataset with a length > 0"
        ):
            ForgetCallback(trainer, bad)
    with pytest.raises(ValueError, match="forget_weight"):
        ForgetCallback(trainer, data, forget_weight=-1.0)
    start = bits(model)
    trainer.add_callback(ForgetCallback(trainer, data))
    with pytest.raises(
        ValueError,
        match=r"optimizer: expected SFRonSGD or SFRonAdamW, found AdamW.*optimizer_factory",
    ):
        trainer.train()
    unlabelled = [{"input_ids": e["input_ids"]} for e in data]
    trainer, _ = unlearner(model, arguments(tmp_path), half(model), retain=data, forget=unlabelled)
    with pytest.raises(ValueError, match="forget_dataset: expected 'labels' in its batches"):
        trainer.train()
    short = arguments(tmp_path, dataloader_drop_last=True)
    trainer, _ = unlearner(model, short, half(model), retain=data, forget=data[:1])
    with pytest.raises(ValueError, match="forget_dataset: expected at least one batch"):
        trainer.train()
    assert same(start, bits(model))


def test_a_run_that_ends_inside_a_cycle_is_told(tmp_path):
    model, args = gpt(), arguments(tmp_path, max_steps=3)
    trainer, _ = unlearner(model, args, half(model), retain=sequences(6), forget=sequences(4))
    with pytest.warns(UserWarning, match=r"3 steps are no multiple of retain_steps \(2\)"):
        trainer.train()
