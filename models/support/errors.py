"""The errors that a user can cause or cure."""


class UserError(RuntimeError):
    """An error whose message says it all: the command line shows it without a traceback."""
