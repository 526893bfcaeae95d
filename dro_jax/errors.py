"""What the person at the terminal is told: mistakes in one line, and how settings are checked."""

from collections.abc import Sequence


class UsageError(Exception):
    """A mistake that the person who started the command can put right.

    The message is one line that says what is wrong, where, and what to do. The command line prints it
    without a traceback and leaves with exit code 2.
    """


class DivergenceError(Exception):
    """A loss or gradient that is not finite. The message names the step; the last checkpoint is sound."""


def check_number(
    name: str,
    value: object,
    *,
    whole: bool = False,
    at_least: float = 0,
    above: float | None = None,
) -> None:
    """Raises UsageError, naming the setting, unless its value is a finite number within bounds.

    Args:
      name: of the setting, as a person writes it.
      value: what was given.
      whole: whether it has to be an integer.
      at_least: smallest value allowed.
      above: where given, the value has to be greater than this instead.
    """
    kind = int if whole else (int, float)
    fits = isinstance(value, kind) and not isinstance(value, bool) and abs(value) < float("inf")
    if fits and (value > above if above is not None else value >= at_least):  # type: ignore[operator]
        return
    bound = f"greater than {above:g}" if above is not None else f"of at least {at_least:g}"
    raise UsageError(f"{name} is {value!r}: give a {'whole ' if whole else ''}number {bound}")


def check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    """Raises UsageError, naming the setting, unless its value is one of the choices."""
    if value not in choices:
        raise UsageError(f"{name} is {value!r}: give one of {', '.join(map(repr, choices))}")
