"""SaliencyMask: which weights a forget step may change, one bit each (docs/equations.md, equation
3; paper m).
"""

import hashlib
import logging
import math
import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .. import functional
from ..distributed.shards import whole
from ..errors import by_keyword, number, require
from ..models.names import canonical_names, possible_names
from ..ops import reference
from . import words
from .mask_file import load_mask, save_mask
from .matching import check_matched, entries_of
from .selection import (
    checked_fishers,
    largest,
    no_gradient,
    provenance,
    without_gradient,
    without_zeros,
)
from .shards import local_bits, whole_bits
from .storage import check_bits, stored

_log = logging.getLogger(__name__)


class SaliencyMask(Mapping[str, Tensor]):
    """Parameter name -> packed bits, uint8 [ceil(n / 8)]; bit i % 8 of byte i // 8 is element i,
    flattened.

    ``shapes`` holds the parameters' shapes, ``metadata`` how the mask was made (JSON values). The
    bits are copied; to edit them in place (``mask[name].zero_()``) or to give an optimizer another
    mask (``optimizer.saliency = mask``) counts from its next forget step on. A step that
    torch.compile has compiled sees another mask, but no edits.
    """

    def __init__(
        self,
        bits: dict[str, Tensor],
        shapes: dict[str, tuple[int, ...]],
        metadata: dict[str, Any] | None = None,
    ) -> None:
        self.shapes = dict(zip(canonical_names(shapes), map(tuple, shapes.values()), strict=True))
        given = dict(zip(canonical_names(bits), bits.values(), strict=True))
        self.metadata = dict(metadata or {})
        require(
            given.keys() == self.shapes.keys(), "shapes", "a shape for every mask", sorted(shapes)
        )
        require(
            len(given) == len(bits),
            "bits",
            "names that differ also without wrappers' prefixes",
            sorted(bits),
        )
        check_bits(given, self.shapes)
        self._stores, self._bits = stored(given)
        self._check_spare_bits()

    def _check_spare_bits(self) -> None:
        for name, packed in self._bits.items():
            spare = 8 * packed.numel() - self.size(name)
            clean = not spare or int(packed[-1]) >> (8 - spare) == 0
            require(clean, f"bits[{name!r}]", "unused high bits of the last byte zero", "others")
        self._sound = self.version

    @property
    def version(self) -> int:
        """Another number after every edit in place, as a tensor's own; does not wait for the
        device.
        """
        return sum(store._version for store in self._stores)

    def _key(self, name: str) -> str:
        """The entry for a parameter, however its model is wrapped; raises KeyError."""
        for possible in possible_names(name):
            if possible in self._bits:
                return possible
        raise KeyError(name)

    def __getitem__(self, name: str) -> Tensor:
        return self._bits[self._key(name)]

    def __getstate__(self) -> dict[str, Any]:
        """Each entry with memory of its own: pickled as they lie, each would bring all the others
        along.
        """
        return {
            "_bits": {n: b.clone() for n, b in self._bits.items()},
            "shapes": self.shapes,
            "metadata": self.metadata,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["_bits"], state["shapes"], state["metadata"])  # type: ignore[misc]

    def __iter__(self):
        return iter(self._bits)

    def __len__(self) -> int:
        return len(self._bits)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SaliencyMask) and self.digest() == other.digest()

    __hash__ = None  # type: ignore[assignment]

    # --- making one -------------------------------------------------------------------------------

    @classmethod
    @by_keyword
    def from_fisher(
        cls,
        *,
        forget: Mapping[str, Tensor],
        retain: Mapping[str, Tensor],
        threshold: float = 1.0,
        zero_over_zero: bool = False,
    ) -> "SaliencyMask":
        """1[F_forget + 1e-15 >= threshold (F_retain + 1e-15)], elementwise.

        Weights no gradient reached are never selected. Where both Fishers are exactly 0 although a
        gradient exists (dead weights, tokens never seen, a fresh ``lora_A``) the data say nothing.

        Args:
            forget, retain: name -> fp32 Fisher of the parameter's shape (``estimate_fisher``, or
                any mapping).
            threshold: gamma > 0.
            zero_over_zero: whether 0 / 0 counts as the ratio 1, as in the authors' code, and is
                selected up to threshold 1; else it is not selected.

        Raises:
            ValueError: different names, shapes or estimators, a threshold out of range, a
                non-finite Fisher.
        """
        threshold = number("threshold", threshold, 0.0, open_low=True)
        names = checked_fishers(forget, retain)
        sides = [forget[n] for n in names], [retain[n] for n in names]
        packed, _ = functional.saliency_mask(*sides, threshold)
        if not zero_over_zero:
            packed = without_zeros(packed, *sides)
        # the bits of DTensors are those of the shards; the mask is whole on every rank
        whole_packed = map(whole_bits, packed, forget.values())
        bits = without_gradient(dict(zip(forget, whole_packed, strict=True)), forget, retain)
        shapes = {n: tuple(f.shape) for n, f in forget.items()}
        made = {"threshold": float(threshold), "zero_over_zero": bool(zero_over_zero)}
        return cls(bits, shapes, {**made, **provenance(forget, retain)})

    @classmethod
    @by_keyword
    def top_k(
        cls,
        *,
        forget: Mapping[str, Tensor],
        retain: Mapping[str, Tensor],
        fraction: float,
    ) -> "SaliencyMask":
        """The ``fraction`` of all weights with the largest ratio F_forget / F_retain.

        Exactly round(fraction n) weights are selected; ties go to the lower index.
        """
        fraction = number("fraction", fraction, 0.0, 1.0, open_low=True)
        names = checked_fishers(forget, retain)
        eps = reference.FISHER_EPS
        ratios = {n: whole((forget[n] + eps) / (retain[n] + eps)).reshape(-1) for n in names}
        for name in no_gradient(forget, retain) & ratios.keys():
            ratios[name].zero_()
        everything = largest(torch.cat(list(ratios.values())), fraction)
        parts = everything.split([r.numel() for r in ratios.values()])
        chosen = dict(zip(names, parts, strict=True))
        bits = without_gradient(
            {n: reference.pack_bits(c) for n, c in chosen.items()}, forget, retain
        )
        made = {"top_k": fraction, **provenance(forget, retain)}
        return cls(bits, {n: forget[n].shape for n in names}, made)

    @classmethod
    def from_bool(
        cls, masks: Mapping[str, Tensor], metadata: dict[str, Any] | None = None
    ) -> "SaliencyMask":
        """From name -> bool (or 0/1) tensors of the parameters' shapes.

        SalUn's files: ``from_bool(torch.load(path, weights_only=True))``.
        """
        for name, mask in masks.items():
            binary = isinstance(mask, Tensor) and bool(((mask == 0) | (mask == 1)).all())
            require(binary, f"masks[{name!r}]", "a tensor of zeros and ones", type(mask).__name__)
        bits = {n: reference.pack_bits(m.to(torch.bool)) for n, m in masks.items()}
        return cls(bits, {n: tuple(m.shape) for n, m in masks.items()}, metadata)

    # --- using it ---------------------------------------------------------------------------------

    def coverage(
        self, named_parameters: Iterable[tuple[str, nn.Parameter]]
    ) -> dict[str, list[str]]:
        """Names of the parameters that are "matched" or "unmatched", and of the masks that are
        "unused".
        """
        names = [n for n, _ in named_parameters]
        entries = entries_of(names, self._bits)
        used = set(entries.values())
        return {
            "matched": [n for n in names if n in entries],
            "unmatched": [n for n in names if n not in entries],
            "unused": [n for n in self._bits if n not in used],
        }

    def resolve(self, named_parameters: Iterable[tuple[str, nn.Parameter]]) -> list[Tensor]:
        """Packed masks on each parameter's device, in order. Logs (INFO) how many were matched,
        unmatched, unused.

        Of a DTensor the mask of the local shard.

        Raises:
            ValueError: a parameter without mask, or a mask of another shape; both mean another
                model's mask. An edit that has set bits of no weight.
        """
        if self.version != self._sound:
            self._check_spare_bits()
        named = list(named_parameters)
        coverage = self.coverage(named)
        _log.info(
            "saliency: %s", ", ".join(f"{len(names)} {kind}" for kind, names in coverage.items())
        )
        check_matched(named, coverage["unmatched"], list(self))
        entries = entries_of([n for n, _ in named], self._bits)
        for name, parameter in named:
            shape = self.shapes[entries[name]]
            require(
                tuple(parameter.shape) == shape,
                f"saliency[{name!r}]",
                f"shape {tuple(parameter.shape)}",
                shape,
                "this mask belongs to another model",
            )
        return [local_bits(self._bits[entries[n]], p) for n, p in named]

    def to_bool(self, name: str) -> Tensor:
        """The mask of one parameter as bool of its shape."""
        return reference.unpack_bits(self[name], self.shapes[self._key(name)])

    def size(self, name: str) -> int:
        """Number of weights of one parameter."""
        return math.prod(self.shapes[self._key(name)])

    def counts(self) -> dict[str, int]:
        """Selected weights per parameter."""
        table = torch.tensor([bin(i).count("1") for i in range(256)])
        return {n: int(table.to(b.device)[b.long()].sum()) for n, b in self._bits.items()}

    def density(self) -> dict[str, float]:
        """Share of selected weights per parameter, in [0, 1]; 0 for empty ones."""
        return {n: c / max(self.size(n), 1) for n, c in self.counts().items()}

    def summary(self) -> str:
        """Coverage and density per parameter as an aligned table, totals last."""
        return words.table(self)

    def __repr__(self) -> str:
        return f"<SaliencyMask of {words.line(self)}>"

    # --- on disk ----------------------------------------------------------------------------------

    def digest(self) -> str:
        """sha256 over names, shapes and bits."""
        sha = hashlib.sha256()
        for name in sorted(self._bits):
            sha.update(f"{name}{list(self.shapes[name])}".encode())
            sha.update(self._bits[name].cpu().numpy().tobytes())
        return sha.hexdigest()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file, whole or not at all.

        It holds uint8 tensors by name; the header has shapes, provenance and checksums.
        """
        save_mask(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "SaliencyMask":
        """Read what ``save`` wrote.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not a mask file, truncated, or changed since it was written.
        """
        return load_mask(path, cls)
