"""Errors that a user can mend: shown as one line, without a traceback."""


class UserError(Exception):
    """A wrong input; its text is one line that names the key, file or rank, the value and the rule."""
