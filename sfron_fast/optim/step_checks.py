"""What a step is given, looked at before its first write: a refused step leaves all as it was.

An op looks at all it is given before it writes. A step is an op for each group, device and mesh, so
what the second would refuse must be found before the first.
"""

from typing import Any

import torch
from torch import Tensor

from ..distributed.shards import plain
from ..errors import number, require, warn
from ..ops.arguments import dense, state_dtypes, strided
from ..ops.layout import is_sharded
from ..ops.native import Tabled
from .amp import amp_scalar
from .batch import Batch
from .elsewhere import is_away
from .groups import GroupedOptimizer
from .scalars import NAMES, check_capture
from .state_kind import CODES, StateKind, is_coded
from .validation import COUNTS, check_dtypes

# what the end of a cycle reads of a parameter without a gradient
IDLE = {"slow", "correction", "count"}
CONVERT = (
    "optimizer.load_state_dict(optimizer.state_dict()) makes state like parameters that have been"
    " converted"
)


def check_step(
    optimizer: GroupedOptimizer,
    batches: list[Batch],
    idle: list[Batch],
    *,
    forget: bool,
    single: bool = False,
) -> None:
    """Raise what any op of this step would raise; then have state follow a new ``state_dtype``.

    Settings are looked at when they have changed; gradients and state where something is written
    before the last op looks: by another op (one for each parameter if ``single``), by copies of
    slow weights that are away, as state is made; and where tensors are reordered for the op.
    ``idle`` are parameters without gradient whose slow weights are set. Warns (RuntimeWarning) of a
    step of a cycle without any gradient.
    """
    groups = optimizer.param_groups
    check_capture(groups, [batch.params[0].device for batch in batches])
    if torch.compiler.is_compiling():
        return
    if not (batches or single) and (forget or (optimizer.mid_cycle and not optimizer.mid_step)):
        name, phase = ("forget_step", "forget") if forget else ("step", "retain")
        warn(
            f"{name} found no gradients, so this {phase} step of the cycle changed no fast weights;"
            f" call backward() on the {phase} loss first, and zero_grad() before that or after the"
            " step"
        )
    known = [[_value(g[k]) for k in optimizer.defaults if k not in COUNTS] for g in groups]
    changed = known != optimizer.checked_settings
    if changed:
        optimizer.check_groups()
    for batch in batches:  # a model may have been converted since
        check_dtypes(batch.group, batch.params)
    for name in ("grad_scale", "found_inf") if batches else ():
        amp_scalar(optimizer, name, batches[0].params[0].device)
    if changed:
        for group in groups:
            _check_conversion(optimizer, group)
    several = single or len(batches) + len(idle) > 1 or any(map(is_away, batches))
    if several or changed or any(b.orders or _makes_state(optimizer, b, forget) for b in batches):
        for batch in batches:
            check_batch(optimizer, batch, forget=forget, numbers=several)
    for batch in idle:
        used = optimizer.used_state(batch.group, forget=forget)
        used = {key: kind for key, kind in used.items() if kind.role in IDLE}
        _check_state(optimizer, batch, used)
    if changed:
        _convert_state(optimizer)
        for batch in batches:
            if batch.flat is not None:  # which takes over what is new
                batch.flat.serves(batch.flat.params, optimizer.state, batch.orders)
        optimizer.checked_settings = known


def _makes_state(optimizer: GroupedOptimizer, batch: Batch, forget: bool) -> bool:
    """Whether a step has to make an entry of a parameter's state."""
    flats = batch.flat.flats if batch.flat is not None else {}
    used = optimizer.used_state(batch.group, forget=forget)
    missing = {key: kind for key, kind in used.items() if key not in flats}
    return any(
        optimizer.state.get(param, {}).get(key) is None
        for param in (batch.params if missing else ())
        for key, kind in missing.items()
        if kind.role != "scale" or is_coded(param)
    )


def _value(setting: Any) -> Any:
    """What a setting is compared by: lists are copied, as they may be changed where they are."""
    if isinstance(setting, Tensor):
        return id(setting), setting.shape
    return tuple(setting) if isinstance(setting, list) else setting


def check_batch(
    optimizer: GroupedOptimizer, batch: Batch, *, forget: bool, numbers: bool = True
) -> None:
    """Raise what the ops of this batch would raise; without ``numbers`` no tensor is read."""
    kinds = batch.check()
    if type(batch.params) is not Tabled and plain(batch.params):
        strided("params", batch.params, True)
        strided("grads", batch.grads, False)
    if (
        numbers and batch.params[0].device.type == "cpu"
    ):  # elsewhere an op does not read them either
        for name in (*NAMES, "forget_lr"):
            value = batch.group[name]
            if isinstance(value, Tensor) and value.device.type == "cpu":
                number(name, value.item(), 0.0, 1.0 if name == "slow_lr" else float("inf"))
    used = optimizer.used_state(batch.group, forget=forget)
    if batch.flat is None or not batch.flat.made(used, kinds):
        _check_state(optimizer, batch, used)


def _check_state(optimizer: GroupedOptimizer, batch: Batch, used: dict[str, StateKind]) -> None:
    """The states of a step that are there already, by key."""
    moments = [key for key, kind in used.items() if kind.role == "moment"]
    for i, param in enumerate(batch.params):
        state = optimizer.state.get(param) or {}
        for key, kind in used.items():
            if state.get(key) is not None:
                _check_entry(kind, f"{key}[{i}]", state[key], param)
        dtypes = [
            state[key].dtype if state.get(key) is not None else used[key].dtype_of(param)
            for key in moments
        ]
        for key, dtype in zip(moments, dtypes, strict=True):
            alike = dtype == dtypes[0] or dtype in CODES
            require(alike, f"{key}[{i}]", f"dtype {dtypes[0]}, as {moments[0]}", dtype, CONVERT)


def _check_entry(kind: StateKind, where: str, value: Any, param: Tensor) -> None:
    dense(where, value, True)
    count = kind.role == "count"
    shape = kind.shape_of(param)
    if value.shape != shape and not (shape == () and value.numel() == 1):
        require(False, where, f"shape {tuple(shape)}", tuple(value.shape))
    if value.device != kind.device_of(param):
        require(False, where, f"device {kind.device_of(param)}", value.device, CONVERT)
    placed = count or is_sharded(value) == is_sharded(param)
    require(placed, where, "sharded as its parameter, or whole as it", "the other", CONVERT)
    by_role: dict[str, set[Any]] = {
        "moment": state_dtypes(param.dtype),
        "slow": {param.dtype},
        "count": {torch.float32},
        "scale": {torch.float32},
        "correction": {kind.dtype},
    }
    allowed = by_role[kind.role]
    if kind.dtype in CODES and kind.role == "moment":
        allowed = {kind.dtype_of(param)}
    if value.dtype not in allowed:
        names = " or ".join(sorted(map(str, allowed)))
        expected = f"dtype {names} beside a parameter of {param.dtype}"
        require(False, where, expected, value.dtype, CONVERT)


def _check_conversion(optimizer: GroupedOptimizer, group: dict[str, Any]) -> None:
    """Between codes and other dtypes, and between weights of one piece and of two, state is not
    converted in passing.
    """
    kinds = optimizer.known_kinds(group)
    for param in group["params"]:
        state = optimizer.state.get(param, {})
        for key, value in state.items():
            kind = kinds.get(key)
            role = "moment" if kind is None else kind.role
            if not isinstance(value, Tensor) or role != "moment":
                continue
            wanted = kind is not None and kind.dtype in CODES and is_coded(param)
            found = value.dtype in CODES and "correction" not in key
            names = {True: "codes", False: "a floating dtype"}
            if kind is not None:
                require(found == wanted, key, names[wanted], names[found], CONVERT)
        if group["weight_bits"] is None:
            require(
                state.get("correction") is None,
                "weight_bits",
                "24 or 32, as this run began",
                None,
                "save and load the weights to end it",
            )


def _convert_state(optimizer: GroupedOptimizer) -> None:
    """State that was made before its group's ``state_dtype`` was set to another one."""
    for group in optimizer.param_groups:
        if group["state_dtype"] is None:
            continue
        kinds = optimizer.known_kinds(group)
        for param in group["params"]:
            state = optimizer.state.get(param, {})
            for key, value in state.items():
                dtype = kinds[key].dtype_of(param) if key in kinds else None
                if dtype is not None and isinstance(value, Tensor) and value.dtype != dtype:
                    state[key] = value.to(dtype)
