"""``fuse_head``: head and loss in one inside Hugging Face's models, against their own logits."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from head_cases import error, small_tiles
from memory import largest
from peft import LoraConfig, get_peft_model
from ranks import on_ranks
from sharded import whole
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
)

import sfron_fast as sf
from sfron_fast.heads.fused import (
    FusedHead,
    fuse_head,
    label_adaptive_cross_entropy,
    label_logp,
)

VOCABULARY, SAMPLES, TOKENS = 203, 3, 9
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "initializer_range": 0.5,
}
CONFIGS = {
    "Llama": LlamaConfig(**SMALL),
    "Llama, tied": LlamaConfig(**SMALL, tie_word_embeddings=True),
    "GPT-2, tied": GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=16,
        n_layer=1,
        n_head=2,
        n_positions=16,
        initializer_range=0.5,
        attn_pdrop=0.0,
        embd_pdrop=0.0,
        resid_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    ),
    "Gemma 2, capped": Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=2.0),
    "Cohere, multiplied": CohereConfig(**SMALL, logit_scale=0.25),
    "Granite, divided": GraniteConfig(**SMALL, logits_scaling=3.0),
}


def make(name="Llama", dtype=torch.float32):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name])).to(dtype)


def batch(samples=SAMPLES, seed=1):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCABULARY, (samples, TOKENS), generator=generator)
    labels = ids.masked_fill(torch.arange(TOKENS) < torch.arange(samples)[:, None] % 4, -100)
    return {"input_ids": ids, "use_cache": False}, labels


INPUTS, LABELS = batch()
UPSTREAM = torch.randn(2, SAMPLES, TOKENS, generator=torch.Generator().manual_seed(3))


def by_logits(model, inputs, labels):
    """logp, lse [samples, tokens] from all logits, by torch."""
    logits = model(**inputs).logits
    labels = F.pad(labels[:, 1:], (0, 1), value=-100)
    counted = labels != -100
    logp = -F.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=-100)
    return logp, torch.where(counted, logits.logsumexp(2), 0.0)


def gradients(model, function):
    model.zero_grad()
    found = function(model, INPUTS, LABELS)
    sum((t * u).sum() for t, u in zip(found, UPSTREAM, strict=True)).backward()
    return [t.detach() for t in found], {name: p.grad for name, p in model.named_parameters()}


def assert_agree(model, plain, tolerance=1e-5):
    wanted, by_name = gradients(plain, by_logits)
    for _ in range(2):  # the first batch is compared
        found, ours = gradients(model, label_logp)
        for got, true in zip(found, wanted, strict=True):
            assert error(got, true.double()) < tolerance
        assert ours.keys() == by_name.keys()
        for name, gradient in by_name.items():
            assert error(ours[name], gradient.double()) < tolerance, name


@pytest.mark.parametrize("name", CONFIGS)
def test_the_models_own_losses_and_gradients(name, monkeypatch):
    small_tiles(monkeypatch)
    assert_agree(fuse_head(make(name)), make(name))


def test_in_fp64():
    name = "GPT-2, tied"
    assert_agree(fuse_head(make(name, torch.float64)), make(name, torch.float64), 1e-12)


@pytest.mark.parametrize("name", CONFIGS)
def test_in_bf16(name):
    """Rounded logits are the model's own, not another model's; under autocast too."""
    wanted = by_logits(make(name, torch.bfloat16), INPUTS, LABELS)[0].detach()
    found = label_logp(fuse_head(make(name, torch.bfloat16)), INPUTS, LABELS)[0].detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = label_logp(fuse_head(make(name)), INPUTS, LABELS)[0].detach()
    assert found.dtype == cast.dtype == torch.float32
    assert error(found, wanted.double()) < 2e-2
    assert error(cast, wanted.double()) < 5e-2


def test_checkpointed_layers():
    model = fuse_head(make("Llama, tied"))
    model.gradient_checkpointing_enable()
    assert_agree(model.train(), make("Llama, tied").train())


@pytest.mark.long
def test_compiled():
    plain = make()
    model = fuse_head(make())
    compiled = torch.compile(model, backend="aot_eager")
    wanted, theirs = gradients(plain, by_logits)
    for _ in range(2):
        model.zero_grad()
        found = label_logp(compiled, INPUTS, LABELS)
        sum((t * u).sum() for t, u in zip(found, UPSTREAM, strict=True)).backward()
        assert error(found[0].detach(), wanted[0].double()) < 1e-5
        for name, p in model.named_parameters():
            assert error(p.grad, theirs[name].double()) < 1e-5, name


def test_adapters_on_the_layers():
    def adapted(fused):
        model = fuse_head(make()) if fused == "before" else make()
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
        return fuse_head(model) if fused == "after" else model

    torch.manual_seed(0)
    wanted, _ = gradients(adapted(None), by_logits)
    for order in ("before", "after"):
        model = adapted(order)
        found, by_name = gradients(model, label_logp)
        assert error(found[0], wanted[0].double()) < 1e-5
        trained = {name for name, gradient in by_name.items() if gradient is not None}
        assert trained == {n for n, p in model.named_parameters() if p.requires_grad}
        assert all("lora" in name for name in trained)


def test_adaptive_losses():
    model, plain = fuse_head(make("Gemma 2, capped")), make("Gemma 2, capped")
    shifted = F.pad(LABELS[:, 1:], (0, 1), value=-100)
    wanted = sf.adaptive_cross_entropy(plain(**INPUTS).logits, shifted, 0.7)
    wanted.backward()
    result = label_adaptive_cross_entropy(model, INPUTS, LABELS, 0.7)
    result.loss.backward()
    assert result.losses.shape == (SAMPLES,)
    assert error(result.loss.detach(), wanted.detach().double()) < 1e-5
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert error(ours.grad, theirs.grad.double()) < 1e-5, name


class Sequences(sf.Task):
    """Batches {"input_ids", "labels"}; the mean loss of each sequence, one way or the other."""

    def __init__(self, function):
        self.function = function

    def losses(self, model, batch):
        inputs = {"input_ids": batch["input_ids"], "use_cache": False}
        logp, _ = self.function(model, inputs, batch["labels"])
        return -logp.sum(1) / (batch["labels"][:, 1:] != -100).sum(1)


def test_the_fisher_of_samples_sees_the_head():
    """A tied one, tile by tile; without a warning that anything goes another way."""
    found = [
        sf.estimate_fisher(model, [{"input_ids": INPUTS["input_ids"], "labels": LABELS}], task=task)
        for model, task in (
            (fuse_head(make("GPT-2, tied")), Sequences(label_logp)),
            (make("GPT-2, tied"), Sequences(by_logits)),
        )
    ]
    assert found[0].metadata["estimator"] == "sample"
    for name, wanted in found[1].items():
        assert error(found[0][name], wanted.double()) < 1e-5, name


def test_logits_are_never_all_in_memory(monkeypatch):
    small_tiles(monkeypatch)
    torch.manual_seed(0)
    config = LlamaConfig(**{**SMALL, "vocab_size": 4096, "initializer_range": 0.02})
    model, plain = fuse_head(AutoModelForCausalLM.from_config(config)), make()
    plain = AutoModelForCausalLM.from_config(config)
    inputs, labels = batch(16)
    logits = 4 * labels.numel() * 4096

    def run(function, model):
        return largest(lambda: function(model, inputs, labels)[0].sum().backward())

    assert run(by_logits, plain) >= logits
    assert run(label_logp, model) < logits / 4  # the first batch, a few rows of which are compared
    assert run(label_logp, model) < logits / 4


def test_without_labels_it_is_the_model_it_was(tmp_path):
    plain, model = make("Llama, tied"), fuse_head(make("Llama, tied"))
    label_logp(model, INPUTS, LABELS)
    assert torch.equal(model(**INPUTS).logits, plain(**INPUTS).logits)
    ids = INPUTS["input_ids"]
    assert torch.equal(model(ids, labels=LABELS).loss, plain(ids, labels=LABELS).loss)
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **settings), plain.generate(ids, **settings))
    assert list(model.state_dict()) == list(plain.state_dict())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.tie_weights()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    with torch.no_grad():
        model.lm_head.weight.mul_(0.5)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again.lm_head) is nn.Linear
    assert torch.equal(again(**INPUTS).logits, model(**INPUTS).logits)
    plain.load_state_dict(model.state_dict())
    copied = copy.deepcopy(model)
    for other in (fuse_head(plain), copied):
        assert torch.equal(
            label_logp(other, INPUTS, LABELS)[0], label_logp(model, INPUTS, LABELS)[0]
        )
    assert copied.lm_head.weight is not model.lm_head.weight


# --- several processes ----------------------------------------------------------------------------


def sharded(model):
    """The root's weights, the head's among them, are gathered again for the backward pass."""
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model, reshard_after_forward=True)


def trained(model, inputs, labels, factor):
    """Losses and gradients of the third backward pass; ``factor``: of ranks that average."""
    for function in (label_logp, by_logits, label_logp):
        model.zero_grad()
        logp, lse = function(model, inputs, labels)
        (factor * (logp.sum() + 0.1 * lse.square().sum())).backward()
    result = label_adaptive_cross_entropy(model, inputs, labels, normalise=False)
    (factor * result.loss).backward()
    return (
        logp.detach(),
        result.losses.detach(),
        {n: whole(p.grad) for n, p in model.named_parameters()},
    )


def two_ranks():
    for name in ("Llama, tied", "Gemma 2, capped"):
        half_each(name)


def half_each(name):
    size, rank = dist.get_world_size(), dist.get_rank()
    inputs, labels = batch(4)
    wanted = trained(fuse_head(make(name)), inputs, labels, 1.0)
    mine = slice(rank * 2, rank * 2 + 2)
    inputs = {**inputs, "input_ids": inputs["input_ids"][mine]}
    for wrap in (sharded, DistributedDataParallel):
        model = wrap(fuse_head(make(name)))
        logp, losses, found = trained(model, inputs, labels[mine], size)
        torch.testing.assert_close(logp, wanted[0][mine], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(losses, wanted[1][mine], rtol=1e-5, atol=1e-5)
        for key, true in wanted[2].items():
            got = found.get(key, found.get(f"module.{key}"))
            assert error(got, true.double()) < 1e-5, (wrap, key)


def test_two_ranks_are_one():
    """FSDP2 of layers and root, and DDP; each rank has half of the batch."""
    on_ranks(2, two_ranks)


# --- refusals -------------------------------------------------------------------------------------


def changed(change):
    """A Llama whose forward does something to its logits."""
    model = make()
    forward = type(model).forward

    class Changed(type(model)):
        def forward(self, *args, **kwargs):
            output = forward(self, *args, **kwargs)
            output.logits = change(output.logits)
            return output

    model.__class__ = Changed
    return fuse_head(model)


def capped(logits):
    return 30.0 * (logits / 30.0).tanh()


def forbidden(logits):
    return torch.cat([logits[..., :1] - 1e4, logits[..., 1:]], 2)


UNKNOWN = {
    "scale": lambda logits: logits * 1.01,
    "cap": capped,
    "class": forbidden,
    "padding": lambda logits: logits[..., :200],
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_model_that_does_more_to_its_logits(name):
    model = changed(UNKNOWN[name])
    what = "logits of shape" if name == "padding" else "the logits of its head, found a difference"
    for _ in range(2):
        with pytest.raises(ValueError, match=f"^model: expected {what}.*final_logit_softcapping"):
            label_logp(model, INPUTS, LABELS)
    if name == "cap":
        model.get_output_embeddings().softcap = 30.0
        label_logp(model, INPUTS, LABELS)


def test_heads_that_are_refused():
    lora = get_peft_model(make(), LoraConfig(r=2, target_modules=["lm_head"]))
    with pytest.raises(ValueError, match=r"^model: expected an nn\.Linear.*adapters"):
        fuse_head(lora)
    late = get_peft_model(fuse_head(make()), LoraConfig(r=2, target_modules=["lm_head"]))
    with pytest.raises(ValueError, match=r"^model: expected the head of fuse_head\(\)"):
        label_logp(late, INPUTS, LABELS)
    with pytest.raises(ValueError, match=r"^model: expected an nn\.Linear.*FusedHead"):
        fuse_head(fuse_head(make()))
    with pytest.raises(ValueError, match=r"^model: expected an nn\.Linear as output embedding"):
        fuse_head(nn.Linear(2, 2))
    hooked = make()
    hooked.lm_head.register_forward_hook(lambda *given: None)
    with pytest.raises(ValueError, match=r"^model: expected a head without hooks"):
        fuse_head(hooked)
    resized = fuse_head(make())
    resized.resize_token_embeddings(300)
    with pytest.raises(ValueError, match=r"^model: expected one with a fused head"):
        label_logp(resized, INPUTS, LABELS)


def test_a_sharded_head_is_refused():
    """Sharded before, and in a group of its own, whose weights are gone after the head's call."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match=r"^model: expected a head of plain weights.*DTensor"):
            fuse_head(sharded(make()))
        model = fuse_head(make())
        fully_shard(model.lm_head)
        with pytest.raises(ValueError, match=r"^head: expected no group of its own"):
            label_logp(sharded(model), INPUTS, LABELS)
    finally:
        dist.destroy_process_group()


def test_calls_that_are_refused():
    with pytest.raises(ValueError, match=r"^model: expected one with a fused head"):
        label_logp(make(), INPUTS, LABELS)
    model = fuse_head(make())
    with pytest.raises(ValueError, match=r"^inputs: expected none named labels"):
        label_logp(model, {**INPUTS, "labels": LABELS}, LABELS)
    with pytest.raises(ValueError, match=r"^labels: expected \[samples, tokens\]"):
        label_logp(model, INPUTS, LABELS[0])
    with pytest.raises(ValueError, match=r"^labels: expected shape"):
        label_logp(model, INPUTS, LABELS[:, 1:])
    label_logp(model, INPUTS, LABELS)  # as if nothing had been


def test_in_a_model_of_ones_own():
    """The same class, called with labels in the forward pass."""

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = (
                nn.Embedding(VOCABULARY, 8),
                FusedHead(8, VOCABULARY, softcap=3.0),
            )

        def forward(self, ids, labels):
            return self.head(self.body(ids), labels)

    model, ids = Own(), INPUTS["input_ids"]
    logp, lse = model(ids, LABELS)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(ids, LABELS)[0], logp)
    logits = 3.0 * (model.head(model.body(ids)) / 3.0).tanh()
    counted = LABELS.flatten() != -100
    picked = logits.log_softmax(2).flatten(0, 1)[counted].gather(1, LABELS.flatten()[counted, None])
    torch.testing.assert_close(logp[counted], picked[:, 0])
    torch.testing.assert_close(lse[counted], logits.logsumexp(2).flatten()[counted])
