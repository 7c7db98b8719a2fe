"""The type of all errors that a user can cause. Any other error is a bug and keeps its traceback."""


class UserError(ValueError):
    """Bad input, stated in one line: which file or field, what is wrong, what to do.

    The commands print it as `error: ...` and exit with status 2.
    """
