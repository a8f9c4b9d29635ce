"""What SFRonSGD and SFRonAdamW have to do, parameter by parameter, over reference.py, in dicts.

No groups of tensors, no flat state, no native kernels. Names stand for parameters; a mask is bool
or None.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sfron_fast.ops import reference
from sfron_fast.ops.interpolate import lerp
from sfron_fast.ops.moment_codes import decode, encode, has_codes, scales_shape
from sfron_fast.ops.reference import pack_bits
from sfron_fast.ops.split_weights import CORRECTIONS, join, split

EMPTY = torch.empty(0, dtype=torch.uint8)  # of a mask: every weight is selected


@dataclass
class Obvious:
    """``groups``: the optimizer's settings, each with its ``names``; ``masks`` hold the masked
    parameters only.
    """

    groups: list[dict[str, Any]]
    params: dict[str, Tensor]
    masks: Mapping[str, Tensor]
    adamw: bool
    state: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    frozen: frozenset[str] = frozenset()
    pending: int = 0
    skipped: int = 0
    norm: Tensor | None = None

    def forget(
        self, grads: dict[str, Tensor | None], grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> None:
        self._measure(grads, grad_scale, found_inf, masked=True)
        for group in self.groups:
            for name in group["names"]:
                if group["slow_lr"] < 1.0 and (
                    grads[name] is not None or "slow" in self.state.get(name, {})
                ):
                    self._start_slow(group, name)
                if grads[name] is not None:
                    self._update(
                        group, name, grads[name], grad_scale, found_inf, self.norm, forget=True
                    )
        self.pending = self.groups[0]["retain_steps"]

    def retain(
        self, grads: dict[str, Tensor | None], grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> None:
        present = [g for g in grads.values() if g is not None]
        if (
            present
            and not any(bool(g.any()) for g in present)
            and all(group["lr"] == 0 for group in self.groups)
        ):
            # what a checkpoint asks for in this way is no step, and measures nothing
            self._make_state()
            self.norm = None
            return
        clip = self.groups[0]["clip_retain"]
        if clip:
            self._measure(grads, grad_scale, found_inf, masked=False)
        elif found_inf is not None and any(g is not None for g in grads.values()):
            self.skipped += bool(found_inf != 0)
        for group in self.groups:
            for name in group["names"]:
                # it has not moved so far
                if grads[name] is not None and self.pending and group["slow_lr"] < 1.0:
                    self._start_slow(group, name, again=False)
                slow = (
                    self.state.get(name, {}).get("slow")
                    if self.pending == 1 and group["slow_lr"] < 1.0
                    else None
                )
                norm = self.norm if clip else None
                if grads[name] is not None:
                    self._update(
                        group,
                        name,
                        grads[name],
                        grad_scale,
                        found_inf,
                        norm,
                        forget=False,
                        slow=slow,
                    )
                elif slow is not None:
                    self._blend(group, name, slow)
        self.pending = max(0, self.pending - 1)

    def _start_slow(self, group: dict[str, Any], name: str, again: bool = True) -> None:
        """Where the cycle begins; ``again``: also where another one has begun."""
        state = self.state.setdefault(name, {})
        if again or "slow" not in state:
            state["slow"] = self.params[name].clone()
        if group["weight_bits"] and (again or "slow_correction" not in state):
            state["slow_correction"] = self._correction(group, name).clone()

    def _blend(self, group: dict[str, Any], name: str, slow: Tensor) -> None:
        """The end of a cycle without a gradient."""
        state, param = self.state[name], self.params[name]
        if not group["weight_bits"]:
            return reference.interpolate_([slow], [param], group["slow_lr"])
        fast = join(param, self._correction(group, name))
        new = lerp(join(slow, state["slow_correction"]), fast, group["slow_lr"])
        step = int(state["step"]) + 1 if "step" in state else 0
        weight, correction = split(new, step, state["correction"].dtype)
        for target, value in ((param, weight), (slow, weight)):
            target.copy_(value)
        state["correction"].copy_(correction)
        state["slow_correction"].copy_(correction)

    def _correction(self, group: dict[str, Any], name: str) -> Tensor:
        dtype = CORRECTIONS[group["weight_bits"]]
        zeros = torch.zeros_like(self.params[name], dtype=dtype)
        return self.state.setdefault(name, {}).setdefault("correction", zeros)

    def code_again(self) -> None:
        """As a state dict goes through fp32: the same codes, but where a scale is not finite."""
        for state in self.state.values():
            for key in [key for key in state if key.endswith("scales")]:
                begin, places = key.removesuffix("scales"), state[key].unbind(-1)
                names = ("exp_avg", "exp_avg_sq") if self.adamw else ("momentum_buffer",)
                for name, scales in zip(names, places, strict=True):
                    codes = state[begin + name]
                    again, factors = encode(decode(codes, scales), None, codes.dtype)
                    if scales.isfinite().all():
                        assert torch.equal(again, codes)
                    codes.copy_(again)
                    scales.copy_(factors)

    def _make_state(self) -> None:
        for group in self.groups:
            kinds = ("exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if group.get("amsgrad") else []))
            keys = kinds if self.adamw else ("momentum_buffer",) if group["momentum"] else ()
            prefixes = ("", "forget_") if group["moments"] == "separate" else ("",)
            for name in (n for n in group["names"] if n not in self.frozen):
                for key in [prefix + key for prefix in prefixes for key in keys]:
                    self._entry(group, name, key)
                for prefix in prefixes if keys else ():
                    self._scales(group, name, prefix)
                counted = prefixes if self.adamw or has_counts(group) else ()
                if has_counts(group) and group["moments"] == "none":
                    counted = ("", "forget_")
                for prefix in counted:
                    self._count(name, prefix)
                if group["weight_bits"]:
                    self._correction(group, name)
                if group["slow_lr"] < 1.0:
                    self._start_slow(group, name, again=False)

    def _measure(
        self,
        grads: dict[str, Tensor | None],
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        *,
        masked: bool,
    ) -> None:
        present = {n: g for n, g in grads.items() if g is not None}
        if not present:
            self.norm = None
            return
        bits = [pack_bits(self.masks[n]) if masked and n in self.masks else EMPTY for n in present]
        self.norm = reference.masked_grad_norm(list(present.values()), bits, grad_scale)
        self.skipped += bool(
            not torch.isfinite(self.norm) or (found_inf is not None and found_inf != 0)
        )

    def _update(
        self,
        group: dict[str, Any],
        name: str,
        grad: Tensor,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        norm: Tensor | None,
        *,
        forget: bool,
        slow: Tensor | None = None,
    ) -> None:
        lists = [self.params[name]], [grad]
        masks = [pack_bits(self.masks[name])] if forget and name in self.masks else []
        slow_from = [] if slow is None else [slow]
        corrections = [self._correction(group, name)] if group["weight_bits"] else []
        theirs = [self.state[name]["slow_correction"]] if corrections and slow_from else []
        rest = [corrections, [], [], slow_from, theirs, masks, norm, grad_scale, found_inf]
        own = group["forget_lr"] is not None and forget
        rule = {
            "lr": float(group["forget_lr"] if own else group["lr"]),
            "maximize": group["maximize"],
            "freeze_masked": forget and group["mask_semantics"] == "update",
            "slow_lr": group["slow_lr"],
            "max_norm": (
                math.inf if norm is None or group["max_norm"] is None else group["max_norm"]
            ),
        }
        prefix = "forget_" if forget and group["moments"] == "separate" else ""
        plain = {
            "momentum": 0.0,
            "dampening": 0.0,
            "weight_decay": 0.0,
            "nesterov": False,
            "first": False,
        }
        if forget and group["moments"] == "none":
            steps = [self._count(name, "forget_")] if has_counts(group) else []
            reference.sgd_step_(*lists, [], [], steps, *rest, **rule, **plain)
        elif self.adamw:
            keys = ["exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if group["amsgrad"] else [])]
            states = [[self._entry(group, name, prefix + key)] for key in keys] + [[]] * (
                not group["amsgrad"]
            )
            steps = self._count(name, prefix)
            beta1, beta2 = group["betas"]
            reference.adamw_step_(
                *lists,
                *states,
                self._scales(group, name, prefix),
                [steps],
                *rest,
                **rule,
                beta1=beta1,
                beta2=beta2,
                eps=group["eps"],
                weight_decay=group["weight_decay"],
                decoupled=group["decoupled_weight_decay"],
            )
        else:
            same = {
                key: group[key] for key in ("momentum", "dampening", "weight_decay", "nesterov")
            }
            key, buffers = f"{prefix}momentum_buffer", []
            first = key not in self.state.get(name, {})
            if group["momentum"]:
                buffers = [self._entry(group, name, key)]
            scales = self._scales(group, name, prefix) if buffers else []
            steps = [self._count(name, prefix)] if has_counts(group) else []
            reference.sgd_step_(*lists, buffers, scales, steps, *rest, **rule, **same, first=first)

    def _entry(self, group: dict[str, Any], name: str, key: str) -> Tensor:
        param, dtype = self.params[name], group["state_dtype"]
        if dtype == torch.int8 and not has_codes(param):
            dtype = torch.float32
        elif dtype == torch.int8 and key.endswith("_sq"):
            dtype = torch.uint8
        elif dtype is None and group["weight_bits"]:
            dtype = torch.float32
        zeros = torch.zeros_like(param, dtype=dtype or param.dtype)
        return self.state.setdefault(name, {}).setdefault(key, zeros)

    def _scales(self, group: dict[str, Any], name: str, prefix: str) -> list[Tensor]:
        """Of moments in codes; without elements where they are none."""
        param = self.params[name]
        if group["state_dtype"] != torch.int8 or not has_codes(param):
            return []
        zeros = torch.zeros(scales_shape(param, 2 if self.adamw else 1))
        return [self.state.setdefault(name, {}).setdefault(f"{prefix}scales", zeros)]

    def _count(self, name: str, prefix: str) -> Tensor:
        return self.state.setdefault(name, {}).setdefault(f"{prefix}step", torch.zeros(()))


def has_counts(group: dict[str, Any]) -> bool:
    """Whether something is dithered."""
    return group["weight_bits"] is not None or group["state_dtype"] == torch.int8
