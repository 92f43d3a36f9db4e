"""How everything that takes long says how far it is: one hook for recipes, drawing, attacks and training."""

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called after every step with the stage's name, the steps done and the steps of the whole run."""


def silent(stage: str, done: int, total: int) -> None:
    """Say nothing."""


def part(progress: Progress, before: int, total: int) -> Progress:
    """Return the hook of a part that starts after `before` of the whole run's `total` steps."""
    return lambda stage, done, _: progress(stage, before + done, total)
