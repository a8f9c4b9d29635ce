"""Faults that fuzzing found, each by itself: what is refused is refused whole, what is accepted is
right.
"""

import numpy
import pytest
import torch
from cases import Case
from judging import assert_matches_reference, assert_same_bits
from models import gradients, parameters, run
from torch import nn

from sfron_fast import SFRonAdamW, SFRonSGD, functional, step_in_backward
from sfron_fast.ops import registry as ops

BOTH = pytest.mark.parametrize("kind", [SFRonSGD, SFRonAdamW])
STEP = {
    "lr": 0.1,
    "momentum": 0.9,
    "dampening": 0.0,
    "weight_decay": 0.0,
    "nesterov": False,
    "maximize": False,
    "first": False,
    "freeze_masked": False,
    "max_norm": 1.0,
    "slow_lr": 1.0,
}


def ones(*shapes, dtype=torch.float32):
    return [torch.ones(s, dtype=dtype) for s in shapes]


def sgd_case(params, grads, buffers, **scalars):
    lists = ("scales", "steps", "corrections", "slow_save", "slow_save_corrections", "slow_from")
    empty = {name: [] for name in (*lists, "slow_from_corrections", "masks")}
    rest = {"norm": None, "grad_scale": None, "found_inf": None, **scalars}
    return Case(
        {"params": params, "grads": grads, "momentum_buffers": buffers, **empty, **rest}, dict(STEP)
    )


@pytest.mark.parametrize("where", ["params", "momentum_buffers"])
def test_an_expanded_tensor_is_refused_before_the_others_are_written(where):
    """torch says so too, but from the copy back, when the tensors before it are done."""
    lists = {"params": ones(3, 4), "momentum_buffers": ones(3, 4)}
    lists[where][1] = torch.ones(()).expand(4)
    with pytest.raises(
        ValueError, match=rf"{where}\[1\]: expected a tensor to write to, found an expanded one"
    ):
        functional.sgd_step_(
            lists["params"], ones(3, 4), lists["momentum_buffers"], lr=0.1, momentum=0.9
        )
    assert all(bool((t == 1).all()) for tensors in lists.values() for t in tensors)
    read = ones(3)
    functional.sgd_step_(read, [torch.ones(()).expand(3)], lr=0.25)
    assert read[0].tolist() == [0.75] * 3
    # strides of nothing say nothing
    functional.sgd_step_([torch.ones(0, 2).t()], [torch.ones(2, 0)], lr=0.25)


def test_a_copied_tensor_given_twice_is_refused():
    """Each copy would be updated once, and the last would win."""
    fast = torch.ones(4, 2)[:, 0]
    with pytest.raises(
        ValueError, match="slow: expected each tensor once, found one of them twice"
    ):
        functional.interpolate_([fast, fast], ones(4, 4), 0.5)
    assert fast.tolist() == [1.0] * 4


@BOTH
def test_a_parameter_twice_in_a_group_is_refused(kind):
    """torch only warns, and updates it twice; here its two states would be one."""
    weight = nn.Parameter(torch.ones(3))
    with (
        pytest.warns(UserWarning, match="duplicate parameters"),
        pytest.raises(ValueError, match="params: expected each parameter once"),
    ):
        kind([weight, weight])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["norm", "grad_scale", "found_inf"])
def test_scalars_of_shape_1_serve_parameters_without_dimensions(dtype, name):
    case = sgd_case(
        ones((), dtype=dtype), ones((), dtype=dtype), ones((), dtype=dtype), **{name: torch.ones(1)}
    )
    assert_matches_reference("sgd_step_", case, ops.default_kernel("sgd_step_"))
    functional.masked_grad_norm(ones((), dtype=dtype), grad_scale=torch.ones(1))


def test_gradients_in_a_graph_do_not_pull_the_weights_into_it():
    """fp64 runs the reference, which is plain torch: it must not record."""
    source = torch.ones(3, dtype=torch.float64, requires_grad=True)
    params, buffers = ones(3, dtype=torch.float64), ones(3, dtype=torch.float64)
    scale = torch.ones((), requires_grad=True)
    functional.sgd_step_(params, [source * 2], buffers, lr=0.1, momentum=0.9, grad_scale=scale)
    assert not params[0].requires_grad
    assert not buffers[0].requires_grad


def test_a_clip_beyond_fp32_does_not_clip():
    """The reference refused it in the middle of a step; the kernels took it for inf."""
    for dtype in (torch.float32, torch.float64):
        params = ones(3, dtype=dtype)
        functional.sgd_step_(
            params, ones(3, dtype=dtype), lr=0.25, norm=torch.tensor(3.0), max_norm=1e39
        )
        assert params[0].tolist() == [0.75] * 3


@pytest.mark.parametrize(
    ("op", "flat", "scalars"),
    [
        ("interpolate_", "fast", {"slow_lr": 0.25}),
        ("fisher_accumulate_", "fisher", {"weight": 2.0}),
        ("saliency_mask", "retain", {"threshold": 0.5, "eps": 0.0}),
    ],
)
def test_reference_and_kernel_agree_on_flat_lists(op, flat, scalars):
    """The kernels took them for any list measured by another; the reference did not."""
    names = {"interpolate_": ["slow", "fast"], "fisher_accumulate_": ["fisher", "grads"]}.get(
        op, ["forget", "retain"]
    )
    case = Case(
        {n: [torch.rand(128)] if n == flat else [torch.rand(64), torch.rand(40)] for n in names},
        scalars,
    )
    twin = case.clone()
    assert_matches_reference(op, case, getattr(functional, op))
    assert_matches_reference(op, twin, ops.default_kernel(op))


@pytest.mark.parametrize("bad", [None, 3.0, torch.ones(3).to_sparse()])
def test_what_is_no_dense_tensor_is_named(bad):
    for lists in ([bad, torch.ones(3)], [torch.ones(3), bad]):
        with pytest.raises(
            (ValueError, RuntimeError), match=r"slow(\[\d\])?: expected|Expected a value of type"
        ):
            functional.interpolate_(lists, ones(3, 3), 0.5)
    with pytest.raises(ValueError, match=r"fisher\[0\]: expected a dense tensor"):
        functional.fisher_accumulate_([torch.ones(3).to_sparse()], ones(3), 1.0)
    with pytest.raises(ValueError, match=r"lr: expected a number in .*found 'fast'"):
        functional.sgd_step_(ones(3), ones(3), lr="fast")


# --- several groups: one op each, so a refusal by the second came when the first had written ------


def spoil_lr(optimizer, params):
    optimizer.param_groups[1]["lr"] = float("nan")


def spoil_gradient(optimizer, params):
    params["e"].grad = params["e"].grad.to_sparse()


def spoil_amp(optimizer, params):
    optimizer.grad_scale = 8.0


@BOTH
@pytest.mark.parametrize("started", [False, True])
@pytest.mark.parametrize("spoil", [spoil_lr, spoil_gradient, spoil_amp])
@pytest.mark.parametrize("forget", [False, True])
def test_groups_are_refused_together(kind, forget, spoil, started):
    params = parameters(torch.float32)
    groups = [{"params": [(n, params[n]) for n in names]} for names in ("abcd", "e")]
    settings = {"momentum": 0.9, "dampening": 0.5} if kind is SFRonSGD else {}
    optimizer = kind(groups, slow_lr=0.5, **settings)
    if started:
        run(optimizer, params, gradients(2, torch.float32), 1)
    for name, grad in gradients(1, torch.float32, seed=7)[0].items():
        params[name].grad = grad
    before = {n: p.detach().clone() for n, p in params.items()}
    state = {
        n: {k: v.clone() for k, v in optimizer.state.get(p, {}).items()} for n, p in params.items()
    }
    spoil(optimizer, params)
    with pytest.raises(
        (ValueError, RuntimeError), match=r"(lr|grads\[\d\]|grad_scale): expected .*found"
    ):
        (optimizer.forget_step if forget else optimizer.step)()
    for name, param in params.items():
        assert_same_bits(param.detach(), before[name], name)
        now = optimizer.state.get(param, {})
        # also no state made: a buffer of zeros is no fresh one
        assert now.keys() == state[name].keys(), name
        for key, value in now.items():
            assert_same_bits(value, state[name][key], key)
    assert optimizer.skipped_steps == 0
    assert not optimizer.mid_cycle


def put_state(change, key=None):
    """Spoil an entry of the last parameter's state: its last, or that of a key."""

    def spoil(optimizer, param):
        state = optimizer.state[param]
        name = key or next(reversed(state))
        state[name] = change(state[name])

    return spoil


def convert(optimizer, param):
    param.data = param.data.bfloat16()
    param.grad = None if param.grad is None else torch.ones_like(param)


def expand(optimizer, param):
    param.data = torch.zeros(()).expand(11, 3)


def put_lr(value):
    return lambda optimizer, param: optimizer.param_groups[1].update(lr=value)


LATER = {
    "converted": (convert, "slow"),
    "fp16": (put_state(lambda t: t.half()), r"\w+"),
    "shape": (put_state(lambda t: torch.zeros(2)), r"\w+"),
    "number": (put_state(lambda t: 0.0), r"\w+"),
    "sparse": (put_state(lambda t: torch.eye(3).to_sparse()), r"\w+"),
    "expanded state": (put_state(lambda t: torch.zeros(()).expand(11, 3), "slow"), "slow"),
    "slow": (put_state(lambda t: t.bfloat16(), "slow"), "slow"),
    "expanded": (expand, "params"),
    "two rates": (put_lr(torch.ones(2)), "lr"),
    "negative rate": (put_lr(torch.tensor(-1.0)), "lr"),
}


@BOTH
@pytest.mark.parametrize("way", LATER)
@pytest.mark.parametrize("how", ["forget", "step", "inside", "no gradient"])
def test_what_a_later_op_would_refuse_is_found_before_the_first_writes(kind, way, how):
    """Tried twice, as a caller that catches the error would: each try moved the first group."""
    spoil, argument = LATER[way]
    first, last = (nn.Parameter(torch.ones(s)) for s in ((4, 2), (11, 3)))
    knobs = {"momentum": 0.9} if kind is SFRonSGD else {"amsgrad": True}
    optimizer = kind(
        [{"params": [first]}, {"params": [last]}], lr=0.1, slow_lr=0.5, retain_steps=2, **knobs
    )

    def backward():
        optimizer.zero_grad()
        first.sum().backward()
        last.sum().backward()

    for phase in (optimizer.forget_step, optimizer.step, optimizer.step)[
        : 3 if how == "forget" else 2
    ]:
        backward()
        phase()
    if how == "no gradient":  # its slow weights are set all the same
        if not argument.startswith("slow"):
            return
        last.grad = None
    spoil(optimizer, last)
    if how == "inside":
        optimizer.zero_grad()
    before = [first.detach().clone(), *(v.clone() for v in optimizer.state[first].values())]

    def inside():
        with step_in_backward(optimizer):
            first.sum().backward()

    attempt = {"inside": inside, "forget": optimizer.forget_step}.get(how, optimizer.step)
    for _ in range(2):
        with pytest.raises(
            (ValueError, RuntimeError), match=rf"^{argument}(\[\d\])?: expected .*found"
        ):
            attempt()
        assert all(map(torch.equal, before, [first.detach(), *optimizer.state[first].values()]))
    assert optimizer.mid_cycle == (how != "forget")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_converted_model_is_refused_with_a_remedy_that_works(dtype):
    """One group too, where the op itself refuses."""
    model = nn.Linear(3, 2)
    optimizer = SFRonAdamW(model.parameters(), slow_lr=0.5)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.forget_step()
    optimizer.step()
    model.to(dtype)
    with pytest.raises(
        ValueError, match=r"slow\[0\]: expected dtype .* found torch.float32; .*load_state_dict"
    ):
        optimizer.forget_step()
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.forget_step()
    assert {v.dtype for s in optimizer.state.values() for k, v in s.items() if k != "step"} == {
        dtype
    }


@BOTH
@pytest.mark.parametrize("several", [False, True])
def test_state_follows_a_new_state_dtype(kind, several):
    """Values are those of a run that was loaded in the new dtype; nothing of the old state is left
    in use.
    """
    names = ["abcd", "e"] if several else ["abcde"]
    knobs = {"momentum": 0.9} if kind is SFRonSGD else {"amsgrad": True}
    found = []
    for reload in (False, True):
        params = parameters(torch.float32)
        optimizer = kind(
            [{"params": [(n, params[n]) for n in part]} for part in names], slow_lr=0.5, **knobs
        )
        run(optimizer, params, gradients(2, torch.float32), 1)
        for group in optimizer.param_groups:
            group["state_dtype"] = torch.bfloat16
        if reload:
            optimizer.load_state_dict(optimizer.state_dict())
        run(optimizer, params, gradients(2, torch.float32, seed=3), 1)
        found.append({n: {"": p.detach(), **optimizer.state[p]} for n, p in params.items()})
    for name, state in found[0].items():
        for key, value in state.items():
            assert_same_bits(value, found[1][name][key], key)
            assert (value.dtype == torch.bfloat16) == (key not in ("", "step", "slow"))


@BOTH
def test_params_as_a_tuple_and_numpys_numbers(kind, tmp_path):
    """As torch takes them; a file of the state is readable with weights_only."""
    params = parameters(torch.float32)
    own = (
        {"momentum": numpy.float32(0.5)}
        if kind is SFRonSGD
        else {"betas": (numpy.float64(0.5), 0.9)}
    )
    numbers = {
        "lr": numpy.float64(0.5),
        "retain_steps": numpy.int64(2),
        "slow_lr": numpy.float32(0.5),
        **own,
    }
    optimizer = kind(params.items(), **numbers)
    optimizer.param_groups[0]["params"] = tuple(optimizer.param_groups[0]["params"])
    run(optimizer, params, gradients(3, torch.float32), 2)
    assert not optimizer.mid_cycle
    optimizer.param_groups[0]["weight_decay"] = numpy.float64(0.25)
    torch.save(optimizer.state_dict(), tmp_path / "state")
    saved = torch.load(tmp_path / "state", weights_only=True)["param_groups"][0]
    assert (saved["lr"], saved["retain_steps"], saved["weight_decay"]) == (0.5, 2, 0.25)
    with pytest.raises(ValueError, match="retain_steps: expected an integer >= 1, found 0"):
        kind(params.items(), retain_steps=numpy.int64(0))


@BOTH
def test_settings_changed_between_steps_are_checked(kind):
    """torch's own way to change one is to write it into the group."""
    params = parameters(torch.float32)
    optimizer = kind(params.items())
    run(optimizer, params, gradients(2, torch.float32), 1)
    for name, bad in {
        "moments": "both",
        "mask_semantics": "weights",
        "max_norm": -1.0,
        "lr": None,
    }.items():
        good = optimizer.param_groups[0][name]
        optimizer.param_groups[0][name] = bad
        with pytest.raises(ValueError, match=f"{name}: expected"):
            optimizer.step()
        optimizer.param_groups[0][name] = good
    optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("bad", "found"),
    [
        (1.0, "float"),
        (torch.ones(1).to_sparse(), "sparse|other strides or none"),
    ],
)
def test_scalars_that_are_no_dense_tensor_are_refused_by_name(dtype, bad, found):
    grads, sums = ones(3, dtype=dtype), ones(3, dtype=dtype)
    calls = {
        "grad_scale": lambda: functional.masked_grad_norm(grads, grad_scale=bad),
        "numbers": lambda: functional.fisher_accumulate_(sums, grads, 1.0, numbers=bad),
        "norm": lambda: functional.sgd_step_(sums, grads, lr=0.1, norm=bad, max_norm=1.0),
        "skipped": lambda: functional.sgd_step_(sums, grads, lr=0.1, skipped=bad),
    }
    for name, call in calls.items():
        told = rf"{name}: expected .*found .*({found})|argument '{name}' but instead found type"
        with pytest.raises((ValueError, RuntimeError), match=told):
            call()
    assert sums[0].tolist() == [1.0] * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_adamw_wants_both_moments(dtype):
    lists = {"exp_avgs": ones(3, 4, dtype=dtype), "exp_avg_sqs": ones(3, 4, dtype=dtype)}
    settings = {"lr": 0.1, "beta1": 0.9, "beta2": 0.9, "eps": 0.1, "weight_decay": 0.0}
    for name in lists:
        moments = {**lists, name: []}
        params = ones(3, 4, dtype=dtype)
        with pytest.raises(ValueError, match=f"{name}: expected 2 tensors, found 0"):
            functional.adamw_step_(
                params, ones(3, 4, dtype=dtype), **moments, steps=ones((), ()), **settings
            )
        assert params[0].tolist() == [1.0] * 3


def test_a_norm_of_nothing_takes_no_masks():
    assert functional.masked_grad_norm([], grad_scale=torch.ones(())).item() == 0.0
    with pytest.raises(ValueError, match="masks: expected 0 tensors, found 1"):
        functional.masked_grad_norm([], [torch.ones(1, dtype=torch.uint8)])


def test_a_negated_accumulator_is_refused():
    negated = torch.complex(torch.zeros(2, 2), -torch.ones(2, 2)).conj().imag
    with pytest.raises(ValueError, match=r"accumulator: expected .*found a negated view; clone it"):
        functional.sample_square_accumulate_(negated, torch.ones(3, 2), torch.ones(3, 2))
    assert negated.tolist() == [[1.0, 1.0]] * 2


@BOTH
def test_state_that_an_idle_parameter_ends_its_cycle_with_is_looked_at(kind):
    """No op does: its slow weights are blended without one."""
    moving, idle = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = kind([moving, idle], slow_lr=0.5)
    for p in (moving, idle):
        p.grad = torch.ones(3)
    optimizer.forget_step()
    idle.grad = None
    optimizer.state[idle]["slow"] = 0.0
    before = moving.detach().clone()
    with pytest.raises(ValueError, match=r"slow\[0\]: expected a tensor, found float"):
        optimizer.step()
    assert_same_bits(moving.detach(), before, "moving")


@BOTH
def test_state_is_not_made_by_settings_that_are_wrong(kind):
    """Nor by the idle step with which torch.distributed.checkpoint asks for it."""
    weight = nn.Parameter(torch.ones(3))
    optimizer = kind([weight], lr=0.0)
    optimizer.param_groups[0]["slow_device"] = "cuda"
    weight.grad = torch.zeros(3)
    for call in (optimizer.init_state, optimizer.step):
        with pytest.raises(ValueError, match="slow_device: expected None or 'cpu', found 'cuda'"):
            call()
    assert not optimizer.state


@BOTH
def test_state_is_looked_at_before_it_is_reordered(kind):
    """As that of a weight that is not row-major is for the op, which would look."""
    weight = nn.Parameter(torch.ones(3, 4).t())
    optimizer = kind([weight], **({"momentum": 0.9} if kind is SFRonSGD else {}))
    weight.grad = torch.ones(3, 4).t()
    optimizer.step()
    key = next(iter(set(optimizer.state[weight]) - {"step"}))
    optimizer.state[weight][key] = 0.0
    before = weight.detach().clone()
    with pytest.raises(ValueError, match=rf"{key}\[0\]: expected a tensor, found float"):
        optimizer.step()
    assert_same_bits(weight.detach(), before, "weight")
