"""Random optimizers: groups, masks, knobs and the steps to take with them."""

import copy
import io
import pickle
from dataclasses import dataclass
from typing import Any

import torch
from fuzz_lists import DTYPES, KINDS, LAYOUT_NAMES, SHAPES, laid_out, numbers, scalar
from hypothesis import strategies as st
from judging import assert_same_bits
from obvious import Obvious
from torch import Tensor, nn

from sfron_fast import SaliencyMask, SFRonAdamW, SFRonSGD
from sfron_fast.optim.elsewhere import settle

RATES = st.sampled_from([0.0, 1e-6, 0.01, 0.3, 2.0])
RESTS = st.sampled_from([0.0, 0.4, 0.9, 0.999])


@dataclass
class Subject:
    """An optimizer, its parameters by name, and the model it has to equal."""

    kind: type
    groups: list[dict[str, Any]]
    params: dict[str, nn.Parameter]
    saliency: SaliencyMask | None
    optimizer: Any
    model: Obvious

    def make(self, **changes: Any) -> Any:
        """An optimizer of the same parameters and settings, without state."""
        groups = [
            {**g, **changes, "params": [(n, self.params[n]) for n in g["names"]]}
            for g in self.groups
        ]
        groups = [{k: v for k, v in g.items() if k != "names"} for g in groups]
        return self.kind(groups, saliency=self.saliency)

    def step(self, forget: bool, grads: dict[str, Tensor | None]) -> None:
        for name, param in self.params.items():
            put_gradient(param, grads[name])
        self.optimizer.forget_step() if forget else self.optimizer.step()

    def check(self) -> None:
        """Everything the optimizer keeps has the model's bits."""
        optimizer, model = self.optimizer, self.model
        settle(optimizer)
        for name, param in self.params.items():
            assert_same_bits(param.detach(), model.params[name], name)
            found, wanted = optimizer.state.get(param, {}), model.state.get(name, {})
            assert found.keys() == wanted.keys(), (name, found.keys(), wanted.keys())
            for key, value in wanted.items():
                assert_same_bits(found[key], value, f"{key} of {name}")
        assert optimizer.skipped_steps == model.skipped
        assert [g["retain_pending"] for g in optimizer.param_groups] == [model.pending] * len(
            self.groups
        )


def put_gradient(param: nn.Parameter, grad: Tensor | None) -> None:
    """Also one that torch would refuse."""
    param.grad = None
    try:
        param.grad = grad
    except (RuntimeError, TypeError):
        param.grad = torch.zeros_like(param)
        param.grad.data = grad


@st.composite
def subjects(draw):
    torch.manual_seed(draw(st.integers(0, 2**32)))
    kind = draw(st.sampled_from([SFRonSGD, SFRonAdamW]))
    count = draw(st.integers(1, 3))
    common = {
        "retain_steps": draw(st.integers(1, 3)),
        "clip_retain": draw(st.booleans()),
        "max_norm": draw(st.sampled_from([None, 1e-3, 1.0, 30.0])),
    }
    same = draw(st.booleans())  # groups alike but for their parameters
    params, masks, groups, frozen = {}, {}, [], set()
    saliency_wanted = draw(st.booleans())
    for index in range(count):
        dtype = draw(st.sampled_from(DTYPES))
        names = [f"p{index}.{i}" for i in range(draw(st.integers(1, 4)))]
        masked = saliency_wanted and draw(st.integers(0, 3)) > 0
        for name in names:
            shape, layout = draw(SHAPES), draw(st.sampled_from(LAYOUT_NAMES))
            own = dtype if draw(st.integers(0, 9)) else torch.float32
            params[name] = nn.Parameter(laid_out(numbers(shape, own, "normal"), layout))
            if draw(st.integers(0, 9)) == 0:
                params[name].requires_grad_(False)
                frozen.add(name)
            density = draw(st.sampled_from([0.0, 0.5, 0.5, 1.0]))
            if masked:
                masks[name] = torch.rand(shape) < density
        settings = {**groups[0]} if groups and same else {**common, **draw(group_settings(kind))}
        settings = fitting(settings, [params[name] for name in names])
        groups.append({**settings, "names": names, "masked": masked})
    saliency = SaliencyMask.from_bool(masks) if saliency_wanted else None
    model = Obvious(
        groups,
        {n: p.detach().clone() for n, p in params.items()},
        masks,
        kind is SFRonAdamW,
        frozen=frozenset(frozen),
    )
    subject = Subject(kind, groups, params, saliency, None, model)
    subject.optimizer = subject.make()
    return subject


def fitting(settings: dict[str, Any], params: list[Tensor]) -> dict[str, Any]:
    """Without what such parameters cannot have. How a narrow state is rounded depends on where its
    element lies, so they are row-major there.
    """
    dtypes, narrow = {p.dtype for p in params}, settings["state_dtype"]
    plain = all(p.is_contiguous() for p in params)
    known = {torch.float32, torch.bfloat16, *([torch.float16] if narrow == torch.int8 else [])}
    if not (plain and dtypes <= known) or (narrow == torch.int8 and settings.get("amsgrad")):
        settings = settings | {"state_dtype": None}
    if not plain or dtypes != {torch.bfloat16}:
        settings = settings | {"weight_bits": None}
    return settings


@st.composite
def group_settings(draw, kind):
    lr = draw(RATES)
    shared = {
        "lr": torch.tensor(lr, dtype=torch.float64) if draw(st.integers(0, 7)) == 0 else lr,
        "forget_lr": draw(st.one_of(st.none(), RATES)),
        "weight_decay": draw(RATES),
        "maximize": draw(st.booleans()),
        "moments": draw(st.sampled_from(["shared", "separate", "none"])),
        "mask_semantics": draw(st.sampled_from(["gradient", "update"])),
        "slow_lr": draw(st.sampled_from([1.0, 0.5, 0.1, 0.9])),
        "state_dtype": draw(st.sampled_from([None, torch.float32, torch.bfloat16, torch.int8])),
        "weight_bits": draw(st.sampled_from([None, 24, 24, 32])),
        "slow_device": draw(st.sampled_from([None, "cpu"])),
    }
    if kind is SFRonAdamW:
        return {
            **shared,
            "betas": (draw(RESTS), draw(RESTS)),
            "eps": draw(st.sampled_from([1e-8, 0.1])),
            "amsgrad": draw(st.booleans()),
            "decoupled_weight_decay": draw(st.booleans()),
        }
    momentum, dampening = draw(RESTS), draw(st.sampled_from([0.0, 0.0, 0.3]))
    nesterov = momentum > 0 and dampening == 0 and draw(st.booleans())
    return {**shared, "momentum": momentum, "dampening": dampening, "nesterov": nesterov}


@st.composite
def actions(draw, subject: Subject, complete: bool = False):
    """A step's gradients and amp scalars, and whether it is to be a forget step."""
    kind = draw(st.sampled_from(KINDS))
    missing = 0 if complete else draw(st.sampled_from([0, 0, 3, 10]))
    grads: dict[str, Tensor | None] = {}
    for name, param in subject.params.items():
        absent = not param.requires_grad or int(torch.randint(10, ())) < missing
        layout = LAYOUT_NAMES[int(torch.randint(len(LAYOUT_NAMES), ()))]
        grads[name] = None if absent else laid_out(numbers(param.shape, param.dtype, kind), layout)
    scale, found = (
        draw(st.sampled_from([None, None, None, 8.0])),
        draw(st.sampled_from([None, None, None, 0.0, 1.0])),
    )
    return grads, scalar(scale), scalar(found), draw(st.booleans())


BETWEEN = ["nothing"] * 5 + [
    "new lr",
    "reload",
    "pickle",
    "copy",
    "new settings",
    "new group",
    "new state",
    "zeros",
    "freeze",
]


def add_group(subject: Subject, rate: float) -> None:
    """Two more parameters in a group without mask; inside a cycle they join it."""
    names = [f"p{len(subject.groups)}.{i}" for i in range(2)]
    settings = {k: v for k, v in subject.groups[0].items() if k not in ("names", "masked")} | {
        "lr": rate
    }
    for name, shape in zip(names, ((3, 5), (70,)), strict=True):
        subject.params[name] = nn.Parameter(numbers(shape, torch.float32, "normal"))
        subject.model.params[name] = subject.params[name].detach().clone()
    settings = fitting(settings, [subject.params[name] for name in names])
    group = {**settings, "names": names, "masked": False}
    subject.groups.append(group)  # the model's too
    given = {k: v for k, v in group.items() if k != "names"}
    subject.optimizer.add_param_group({**given, "params": [(n, subject.params[n]) for n in names]})


def prepare(subject: Subject, before: str, rate: float) -> None:
    """What users do between steps; it must not change what the next one does (but for a new lr)."""
    if before == "new lr":
        for mine, theirs in zip(subject.optimizer.param_groups, subject.model.groups, strict=True):
            if isinstance(mine["lr"], Tensor):
                mine["lr"].fill_(rate)
            else:
                mine["lr"] = rate
            theirs["lr"] = rate
    elif before == "new settings":
        group, theirs = subject.optimizer.param_groups[-1], subject.model.groups[-1]
        for each in (group, theirs):
            each["weight_decay"] = rate
            if subject.model.pending == 0 or each["slow_lr"] < 1.0:
                each["slow_lr"] = {0.0: 0.2, 2.0: 0.7}.get(
                    rate, 0.5 if subject.model.pending else 1.0
                )
    elif before == "new group":
        add_group(subject, rate)
    elif before == "new state":  # somebody puts tensors of his own in the place of ours
        settle(subject.optimizer)
        for state in subject.optimizer.state.values():
            state.update({key: value.clone() for key, value in state.items()})
    elif before == "zeros":
        subject.optimizer.zero_grad(set_to_none=bool(rate))
    elif before == "freeze":
        for param in list(subject.params.values())[:: 2 if rate else 1]:
            param.requires_grad_(not param.requires_grad)
        subject.model.frozen = frozenset(
            n for n, p in subject.params.items() if not p.requires_grad
        )
    elif before == "reload":
        file = io.BytesIO()
        torch.save(subject.optimizer.state_dict(), file)
        file.seek(0)
        subject.optimizer = subject.make(lr=7.0)
        subject.optimizer.load_state_dict(torch.load(file, weights_only=True))
        subject.model.code_again()
    elif before in ("pickle", "copy"):
        old = subject.optimizer
        twin = pickle.loads(pickle.dumps(old)) if before == "pickle" else copy.deepcopy(old)
        copies = [p for g in twin.param_groups for p in g["params"]]
        names = [n for g in subject.groups for n in g["names"]]
        subject.params, subject.optimizer = dict(zip(names, copies, strict=True)), twin


# --- ways to spoil a step: each takes the subject and its gradients -------------------------------


def _last(name: str, value: Any):
    def spoil(subject: Subject, grads: dict[str, Tensor]) -> None:
        if name in subject.optimizer.param_groups[-1]:
            subject.optimizer.param_groups[-1][name] = value

    return spoil


def _gradient(change):
    def spoil(subject: Subject, grads: dict[str, Tensor]) -> None:
        for name in [n for n, g in grads.items() if g is not None][-1:]:
            grads[name] = change(grads[name])

    return spoil


def _amp(name: str, value: Any):
    return lambda subject, grads: setattr(subject.optimizer, name, value)


def _state(change):
    """The last entry of the last parameter that has state."""

    def spoil(subject: Subject, grads: dict[str, Tensor]) -> None:
        for state in [s for s in map(subject.optimizer.state.get, subject.params.values()) if s][
            -1:
        ]:
            key = list(state)[-1]
            state[key] = change(state[key])

    return spoil


def _complex(subject: Subject, grads: dict[str, Tensor]) -> None:
    wave = nn.Parameter(torch.ones(3, dtype=torch.complex64))
    same = {k: subject.groups[0][k] for k in ("retain_steps", "max_norm", "clip_retain")}
    subject.optimizer.add_param_group({"params": [("wave", wave)], "masked": False, **same})
    wave.grad = torch.ones_like(wave)


NAN = float("nan")
SPOILERS = {
    **{
        f"{name} {value}": _last(name, value)
        for name, values in {
            "lr": (NAN, -1.0, None, "fast"),
            "weight_decay": (NAN, -1.0),
            "forget_lr": (NAN, -1.0),
            "slow_lr": (NAN, 2.0, -1.0),
            "max_norm": (NAN, 0.0),
            "momentum": (NAN, -1.0),
            "eps": (NAN, -1.0),
            "betas": ((1.0, 0.9), (0.9, NAN)),
            "weight_bits": (16,),
            "state_dtype": (torch.float64,),
            "slow_device": ("cuda",),
        }.items()
        for value in values
    },
    "sparse": _gradient(lambda g: g.to_sparse()),
    "complex": _complex,
    "double": _gradient(
        lambda g: g.to(torch.float64 if g.dtype != torch.float64 else torch.float32)
    ),
    "state of fp16": _state(lambda t: t.half()),
    "state of another shape": _state(lambda t: torch.zeros(2, 1)),
    "state on meta": _state(lambda t: t.to("meta")),
    "state sparse": _state(lambda t: torch.ones(3, 3).to_sparse()),
    "state a number": _state(lambda t: 0.0),
    "state expanded": _state(lambda t: t.new_zeros(()).expand(t.shape)),
    "scale 8": _amp("grad_scale", 8.0),
    "scale two": _amp("grad_scale", torch.ones(2)),
    "found bool": _amp("found_inf", torch.tensor(True)),
    "found number": _amp("found_inf", 1.0),
}


def snapshot(subject: Subject) -> tuple[Any, ...]:
    """The bits of everything a step may write, and what counts its steps."""
    optimizer = subject.optimizer
    settle(optimizer)
    state = {
        n: {
            k: v.clone() if isinstance(v, Tensor) else v
            for k, v in optimizer.state.get(p, {}).items()
        }
        for n, p in subject.params.items()
    }
    params = {n: p.detach().clone() for n, p in subject.params.items()}
    return (
        params,
        state,
        optimizer.skipped_steps,
        [g["retain_pending"] for g in optimizer.param_groups],
    )


def assert_unchanged(subject: Subject, before: tuple[Any, ...]) -> None:
    now = snapshot(subject)
    assert now[2:] == before[2:]
    for name in subject.params:
        assert_same_bits(now[0][name], before[0][name], name)
        assert now[1][name].keys() == before[1][name].keys(), (
            name,
            now[1][name].keys(),
            before[1][name].keys(),
        )
        for key, value in before[1][name].items():
            found = now[1][name][key]
            if (
                isinstance(value, Tensor)
                and value.layout == torch.strided
                and value.device.type != "meta"
            ):
                assert_same_bits(found, value, f"{key} of {name}")
            else:
                assert type(found) is type(value), f"{key} of {name}"
