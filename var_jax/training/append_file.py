"""Files that grow while a run lasts and outlive a hard kill of it, on every kind of storage."""

import contextlib
import os
import threading
import time

from var_jax.paths import as_path, is_remote, write_whole

SHARE = 0.05  # of the time at most is spent on writing


class AppendFile:
    """File that grows; what was flushed survives the process and the machine.

    A local file is opened and closed at each flush: mounts of object stores (gcsfuse) upload a file when it
    is closed.  An object cannot be appended to and is written again as a whole.  Where either takes long, a
    flush may leave the writing to one of the next.
    """

    def __init__(self, path: os.PathLike, content: bytes = b""):
        """Create the file with this content, in place of one that may be there."""
        self.path = as_path(path)
        self._size, self._pending = len(content), bytearray()
        self._whole = bytearray(content) if is_remote(self.path) else None
        self._next = 0.0  # no flush before this time
        self._lock = threading.Lock()  # of what is pending
        write_whole(self.path, content)

    def write(self, content: bytes) -> None:
        """Take content, to be written by `flush`; may be called from another thread."""
        with self._lock:
            self._pending += content

    def flush(self, now: bool = False) -> None:
        """Write what was taken; without `now` only if the last time was long enough ago.

        Raises:
          OSError: if it cannot be written; it is kept for the next flush, and the file stays as it was.
        """
        start = time.monotonic()
        content = bytes(self._pending)
        if not content or (start < self._next and not now):
            return
        if self._whole is None:
            self._append(content)
        else:
            write_whole(self.path, bytes(self._whole + content))
            self._whole += content
        self._size += len(content)
        with self._lock:
            del self._pending[: len(content)]
        end = time.monotonic()
        self._next = end + (end - start) / SHARE

    def _append(self, content: bytes) -> None:
        try:
            with open(self.path, "ab") as file:
                file.write(content)
        except OSError:
            with contextlib.suppress(OSError):
                os.truncate(self.path, self._size)  # without the part that there was room for
            raise
