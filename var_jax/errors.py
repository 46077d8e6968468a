"""Errors that users can mend: a command prints the message alone, every other error with its traceback."""

import contextlib


class UserError(Exception):
    """Base of errors whose message says what is wrong and what to do about it."""


class ConfigError(UserError, ValueError):
    """A config field, flag or file that makes no run; the message names it."""


@contextlib.contextmanager
def config_errors(*types: type[Exception], prefix: str = ""):
    """Convert the errors of a check into a ConfigError.

    Only around checks, and the reading, of what the user gave, never around work: there a ValueError is a
    bug, whose traceback is needed.

    Args:
      types: errors to convert; ValueError and FileNotFoundError by default.
      prefix: of the message; names the field or flag where the message does not.
    """
    types = types or (ValueError, FileNotFoundError)
    try:
        yield
    except UserError:
        raise
    except types as error:
        raise ConfigError(f"{prefix}{error}") from error
