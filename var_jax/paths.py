"""Paths given by users: local paths, and URLs such as gs://bucket/run.

Paths of things that can be in object storage (runs, data sets, token caches) go through `as_path`. Paths of
things that cannot (the compile cache, temporary files, memory-mapped files) go through `local_path`, which
rejects a URL.
"""

import os
import re
import sys

import fsspec.config
from etils import epath

_URL = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_STORES = ("gs://", "s3://", "az://", "hf://")  # URL schemes that epath supports

# By default gcsfs caches listings forever and does not see files written by other processes or TensorStore.
fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)


def is_remote(path: str | os.PathLike) -> bool:
    """Return True if a path is a URL (gs://, s3://, http://, ...)."""
    return bool(_URL.match(os.fspath(path)))


def as_path(path: str | os.PathLike) -> epath.Path:
    """Return an absolute path with `~` expanded; a URL is returned unchanged.

    Raises:
      ValueError: on a URL whose scheme is not supported.
    """
    path = os.fspath(path)
    if is_remote(path):
        if not path.startswith(_STORES):
            raise ValueError(f"{path}: must be a local path, or start with one of {', '.join(_STORES)}")
        return epath.Path(path)
    return epath.Path(os.path.abspath(os.path.expanduser(path)))


def local_path(path: str | os.PathLike, name: str) -> epath.Path:
    """Return an absolute path on this machine; reject a URL.

    Args:
      path: given by the user.
      name: flag or config field of the path, for the message.

    Raises:
      ValueError: on a URL.
    """
    if is_remote(path):
        raise ValueError(
            f"{name}={os.fspath(path)}: must be a local path. Copy it to this machine, or mount the bucket "
            "(gcsfuse for gs://) and give the path of the mount."
        )
    return as_path(path)


def storage_errors() -> tuple[type[Exception], ...]:
    """Return the exception types of file access: OSError, and those of the loaded object-storage clients.

    Use as `except storage_errors()`: it is evaluated when an error is raised, and by then the client's module
    is loaded.
    """
    client_errors = (
        ("gcsfs.retry", "HttpError"),
        ("aiohttp", "ClientError"),
        ("google.auth.exceptions", "GoogleAuthError"),
    )
    return (
        OSError,
        *(getattr(sys.modules[module], name) for module, name in client_errors if module in sys.modules),
    )


def write_atomic(path: os.PathLike, content: bytes) -> epath.Path:
    """Write a file atomically, creating its parent directory, and return its path.

    Raises:
      OSError: if it cannot be written, e.g. on a full disk; an existing file stays unchanged.
    """
    path = as_path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if is_remote(path):  # an object appears only when its upload is complete
        path.write_bytes(content)
        return path
    partial = path.with_name(f"{path.name}.partial")
    try:
        partial.write_bytes(content)
        return partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
