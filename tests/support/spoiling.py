"""Ways to spoil the arguments of an op, and the refusal that must follow."""

import math
import re

import pytest
import torch
from cases import Case
from judging import assert_same_bits


def assert_rejected(kernel, case: Case, argument: str) -> None:
    """Raises, naming the argument, and writes nothing."""
    before = case.map(lambda t: t.detach().clone())
    with pytest.raises(
        (ValueError, RuntimeError),
        match=rf"(^|\W){re.escape(argument)}(\[\d+\])?: expected .*, found",
    ):
        case.run(kernel)
    for (name, a), (_, e) in zip(case.flat(), before.flat(), strict=True):
        if a.device.type != "meta":
            assert_same_bits(a, e, name)


LIST_EDITS = {
    "shape": lambda t: t.new_zeros(t.numel() + 1),
    "column": lambda t: t.view(-1, 1),
    "dtype": lambda t: t.to(torch.int32),
    "double": lambda t: t.double(),
    "meta": lambda t: t.to("meta"),
}


def bad_lists(*names: str):
    """(id, edit, argument) of the mistakes that every list of tensors can have."""

    def edit_of(name, change):
        def edit(case):
            case.tensors[name][1] = change(case.tensors[name][1])

        return edit

    def short(name):
        return lambda case: case.tensors[name].pop()

    return [
        edit
        for name in names
        for edit in (
            (f"{name}-short", short(name), name),
            *((f"{name}-{kind}", edit_of(name, f), name) for kind, f in LIST_EDITS.items()),
        )
    ]


def put(name: str, change):
    """An edit of one argument that is a tensor."""

    def edit(case):
        case.tensors[name] = change(case.tensors[name])

    return edit


MEASURED = ("short", "shape", "column")


def blame(edits, measure: str, argument: str, kinds=MEASURED):
    """The same edits; those of the list that measures the others are noticed at another one.

    Not its ``double``: which list is blamed for two dtypes differs between kernel and formula.
    """
    ids = [f"{measure}-{kind}" for kind in kinds]
    return [
        (i, edit, argument if i in ids else named)
        for i, edit, named in edits
        if i != f"{measure}-double"
    ]


def bad_masks():
    def shorter(case):
        case.tensors["masks"].pop()

    def few_bytes(case):
        case.tensors["masks"][1] = case.tensors["masks"][1][:-1]

    def many_bytes(case):
        case.tensors["masks"][1] = torch.cat([case.tensors["masks"][1]] * 2)

    def booleans(case):
        case.tensors["masks"][1] = case.tensors["masks"][1].to(torch.bool)

    def column(case):
        case.tensors["masks"][1] = case.tensors["masks"][1].unsqueeze(1)

    def elsewhere(case):
        case.tensors["masks"][1] = case.tensors["masks"][1].to("meta")

    edits = {
        "short": shorter,
        "few": few_bytes,
        "many": many_bytes,
        "bool": booleans,
        "2d": column,
        "meta": elsewhere,
    }
    return [(f"masks-{kind}", edit, "masks") for kind, edit in edits.items()]


def bad_scalar_tensors(*names: str):
    wrong = {
        "two": torch.ones(2),
        "double": torch.ones((), dtype=torch.float64),
        "integer": torch.ones((), dtype=torch.int64),
    }

    def edit_of(name, value):
        return lambda case: case.tensors.update({name: value})

    return [(f"{n}-{kind}", edit_of(n, value), n) for n in names for kind, value in wrong.items()]


def bad_tensor_numbers(good: list[float], names=("lr", "weight_decay", "slow_lr")):
    """Numbers as one tensor: its own shape and dtype, and the ranges of its elements."""

    def put(values, dtype=torch.float64):
        return lambda case: case.tensors.update(numbers=torch.tensor(values, dtype=dtype))

    edits = [
        ("numbers-short", put(good[:-1]), "numbers"),
        ("numbers-float32", put(good, torch.float32), "numbers"),
    ]
    for i, name in enumerate(names):
        edits += [
            (f"numbers-{name}={bad}", put([*good[:i], bad, *good[i + 1 :]]), name)
            for bad in (-0.1, math.nan)
        ]
    return edits


def bad_skipped():
    def put(counter):
        return lambda case: case.tensors.update(skipped=counter)

    wrong = {"int32": torch.zeros((), dtype=torch.int32), "two": torch.zeros(2, dtype=torch.int64)}
    return [(f"skipped-{name}", put(counter), "skipped") for name, counter in wrong.items()]


def bad_numbers(**numbers):
    def put(name, value):
        return lambda case: case.scalars.update({name: value})

    return [
        (f"{name}={v}", put(name, v), name)
        for name, bad in numbers.items()
        for v in (*bad, math.nan)
    ]
