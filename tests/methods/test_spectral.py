"""Spectral norms against dense matrices, and clipping against the singular value decomposition."""

import copy

import pytest
import torch
from models import bits, same
from torch import nn

from sfron_fast import methods
from sfron_fast.methods import clip_spectral_norms, spectral_norms
from sfron_fast.models.lora import add_lora


def matrix(run, shape):
    """M [out, in] of x -> run(x), by the unit vectors."""
    size = torch.Size(shape).numel()
    unit = torch.eye(size, dtype=torch.float64).reshape(size, *shape)
    with torch.no_grad():
        return (run(unit) - run(torch.zeros_like(unit))).flatten(1).T


def norm(run, shape):
    return float(torch.linalg.matrix_norm(matrix(run, shape), 2))


def spoilt(layer):
    """A BatchNorm that has seen something, also one channel turned over."""
    with torch.no_grad():
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.05, 2.0)
        layer.weight.uniform_(0.3, 2.0)[0] = -2.5
        layer.bias.normal_()
    return layer


def layers():
    torch.manual_seed(0)
    conv, moved = nn.Conv2d, (5, 7, 6)
    return {
        "stride and padding": ([conv(5, 8, 3, stride=2, padding=1)], moved),
        "padding": ([conv(5, 8, 3, padding=1)], moved),
        "no padding": ([conv(5, 4, 3, bias=False)], moved),
        "dilation": ([conv(5, 8, 3, padding=2, dilation=2)], moved),
        "groups": ([conv(6, 8, 3, padding=1, groups=2)], (6, 5, 5)),
        "circular": ([nn.Conv1d(4, 6, 3, padding=1, padding_mode="circular")], (4, 11)),
        "transposed": ([nn.ConvTranspose2d(5, 3, 4, stride=2, padding=1)], moved),
        "linear": ([nn.Linear(20, 30)], (20,)),
        "few inputs": ([nn.Linear(3, 30)], (3,)),
        "linear, normed": ([nn.Linear(20, 9), spoilt(nn.BatchNorm1d(9))], (20,)),
        "normed": ([conv(5, 8, 3, 2, 1, bias=False), spoilt(nn.BatchNorm2d(8))], moved),
        "norm alone": ([spoilt(nn.BatchNorm2d(5))], moved),
    }


@pytest.mark.parametrize("name", layers())
def test_norms_are_exact_before_and_after_clipping(name):
    found, shape = layers()[name]
    model = nn.Sequential(*found).double()
    with torch.no_grad():
        model[0].weight.mul_(8.0)
    model.train()
    inputs, start = torch.randn(2, *shape, dtype=torch.float64), bits(model)
    model[0].weight.requires_grad_(False)
    exact = norm(copy.deepcopy(model).eval(), shape)
    assert spectral_norms(model, inputs) == {"0": pytest.approx(exact, rel=5e-5)}
    assert same(bits(model), start)

    assert clip_spectral_norms(model, inputs, bound=1.1 * exact) is model
    assert same(bits(model), start)  # nothing is above
    clip_spectral_norms(model, inputs, bound=exact / 4)
    after = norm(copy.deepcopy(model).eval(), shape)
    assert 0.99 * exact / 4 <= after <= 1.025 * exact / 4
    moved = {n for n, t in bits(model).items() if not torch.equal(t, start[n])}
    assert moved == {n for n in start if n.endswith(".weight")}
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["0.weight"]


def test_a_small_matrix_is_clipped_as_by_its_decomposition():
    torch.manual_seed(1)
    model = nn.Linear(20, 6).double()
    u, s, v = torch.linalg.svd(model.weight.detach(), full_matrices=False)
    bound = float(s[2] + s[3]) / 2
    clip_spectral_norms(model, torch.zeros(1, 20).double(), bound=bound)
    torch.testing.assert_close(model.weight.detach(), (u * s.clamp(max=bound)) @ v)


def test_the_reshaped_kernel_is_something_else():
    """The classic mistake: a blur passes what is constant, of norm near the sum of its weights."""
    conv = nn.Conv2d(1, 1, 3, padding=1, padding_mode="circular", bias=False)
    with torch.no_grad():
        conv.weight.fill_(1.0)
    assert float(torch.linalg.matrix_norm(conv.weight.detach().flatten(1), 2)) == pytest.approx(3.0)
    assert spectral_norms(conv, torch.zeros(1, 1, 6, 6))[""] == pytest.approx(9.0, rel=1e-5)


class Model(nn.Module):
    """Layers in the order they are called, a branch, tokens, and what lies between."""

    def __init__(self):
        super().__init__()
        self.norm = spoilt(nn.BatchNorm2d(4))
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.kept = nn.Conv2d(4, 4, 1)
        self.after_relu = spoilt(nn.BatchNorm2d(4))
        self.after_sum = spoilt(nn.BatchNorm2d(4))
        self.tokens = nn.Linear(4, 5)
        self.unused = nn.Linear(2, 2)

    def forward(self, x):
        x = self.norm(self.conv(x))
        x = x + self.after_relu(self.kept(x).relu_())
        x = self.after_sum(x)
        return self.tokens(x.flatten(2).transpose(1, 2))


def test_layers_are_found_where_they_are_called():
    torch.manual_seed(2)
    model = Model().double()
    inputs = torch.randn(3, 2, 5, 4, dtype=torch.float64)
    found = spectral_norms(model, inputs)
    assert list(found) == ["conv", "kept", "after_relu", "after_sum", "tokens"]
    model.eval()
    both = norm(lambda x: model.norm(model.conv(x)), (2, 5, 4))
    assert found["conv"] == pytest.approx(both, rel=5e-5)
    assert found["kept"] == pytest.approx(norm(model.kept, (4, 5, 4)), rel=5e-5)
    assert found["after_relu"] == pytest.approx(norm(model.after_relu, (4, 5, 4)), rel=5e-5)
    assert found["tokens"] == pytest.approx(norm(model.tokens, (4,)), rel=5e-5)
    assert not any(m._forward_hooks for m in model.modules())

    clip_spectral_norms(model, inputs, bound=0.5)
    assert max(spectral_norms(model, inputs).values()) <= 0.5 * 1.021


def test_adapters_are_part_of_their_layer():
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)).double()
    add_lora(model, rank=2, alpha=4.0)
    with torch.no_grad():
        for layer in model:
            layer.lora_B.normal_()
    found = spectral_norms(model, torch.zeros(1, 6).double())
    for number, layer in enumerate(model):
        assert found[str(number)] == pytest.approx(norm(layer, (6,)), rel=5e-5)


def test_inputs_by_keyword_and_without_autograd():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, *, x):
            return self.layer(x)

    model = Named()
    with torch.inference_mode():
        clip_spectral_norms(model, {"x": torch.ones(1, 4)}, bound=0.5)
        found = spectral_norms(model, {"x": torch.ones(1, 4)})["layer"]
    exact = float(torch.linalg.matrix_norm(model.layer.weight.detach(), 2))
    assert found == pytest.approx(exact, rel=1e-4)
    assert 0.49 <= exact <= 0.511


def test_a_lost_model_is_refused():
    model = nn.Linear(4, 4)
    with torch.no_grad():
        model.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"^model: expected finite weights .*found NaN"):
        clip_spectral_norms(model, torch.ones(1, 4), bound=1.0)


@pytest.mark.parametrize(
    ("argument", "model", "settings"),
    [
        ("bound", nn.Linear(4, 4), {"bound": 0.0}),
        ("bound", nn.Linear(4, 4), {"bound": float("nan")}),
        ("model", nn.ReLU(), {}),
        ("model", nn.Linear(4, 4).bfloat16(), {}),
        ("model", nn.BatchNorm1d(4, track_running_stats=False), {}),
        ("model", nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)), {}),
    ],
)
def test_bad_input_is_named_and_nothing_moves(argument, model, settings):
    start = bits(model)
    inputs = torch.randn(3, 4).to(next(model.parameters(), torch.empty(0)).dtype)
    with pytest.raises(ValueError, match=rf"^{argument}: expected .*found "):
        methods.clip_spectral_norms(model, inputs, **{"bound": 1.0, **settings})
    assert same(bits(model), start)
    assert model.training


def test_what_could_not_be_done_is_said(monkeypatch):
    from sfron_fast.models import spectral

    bare = nn.BatchNorm1d(3, affine=False)  # nothing there to clip
    assert spectral_norms(bare, torch.zeros(2, 3))[""] == pytest.approx(1.0, rel=1e-4)
    with pytest.warns(RuntimeWarning, match=r"still above 0.5"):
        clip_spectral_norms(bare, torch.zeros(2, 3), bound=0.5)
    monkeypatch.setattr(spectral, "ROUNDS", 1)
    torch.manual_seed(4)
    model = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1))
    with pytest.warns(RuntimeWarning, match="still above 0.2 in 0;"):
        clip_spectral_norms(model, torch.zeros(1, 4, 6, 6), bound=0.2)
