"""How the package refuses and how it warns: what was expected, what was found, and the remedy."""

import functools
import inspect
import math
import operator
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

# torch's decorators lie between the caller and an optimizer
PASSED = (__name__.partition(".")[0], "torch")
# what float() raises; RuntimeError: of a tensor of several elements
NO_NUMBER = (TypeError, ValueError, OverflowError, RuntimeError)


def require(condition: bool, argument: str, expected: str, found: object, remedy: str = "") -> None:
    """Raise ValueError unless ``condition``."""
    if not condition:
        raise ValueError(
            f"{argument}: expected {expected}, found {found}{'; ' + remedy if remedy else ''}"
        )


def number(
    argument: str, value: Any, low: float, high: float = math.inf, *, open_low: bool = False
) -> float:
    """The value, a finite number in [low, high], or (low, high] with ``open_low``."""
    if isinstance(value, (str, bool)):  # float() would read one
        require(False, argument, _interval(low, high, open_low), repr(value))
    try:  # words only for what is refused: a compiler's symbolic number has none
        value = float(value)
    except NO_NUMBER:
        require(False, argument, _interval(low, high, open_low), repr(value))
    inside = (value > low if open_low else value >= low) and value <= high and value != math.inf
    if not inside:  # NaN fails both comparisons
        require(False, argument, _interval(low, high, open_low), value)
    return value


def _interval(low: float, high: float, open_low: bool) -> str:
    return f"a number in {'(' if open_low else '['}{low}, {high}{')' if high == math.inf else ']'}"


def by_keyword(function: Callable[P, R]) -> Callable[P, R]:
    """A function whose loaders or sets are keyword-only, with a TypeError that shows the form.

    Python's own error counts the arguments; this one says how to write the call. The signature
    stays: what comes before ``*`` may be given by position, what has no default behind it is shown.
    """
    own = ("self", "cls")
    parameters = list(inspect.signature(function).parameters.values())
    front = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    named = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty]
    name = function.__qualname__.removesuffix(".__init__")
    shown = [*(n for n in front if n not in own), *(f"{n}=..." for n in named)]

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        extra = len(args) - len(front)
        if extra > 0:
            raise TypeError(
                f"{name}: expected {name}({', '.join(shown)}), found {extra} more by position; say"
                " which is which"
            )
        return function(*args, **kwargs)

    return checked


def integer(argument: str, value: Any, low: int, high: int | None = None) -> int:
    """The value, an integer >= ``low``, and <= ``high`` if there is one: Python's, numpy's, or
    whatever else can stand for one in an index.
    """
    wanted = f"an integer >= {low}" if high is None else f"an integer from {low} to {high}"
    try:
        whole = operator.index(value)
    except (TypeError, RuntimeError, ValueError):  # torch's tensors of several elements
        require(False, argument, wanted, repr(value))
    require(low <= whole and (high is None or whole <= high), argument, wanted, whole)
    return whole


_listening: list[list[str]] = []


@contextmanager
def noting(said: list[str]) -> Iterator[None]:
    """Within, what ``warn`` says is added to ``said`` too, whatever the filters show of it."""
    _listening.append(said)
    try:
        yield
    finally:
        _listening.pop()


def warn(message: str) -> None:
    """A RuntimeWarning at the first frame outside this package and torch."""
    for said in _listening:
        said.append(message)
    level, frame = 1, sys._getframe()
    while (
        frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in PASSED
    ):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, RuntimeWarning, stacklevel=level)
