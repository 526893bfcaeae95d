"""The one exception that is meant for the person at the terminal."""


class UsageError(Exception):
    """A mistake that the person who started the command can put right.

    The message is one line that says what is wrong, where, and what to do. The command line prints it
    without a traceback and leaves with exit code 2.
    """


class DivergenceError(Exception):
    """A loss or gradient that is not finite. The message names the step; the last checkpoint is sound."""
