"""SaliencyMask: which weights a forget step may change, one bit each (README equation 3, paper m)."""

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from . import functional, reference
from .checks import number, require
from .cuts import check_cuts
from .files import write_whole
from .naming import canonical_name
from .shards import local_bits, whole, whole_bits

_log = logging.getLogger(__name__)

FORMAT = "sfron_fast.saliency_mask.v1"


class SaliencyMask(Mapping[str, Tensor]):
    """Parameter name -> packed bits, uint8 [ceil(n / 8)]; bit i % 8 of byte i // 8 is element i, flattened.

    ``shapes`` holds the parameters' shapes, ``metadata`` how the mask was made (JSON values).
    """

    def __init__(
        self, bits: dict[str, Tensor], shapes: dict[str, tuple[int, ...]], metadata: dict[str, Any] | None = None
    ) -> None:
        self.shapes = {canonical_name(n): tuple(s) for n, s in shapes.items()}
        self._bits = {canonical_name(n): b for n, b in bits.items()}
        self.metadata = dict(metadata or {})
        require(self._bits.keys() == self.shapes.keys(), "shapes", "a shape for every mask", sorted(shapes))
        require(len(self) == len(bits), "bits", "names that differ also without wrappers' prefixes", sorted(bits))
        for name, packed in self._bits.items():
            size = (self.size(name) + 7) // 8
            ok = packed.dtype == torch.uint8 and packed.shape == (size,)
            require(ok, f"bits[{name!r}]", f"uint8 [{size}]", f"{packed.dtype} {list(packed.shape)}")
            spare = 8 * size - self.size(name)
            clean = not spare or int(packed[-1]) >> (8 - spare) == 0
            require(clean, f"bits[{name!r}]", "unused high bits of the last byte zero", "others")

    def __getitem__(self, name: str) -> Tensor:
        return self._bits[canonical_name(name)]

    def __iter__(self):
        return iter(self._bits)

    def __len__(self) -> int:
        return len(self._bits)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SaliencyMask) and self.digest() == other.digest()

    __hash__ = None  # type: ignore[assignment]

    # --- making one ---------------------------------------------------------------------------------------------

    @classmethod
    def from_fisher(
        cls, forget: Mapping[str, Tensor], retain: Mapping[str, Tensor], threshold: float = 1.0
    ) -> "SaliencyMask":
        """1[F_forget + 1e-15 >= threshold (F_retain + 1e-15)], elementwise.

        Weights no gradient reached are never selected; where both Fishers are exactly 0 although a gradient
        exists (dead weights) the ratio is 1, as in the authors' code.

        Args:
            forget, retain: name -> fp32 Fisher of the parameter's shape (``estimate_fisher``, or any mapping).
            threshold: gamma > 0.
        Raises:
            ValueError: different names, shapes or estimators, a threshold out of range, a non-finite Fisher.
        """
        number("threshold", threshold, 0.0, open_low=True)
        names = checked_fishers(forget, retain)
        packed, _ = functional.saliency_mask([forget[n] for n in names], [retain[n] for n in names], threshold)
        return cls.from_packed(packed, forget, retain, threshold)

    @classmethod
    def from_packed(
        cls, packed: list[Tensor], forget: Mapping[str, Tensor], retain: Mapping[str, Tensor], threshold: float
    ) -> "SaliencyMask":
        """From the bits that ``functional`` selected of two Fishers, in their order; see ``from_fisher``.

        Of DTensors they are the shards' bits; the mask is whole on every rank.
        """
        whole_packed = map(whole_bits, packed, forget.values())
        bits = _without_gradient(dict(zip(forget, whole_packed, strict=True)), forget, retain)
        shapes = {n: tuple(f.shape) for n, f in forget.items()}
        return cls(bits, shapes, {"threshold": threshold, **_provenance(forget, retain)})

    @classmethod
    def top_k(
        cls, forget: Mapping[str, Tensor], retain: Mapping[str, Tensor], fraction: float, *, per_layer: bool = False
    ) -> "SaliencyMask":
        """The ``fraction`` of weights with the largest ratio F_forget / F_retain, over all or in each tensor.

        Exactly round(fraction n) weights are selected; ties go to the lower index.
        """
        number("fraction", fraction, 0.0, 1.0, open_low=True)
        names = checked_fishers(forget, retain)
        eps = reference.FISHER_EPS
        ratios = {n: whole((forget[n] + eps) / (retain[n] + eps)).reshape(-1) for n in names}
        no_gradient = _no_gradient(forget, retain)
        for name in no_gradient & ratios.keys():
            ratios[name].zero_()
        if per_layer:
            chosen = {n: _largest(r, fraction) for n, r in ratios.items()}
        else:
            everything = _largest(torch.cat(list(ratios.values())), fraction)
            parts = everything.split([r.numel() for r in ratios.values()])
            chosen = dict(zip(names, parts, strict=True))
        bits = _without_gradient({n: reference.pack_bits(c) for n, c in chosen.items()}, forget, retain)
        made = {"top_k": fraction, "per_layer": per_layer, **_provenance(forget, retain)}
        return cls(bits, {n: forget[n].shape for n in names}, made)

    @classmethod
    def from_bool(cls, masks: Mapping[str, Tensor], metadata: dict[str, Any] | None = None) -> "SaliencyMask":
        """From name -> bool (or 0/1) tensors of the parameters' shapes.

        SalUn's files: ``from_bool(torch.load(path, weights_only=True))``.
        """
        for name, mask in masks.items():
            binary = isinstance(mask, Tensor) and bool(((mask == 0) | (mask == 1)).all())
            require(binary, f"masks[{name!r}]", "a tensor of zeros and ones", type(mask).__name__)
        bits = {n: reference.pack_bits(m.to(torch.bool)) for n, m in masks.items()}
        return cls(bits, {n: tuple(m.shape) for n, m in masks.items()}, metadata)

    # --- using it -------------------------------------------------------------------------------------------------

    def coverage(self, named_parameters: Iterable[tuple[str, nn.Parameter]]) -> dict[str, list[str]]:
        """Names of the parameters that are "matched" or "unmatched", and of the masks that are "unused"."""
        names = {canonical_name(n): n for n, _ in named_parameters}
        found = {"matched": [n for c, n in names.items() if c in self._bits]}
        found["unmatched"] = [n for c, n in names.items() if c not in self._bits]
        return {**found, "unused": [n for n in self._bits if n not in names]}

    def resolve(self, named_parameters: Iterable[tuple[str, nn.Parameter]]) -> list[Tensor]:
        """Packed masks on each parameter's device, in order. Logs (INFO) how many were matched, unmatched, unused.

        Of a DTensor the mask of the local shard.

        Raises:
            ValueError: a parameter without mask, or a mask of another shape; both mean another model's mask.
        """
        named = list(named_parameters)
        coverage = self.coverage(named)
        _log.info("saliency: %s", ", ".join(f"{len(names)} {kind}" for kind, names in coverage.items()))
        missing = coverage["unmatched"]
        if missing:
            frozen = not any(p.requires_grad for n, p in named if n in missing)
            remedy = "they are frozen: pass only parameters with requires_grad" if frozen else (
                "build it on this model as it is trained, adapters included, or put unmasked parameters in a group "
                "with masked=False"
            )
            raise ValueError(
                f"saliency: expected a mask for each of {len(named)} parameters, found none for {len(missing)} "
                f"({_some(missing)}); the mask is for {len(self)} ({_some(list(self))}); {remedy}"
            )
        for name, parameter in named:
            shape = self.shapes[canonical_name(name)]
            require(tuple(parameter.shape) == shape, f"saliency[{name!r}]", f"shape {tuple(parameter.shape)}", shape,
                    "this mask belongs to another model")  # fmt: skip
        return [local_bits(self[n], p) for n, p in named]

    def to_bool(self, name: str) -> Tensor:
        """The mask of one parameter as bool of its shape."""
        return reference.unpack_bits(self[name], self.shapes[canonical_name(name)])

    def size(self, name: str) -> int:
        """Number of weights of one parameter."""
        return torch.Size(self.shapes[canonical_name(name)]).numel()

    def counts(self) -> dict[str, int]:
        """Selected weights per parameter."""
        table = torch.tensor([bin(i).count("1") for i in range(256)])
        return {n: int(table.to(b.device)[b.long()].sum()) for n, b in self._bits.items()}

    def density(self) -> dict[str, float]:
        """Share of selected weights per parameter, in [0, 1]; 0 for empty ones."""
        return {n: c / max(self.size(n), 1) for n, c in self.counts().items()}

    def summary(self) -> str:
        """Coverage and density per parameter as an aligned table, totals last."""
        counts = self.counts()
        width = max([len(n) for n in counts] + [5])
        rows = [f"{'':{width}}  {'weights':>12}  {'selected':>12}  {'density':>8}"]
        total = (sum(map(self.size, counts)), sum(counts.values()))
        for name, size, count in [*((n, self.size(n), c) for n, c in counts.items()), ("total", *total)]:
            rows.append(f"{name:{width}}  {size:12,}  {count:12,}  {100 * count / max(size, 1):7.2f}%")
        return "\n".join(rows)

    # --- on disk --------------------------------------------------------------------------------------------------

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
        path = Path(path)
        provenance = json.dumps(self.metadata)
        header = {"format": FORMAT, "shapes": json.dumps(self.shapes), "provenance": provenance,
                  "digest": self.digest(), "provenance_digest": _sha256(provenance)}  # fmt: skip
        bits = {n: b.cpu().contiguous() for n, b in self._bits.items()}
        write_whole(path, lambda temporary: save_file(bits, temporary, metadata=header))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "SaliencyMask":
        """Read what ``save`` wrote.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not a mask file, truncated, or changed since it was written.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"path: expected a mask file, found nothing at {path}")
        try:
            with safe_open(path, framework="pt") as file:
                header = file.metadata() or {}
                bits = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            require(header.get("format") == FORMAT, "path", f"a mask in format {FORMAT}", header.get("format"))
            shapes = {n: tuple(map(int, s)) for n, s in json.loads(header["shapes"]).items()}
            mask = cls(bits, shapes, json.loads(header["provenance"]))
            intact = mask.digest() == header["digest"] and _sha256(header["provenance"]) == header["provenance_digest"]
        except (SafetensorError, KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"path: expected a whole mask file, found {path}: {error}; save the mask again") from error
        require(intact, "path", "a mask file as it was saved", f"{path}, which does not match its checksums",
                "save the mask again")  # fmt: skip
        return mask


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (" ..." if len(names) > 5 else "")


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def checked_fishers(forget: Mapping[str, Tensor], retain: Mapping[str, Tensor]) -> list[str]:
    """The names, in order, of two Fishers that can be compared; see ``SaliencyMask.from_fisher`` for the errors."""
    require(bool(forget), "forget", "at least one tensor", "an empty mapping")
    require(forget.keys() == retain.keys(), "retain", f"the names of forget ({len(forget)})",
            f"{len(retain)} names, {len(forget.keys() ^ retain.keys())} of them different")  # fmt: skip
    for side, fisher in (("forget", forget), ("retain", retain)):
        for name, f in fisher.items():
            sound = bool(torch.isfinite(f).all()) and bool((f >= 0).all())
            require(sound, f"{side}[{name!r}]", "finite values >= 0", "others", "check the loss and the data")
            shape = tuple(forget[name].shape)
            require(tuple(f.shape) == shape, f"{side}[{name!r}]", f"shape {shape}", tuple(f.shape))
    estimators = [getattr(f, "metadata", {}).get("estimator") for f in (forget, retain)]
    require(estimators[0] == estimators[1], "retain", f"estimator {estimators[0]!r} as forget", repr(estimators[1]),
            "a threshold compares like with like")  # fmt: skip
    check_cuts(getattr(forget, "metadata", {}), getattr(retain, "metadata", {}))
    return list(forget)


def _no_gradient(*fishers: Mapping[str, Tensor]) -> set[str]:
    """Parameters without gradient in every one of the Fishers."""
    return set.intersection(*(set(getattr(f, "metadata", {}).get("no_gradient", ())) for f in fishers))


def _without_gradient(bits: dict[str, Tensor], *fishers: Mapping[str, Tensor]) -> dict[str, Tensor]:
    gone = _no_gradient(*fishers)
    return {n: torch.zeros_like(b) if n in gone else b for n, b in bits.items()}


def _provenance(forget: Mapping[str, Tensor], retain: Mapping[str, Tensor]) -> dict[str, Any]:
    from . import __version__

    sides = {side: getattr(f, "metadata", {}) for side, f in (("forget", forget), ("retain", retain))}
    return {**sides, "versions": {"sfron_fast": __version__, "torch": torch.__version__}}


def _largest(values: Tensor, fraction: float) -> Tensor:
    """bool: the round(fraction n) largest values; ties go to the lower index."""
    k = round(fraction * values.numel())
    if k == 0:
        return torch.zeros_like(values, dtype=torch.bool)
    kth = values.kthvalue(values.numel() - k + 1).values
    above = values > kth
    ties = values == kth
    return above | (ties & (ties.cumsum(0) <= k - above.sum()))
