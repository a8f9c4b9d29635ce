"""Squares of every sample's own gradient, added up inside the backward pass of a whole batch.

A parameter in one call: its product is squared as the gradient passes by. In several calls, all of
them are waited for, since their sum is squared.
"""

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ... import functional
from ...errors import require
from ...ops.dtypes import accumulate_dtype, wide
from ...ops.layout import is_sharded, orders_of
from .layouts import SPREAD, cutter
from .uses import Tiles, Use

KINDS = ("product", "rows", "vector")


class _Open:
    """A parameter in the batch that is running."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.pieces: dict[str, list[Any]] = {kind: [] for kind in KINDS}
        self.ids: list[Tensor] = []  # [samples, positions] of every call that reads rows
        self.beside: list[Tensor] = []  # by sample, the product's part in those rows
        self.sum: Tensor | None = None  # where squares go

    def all_there(self, kind: str) -> bool:
        return len(self.pieces[kind]) >= self.calls[kind] > 0


class SampleSquares:
    """Adds ``weight`` times the square of each sample's gradient to ``values``.

    Args:
        values: name -> fp32 (fp64) sum of the parameter's shape; DTensors where it is one.
        layouts: name -> how the calls of its functions are laid out.
        others: names of the parameters that are seen to elsewhere.
    """

    def __init__(
        self, values: dict[str, Tensor], layouts: dict[str, str], others: Iterable[str]
    ) -> None:
        self.values, self.layouts, self.others = values, layouts, set(others)
        self.weight = 1.0
        self.rows: dict[str, set[int]] | None = None  # what each sample has, where it is known
        self.counted = True  # a rank without samples runs along, and adds nothing
        self.reached: set[str] = set()
        self._open: dict[str, _Open] = {}
        self._backward = False
        self._device = torch.device("cpu")  # of the gradients

    # --- what the taps tell -----------------------------------------------------------------------

    def call(self, name: str, use: Use, samples: int) -> None:
        """Counted in the forward pass; a checkpoint's second run is not."""
        if self._backward:
            return
        entry = self._open.setdefault(name, _Open())
        entry.calls[use.kind] += 1
        if use.kind == "rows":
            ids = use.saved[0]
            shared = self.layouts[name] == SPREAD
            cut = cutter(self.layouts[name], samples)
            entry.ids.append(ids.expand(samples, -1) if shared else cut(ids).flatten(1))

    def left(self, name: str, function: Any) -> None:
        """Raises ValueError: the first batch has not shown this function."""
        if name in self.others:
            return
        called = getattr(function, "__name__", function)
        raise ValueError(
            "estimator: expected a model that calls the same functions for every batch, found"
            f" {name!r} in {called} only in a later one; use 'batch'"
        )

    def take(
        self, name: str, use: Use, delta: Tensor, saved: tuple[Tensor, ...], samples: int
    ) -> None:
        """A call's gradient has come."""
        self._backward, self._device = True, delta.device
        entry = self._open.setdefault(name, _Open())
        cut = cutter(self.layouts[name], samples)
        if self.rows is not None:
            self._check_rows(name, cut(delta).shape[1])
        entry.pieces[use.kind].append(use.read(delta, saved, cut))
        if entry.all_there(use.kind):
            self._add(name, entry, use.kind, samples)

    def _check_rows(self, name: str, found: int) -> None:
        """In the batch that the look was at: rows that do not grow with the samples are others'."""
        expected = self.rows[name] if self.rows is not None else set()
        require(
            found in expected,
            "estimator",
            f"{' or '.join(map(str, sorted(expected)))} rows of {name!r} for each sample, as"
            " for two samples alone",
            found,
            "use 'batch'",
        )

    def finish(self, samples: int) -> None:
        """After the backward pass: what waits for calls that the loss does not reach."""
        for name in list(self._open):
            entry = self._open[name]
            for kind in KINDS:
                if entry.pieces[kind]:
                    entry.calls = Counter({k: len(p) for k, p in entry.pieces.items()})
                    self._add(name, entry, kind, samples)
            if entry.sum is not None:
                self._close(name, entry)
        self._open.clear()
        self._backward = False

    # --- sums -------------------------------------------------------------------------------------

    def _add(self, name: str, entry: _Open, kind: str, samples: int) -> None:
        self.reached.add(name)
        if kind == "rows" and entry.calls["product"]:
            return  # a tied head comes first
        if entry.sum is None:
            entry.sum = self._sum(name)
        pieces, entry.pieces[kind] = entry.pieces[kind], []
        if self.counted:
            {"product": self._product, "rows": self._rows, "vector": self._vector}[kind](
                entry, entry.sum, pieces, samples
            )
        if kind == "product":
            entry.calls["product"] = 0
            if entry.all_there("rows"):
                return self._add(name, entry, "rows", samples)
            if entry.calls["rows"]:
                return None
        self._close(name, entry)
        return None

    def _sum(self, name: str) -> Tensor:
        value = self.values[name]
        if not is_sharded(value):
            return value
        # offloaded shards lie elsewhere
        return torch.zeros(value.shape, dtype=value.dtype, device=self._device)

    def _close(self, name: str, entry: _Open) -> None:
        """Of a sharded parameter the ranks' sums are added up, each rank's shard on that rank."""
        value: Any = self.values[name]
        if is_sharded(value):
            from torch.distributed.tensor import DTensor, Partial

            mesh, total = value.device_mesh, entry.sum
            assert total is not None
            parts = DTensor.from_local(total, mesh, [Partial()] * mesh.ndim, run_check=False)
            shard = parts.redistribute(mesh, value.placements).to_local()
            value.to_local().add_(shard.to(value.to_local().device))
        entry.sum = None

    def _product(self, entry: _Open, total: Tensor, pieces: list[Any], samples: int) -> None:
        if len(pieces) == 1 and isinstance(pieces[0], Tiles):
            tiles = pieces[0].each()
        else:
            tiles = iter([(0, len(total), *self._joined(total, pieces))])
        rows = torch.cat(entry.ids, 1) if entry.ids else None
        own = [] if rows is None else [rows[s].unique() for s in range(samples)]
        if own:
            entry.beside = [total.new_zeros(len(ids), total.shape[1]) for ids in own]
        for start, stop, deltas, inputs in tiles:
            for s, ids in enumerate(own):
                here = (ids >= start) & (ids < stop)
                columns = deltas[s].index_select(-1, ids[here] - start)
                entry.beside[s][here] = wide(columns).t() @ wide(inputs[s])
            product(total[start:stop], deltas, inputs, self.weight)

    def _joined(self, total: Tensor, pieces: list[Any]) -> tuple[Tensor, Tensor]:
        """One sum over the positions of all calls."""
        deltas, inputs = pieces[0]
        if len(pieces) > 1:
            deltas = torch.cat([d.flatten(1, -2) for d, _ in pieces], 1)
            width = total.dim() - 1
            inputs = torch.cat([x.flatten(1, -1 - width) for _, x in pieces], 1)
        return deltas, inputs

    def _rows(self, entry: _Open, total: Tensor, pieces: list[Any], samples: int) -> None:
        """(a + b)^2 of an embedding's b and, where its weight is also the head's, the a there: a^2
        is in the sum already. What rounding takes below zero is zero.
        """
        deltas = torch.cat([d for d, _ in pieces], 1)
        ids = torch.cat([i for _, i in pieces], 1)
        for s in range(samples):
            own, place = ids[s].unique(return_inverse=True)
            # a product sums up a token's positions in one order, on any device
            at = place == torch.arange(len(own), device=place.device).unsqueeze(1)
            b = at.to(total.dtype) @ deltas[s].to(total.dtype)
            if entry.beside:
                b = b * (b + 2.0 * entry.beside[s].to(total.dtype))
            else:
                b = b * b
            b = total[own].add_(b, alpha=self.weight)
            total[own] = b.clamp_min_(0.0) if self.weight > 0 else b

    def _vector(self, entry: _Open, total: Tensor, pieces: list[Any], samples: int) -> None:
        # a call may have had the parameter in another shape
        parts = [piece.reshape(samples, -1) for piece in pieces]
        each = parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)
        order = orders_of([total])
        if order:
            each = each.view(samples, *total.shape).permute(0, *(d + 1 for d in order[0] or ()))
            each = each.reshape(samples, -1)
            total = total.permute(order[0] or ())
        # a vector times one: the same sum of squares in order
        product(total.view(1, -1), each.new_ones(samples, 1), each, self.weight)


def product(total: Tensor, deltas: Tensor, inputs: Tensor, weight: float) -> None:
    """total [out, in...] += weight * (sum over positions of delta x^T)^2, sample after sample."""
    if accumulate_dtype(deltas.dtype) != total.dtype:  # a model that casts in mid-way
        deltas, inputs = deltas.to(total.dtype), inputs.to(total.dtype)
    width = total.dim() - 1
    groups = inputs.shape[-width] // total.shape[1]
    for g in range(groups):  # of a convolution
        outs, ins = total.shape[0] // groups, total.shape[1]
        part, o, i = total, deltas, inputs
        if groups > 1:
            part = total.narrow(0, g * outs, outs)
            o = deltas.narrow(-1, g * outs, outs)
            i = inputs.narrow(inputs.dim() - width, g * ins, ins)
        (order,) = orders_of([part]) or (None,)
        if order is not None and order[0] == 0:
            first = i.dim() - width
            i = i.permute(*range(first), *(first + d - 1 for d in order[1:]))
            part = part.permute(order)
        elif order is not None and width == 1:  # a transposed matrix
            part, o, i = part.t(), i, o
        dense = part if part.is_contiguous() else part.contiguous()
        functional.sample_square_accumulate_(dense, o, i, weight)
        if dense is not part:
            part.copy_(dense)
