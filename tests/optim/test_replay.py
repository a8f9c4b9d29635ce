"""Steps that call their ops again as prepared before: whatever is changed between two steps, the
outcome is that of steps which prepare all anew, and what those refuse is refused.
"""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

from sfron_fast import SaliencyMask, SFRonAdamW, SFRonSGD
from sfron_fast.ops import native

needs_native = pytest.mark.skipif(not native.available(), reason="no compiled kernels here")
pytestmark = needs_native
EXACT = {"rtol": 0.0, "atol": 0.0, "equal_nan": True}
SHAPES = {"a": (8, 6), "b": (70,), "c": (3, 4, 5), "d": ()}
KINDS = {
    "sgd": (SFRonSGD, {"momentum": 0.9}),
    "plain-sgd": (SFRonSGD, {}),
    "adamw": (SFRonAdamW, {}),
    "separate": (SFRonAdamW, {"moments": "separate", "clip_retain": True}),
}


class Run:
    """An optimizer and its gradients; ``anew`` forgets what was prepared before every step."""

    def __init__(self, kind, *, anew, masked=True, groups=1, names="abcd"):
        torch.manual_seed(0)
        self.anew = anew
        self.params = {n: nn.Parameter(torch.randn(SHAPES[n])) for n in names}
        bits = {n: torch.rand(SHAPES[n]) < 0.5 for n in names}
        self.mask = SaliencyMask.from_bool(bits)
        make, settings = KINDS[kind]
        named = list(self.params.items())
        given = named if groups == 1 else [{"params": named[:2]}, {"params": named[2:], "lr": 0.02}]
        self.optimizer = make(
            given,
            lr=0.01,
            weight_decay=0.1,
            slow_lr=0.5,
            retain_steps=2,
            max_norm=1.0,
            saliency=self.mask if masked else None,
            **settings,
        )

    def set_gradients(self):
        for p in self.params.values():
            p.grad = torch.randn_like(p)

    def one(self, call):
        if self.anew:
            self.optimizer._replays.clear()
        call()

    def cycle(self):
        self.set_gradients()
        self.one(self.optimizer.forget_step)
        for _ in range(2):
            self.set_gradients()
            self.one(self.optimizer.step)

    def outcome(self):
        entries = [t for state in self.optimizer.state.values() for t in state.values()]
        hidden = ("params", "param_names")
        settings = [
            {k: v for k, v in group.items() if k not in hidden}
            for group in self.optimizer.param_groups
        ]
        weights = [p.detach() for p in self.params.values()]
        versions = [p._version for p in self.params.values()]  # for autograd
        return weights, entries, (self.optimizer.skipped_steps, versions, settings)


def both(change, kind="adamw", **how):
    """Three cycles, the change, and two more, prepared anew and replayed."""
    ends = []
    for anew in (True, False):
        run = Run(kind, anew=anew, **how)
        for _ in range(3):
            run.cycle()
        assert anew or set(run.optimizer._replays) == {(True, 0), (False, 2), (False, 1)}
        torch.manual_seed(1)
        change(run)
        for _ in range(2):
            run.cycle()
        ends.append(run)
    anew, again = (run.outcome() for run in ends)
    for ours, theirs in zip(again[:2], anew[:2], strict=True):
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, **EXACT)
    assert again[2] == anew[2]
    torch.testing.assert_close(*(run.optimizer.grad_norm for run in ends), **EXACT)


def group(run):
    return run.optimizer.param_groups[-1]


def setting(**values):
    return lambda run: group(run).update(values)


def load_scaled(run):
    state = run.optimizer.state_dict()
    for entries in state["state"].values():
        for key in ("exp_avg", "momentum_buffer"):
            if key in entries:
                entries[key].mul_(3.0)
    run.optimizer.load_state_dict(state)


def replace_entry(run):
    for state in run.optimizer.state.values():
        for key in state:
            state[key] = state[key] * 2.0


def lose_entry(run):
    run.optimizer.state[run.params["b"]].clear()


def lose_state(run):
    del run.optimizer.state[run.params["b"]]


def edit_entries(run):
    for state in run.optimizer.state.values():
        for entry in state.values():
            entry.add_(1.0)


def other_memory(run):
    for p in run.params.values():
        p.data = p.detach().clone() + 1.0


def other_parameter(run):
    old = run.params["a"]
    new = run.params["a"] = nn.Parameter(old.detach() + 1.0)
    params = run.optimizer.param_groups[0]["params"]
    params[[p is old for p in params].index(True)] = new


def shorter_group(run):
    group(run)["params"].pop()
    group(run)["param_names"].pop()


def more_groups(run):
    extra = run.params["e"] = nn.Parameter(torch.ones(9))
    run.optimizer.add_param_group({"params": [("e", extra)], "masked": False})


def edit_mask(run):
    run.mask["b"].bitwise_not_()
    run.mask["b"][-1] &= 0x3F  # 70 weights: the bits behind them stay 0


def other_mask(run):
    bits = {n: torch.rand(p.shape) < 0.3 for n, p in run.params.items()}
    run.optimizer.saliency = SaliencyMask.from_bool(bits)


def frozen(run):
    run.params["a"].requires_grad_(False)


def some_gradients(run):
    original = run.set_gradients

    def fewer():
        original()
        run.params["b"].grad = None

    run.set_gradients = fewer


def odd_gradients(run):
    original = run.set_gradients

    def strided():
        original()
        run.params["a"].grad = torch.randn(6, 8).T

    run.set_gradients = strided


def infinite_gradients(run):
    original = run.set_gradients

    def infinite():
        original()
        run.params["a"].grad[0, 0] = float("inf")

    run.set_gradients = infinite


def narrow(run):
    for p in run.params.values():
        p.data = p.detach().bfloat16()
    run.optimizer.load_state_dict(run.optimizer.state_dict())


def channels_last(run):
    p = run.params["a"]
    p.data = p.detach().T.contiguous().T


def scaled(run):
    run.optimizer.grad_scale = torch.tensor(4.0)


def overflow(run):
    run.optimizer.found_inf = torch.tensor(1.0)


def hook(run):
    def double(optimizer, *unused):
        for p in optimizer.param_groups[0]["params"]:
            p.grad.mul_(2.0)

    run.optimizer.register_step_pre_hook(double)


def copied(run):
    run.params, run.optimizer = copy.deepcopy((run.params, run.optimizer))


def pickled(run):
    run.params, run.optimizer = pickle.loads(pickle.dumps((run.params, run.optimizer)))


CHANGES = {
    "nothing": lambda run: None,
    "lr": setting(lr=0.5),
    "lr tensor": setting(lr=torch.tensor(0.5)),
    "lr zero": setting(lr=0.0),
    "forget_lr": setting(forget_lr=0.5),
    "weight_decay": setting(weight_decay=0.5),
    "slow_lr": setting(slow_lr=0.25),
    "slow_lr one": setting(slow_lr=1.0),
    "max_norm": setting(max_norm=0.1),
    "max_norm none": setting(max_norm=None),
    "clip_retain": setting(clip_retain=True),
    "maximize": setting(maximize=True),
    "moments": setting(moments="none"),
    "mask_semantics": setting(mask_semantics="update"),
    "load": load_scaled,
    "replace": replace_entry,
    "lose": lose_entry,
    "lose all": lose_state,
    "edit": edit_entries,
    "memory": other_memory,
    "frozen": frozen,
    "edit mask": edit_mask,
    "other mask": other_mask,
    "some": some_gradients,
    "strides": odd_gradients,
    "inf": infinite_gradients,
    "channels last": channels_last,
    "grad_scale": scaled,
    "found_inf": overflow,
    "hook": hook,
    "deepcopy": copied,
    "pickle": pickled,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CHANGES)
def test_a_change_between_steps_counts(name, kind):
    both(CHANGES[name], kind)


@pytest.mark.parametrize(
    "name", ["nothing", "lr", "replace", "lose", "memory", "some", "edit mask"]
)
@pytest.mark.parametrize("how", [{"groups": 2}, {"names": "a"}], ids=["two groups", "one weight"])
def test_of_other_lists(how, name):
    if how.get("names") == "a" and name in ("lose", "some", "edit mask"):
        pytest.skip("these are of b")
    both(CHANGES[name], **how)


@pytest.mark.parametrize("change", [other_parameter, shorter_group, more_groups, narrow])
def test_of_other_parameters(change):
    both(change, masked=False)


def test_betas():
    both(setting(betas=(0.5, 0.9)))
    run = Run("adamw", anew=False)
    group(run)["betas"] = [0.9, 0.999]  # may be changed where it is
    run.cycle(), run.cycle()
    assert not run.optimizer._replays


def test_a_schedule_of_the_learning_rate_is_replayed():
    ends = []
    for anew in (True, False):
        run = Run("adamw", anew=anew)
        schedule = torch.optim.lr_scheduler.ExponentialLR(run.optimizer, 0.9)
        prepared = []
        for _ in range(5):
            run.cycle()
            prepared.append(dict(run.optimizer._replays))
            schedule.step()
        assert anew or prepared[-1] == prepared[-2]
        ends.append(run.outcome()[0])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_gradients_are_not_kept():
    import weakref

    run = Run("adamw", anew=False)
    for _ in range(3):
        run.cycle()
    kept = [weakref.ref(p.grad) for p in run.params.values()]
    run.optimizer.zero_grad()
    assert not any(ref() is not None for ref in kept)


BAD = {
    "nan lr": (setting(lr=float("nan")), "lr"),
    "negative lr": (setting(lr=-1.0), "lr"),
    "text": (setting(lr="fast"), "lr"),
    "max_norm": (setting(max_norm=-1.0), "max_norm"),
    "names": (lambda run: group(run)["param_names"].pop(), "params"),
    "mask": (lambda run: run.mask["b"][-1].fill_(255), "bits"),
}


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("name", BAD)
def test_what_is_refused_stays_refused(name, groups):
    """Of two groups in the second, before the first is stepped."""
    change, word = BAD[name]
    said = []
    for anew in (True, False):
        run = Run("adamw", anew=anew, groups=groups)
        for _ in range(3):
            run.cycle()
        change(run)
        run.set_gradients()
        before = [p.detach().clone() for p in run.params.values()]
        with pytest.raises((ValueError, RuntimeError), match=word) as refusal:
            run.one(run.optimizer.forget_step)
        said.append(str(refusal.value))
        assert all(torch.equal(a, b) for a, b in zip(before, run.params.values(), strict=True))
    assert said[0] == said[1]


def half(run):
    last = run.params["d"]
    last.data = last.detach().half()


def half_state(run):
    entry = run.optimizer.state[run.params["d"]]["exp_avg"]
    entry.data = entry.half()


@pytest.mark.parametrize(
    ("change", "how"),
    [(half, {}), (half, {"groups": 2}), (half_state, {"groups": 2, "names": "abd"})],
)
def test_what_was_converted_is_refused_before_anything_is_written(change, how):
    """Of the second group only: the first has not been stepped by then."""
    said = []
    for anew in (True, False):
        run = Run("adamw", anew=anew, masked=False, **how)
        for _ in range(3):
            run.cycle()
        change(run)
        run.set_gradients()
        before = [p.detach().clone() for p in run.params.values()]
        with pytest.raises(ValueError, match="load_state_dict") as refusal:
            run.one(run.optimizer.forget_step)
        said.append(str(refusal.value))
        assert all(torch.equal(a, b) for a, b in zip(before, run.params.values(), strict=True))
    assert said[0] == said[1]


def test_a_step_without_gradients_warns():
    run = Run("adamw", anew=False)
    for _ in range(3):
        run.cycle()
    run.optimizer.zero_grad()
    with pytest.warns(RuntimeWarning, match="no gradients"):
        run.optimizer.forget_step()


def test_skipped_steps_are_counted_and_told():
    run = Run("adamw", anew=False)
    for _ in range(3):
        run.cycle()
    infinite_gradients(run)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(45):
            run.set_gradients()
            run.optimizer.forget_step()
            for settings in run.optimizer.param_groups:
                settings["retain_pending"] = 0
    assert run.optimizer.skipped_steps == 45
    assert sum("changed nothing" in str(w.message) for w in told) == 1


def test_an_optimizer_of_ones_own_is_asked_every_time():
    seen = []

    class Own(SFRonAdamW):
        def update(self, batch, step):
            seen.append(step.forget)
            super().update(batch, step)

    weight = nn.Parameter(torch.ones(5))
    optimizer = Own([weight])
    for _ in range(6):
        weight.grad = torch.ones(5)
        optimizer.step()
    assert seen == [False] * 6


def test_under_a_mode_the_ops_are_seen():
    from torch.utils._python_dispatch import TorchDispatchMode

    names = []

    class Look(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            names.append(str(function))
            return function(*args, **(kwargs or {}))

    run = Run("adamw", anew=False)
    for _ in range(3):
        run.cycle()
    run.set_gradients()
    with Look():
        run.optimizer.forget_step()
    assert any("adamw_step_" in name for name in names)
