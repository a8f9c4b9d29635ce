"""The language task: what a sequence's loss is, whatever the model and the batch look like."""

import pytest
import torch
import torch.nn.functional as F
import transformers

import sfron_fast as sf
from sfron_fast.integrations.transformers import fuse_head
from sfron_fast.tasks import Language

CPU, VOCABULARY = torch.device("cpu"), 37
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 2, "intermediate_size": 24}
ENDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}


def llama():
    config = transformers.LlamaConfig(**SIZES, **ENDS, initializer_range=0.3)
    return transformers.LlamaForCausalLM(config)


def gpt2():
    sizes = {"vocab_size": VOCABULARY, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2}
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**sizes, **ENDS, initializer_range=0.3)
    )


def bert(kind):
    config = transformers.BertConfig(**SIZES, initializer_range=0.3, num_labels=3)
    return getattr(transformers, f"BertFor{kind}")(config)


def t5():
    sizes = {"vocab_size": VOCABULARY, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2}
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(**sizes, num_heads=2, decoder_start_token_id=0, **ENDS)
    )


def built(make, *args):
    torch.manual_seed(0)
    return make(*args).eval()


def sequences(*lengths, seed=1):
    """Token sequences, each with a prompt of two tokens that is not asked for."""
    generator = torch.Generator().manual_seed(seed)
    tokens = [torch.randint(2, VOCABULARY, (n,), generator=generator) for n in lengths]
    return tokens, [torch.cat([torch.full((2,), -100), t[2:]]) for t in tokens]


def padded(tokens, labels, side="right", label=-100):
    """The batch of a collator; ``label`` stands on the padding, where it must not count."""
    rows = {"input_ids": [], "attention_mask": [], "labels": []}
    most = max(map(len, tokens))
    for ids, wanted in zip(tokens, labels, strict=True):
        left = most - len(ids)
        pad = (left, 0) if side == "left" else (0, left)
        rows["input_ids"].append(F.pad(ids, pad))
        rows["attention_mask"].append(F.pad(torch.ones_like(ids), pad))
        rows["labels"].append(F.pad(wanted, pad, value=label))
    return {key: torch.stack(row) for key, row in rows.items()}


def packed(tokens, labels):
    """One row of all sequences, as DataCollatorWithFlattening makes it."""
    positions = torch.cat([torch.arange(len(t)) for t in tokens])
    return {
        "input_ids": torch.cat(tokens)[None],
        "labels": torch.cat(labels)[None],
        "position_ids": positions[None],
    }


def alone(model, tokens, labels):
    """Each sequence's mean loss as the model itself says it, of the sequence alone."""
    pairs = zip(tokens, labels, strict=True)
    return torch.stack([model(input_ids=t[None], labels=y[None]).loss for t, y in pairs])


def losses(model, batch, **settings):
    task = Language(**settings)
    return task.checked_losses(model, task.prepare(batch, CPU))


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("side", ["right", "left"])
@torch.no_grad()
def test_padding_changes_nothing(make, side):
    model = built(make)
    found = sequences(9, 5, 7)
    expected = alone(model, *found)
    torch.testing.assert_close(losses(model, padded(*found, side, label=3)), expected)
    sums = expected * torch.tensor([7.0, 3.0, 5.0])
    torch.testing.assert_close(losses(model, padded(*found, side), reduction="sum"), sums)


@pytest.mark.parametrize("by", ["position_ids", "sample_index"])
@torch.no_grad()
def test_packed_rows_hold_a_sample_for_each_beginning(by):
    model, found = built(llama), sequences(9, 5, 7)
    found[1][1][:] = found[0][1]  # a first token that is labelled has nobody to predict it
    batch = packed(*found)
    if by == "sample_index":
        batch["sample_index"] = torch.tensor([0, 1, 2]).repeat_interleave(torch.tensor([9, 5, 7]))
        batch["sample_index"] = batch["sample_index"][None]
    task = Language()
    batch = task.prepare(batch, CPU)
    assert task.samples(batch) == 3
    torch.testing.assert_close(task.losses(model, batch), alone(model, *found))
    units = task.units(task.outputs(model, batch), batch)
    assert units.lengths.tolist() == [7, 4, 5]
    assert units.sample.tolist() == [0] * 7 + [1] * 4 + [2] * 5


@torch.no_grad()
def test_labels_are_shifted_for_causal_models_only():
    found = sequences(6, 6)
    batch = padded(*found)
    masked = built(bert, "MaskedLM")
    torch.testing.assert_close(losses(masked, batch), alone(masked, *found))
    tagging = built(bert, "TokenClassification")
    tags = {**batch, "labels": batch["labels"].clamp_max(2)}
    expected = alone(tagging, found[0], tags["labels"])
    torch.testing.assert_close(losses(tagging, tags), expected)
    seq2seq = built(t5)
    torch.testing.assert_close(losses(seq2seq, batch), alone(seq2seq, *found))
    plain = torch.nn.Embedding(VOCABULARY, VOCABULARY)
    model = _Plain(plain)
    rows = plain(batch["input_ids"])
    labels = batch["labels"]
    shifted = F.cross_entropy(rows[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(losses(model, batch).mean(), shifted)
    own = F.cross_entropy(rows.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(losses(model, batch, shift=False).mean(), own)


class _Plain(torch.nn.Module):
    def __init__(self, table):
        super().__init__()
        self.table = table

    def forward(self, input_ids, attention_mask):
        return self.table(input_ids)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("form", [padded, packed])
def test_a_sequence_without_a_label_weighs_nothing(reduction, form):
    """Its loss of 0 would outweigh all others."""
    model = built(llama).double()
    tokens, labels = sequences(9, 5, 7)
    task = Language(reduction)
    some = task.prepare(form([tokens[0], tokens[2]], [labels[0], labels[2]]), CPU)
    labels[1][:] = -100
    every = task.prepare(form(tokens, labels), CPU)
    for loss in (
        lambda batch: task.adaptive_loss(model, batch, 0.5, 1e-6)[0],
        lambda batch: task.ceiling_loss(model, batch, 0.5, 1e-6, 1e3, 1.0)[0],
        lambda batch: task.mean_loss(model, batch),
    ):
        torch.testing.assert_close(loss(every), loss(some))
    assert float(task.losses(model, every)[1]) == 0.0


def test_adaptive_and_ceiling_losses_are_their_formulas():
    model, task = built(llama).double(), Language()
    batch = task.prepare(padded(*sequences(9, 5, 7)), CPU)
    each = task.losses(model, batch).detach()
    weights = sf.adaptive_weights(each, 0.7)
    torch.testing.assert_close(
        task.adaptive_loss(model, batch, 0.7, 1e-6)[0], (weights * each).sum()
    )
    reached = each >= float(each.median())
    expected = (weights * each)[~reached].sum()
    found = task.ceiling_loss(model, batch, 0.7, 1e-6, 1.0, float(each.median()))[0]
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(task.mean_loss(model, batch), each.mean())


@pytest.mark.parametrize("form", [padded, packed])
def test_a_ceiling_of_tokens_ends_each_token_by_itself(form):
    """Tokens at the ceiling give no gradient, those below the one they had."""
    model, task = built(llama).double(), Language()
    batch = task.prepare(form(*sequences(9, 5, 7)), CPU)
    units = task.units_by(model, batch)
    limit = float(units.losses.detach().median())
    weights = sf.adaptive_weights(task.losses(model, batch).detach(), 0.7)
    share = (weights / units.lengths)[units.sample]
    below = units.losses < limit
    assert 0 < below.sum() < len(below)
    parameters = list(model.parameters())
    expected = torch.autograd.grad((share * units.losses)[below].sum(), parameters)
    loss, values, left = task.token_ceiling_loss(model, batch, 0.7, 1e-6, 0.5, 2.0 * limit)
    torch.testing.assert_close(torch.autograd.grad(loss, parameters), expected)
    torch.testing.assert_close(values, task.losses(model, batch))
    assert bool(left)
    loss, _, left = task.token_ceiling_loss(model, batch, 0.7, 1e-6, 1e-6, 1.0)
    assert not bool(left)
    assert not any(g.any() for g in torch.autograd.grad(loss, parameters))


def test_a_ceiling_of_tokens_wants_means_and_a_task_of_tokens():
    model = built(llama)
    batch = {"input_ids": sequences(6)[0][0][None], "labels": sequences(6)[1][0][None]}
    recipe = sf.Recipe.language(ceiling_of="token", cycles=1, threshold=None)
    given = {"forget": [batch], "retain": [batch], "holdout": [batch], "recipe": recipe}
    with pytest.raises(ValueError, match=r"task: expected Language\('mean'\).*found Language"):
        sf.unlearn(model, **given, task=Language("sum"))
    with pytest.raises(ValueError, match=r"task: .*token_ceiling_loss.*found Classification"):
        sf.unlearn(model, **given)
    with pytest.raises(ValueError, match="ceiling: expected a number, with ceiling_of 'token'"):
        sf.Recipe.paper(ceiling_of="token")
    with pytest.raises(ValueError, match="ceiling_of: expected 'sample' or 'token'"):
        sf.Recipe.paper(ceiling=1.0, ceiling_of="word")


def test_chats_are_labelled_where_the_assistant_speaks():
    tokens, labels = sequences(9, 9)
    ids, wanted = torch.stack(tokens), torch.stack(labels)
    masks = (wanted != -100).long()
    found = Language().prepare({"input_ids": ids, "assistant_masks": masks}, CPU)
    assert torch.equal(found["labels"], wanted)
    with pytest.raises(ValueError, match=r"forget: .*assistant_masks.*\{% generation %\}"):
        Language().prepare({"input_ids": ids, "assistant_masks": 0 * masks}, CPU, "forget")


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ((torch.zeros(2, 3), torch.zeros(2)), "forget: expected mappings.*found tuple.*collator"),
        ({"input_ids": torch.zeros(2, 3)}, "forget: expected batches with labels.*input_ids"),
        ({"labels": torch.zeros(2, 3)}, "forget: expected labels that are an int64.*float32"),
        ({"labels": torch.zeros(2).long()}, r"forget: .*\[samples, tokens\].*Classification"),
    ],
)
def test_other_batches_are_refused_by_the_name_of_their_loader(batch, message):
    with pytest.raises(ValueError, match=message):
        Language().prepare(batch, CPU, "forget")
    with pytest.raises(ValueError, match="reduction: expected 'mean' or 'sum'"):
        Language("tokens")


def test_classifiers_of_transformers_need_no_task():
    """Batches of a collator, and an output object."""
    model = built(bert, "SequenceClassification")
    tokens, _ = sequences(6, 6, 6, 6)
    ids, labels = torch.stack(tokens), torch.tensor([0, 1, 2, 0])
    batch = transformers.BatchEncoding({"input_ids": ids, "labels": labels})
    sets = {"forget": [batch], "retain": [batch]}
    fisher = sf.estimate_fisher(model, [batch])
    expected = sf.estimate_fisher(model, [({"input_ids": ids}, labels)], loss_fn=_of_logits)
    for name in fisher:
        torch.testing.assert_close(fisher[name], expected[name])
    recipe = sf.Recipe.paper(cycles=1, retain_steps=1)
    run = sf.unlearn(model, **sets, holdout=[batch], recipe=recipe, eval_every=1)
    assert len(run.history) == 2
    bad, recipe = {"input_ids": ids, "labels": ids}, recipe.replace(threshold=None)
    with pytest.raises(ValueError, match=r"forget: .*labels \[samples\].*Language"):
        sf.unlearn(model, forget=[bad], retain=[batch], recipe=recipe)


def _of_logits(outputs, targets):
    return F.cross_entropy(outputs.logits, targets)


@pytest.mark.parametrize("form", [padded, packed])
def test_a_fused_head_changes_nothing_but_the_logits(form, monkeypatch):
    tokens, labels = sequences(9, 5, 7)
    labels[1][:] = -100
    model, fused, task = built(llama).double(), built(llama).double(), Language()
    fuse_head(fused)
    batch = task.prepare(form(tokens, labels), CPU)
    limit = 0.99 * float(task.losses(model, batch)[[0, 2]].max())  # one of them has reached it
    calls = {
        "losses": lambda m: task.losses(m, batch).square().sum(),
        "sums": lambda m: Language("sum").losses(m, batch).square().sum(),
        "mean": lambda m: task.mean_loss(m, batch),
        "adaptive": lambda m: task.adaptive_loss(m, batch, 0.7, 1e-6)[0],
        "ceiling": lambda m: task.ceiling_loss(m, batch, 0.7, 1e-6, 1.0, limit)[0],
        "of tokens": lambda m: task.token_ceiling_loss(m, batch, 0.7, 1e-6, 1.0, limit)[0],
        "units": lambda m: task.units_by(m, batch).losses.square().sum(),
    }
    for name, call in calls.items():
        values = [call(m) for m in (fused, model)]
        torch.testing.assert_close(*values, msg=name)
        grads = [
            torch.autograd.grad(v, list(m.parameters()))
            for v, m in zip(values, (fused, model), strict=True)
        ]
        torch.testing.assert_close(*grads)
    with monkeypatch.context() as patch:
        patch.setattr(task, "outputs", None)
        for name, call in calls.items():
            if name != "sums":
                call(fused)  # none of them asked for logits


@pytest.mark.parametrize("estimator", ["sample", "batch"])
@pytest.mark.filterwarnings("ignore::RuntimeWarning:sfron_fast")
def test_a_language_model_is_unlearnt(estimator):
    model = built(gpt2)
    batches = [padded(*sequences(9, 5, 7, seed=s), side="left") for s in range(3)]
    recipe = sf.Recipe.paper(
        cycles=4, retain_steps=1, lr=0.05, forget_lr=0.2, slow_lr=1.0, estimator=estimator
    )
    before = losses(model, batches[0]).mean()
    run = sf.unlearn(
        model,
        forget=batches[:1],
        retain=batches[1:],
        holdout=batches[2:],
        recipe=recipe,
        task=Language(),
        eval_every=2,
    )
    assert losses(model, batches[0]).mean() > before
    assert set(run.history[0]) == {"cycle", "skipped_steps", "forget_accuracy", "val_accuracy"}


@pytest.mark.parametrize("side", ["forget", "retain"])
@pytest.mark.parametrize("estimator", ["sample", "batch"])
def test_labels_that_are_no_token_are_told(side, estimator):
    model = built(gpt2)
    sets = {name: [padded(*sequences(9, 5))] for name in ("forget", "retain", "holdout")}
    sets[side][0]["labels"][0, 3] = VOCABULARY
    recipe = sf.Recipe.paper(cycles=1, estimator=estimator)
    message = rf"expected classes 0 to {VOCABULARY - 1}.*, found"
    with pytest.raises(ValueError, match=message):
        sf.unlearn(model, **sets, recipe=recipe, task=Language())


@pytest.mark.parametrize(
    ("side", "message"), [("forget", "mask: .*labels of -100"), ("retain", "retain: .*found none")]
)
def test_a_set_without_a_label_is_told(side, message):
    sets = {name: [padded(*sequences(9, 5))] for name in ("forget", "retain", "holdout")}
    sets[side][0]["labels"][:] = -100
    recipe = sf.Recipe.paper(cycles=1)
    with pytest.raises(ValueError, match=message):
        sf.unlearn(built(gpt2), **sets, recipe=recipe, task=Language())
