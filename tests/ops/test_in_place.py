"""Cross-entropies whose gradient is written over the logits: the same results, and no way to use
what is gone.
"""

from functools import partial

import pytest
import tolerances as tol
import torch
import torch.nn.functional as F
from cases import DTYPES, values
from judging import assert_same_bits
from row_cases import last_layer
from torch.utils.checkpoint import checkpoint

import sfron_fast as sf
from sfron_fast import losses
from sfron_fast.ops import reference

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
over = partial(sf.adaptive_cross_entropy, inplace=True)


def total(logits, labels, *args, **kwargs):
    return sf.adaptive_cross_entropy_sum_(logits, labels, *args, **kwargs)[0]


def weighted_sum(logits, labels, *args, scale=1.0):
    """What ``total`` is, out of place."""
    loss, _, _, normaliser = losses.adaptive_cross_entropy_parts(logits, labels, *args)
    return loss * normaliser * scale


DOORS = pytest.mark.parametrize(
    ("door", "plain"),
    [(over, sf.adaptive_cross_entropy), (total, weighted_sum)],
    ids=["over", "total"],
)
SHAPES = [
    (9, 7),
    (1, 1),
    (5, 4, 33),
    (3, 2, 31),
    (2, 3, 2049),
    (3, 4100),
    (70, 1000),
    (2, 300, 3),
    (3, 0, 5),
]


@each_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_same_bits_as_out_of_place(device, shape, dtype):
    if 0 in shape:
        logits = torch.empty(shape, dtype=dtype, device=device).requires_grad_() * 1.0
        labels = torch.empty(shape[:-1], dtype=torch.int64, device=device)
    else:
        weight, features, labels = last_layer(shape, dtype, device)
        logits = F.linear(features, weight)
    before, known = logits.detach().clone(), labels.clone()
    leaf = before.clone().requires_grad_()
    for numbers in ((0.5,), (0.0,), (2.0,)):
        plain = sf.adaptive_cross_entropy(leaf, labels, *numbers)
        (wanted,) = torch.autograd.grad(-0.7 * plain, leaf)
        work = leaf * 1.0
        loss = over(work, labels, *numbers)
        assert_same_bits(loss, plain)
        assert_same_bits(work, before)  # whole until the backward pass
        assert work._version == 0
        (got,) = torch.autograd.grad(-0.7 * loss, work)
        assert got.data_ptr() == work.data_ptr()
        assert not got.requires_grad
        assert torch.equal(labels, known)
        if dtype == torch.float64:  # plain is differentiated by autograd there
            torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-15)
        else:
            assert_same_bits(got, wanted)


@DOORS
def test_reaches_the_weights(device, door, plain):
    """Through a real last layer, beside another loss on the same logits, and with a factor that
    autograd applies.
    """
    weight, features, labels = last_layer((20, 11), device=device)
    constant = values((20, 11), torch.float32, device)
    for extra in (0.0, 0.25):
        wanted = None
        for loss in (plain, door):
            logits = F.linear(features, weight)
            other = (logits * constant).sum() * extra  # of the logits it saves nothing
            (grad,) = torch.autograd.grad(-1.5 * loss(logits, labels) + other, weight)
            if wanted is None:
                wanted = grad
        torch.testing.assert_close(grad, wanted, rtol=1e-5, atol=1e-6)
        assert wanted.abs().max() > 0.05


@each_dtype
def test_parts_of_a_batch_add_up(device, dtype):
    """Gradient accumulation in place: loss times normaliser of each part, over the sum of the
    normalisers.
    """
    weight, features, labels = last_layer((12, 3, 8), dtype, device)
    (wanted,) = torch.autograd.grad(
        sf.adaptive_cross_entropy(F.linear(features, weight), labels), weight
    )
    found, normalisers = torch.zeros_like(weight, dtype=torch.float64), 0.0
    for x, y in zip(features.split(5), labels.split(5), strict=True):
        loss, per_sample, weights, normaliser = losses.adaptive_cross_entropy_parts(
            F.linear(x, weight), y, inplace=True
        )
        assert not any(t.requires_grad for t in (per_sample, weights, normaliser))
        found += torch.autograd.grad(loss * normaliser, weight)[0]
        normalisers += normaliser.double()
    size = wanted.abs().max().item()
    torch.testing.assert_close(
        found / normalisers, wanted.double(), rtol=0, atol=size * (16 * tol.EPS[dtype] + 1e-6)
    )


@each_dtype
@pytest.mark.parametrize("factor", [1.0, -2.5, 0.0])
def test_upstream_factor(device, dtype, factor):
    """``(factor * total).backward()`` costs a pass, and is right; a factor of 1 leaves the bits."""
    weight, features, labels = last_layer((30, 40), dtype, device)
    logits = F.linear(features, weight)
    leaf = logits.detach().clone().requires_grad_()
    loss = total(logits, labels)
    written = logits.detach().clone()
    (got,) = torch.autograd.grad(factor * loss, logits)
    assert got.data_ptr() == logits.data_ptr()
    assert_same_bits(got, (written.to(reference.accumulate_dtype(dtype)) * factor).to(dtype))
    (wanted,) = torch.autograd.grad(weighted_sum(leaf, labels, scale=factor), leaf)
    torch.testing.assert_close(
        got, wanted, rtol=2 * tol.EPS[dtype] + 16 * tol.U, atol=2 * tol.TINY[dtype] + 2.0**-100
    )


# --- what autograd and the caller can do with it --------------------------------------------------


@DOORS
def test_nothing_is_written_without_grad(device, door, plain):
    weight, features, labels = last_layer(device=device)
    with torch.no_grad():
        expected = plain(F.linear(features, weight), labels)
    tracked = F.linear(features, weight)
    before = tracked.detach().clone()
    for context, logits in (
        (torch.no_grad, tracked),
        (torch.inference_mode, tracked),
        (torch.enable_grad, tracked.detach()),
    ):
        with context():
            got = door(logits, labels)
        assert torch.equal(got, expected)
        assert not got.requires_grad
        assert torch.equal(logits, before)
        assert logits._version == 0


@DOORS
@pytest.mark.parametrize(
    "saves", [torch.exp, torch.relu, torch.tanh, partial(torch.softmax, dim=-1)]
)
def test_who_saved_the_logits_finds_out(door, plain, saves):
    """An operation that needs its result for its own backward pass, before or beside the loss."""
    weight, features, labels = last_layer()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        door(saves(F.linear(features, weight)), labels).backward()
    logits = F.linear(features, weight)
    other = (logits * logits).sum()  # saves the logits themselves
    (door(logits, labels) * 2.0).backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()


def test_who_saved_the_logits_of_the_sum_finds_out_at_once():
    """They are gone before its backward pass."""
    weight, features, labels = last_layer()
    logits = F.linear(features, weight)
    other = (logits * logits).sum()
    total(logits, labels)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()


@DOORS
def test_soft_capped_logits(device, door, plain):
    """Nothing needs the product itself: 5 tanh(x / 5) is written over."""
    weight, features, labels = last_layer(device=device)
    grads = [
        torch.autograd.grad(
            loss(5.0 * torch.tanh(F.linear(features, weight) / 5.0), labels), weight
        )[0]
        for loss in (plain, door)
    ]
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-5, atol=1e-6)


@DOORS
def test_logits_changed_before_backward(door, plain):
    weight, features, labels = last_layer()
    for change in (lambda x, y: x.add_(1.0), lambda x, y: y.zero_()):
        logits, known = F.linear(features, weight), labels.clone()
        loss = door(logits, known)
        if door is total and change(torch.zeros(1), known) is known:
            continue  # the labels have served
        with torch.no_grad():
            change(logits, known)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@DOORS
@pytest.mark.parametrize("factor", [1.0, 2.0])
def test_second_backward_raises(door, plain, factor):
    weight, features, labels = last_layer()
    loss = door(F.linear(features, weight), labels) * factor
    (first,) = torch.autograd.grad(loss, weight, retain_graph=True)
    kept = first.clone()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, weight)
    assert torch.equal(first, kept)


@DOORS
def test_double_backward_raises(door, plain):
    weight, features, labels = last_layer()
    logits = F.linear(features, weight)
    loss = door(logits, labels)
    before = logits.detach().clone()
    with pytest.raises(RuntimeError, match="create_graph: expected False, found True"):
        torch.autograd.grad(loss, weight, create_graph=True)
    assert torch.equal(logits, before)


@DOORS
def test_what_may_not_be_written_is_refused(device, door, plain):
    """A leaf would lose its values; of other strides the gradient would need memory of its own."""
    _, _, labels = last_layer(device=device)
    leaf = values((9, 7), torch.float32, device).requires_grad_()
    work = leaf * 1.0
    refused = {
        "a leaf": (leaf, labels),
        "or a view of one": (leaf.view(9, 7), labels),
        "leaf": (leaf[:4], labels[:4]),
        "contiguous": ((leaf * 1.0)[:, ::2], labels.clamp(max=3)),
        "labels to ignore_index": (work.t().contiguous().t(), labels),
    }
    for words, (logits, known) in refused.items():
        before = logits.detach().clone()
        with pytest.raises(ValueError, match=f"logits: expected .*{words}"):
            door(logits, known)
        assert torch.equal(logits.detach(), before)
    door(work[2:5], labels[2:5]).backward()  # a contiguous part of a result is its own
    assert not leaf.grad[[0, 1, 5, 8]].any()
    assert leaf.grad[2:5].any()
    assert work[:2].detach().equal(leaf[:2].detach())


@DOORS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_bad_input_writes_nothing(door, plain, dtype):
    leaf = torch.randn(4, 3, dtype=dtype, requires_grad=True)
    labels = torch.tensor([0, 1, 2, 0])
    for argument, call in {
        "labels": lambda x: door(x, labels + 1),
        "temperature": lambda x: door(x, labels, -0.5),
        "floor": lambda x: door(x, labels, floor=0.0),
        "logits": lambda x: door(x[0], labels),
    }.items():
        work = leaf * 1.0
        with pytest.raises((ValueError, RuntimeError), match=f"^{argument}: expected .*found"):
            call(work)
        assert torch.equal(work, leaf)
        assert work._version == 0


@DOORS
def test_compile(device, door, plain):
    """Compiled, nothing is written, whatever needs the logits; the results are those of the plain
    loss.
    """
    weight, features, labels = last_layer(device=device)

    def step(weight, act):
        logits = act(F.linear(features, weight))
        return -2.0 * door(logits, labels), logits.argmax(1)

    for act in (torch.relu, torch.neg):
        (wanted,) = torch.autograd.grad(
            -2.0 * plain(act(F.linear(features, weight)), labels), weight
        )
        torch._dynamo.reset()
        loss, top = torch.compile(step, fullgraph=True, backend="aot_eager")(weight, act)
        (got,) = torch.autograd.grad(loss, weight)
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
        assert torch.equal(top, act(F.linear(features, weight)).argmax(1))
    torch._dynamo.reset()
    # the model compiled, the loss not
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        door(
            torch.compile(lambda w: F.linear(features, w).exp(), backend="aot_eager")(weight),
            labels,
        ).backward()


@DOORS
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_and_saved_tensor_hooks(device, door, plain, reentrant):
    """Recomputed or unpacked, the logits that are written are others; the gradient is the same."""
    weight, features, labels = last_layer(device=device)
    (wanted,) = torch.autograd.grad(plain(F.linear(features, weight), labels), weight)
    checkpoint(
        lambda w: door(F.linear(features, w), labels), weight, use_reentrant=reentrant
    ).backward()
    torch.testing.assert_close(weight.grad, wanted, rtol=1e-5, atol=1e-6)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t.clone()):
        loss = door(F.linear(features, weight), labels)
    for _ in range(2):
        (got,) = torch.autograd.grad(loss, weight, retain_graph=True)
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
