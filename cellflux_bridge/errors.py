"""The one exception that a user's mistake raises; the command line prints it without a traceback."""


class UserError(ValueError):
    """A mistake in a file, key or value that the user can mend; the message says which and how."""
