"""The one exception that a user's mistake raises; the command line prints it without a traceback."""

from collections.abc import Sequence


class UserError(ValueError):
    """A mistake in a file, key or value that the user can mend; the message says which and how."""


def abbreviate(items: Sequence[str], *, limit: int = 5) -> str:
    """The first few items of a list, and how many more there are."""
    rest = len(items) - limit
    return ", ".join(items[:limit]) + (f" and {rest} more" if rest > 0 else "")
