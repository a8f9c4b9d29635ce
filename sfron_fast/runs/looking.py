"""Looks at a model along a run, which must not change the run."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

from ..data.endless import EndlessLoader, random_state, set_random_state
from ..tasks import Task


@contextmanager
def leaving_no_trace(task: Task, *loaders: EndlessLoader) -> Iterator[None]:
    """Within, generators may be drawn from, global ones, the task's, and those of the loaders,
    which others may share; after, they are where they were.
    """
    state, own = random_state(), [loader.own_state() for loader in loaders]
    drawn = copy.deepcopy(task.state_dict())
    yield
    set_random_state(state)
    task.load_state_dict(drawn)
    for loader, generators in zip(loaders, own, strict=True):
        loader.set_own_state(generators)
