"""What an entry in the tests' table of ops says; ``ListOp`` for lists of tensors, ``RowOp`` for
losses over rows.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any

import torch
from cases import DTYPES, MIXED, SIZES, Case, shifted
from judging import assert_matches_reference, assert_within, flat_outputs, formula_of, named
from torch import Tensor

from sfron_fast.ops import registry as ops
from sfron_fast.ops import rows
from sfron_fast.ops.dtypes import only_reference


@dataclass(frozen=True, kw_only=True)
class Op:
    """One op: ``make(shape, dtype, device, **settings)`` makes its arguments by name."""

    name: str
    make: Callable[..., Case]
    # named settings: under each of them the op is compared with its formula
    settings: dict[str, dict[str, Any]]
    # of them, those that use every argument: for sizes, layouts, threads, opcheck
    thorough: tuple[str, ...]
    # mistakes that are refused before anything is written: id, edit of a case of the last thorough
    # settings, argument that is blamed
    wrong: list[tuple[str, Callable[[Case], None], str]]
    # raises if what the op makes of a case is not right
    judge: Callable[[Case], None] | None = None
    opcheck_shapes: tuple[Any, ...] = ()
    shape_for_threads: Any = ()  # large enough for two
    compile_shape: Any = ()
    dtypes: list[torch.dtype] = field(default_factory=lambda: DTYPES)
    call: Callable[..., Any] | None = None  # the public function, if it takes the op's arguments

    @property
    def calls(self) -> list[tuple[str, Callable[..., Any]]]:
        """Public calls that take the op's arguments by name."""
        return [] if self.call is None else [("call", self.call)]

    def __str__(self) -> str:
        return self.name

    def full(self, shape, dtype=torch.float32, device="cpu") -> list[Case]:
        """Cases of that shape: the first of the thorough settings, and the last."""
        names = dict.fromkeys((self.thorough[0], self.thorough[-1]))
        return [self.make(shape, dtype, device, **self.settings[name]) for name in names]

    def good(self) -> Case:
        """What ``wrong`` spoils."""
        return self.make(**self.settings[self.thorough[-1]])

    def examples(self, name: str, dtype, device) -> list[Case]:
        """What is compared with the formula under the settings of that name."""
        return [self.make(dtype=dtype, device=device, **self.settings[name])]

    def assert_right(self, case: Case) -> None:
        self.judge(case)

    def opchecks(self, dtype, device) -> list[tuple[str, Case]]:
        """Cases for ``torch.library.opcheck``, each with the op it is for."""
        return [
            (self.name, case)
            for shape in self.opcheck_shapes
            for case in self.full(shape, dtype, device)
        ]

    def outcome(self, case: Case) -> list[Tensor]:
        """What the op returns, from the entry that serves the dtype."""
        wide = any(only_reference(t.dtype) for _, t in case.flat())
        kernel = ops.default_kernel(self.name) if wide else ops.op(self.name)
        return flat_outputs(case.run(kernel))


@dataclass(frozen=True, kw_only=True)
class ListOp(Op):
    """An op over lists of tensors, where a shape is a list of shapes."""

    many: str  # settings for thousands of tensors
    like: str  # the list that measures the others
    flat: tuple[str, ...]  # lists that may be given as one flat tensor
    flat_settings: dict[str, Any] = field(default_factory=dict)
    in_graph: tuple[str, ...] = ()  # written lists whose tensors autograd may know
    numbers: tuple[str, ...] = ()  # scalars that the tensor ``numbers`` replaces
    sizes = SIZES
    opcheck_shapes: tuple[Any, ...] = ([(5,), (0,), (), (65,)],)
    shape_for_threads: Any = (*MIXED, (200_001,))
    compile_shape: Any = ((5,), (0,), (70,))

    def examples(self, name: str, dtype, device) -> list[Case]:
        """What is compared with the formula: ordinary values, then infinities, NaN, subnormals."""
        return [
            self.make(MIXED, dtype, device, special=special, **self.settings[name])
            for special in (False, True)
        ]

    def assert_right(self, case: Case) -> None:
        """By default the public call leaves the bits of the formula."""
        if self.judge is not None:
            self.judge(case)
        else:
            assert_matches_reference(self.name, case, self.call)

    def assert_size(self, size: str, dtype, device) -> None:
        names = (self.many,) if size == "many" else self.thorough
        for name in names:
            case = self.make(SIZES[size], dtype, device, **self.settings[name])
            if size != "many":
                self.assert_right(case.map(shifted))
            self.assert_right(case)

    def public_outcome(self, case: Case) -> list[tuple[str, Tensor]]:
        return [*named(flat_outputs(case.run(self.call))), *case.flat()]


@dataclass(frozen=True, kw_only=True)
class RowOp(Op):
    """A loss over rows, whose first tensor has a gradient."""

    outputs: tuple[str, ...]
    loss: Callable[..., Tensor]  # the public function on the op's arguments, in their order
    differentiable: Callable[..., Any]  # what torch differentiates by itself
    bounds: Callable[..., dict[str, tuple[Tensor, Tensor]]]  # in tolerances.py
    saved: tuple[str, ...]  # outputs and numbers that the op of the gradient takes
    saved_numbers: tuple[str, ...]
    sizes: dict[str, list[tuple[int, ...]]]  # groups of shapes by name
    read_again: tuple[str, ...]  # tensors that backward reads
    only_forward: tuple[str, ...] = ()  # tensors that the op of the gradient does not take

    @property
    def gradient_name(self) -> str:
        return f"{self.name}_backward"

    def run(self, case: Case, grad: float = 1.0) -> dict[str, Tensor]:
        """All outputs and the gradient of ``grad * loss``, from the entry that serves the dtype."""
        source, *others = case.tensors.values()
        source = source.detach().requires_grad_()
        kernel = rows.kernel(self.name, self.differentiable, source)
        found = kernel(source, *others, *case.scalars.values())
        outputs = dict(zip(self.outputs, found, strict=True))
        (gradient,) = torch.autograd.grad(outputs["loss"] * grad, source)
        return {name: t.detach() for name, t in outputs.items()} | {"gradient": gradient}

    def assert_right(self, case: Case, grad: float = -0.7) -> None:
        """Kernel and formula within the bounds of the truth in fp64."""
        bounds = self.bounds(*case.tensors.values(), *case.scalars.values(), grad)
        assert_within(self.run(case, grad), bounds)
        with torch.no_grad():
            found = case.run(formula_of(self.name))
            outputs = dict(zip(self.outputs, found, strict=True))
            gradient = self.gradient_case(case, outputs, grad)
            outputs["gradient"] = gradient.run(formula_of(self.gradient_name))
            assert_within(outputs, bounds)

    def gradient_case(self, case: Case, outputs: dict[str, Tensor], grad: float = 1.0) -> Case:
        """Arguments of the op that computes the gradient."""
        upstream = torch.tensor(grad, device=outputs["loss"].device)
        saved = {name: outputs[name] for name in self.saved}
        numbers = {name: case.scalars[name] for name in self.saved_numbers}
        given = {name: t for name, t in case.tensors.items() if name not in self.only_forward}
        return Case({"grad": upstream, **given, **saved}, numbers)

    def assert_size(self, size: str, dtype, device) -> None:
        for shape in self.sizes[size]:
            case = self.make(shape, dtype, device)
            self.assert_right(case)
            if not shape[0]:
                assert self.run(case)["loss"] == 0

    def outcome(self, case: Case) -> list[Tensor]:
        return list(self.run(case).values())

    def public_outcome(self, case: Case) -> list[tuple[str, Tensor]]:
        """Loss and gradient."""
        source, *others = case.tensors.values()
        leaf = source.detach().requires_grad_()
        loss = self.loss(leaf, *others, *case.scalars.values())
        loss.backward()
        return [("loss", loss.detach()), ("gradient", leaf.grad)]

    def opchecks(self, dtype, device) -> list[tuple[str, Case]]:
        """The op with and without a gradient to come, and the op of the gradient."""
        found = []
        for shape, settings in zip(self.opcheck_shapes, cycle(self.thorough), strict=False):
            case = self.make(shape, dtype, device, **self.settings[settings])
            outputs = dict(zip(self.outputs, case.run(ops.op(self.name)), strict=True))
            found.append((self.gradient_name, self.gradient_case(case, outputs)))
            found.append((self.name, case))
            differentiated = case.clone()
            next(iter(differentiated.tensors.values())).requires_grad_()
            found.append((self.name, differentiated))
        return found
