"""Errors for users: a command prints their message alone, and every other error with its traceback."""

import contextlib


class UserError(Exception):
    """Base class of errors whose message says what is wrong and what to do about it."""


class ConfigError(UserError, ValueError):
    """Invalid config field, flag or file; the message names it."""


@contextlib.contextmanager
def config_errors(*types: type[Exception], prefix: str = ""):
    """Convert errors raised while reading or checking user input into a ConfigError.

    Never wrap computation: a ValueError there is a bug, and its traceback is needed.

    Args:
      types: errors to convert; ValueError and FileNotFoundError by default.
      prefix: prepended to the message, to name the field or flag if the message does not.
    """
    types = types or (ValueError, FileNotFoundError)
    try:
        yield
    except UserError:
        raise
    except types as error:
        raise ConfigError(f"{prefix}{error}") from error
