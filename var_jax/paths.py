"""Paths that users give: local ones, and URLs such as gs://bucket/run.

Whatever can live in object storage (runs, data sets, token caches) goes through `as_path`; whatever cannot
(the compile cache, temporary files, files that are memory-mapped) through `local_path`, which refuses a URL.
"""

import os
import re
import sys

import fsspec.config
from etils import epath

_URL = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
# gcsfs keeps listings for ever, and learns of no file that another process or TensorStore writes.
fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)


_STORES = ("gs://", "s3://", "az://", "hf://")  # that epath knows


def is_remote(path: str | os.PathLike) -> bool:
    """Whether a path is a URL (gs://, s3://, http://, ...)."""
    return bool(_URL.match(os.fspath(path)))


def as_path(path: str | os.PathLike) -> epath.Path:
    """An absolute path, `~` expanded; a URL stays as it is.

    Raises:
      ValueError: on a URL of a kind that there is no file system for.
    """
    path = os.fspath(path)
    if is_remote(path):
        if not path.startswith(_STORES):
            raise ValueError(f"{path}: must be a local path, or start with one of {', '.join(_STORES)}")
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


def storage_errors() -> tuple[type[Exception], ...]:
    """Errors with which files, local or in a bucket, fail; what reaches a bucket raises some of its own.

    For `except storage_errors()`, which asks when an error is there: by then its module is loaded.
    """
    own = (
        ("gcsfs.retry", "HttpError"),
        ("aiohttp", "ClientError"),
        ("google.auth.exceptions", "GoogleAuthError"),
    )
    return (OSError, *(getattr(sys.modules[module], name) for module, name in own if module in sys.modules))


def write_whole(path: os.PathLike, content: bytes) -> epath.Path:
    """Write a file, making its folder; a half-written one never takes its name.

    Raises:
      OSError: where there is no room; what stood under the name before stays.
    """
    path = as_path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if is_remote(path):  # an object appears when its upload ends
        path.write_bytes(content)
        return path
    partial = path.with_name(f"{path.name}.partial")
    try:
        partial.write_bytes(content)
        return partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
