"""R2F: the decoder against literal least squares, the step, and what is never allocated."""

import copy

import pytest
import torch
from memory import largest
from tiny import gpt, sequences

from sfron_fast import methods
from sfron_fast.methods.r2f import Decoder, factor_gradients
from sfron_fast.tasks import Language

RANK, RIDGE = 3, 1e-2
TASK = Language()


def batches(count, size, seed):
    rows = sequences(count * size, seed)
    stacked = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    return [{k: t[i * size : (i + 1) * size] for k, t in stacked.items()} for i in range(count)]


PROXY, FORGET = batches(5, 4, seed=1), [*batches(2, 3, seed=2), *batches(1, 2, seed=3)]


def names(model):
    return [n for n, m in model.named_modules() if type(m).__name__ == "Conv1D"]


def gradient(model, loader, name):
    """Of the mean over all samples, [out, in]."""
    weight, total = model.get_submodule(name).weight, 0.0
    for batch in loader:
        (g,) = torch.autograd.grad(TASK.mean_loss(model, batch), weight)
        total = total + len(batch["labels"]) * g.T
    return total / sum(len(batch["labels"]) for batch in loader)


def fitted(model, **settings):
    expression = r"transformer\.h\.\d\.(attn|mlp)\.c_\w+"
    return methods.fit_decoder(
        model,
        **{"loader": PROXY, "layers": expression, "rank": RANK, "ridge": RIDGE, "task": TASK}
        | settings,
    )


def test_decoder_is_the_least_squares_solution():
    model = gpt().eval()
    decoder = fitted(model)
    assert decoder.down.keys() == decoder.up.keys() == set(names(model))
    for name in names(model):
        full = torch.cat([gradient(model, [batch], name) for batch in PROXY])
        down = decoder.down[name]
        seen = full @ down.T
        ridge = RIDGE * (seen.T @ seen).diagonal().mean()
        # |G - X D|^2 + ridge |D|^2, as rows below one another
        left = torch.cat([seen, ridge.sqrt() * torch.eye(RANK)])
        right = torch.cat([full, full.new_zeros(RANK, full.shape[1])])
        expected = torch.linalg.lstsq(left, right).solution
        torch.testing.assert_close(decoder.up[name], expected, rtol=1e-7, atol=1e-9)
        inverse = decoder.without_proxy().up[name]
        torch.testing.assert_close(inverse, torch.linalg.pinv(down).T, rtol=1e-9, atol=1e-12)


def test_factors_have_the_full_gradients_product():
    model = gpt().eval()
    found = factor_gradients(model, FORGET, decoder := fitted(model), task=TASK)
    for name in names(model):
        expected = gradient(model, FORGET, name) @ decoder.down[name].T
        torch.testing.assert_close(found[name], expected, rtol=1e-9, atol=1e-12)
    assert all(not m._forward_hooks for m in model.modules())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_the_step_is_the_decoded_gradient_of_the_norm_it_says():
    model = gpt().train()
    decoder, start = fitted(model), copy.deepcopy(model)
    x = factor_gradients(model, FORGET, decoder, task=TASK)
    decoded = {n: x[n] @ decoder.up[n] for n in x}
    size = torch.cat([g.flatten() for g in decoded.values()]).norm()
    assert float(decoder.norm(x)) == pytest.approx(float(size), rel=1e-9)
    assert methods.r2f(model, forget=FORGET, decoder=decoder, norm=0.3, task=TASK) is model
    moved = 0.0
    for name, weight in model.named_parameters():
        step = weight.detach() - start.get_parameter(name).detach()
        moved += step.square().sum().item()
        layer = name.removesuffix(".weight")
        wanted = 0.3 / size * decoded[layer].T if layer in decoded else torch.zeros_like(step)
        torch.testing.assert_close(step, wanted, rtol=1e-9, atol=1e-12)
    assert moved**0.5 == pytest.approx(0.3, rel=1e-9)
    assert model.training
    losses = [sum(TASK.mean_loss(m.eval(), b) for b in FORGET) for m in (model, start)]
    assert losses[0] > losses[1]


def test_no_weight_gradient_is_allocated():
    """No tensor as large as the smallest of the matrices; the true gradient's are."""
    model = gpt(width=256, layers=2).eval()
    decoder, forget = fitted(model), FORGET[:1]
    weights = [model.get_submodule(n).weight for n in names(model)]
    least = min(w.numel() * w.element_size() for w in weights)
    step = {"forget": forget, "decoder": decoder, "norm": 0.1, "task": TASK}
    methods.r2f(model, **step)  # what is made once
    assert largest(lambda: methods.r2f(model, **step)) < least
    true = largest(lambda: torch.autograd.grad(TASK.mean_loss(model, forget[0]), weights))
    assert true >= least


def test_linear_layers_are_served_as_gpt2s_are():
    """A Llama's: the step of plain autograd, where the rank is as large as the input."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 16, "vocab_size": 32}
    config = LlamaConfig(**shape, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2)
    model = LlamaForCausalLM(config).double().eval()
    start = copy.deepcopy(model)
    decoder = fitted(model, layers=r"model\.layers\.0\.mlp\.\w+_proj", rank=16, ridge=0.0)
    methods.r2f(model, forget=FORGET, decoder=decoder.without_proxy(), norm=0.1, task=TASK)
    weights = [start.get_submodule(n).weight for n in decoder.down]
    true = [torch.zeros_like(w) for w in weights]
    for batch in FORGET:
        grads = torch.autograd.grad(TASK.mean_loss(start, batch), weights)
        true = [t + len(batch["labels"]) * g for t, g in zip(true, grads, strict=True)]
    size = torch.cat([t.flatten() for t in true]).norm()
    for name, before, t in zip(decoder.down, weights, true, strict=True):
        after = model.get_submodule(name).weight
        torch.testing.assert_close(after - before, 0.1 / size * t, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("argument", "call"),
    [
        ("layers", lambda m, d: fitted(m, layers="none")),
        ("layers", lambda m, d: fitted(m, layers=r"transformer\.wte")),
        ("rank", lambda m, d: fitted(m, rank=0)),
        ("ridge", lambda m, d: fitted(m, ridge=-1.0)),
        ("loader", lambda m, d: fitted(m, loader=[])),
        ("norm", lambda m, d: methods.r2f(m, forget=FORGET, decoder=d, norm=-1.0, task=TASK)),
        ("forget", lambda m, d: methods.r2f(m, forget=[], decoder=d, norm=1.0, task=TASK)),
        (
            "decoder",
            lambda m, d: methods.r2f(
                m,
                forget=FORGET,
                decoder=Decoder({"h": torch.ones(1, 2)}, {"h": torch.ones(1, 2)}),
                norm=1.0,
                task=TASK,
            ),
        ),
        (
            "decoder",
            lambda m, d: methods.r2f(gpt(width=8), forget=FORGET, decoder=d, norm=1.0, task=TASK),
        ),
    ],
)
def test_bad_input_is_named_and_nothing_moves(argument, call):
    model = gpt().eval()
    start = copy.deepcopy(model.state_dict())
    decoder = fitted(model)
    with pytest.raises(ValueError, match=rf"^{argument}: expected .*found "):
        call(model, decoder)
    assert all(torch.equal(start[n], t) for n, t in model.state_dict().items())
