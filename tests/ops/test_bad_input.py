"""Bad input: an error that names the argument, what was expected and what was found; nothing
changes.
"""

from functools import partial

import pytest
import torch
from models import bits, build, data, random_fishers, random_mask, same
from op_table import OPS
from torch.utils.data import TensorDataset

import sfron_fast as sf
from sfron_fast import Fisher, Recipe, SaliencyMask, functional
from sfron_fast.methods import (
    Adversarial,
    add_lora,
    amun,
    bad_teacher,
    finetune,
    fit_decoder,
    gradient_ascent,
    kunbr,
    lune,
    merge_lora,
    r2f,
    random_label,
    scrub,
    selective_amnesia,
    siu,
    wrong_labels,
)
from sfron_fast.ops import native

NAN, INF = float("nan"), float("inf")
ERRORS = (ValueError, RuntimeError)


def table(rows):
    """(id, argument named, call) -> parametrize."""
    return pytest.mark.parametrize(
        ("argument", "call"), [pytest.param(a, c, id=i) for i, a, c in rows]
    )


def refused(argument, call):
    with pytest.raises(ERRORS, match=rf"^{argument}.*: expected .*found "):
        call()


# --- functional -----------------------------------------------------------------------------------


def tensors(*shapes, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(s, generator=generator).to(dtype) for s in shapes]


SHAPES = ((3, 4), (5,))


def test_a_leaf_that_requires_grad_is_refused():
    weight = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(RuntimeError, match=r"params\[0\]: expected a call under torch.no_grad"):
        functional.sgd_step_([weight], [torch.ones(3)], lr=0.1)
    assert torch.equal(weight, torch.ones(3))


@table(
    [
        ("clip without a norm", "norm", {"max_norm": 1.0}),
        ("norm of a number", "norm", {"norm": 1.0, "max_norm": 1.0}),
        ("momentum without buffers", "momentum_buffers", {"momentum": 0.9}),
    ]
)
def test_a_step_that_would_not_do_what_it_is_told(argument, call):
    weights = [torch.ones(3)]
    refused(argument, lambda: functional.sgd_step_(weights, [torch.ones(3)], lr=0.1, **call))
    assert torch.equal(weights[0], torch.ones(3))


# --- losses ---------------------------------------------------------------------------------------

LOGITS, LABELS = tensors((4, 3))[0], torch.tensor([0, 1, 2, 0])
LEAF = LOGITS.clone().requires_grad_()


@table(
    [
        ("ce logits 1d", "logits", lambda: sf.adaptive_cross_entropy(LOGITS[0], LABELS)),
        ("ce logits 4d", "logits", lambda: sf.adaptive_cross_entropy(LOGITS[None, None], LABELS)),
        ("ce logits int", "logits", lambda: sf.adaptive_cross_entropy(LOGITS.long(), LABELS)),
        ("ce empty", "logits", lambda: sf.adaptive_cross_entropy(LOGITS[:0], LABELS[:0])),
        ("ce no class", "logits", lambda: sf.adaptive_cross_entropy(LOGITS[:, :0], LABELS)),
        ("ce labels shape", "labels", lambda: sf.adaptive_cross_entropy(LOGITS, LABELS[:3])),
        ("ce labels dtype", "labels", lambda: sf.adaptive_cross_entropy(LOGITS, LABELS.int())),
        (
            "ce labels float",
            "labels",
            lambda: sf.adaptive_cross_entropy(LOGITS.double(), LABELS.double()),
        ),
        ("ce label high", "labels", lambda: sf.adaptive_cross_entropy(LOGITS, LABELS + 1)),
        ("ce label low", "labels", lambda: sf.adaptive_cross_entropy(LOGITS, LABELS - 1)),
        ("ce temperature", "temperature", lambda: sf.adaptive_cross_entropy(LOGITS, LABELS, -0.5)),
        (
            "ce temperature nan",
            "temperature",
            lambda: sf.adaptive_cross_entropy(LOGITS, LABELS, NAN),
        ),
        (
            "ce temperature word",
            "temperature",
            lambda: sf.adaptive_cross_entropy(LOGITS, LABELS, "hot"),
        ),
        ("ce floor", "floor", lambda: sf.adaptive_cross_entropy(LOGITS, LABELS, floor=0.0)),
        (
            "ce floor nan",
            "floor",
            lambda: sf.adaptive_cross_entropy(LOGITS.double(), LABELS, floor=NAN),
        ),
        (
            "ce in place",
            "labels",
            lambda: sf.adaptive_cross_entropy(LOGITS, LABELS + 1, inplace=True),
        ),
        (
            "ce in place leaf",
            "logits",
            lambda: sf.adaptive_cross_entropy(LEAF, LABELS, inplace=True),
        ),
        (
            "ce in place view",
            "logits",
            lambda: sf.adaptive_cross_entropy(LEAF.view(4, 3), LABELS, inplace=True),
        ),
        (
            "ce in place strides",
            "logits",
            lambda: sf.adaptive_cross_entropy((1 * LEAF)[:, ::2], LABELS, inplace=True),
        ),
        (
            "ce sum tokens",
            "logits",
            lambda: sf.adaptive_cross_entropy_sum_(LOGITS[None], LABELS[None]),
        ),
        ("ce sum leaf", "logits", lambda: sf.adaptive_cross_entropy_sum_(LEAF, LABELS)),
        ("ce sum label", "labels", lambda: sf.adaptive_cross_entropy_sum_(1 * LEAF, LABELS + 1)),
        (
            "ce sum scale",
            "scale",
            lambda: sf.adaptive_cross_entropy_sum_(1 * LEAF, LABELS, scale=INF),
        ),
        (
            "ce sum range",
            "floor",
            lambda: sf.adaptive_cross_entropy_sum_((1 * LEAF).half(), LABELS, 2.0),
        ),
        ("mse target shape", "target", lambda: sf.adaptive_mse(LOGITS, LOGITS[:2])),
        ("mse target dtype", "target", lambda: sf.adaptive_mse(LOGITS, LOGITS.half())),
        (
            "mse target grad",
            "target",
            lambda: sf.adaptive_mse(LOGITS, LOGITS.clone().requires_grad_()),
        ),
        ("mse 1d", "prediction", lambda: sf.adaptive_mse(LOGITS[0], LOGITS[0])),
        ("mse empty", "prediction", lambda: sf.adaptive_mse(LOGITS[:0], LOGITS[:0])),
        ("mse int", "prediction", lambda: sf.adaptive_mse(LOGITS.int(), LOGITS.int())),
        ("mse reduction", "reduction", lambda: sf.adaptive_mse(LOGITS, LOGITS, reduction="none")),
        ("mse temperature", "temperature", lambda: sf.adaptive_mse(LOGITS, LOGITS, NAN)),
        ("mse floor", "floor", lambda: sf.adaptive_mse(LOGITS, LOGITS, floor=-1.0)),
        (
            "mse reference",
            "reference",
            lambda: sf.adaptive_mse(LOGITS, LOGITS, reference=LOGITS[0, :1]),
        ),
        ("mse cap alone", "reference", lambda: sf.adaptive_mse(LOGITS, LOGITS, cap=3.0)),
        ("kl 1d", "logits", lambda: sf.soft_target_kl(LOGITS[0], LOGITS[0])),
        ("kl 3d", "logits", lambda: sf.soft_target_kl(LOGITS[None], LOGITS[None])),
        ("kl empty", "logits", lambda: sf.soft_target_kl(LOGITS[:0], LOGITS[:0])),
        ("kl no class", "logits", lambda: sf.soft_target_kl(LOGITS[:, :0], LOGITS[:, :0])),
        ("kl int", "logits", lambda: sf.soft_target_kl(LOGITS.int(), LOGITS.int())),
        ("kl teacher shape", "teacher_logits", lambda: sf.soft_target_kl(LOGITS, LOGITS[:2])),
        ("kl teacher dtype", "teacher_logits", lambda: sf.soft_target_kl(LOGITS, LOGITS.half())),
        (
            "kl teacher grad",
            "teacher_logits",
            lambda: sf.soft_target_kl(LOGITS, LOGITS.clone().requires_grad_()),
        ),
        ("kl weights shape", "weights", lambda: sf.soft_target_kl(LOGITS, LOGITS, LOGITS[:, :1])),
        (
            "kl weights double",
            "weights",
            lambda: sf.soft_target_kl(LOGITS.double(), LOGITS.double(), LOGITS[0, :1]),
        ),
        *(
            (f"kl {name} {how}", name, partial(sf.soft_target_kl, LOGITS, LOGITS, **{name: wrong}))
            for name, spoilt in (("class_bias", (INF, NAN)), ("class_weights", (-1.0, INF, NAN)))
            for how, wrong in (
                ("shape", LOGITS[0, :1]),
                ("2d", LOGITS),
                ("meta", LOGITS[0].to("meta")),
                ("list", [0.0]),
                *((str(x), torch.full_like(LOGITS[0], x)) for x in spoilt),
            )
        ),
        (
            "kl all forbidden",
            "class_bias",
            lambda: sf.soft_target_kl(LOGITS, LOGITS, class_bias=torch.full_like(LOGITS[0], -INF)),
        ),
        ("kl temperature", "temperature", lambda: sf.soft_target_kl(LOGITS, LOGITS, None, 0.0)),
        (
            "kl temperature nan",
            "temperature",
            lambda: sf.soft_target_kl(LOGITS, LOGITS, temperature=NAN),
        ),
        ("weights 2d", "losses", lambda: sf.adaptive_weights(LOGITS)),
        ("weights empty", "losses", lambda: sf.adaptive_weights(LOGITS[0, :0])),
        ("weights int", "losses", lambda: sf.adaptive_weights(LABELS)),
        ("weights temperature", "temperature", lambda: sf.adaptive_weights(LOGITS[0], NAN)),
        ("weights floor", "floor", lambda: sf.adaptive_weights(LOGITS[0], floor=0)),
        (
            "weights reference",
            "reference",
            lambda: sf.adaptive_weights(LOGITS[0], reference=-LOGITS[0].abs()),
        ),
        (
            "weights reference float",
            "reference",
            lambda: sf.adaptive_weights(LOGITS[0], reference=1.0),
        ),
        (
            "weights cap",
            "cap",
            lambda: sf.adaptive_weights(LOGITS[0], reference=LOGITS[0].abs() + 1, cap=1e-9),
        ),
    ]
)
def test_losses(argument, call):
    refused(argument, call)


# --- optimizers and recipes -----------------------------------------------------------------------

COMMON = {
    "lr": [-1.0, NAN, "fast"],
    "weight_decay": [-1.0, NAN],
    "forget_lr": [-0.1, NAN],
    "max_norm": [0.0, -1.0, NAN],
    "slow_lr": [0.0, -0.5, 1.1, NAN],
    "retain_steps": [0, -1, 1.5, None],
    "moments": ["both", None],
    "mask_semantics": ["weights", None],
    "state_dtype": [torch.float16, torch.uint8, "float32"],
    "weight_bits": [16, "24", True],
    "saliency": [{"0.weight": torch.ones(3)}],
}
KNOBS = {
    sf.SFRonSGD: {**COMMON, "momentum": [-0.1, NAN], "dampening": [-0.1, NAN]},
    sf.SFRonAdamW: {
        **COMMON,
        "betas": [(1.0, 0.9), (0.9, NAN), (-0.1, 0.9), (0.9,), 0.9],
        "eps": [-1.0, NAN],
    },
}


@pytest.mark.checklist("A11")
@pytest.mark.parametrize(("kind", "knob"), [(k, a) for k, rows in KNOBS.items() for a in rows])
def test_optimizer_settings(kind, knob):
    model = build()
    before = bits(model)
    optimizer = kind(model.named_parameters())
    for value in KNOBS[kind][knob]:
        refused(knob, lambda value=value: kind(model.named_parameters(), **{knob: value}))
        if knob != "saliency":
            extra = {"params": [("x", torch.nn.Parameter(torch.ones(2)))], knob: value}
            refused(knob, lambda extra=extra: optimizer.add_param_group(extra))
    assert len(optimizer.param_groups) == 1
    assert same(bits(model), before)


@pytest.mark.checklist("A11")
def test_optimizer_settings_that_must_agree():
    model = build()
    refused("nesterov", lambda: sf.SFRonSGD(model.parameters(), nesterov=True))
    refused(
        "nesterov",
        lambda: sf.SFRonSGD(model.parameters(), momentum=0.9, dampening=0.1, nesterov=True),
    )
    first, second = list(model.parameters())[:2]
    for knob, value in (("retain_steps", 3), ("max_norm", 1.0), ("clip_retain", True)):
        refused(
            knob,
            lambda k=knob, v=value: sf.SFRonSGD([{"params": [first]}, {"params": [second], k: v}]),
        )


@pytest.mark.parametrize("kind", [sf.SFRonSGD, sf.SFRonAdamW])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_bf16_state_beside_what_is_neither_fp32_nor_bf16(kind, dtype):
    def params(dtype):
        return [("a", torch.nn.Parameter(torch.ones(3, dtype=dtype)))]

    refused("state_dtype", lambda: kind(params(dtype), state_dtype=torch.bfloat16))
    saved = kind(params(torch.float32), state_dtype=torch.bfloat16).state_dict()
    optimizer = kind(params(dtype))
    # of a run that has not forgotten yet: the setting is this optimizer's
    optimizer.load_state_dict(saved)
    saved["param_groups"][0]["has_forgotten"] = True
    refused("state_dict", lambda: optimizer.load_state_dict(saved))
    assert optimizer.param_groups[0]["state_dtype"] is None

    # by the model, behind the optimizer's back
    kept, converted = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer = kind([{"params": [kept]}, {"params": [converted]}], state_dtype=torch.bfloat16)
    converted.data = converted.data.to(dtype)
    for param in (kept, converted):
        param.grad = torch.ones_like(param)
    for call in (optimizer.step, optimizer.forget_step, optimizer.init_state):
        refused("state_dtype", call)
        assert not optimizer.state
        assert torch.equal(kept.detach(), torch.ones(3))


@pytest.mark.parametrize("phase", range(3))
@pytest.mark.parametrize(
    ("argument", "change"),
    [
        ("lr", lambda group: group.update(lr=-1.0)),
        ("slow_lr", lambda group: group.update(slow_lr=2.0)),
        # in place: a list, as JSON has it
        (
            "betas",
            lambda group: group["betas"].__setitem__(1, 7.0),
        ),
    ],
)
def test_settings_changed_between_steps(argument, change, phase):
    """A group's are refused before the group before it is written."""
    params = [p.requires_grad_() for p in tensors((3,), (4,), (2,), (5,))]
    for p in params:
        p.grad = torch.ones_like(p)
    groups = [{"params": half, "betas": [0.9, 0.99]} for half in (params[:2], params[2:])]
    optimizer = sf.SFRonAdamW(groups, retain_steps=2)
    steps = [optimizer.forget_step, optimizer.step, optimizer.step, optimizer.forget_step]
    for step in steps[: phase + 1]:
        step()
    before = [p.detach().clone() for p in params]
    change(optimizer.param_groups[1])
    refused(argument, steps[phase + 1])
    assert all(map(torch.equal, before, params))


@pytest.mark.parametrize("phase", ["forget_step", "step"])
def test_gradient_of_a_later_group(phase):
    """Resized in place, which torch allows: refused before the group before is written."""
    params = [p.requires_grad_() for p in tensors((3,), (4,), (2,), (5,))]
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer = sf.SFRonAdamW([{"params": params[:2]}, {"params": params[2:]}])
    optimizer.forget_step()
    optimizer.step()
    params[3].grad.resize_(4)
    before = [p.detach().clone() for p in params]
    refused("grads", getattr(optimizer, phase))
    assert all(map(torch.equal, before, params))


@pytest.mark.parametrize(
    ("setting", "values"),
    [
        ("cycles", [0, 1.5, None]),
        ("retain_steps", [0, -1]),
        ("lr", [-1.0, NAN, None]),
        ("forget_lr", [-1.0, NAN]),
        ("forget_weight", [-1.0, NAN]),
        ("forget_decay", ["exponential"]),
        ("lr_decay", ["linear"]),
        ("slow_lr", [0.0, 2.0, NAN]),
        ("temperature", [-1.0, NAN]),
        ("loss_floor", [0.0, NAN, None]),
        ("threshold", [0.0, -1.0, NAN]),
        ("estimator", ["samples", None]),
        ("optimizer", ["adam"]),
        ("momentum", [-1.0, NAN]),
        ("weight_decay", [NAN]),
        ("max_norm", [0.0, NAN]),
        ("moments", ["both"]),
        ("mask_semantics", ["weights"]),
        ("weight_bits", [16, "24"]),
        ("betas", [(0.9,), (0.9, 1.0), None]),
    ],
)
def test_recipe_settings(setting, values):
    for value in values:
        for make in (Recipe.paper, Recipe.official, Recipe.paper().replace):
            refused(setting, lambda make=make, value=value: make(**{setting: value}))


# --- Fisher and masks -----------------------------------------------------------------------------


def fishers():
    return random_fishers({"a": (3, 2), "b": (4,)})


def sides():
    forget, retain = fishers()
    return {"forget": dict(forget), "retain": dict(retain)}


def other(side, **changes):
    both = sides()
    both[side].update(changes)
    return both


@table(
    [
        ("threshold zero", "threshold", lambda: SaliencyMask.from_fisher(**sides(), threshold=0.0)),
        ("threshold nan", "threshold", lambda: SaliencyMask.from_fisher(**sides(), threshold=NAN)),
        ("empty", "forget", lambda: SaliencyMask.from_fisher(forget={}, retain={})),
        ("names", "retain", lambda: SaliencyMask.from_fisher(**other("retain", c=torch.ones(2)))),
        (
            "shape",
            r"retain\['b'\]",
            lambda: SaliencyMask.from_fisher(**other("retain", b=torch.ones(5))),
        ),
        (
            "nan",
            r"forget\['b'\]",
            lambda: SaliencyMask.from_fisher(**other("forget", b=torch.full((4,), NAN))),
        ),
        (
            "inf",
            r"retain\['a'\]",
            lambda: SaliencyMask.top_k(**other("retain", a=torch.full((3, 2), INF)), fraction=0.5),
        ),
        (
            "negative",
            r"forget\['a'\]",
            lambda: SaliencyMask.from_fisher(**other("forget", a=-torch.ones(3, 2))),
        ),
        (
            "estimator",
            "retain",
            lambda: SaliencyMask.from_fisher(
                forget=Fisher(fishers()[0], {"estimator": "sample"}),
                retain=Fisher(fishers()[1], {"estimator": "batch"}),
            ),
        ),
        ("fraction zero", "fraction", lambda: SaliencyMask.top_k(**sides(), fraction=0.0)),
        ("fraction high", "fraction", lambda: SaliencyMask.top_k(**sides(), fraction=1.1)),
        ("fraction nan", "fraction", lambda: SaliencyMask.top_k(**sides(), fraction=NAN)),
        (
            "bool values",
            r"masks\['w'\]",
            lambda: SaliencyMask.from_bool({"w": torch.tensor([0, 2])}),
        ),
        ("bool type", r"masks\['w'\]", lambda: SaliencyMask.from_bool({"w": 0})),
        ("bits dtype", r"bits\['w'\]", lambda: SaliencyMask({"w": torch.ones(1)}, {"w": (3,)})),
        (
            "bits size",
            r"bits\['w'\]",
            lambda: SaliencyMask({"w": torch.ones(2, dtype=torch.uint8)}, {"w": (3,)}),
        ),
        (
            "bits spare",
            r"bits\['w'\]",
            lambda: SaliencyMask({"w": torch.tensor([8], dtype=torch.uint8)}, {"w": (3,)}),
        ),
        (
            "bits shapes",
            "shapes",
            lambda: SaliencyMask({"w": torch.ones(1, dtype=torch.uint8)}, {}),
        ),
    ]
)
def test_masks(argument, call):
    refused(argument, call)


X, Y = data(6)


@pytest.mark.parametrize("estimator", ["sample", "batch", "batch_equal"])
@table(
    [
        (i, a, (b, s))
        for i, a, b, s in [
            ("none", "loader", None, {}),
            ("data set", "loader", TensorDataset(X, Y), {}),
            ("empty", "loader", [], {}),
            ("empty batches", "loader", [(X[:0], Y[:0])], {}),
            ("no pair", "loader", [X], {}),
            ("three", "loader", [(X, Y, Y)], {}),
            ("inputs", "loader", [([1, 2], Y[:2])], {}),
            ("one target", "loader", [(X, torch.tensor(3))], {}),
            ("label high", "targets", [(X, Y + 3)], {}),
            ("label low", "targets", [(X, Y - 4)], {}),
            ("chunk", "chunk_size", [(X, Y)], {"chunk_size": 0}),
            ("chunk type", "chunk_size", [(X, Y)], {"chunk_size": 2.0}),
            ("loss shape", "loss_fn", [(X, Y)], {"loss_fn": lambda o, t: o.sum(1)}),
            ("loss inf", "loader", [(X, Y)], {"loss_fn": lambda o, t: o.sum() * INF}),
            ("loss constant", "loss_fn", [(X, Y)], {"loss_fn": lambda o, t: torch.tensor(1.0)}),
        ]
    ]
)
def test_estimate_fisher(estimator, argument, call):
    batches, settings = call
    model = build("bn")
    before = bits(model)
    refused(argument, lambda: sf.estimate_fisher(model, batches, estimator=estimator, **settings))
    assert same(bits(model), before)
    assert model.training


@pytest.mark.parametrize(
    ("argument", "change"),
    [
        ("forget", {"forget": []}),
        ("retain", {"retain": []}),
        ("targets", {"retain": [(X, Y + 3)]}),
        ("threshold", {"threshold": 0.0}),
        ("threshold", {"threshold": NAN}),
        ("estimator", {"estimator": "samples"}),
        ("chunk_size", {"chunk_size": 0}),
        ("forget", {"loss_fn": lambda o, t: o.sum() * INF}),
        ("retain", {"retain": [(X * NAN, Y)]}),
        ("retain", {"retain": None}),
    ],
)
def test_estimate_mask(argument, change):
    model = build("bn")
    before = bits(model)
    settings = {"forget": [(X, Y)], "retain": [(X, Y)], **change}
    refused(argument, lambda: sf.estimate_mask(model, **settings))
    assert same(bits(model), before)
    assert model.training


def test_estimate_fisher_of_nothing():
    refused("estimator", lambda: sf.estimate_fisher(build(), [(X, Y)], estimator="samples"))
    refused("model", lambda: sf.estimate_fisher(build().requires_grad_(False), [(X, Y)]))


@pytest.mark.parametrize(
    ("argument", "changes"),
    [
        ("share", {"share": 0.0}),
        ("task", {"task": "language"}),
        ("kept", {"kept": []}),
        ("holdout", {"holdout": []}),
        ("holdout", {"holdout": [(X, Y)], "task": sf.Classification(lambda o, t: 0 * o.sum(1))}),
    ],
)
def test_retain_budget(argument, changes):
    sets = {"kept": [(X, Y)], "holdout": [(X, Y)]}
    refused(argument, lambda: sf.retain_budget(build(), **(sets | changes)))


# --- unlearn --------------------------------------------------------------------------------------

GOOD = [(X, Y)]
OTHER_MODEL = SaliencyMask.from_bool({"0.weight": torch.ones(10, 7)})


@pytest.mark.parametrize(
    ("argument", "changes"),
    [
        ("recipe", {"recipe": "paper"}),
        ("eval_every", {"eval_every": -1}),
        ("eval_every", {"eval_every": 0.5}),
        ("checkpoint_every", {"checkpoint_every": 0}),
        ("over_forgetting", {"over_forgetting": "ignore"}),
        ("forget_floor", {"forget_floor": -1}),
        ("forget_floor", {"forget_floor": 101}),
        ("forget_floor", {"forget_floor": NAN}),
        ("retain", {"retain": []}),
        ("forget", {"forget": []}),
        ("retain", {"retain": iter(()), "mask": random_mask(build("bn"))}),
        ("forget", {"forget": iter(()), "mask": random_mask(build("bn"))}),
        ("forget", {"forget": [X], "mask": random_mask(build("bn"))}),
        ("retain", {"retain": [(X, Y, Y)], "mask": random_mask(build("bn"))}),
        ("forget", {"forget": [X]}),
        ("targets", {"forget": [(X, Y + 3)]}),
        ("targets", {"retain": [(X, Y - 4)]}),
        ("task", {"task": sf.Classification}),
        ("task", {"task": sf.Classification(), "loss_fn": lambda o, t: o.sum(1)}),
        ("targets", {"forget": [(X, Y + 3)], "mask": random_mask(build("bn"))}),
        ("targets", {"retain": [(X, Y - 1)], "mask": random_mask(build("bn"))}),
        ("targets", {"forget": [(X, Y.int())], "mask": random_mask(build("bn"))}),
        ("saliency", {"mask": OTHER_MODEL}),
        ("mask", {"mask": {"0.weight": torch.ones(3)}}),
        ("loss_fn", {"loss_fn": lambda o, t: o.sum()}),
        ("holdout", {"holdout": [], "eval_every": 1}),
        ("holdout", {"holdout": iter(GOOD)}),
        ("forget", {"forget": 3}),
        ("eval_every", {"metrics": [len]}),
        ("metrics", {"eval_every": 1, "metrics": [len]}),
        (r"metrics\['a'\]", {"eval_every": 1, "metrics": {"a": lambda model: None}}),
        ("eval_every", {"best": "best.pt"}),
        ("retain_budget", {"retain_budget": 0.0}),
        ("retain_budget", {"retain_budget": True}),
        ("checkpoint", {"checkpoint": __file__}),
    ],
)
def test_unlearn(argument, changes, tmp_path):
    model = build("bn")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    settings = {
        "retain": GOOD,
        "forget": GOOD,
        "checkpoint": tmp_path / "run",
        "recipe": Recipe.paper(cycles=2, lr=0.0, forget_lr=0.0),
    }
    refused(argument, lambda: sf.unlearn(model, **(settings | changes)))
    assert same({n: p.detach() for n, p in model.named_parameters()}, before)
    assert model.training
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


@pytest.mark.parametrize("model", [torch.nn.Linear, {}, GOOD])
def test_what_is_no_model(model):
    refused("model", lambda: sf.unlearn(model, forget=GOOD, retain=GOOD))
    refused("model", lambda: sf.estimate_fisher(model, GOOD))
    refused("model", lambda: sf.evaluate(model, forget=GOOD, retain=GOOD, holdout=GOOD))


@pytest.mark.parametrize("method", [finetune, gradient_ascent])
def test_baselines(method):
    model = build("bn")
    before = bits(model)
    name = "retain" if method is finetune else "forget"
    refused(name, lambda: method(model, []))
    refused(name, lambda: method(model, [X]))
    refused("epochs", lambda: method(model, GOOD, epochs=0))
    refused("lr", lambda: method(model, GOOD, lr=NAN))
    once = "retain" if method is finetune else "forget"
    refused(once, lambda: method(model, iter(GOOD), epochs=2))  # not after the first epoch
    refused(once, lambda: method(model, None))
    assert same(bits(model), before)


def test_baselines_of_two_loaders():
    model = build("bn")
    before = bits(model)
    refused("mixed", lambda: random_label(model, []))
    refused("forget", lambda: scrub(model, retain=GOOD, forget=[]))
    refused("retain", lambda: scrub(model, retain=[], forget=GOOD, ascent_epochs=0))
    refused("forget", lambda: scrub(model, retain=GOOD, forget=iter(GOOD)))
    refused("penalty", lambda: selective_amnesia(model, retain=GOOD, forget=GOOD, penalty=-1.0))
    refused("forget", lambda: selective_amnesia(model, retain=GOOD, forget=[]))
    refused("mixed", lambda: bad_teacher(model, GOOD, build("bn", seed=1)))
    refused("classes", lambda: wrong_labels(torch.zeros(3, dtype=torch.int64), 1))
    assert same(bits(model), before)


def test_adapters():
    model = build("bn")
    before = bits(model)
    refused("negatives", lambda: lune(model, negatives=[]))
    refused("negatives", lambda: lune(model, negatives=[X]))
    refused("retain", lambda: lune(model, negatives=GOOD, retain=[]))
    refused("retain_weight", lambda: lune(model, negatives=GOOD, retain_weight=NAN))
    refused("rank", lambda: lune(model, negatives=GOOD, rank=0))
    refused("alpha", lambda: lune(model, negatives=GOOD, alpha=0.0))
    refused("dropout", lambda: lune(model, negatives=GOOD, dropout=1.5))
    refused("epochs", lambda: lune(model, negatives=GOOD, epochs=0))
    refused("lr", lambda: lune(model, negatives=GOOD, lr=NAN))
    refused("mask", lambda: lune(model, negatives=GOOD, mask=random_mask(model)))
    masks = {"names": [1], "substitutes": [0]}
    refused("data", lambda: siu(model, data=[], **masks))
    refused("data", lambda: siu(model, data=[X], **masks))
    refused("names", lambda: siu(model, data=GOOD, names=[-1], substitutes=[]))
    refused("names", lambda: siu(model, data=GOOD, names=[99], substitutes=[]))
    refused("substitutes", lambda: siu(model, data=GOOD, names=[], substitutes=[99]))
    refused("ce_weight", lambda: siu(model, data=GOOD, **masks, ce_weight=-1.0))
    refused("kl_weight", lambda: siu(model, data=GOOD, **masks, kl_weight=NAN))
    refused("rank", lambda: siu(model, data=GOOD, **masks, rank=0))
    refused("lr", lambda: siu(model, data=GOOD, **masks, lr=NAN))
    refused("mask", lambda: siu(model, data=GOOD, **masks, mask=random_mask(model)))
    refused("model", lambda: add_lora(torch.nn.Conv2d(1, 1, 1), rank=1, alpha=1.0))
    assert same(bits(model), before)
    add_lora(model, rank=1, alpha=1.0)
    refused("model", lambda: add_lora(model, rank=1, alpha=1.0))
    assert same(bits(merge_lora(model)), before)  # B was 0


def test_amun():
    """More: tests/methods/test_amun.py."""
    model = build("bn")
    before = bits(model)
    sets = {"forget": GOOD, "retain": GOOD, "bounds": None}
    refused("forget", lambda: amun(model, **sets | {"forget": []}))
    refused("forget", lambda: amun(model, **sets | {"forget": [X]}))
    refused("retain", lambda: amun(model, **sets | {"retain": []}))
    refused("retain", lambda: amun(model, **sets | {"retain": iter(GOOD)}))
    refused("bounds", lambda: amun(model, **sets | {"bounds": (2.0, 1.0)}))
    other = Adversarial(torch.zeros(2, 99), torch.zeros(2).long(), torch.zeros(2))
    refused("adversarial", lambda: amun(model, **sets, adversarial=other))
    refused("epochs", lambda: amun(model, **sets, epochs=0))
    refused("lr", lambda: amun(model, **sets, lr=NAN))
    assert same(bits(model), before)


def test_methods_of_single_layers():
    """More: tests/frameworks/test_kunbr.py and test_r2f.py."""
    model = build("bn")
    before = bits(model)
    sets = {"forget": GOOD, "retain": GOOD}
    refused("layers", lambda: kunbr(model, **sets, layers="0", size=1, top=1))
    refused("block_epochs", lambda: kunbr(model, **sets, layers="0", size=1, top=1, block_epochs=0))
    refused("layers", lambda: fit_decoder(model, loader=GOOD, layers="none"))
    refused("rank", lambda: fit_decoder(model, loader=GOOD, layers="0", rank=0))
    decoder = fit_decoder(build(), loader=GOOD, layers="0", rank=2)
    refused("norm", lambda: r2f(model, forget=GOOD, decoder=decoder, norm=NAN))
    assert same(bits(model), before)


def test_everything_public_has_its_row_here():
    covered = {"Fisher", "UnlearnResult"}  # records without a rule of their own
    # have tests of their own
    covered |= {
        "Classification",
        "Language",
        "PairedLoader",
        "Task",
        "evaluate",
        "step_in_backward",
    }
    covered |= {"linear_logp", "linear_logp_stats"}
    covered |= {"linear_adaptive_cross_entropy", "linear_soft_target_kl"}
    covered |= {n for n in sf.__all__ if n.endswith("_weights")} | {"with_ceiling"}  # test_weights
    covered |= {"reference_losses"}
    covered |= {"Denoising", "Memorise", "Relabel", "Surrogate", "Unconditional"}  # tests/tasks
    covered |= {"loss_profile", "noise_overlap"}
    covered |= {"no_decay_groups"}  # tests/optim/test_no_decay.py
    covered |= {
        "Recipe",
        "SFRonAdamW",
        "SFRonSGD",
        "SaliencyMask",
        "adaptive_cross_entropy",
        "adaptive_cross_entropy_sum_",
        "adaptive_mse",
        "adaptive_weights",
        "estimate_fisher",
        "estimate_mask",
        "retain_budget",
        "soft_target_kl",
        "unlearn",
    }
    assert set(sf.__all__) - {"__version__"} == covered
    with_mistakes = {op.name for op in OPS.values() if op.calls}
    assert set(functional.__all__) - {"pack_bits"} <= with_mistakes  # that: test_listed.py


# --- names, not the numbers of torch's ABI --------------------------------------------------------


@pytest.mark.skipif(not native.available(), reason="needs the native kernels")
def test_a_refused_dtype_has_its_name(monkeypatch):
    # torch cannot fill all of them
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    known = {d for d in vars(torch).values() if isinstance(d, torch.dtype)} - {torch.float64}
    floats = {torch.float32, torch.bfloat16, torch.float16}
    for dtype in known:
        tensor = torch.empty(0, dtype=dtype)
        if tensor.is_quantized:
            continue  # served by the reference, which prints Python's name
        grads, masks = ([torch.zeros(0)], [tensor]) if dtype in floats else ([tensor], [])
        with pytest.raises(ERRORS, match=rf"\[0\]: expected .*, found {dtype}$"):
            torch.ops.sfron_fast.masked_grad_norm(grads, masks, None)
