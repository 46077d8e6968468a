"""Paths that users give: local ones, and URLs such as gs://bucket/run.

Whatever can live in object storage (runs, data sets, token caches) goes through `as_path`; whatever cannot
(the compile cache, temporary files, files that are memory-mapped) through `local_path`, which refuses a URL.
"""

import os
import re

from etils import epath

_URL = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)


def is_remote(path: str | os.PathLike) -> bool:
    """Whether a path is a URL (gs://, s3://, memory://, ...)."""
    return bool(_URL.match(os.fspath(path)))


def as_path(path: str | os.PathLike) -> epath.Path:
    """An absolute path, `~` expanded; a URL stays as it is."""
    path = os.fspath(path)
    if is_remote(path):
        return epath.Path(path)
    return epath.Path(os.path.abspath(os.path.expanduser(path)))


def local_path(path: str | os.PathLike, name: str) -> epath.Path:
    """An absolute path on this machine.

    Args:
      path: given by the user.
      name: the flag or config field that it was given by, for the message.

    Raises:
      ValueError: on a URL.
    """
    if is_remote(path):
        raise ValueError(
            f"{name}={os.fspath(path)}: must be a local path. Copy it to this machine, or mount the bucket "
            "(gcsfuse for gs://) and give the path of the mount."
        )
    return as_path(path)
