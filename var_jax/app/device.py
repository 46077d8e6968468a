"""The device, used by one request at a time, and the number of programs compiled for it."""

import threading
from collections.abc import Callable, Hashable, Iterator
from typing import TypeVar

import jax

T = TypeVar("T")
MAX_PROGRAMS = 64


class Device:
    """Run one program at a time, and drop compiled programs before they fill the memory.

    Visitors choose top-k, the guided scales and the number of images, and each combination is compiled.
    Programs that were dropped come back from JAX's cache on disk.
    """

    def __init__(self, max_programs: int = MAX_PROGRAMS):
        self._lock = threading.Lock()
        self._max_programs = max_programs
        self._programs: set[Hashable] = set()

    def call(self, function: Callable[..., T], *args, program: Hashable = None, **kwargs) -> T:
        """Call a function that runs programs.

        Args:
          function: function to call.
          *args: its arguments.
          program: value that differs for what must be compiled apart; None if nothing a visitor chooses does.
          **kwargs: its keyword arguments.
        """
        with self._lock:
            if program is not None and program not in self._programs:
                if len(self._programs) >= self._max_programs:
                    jax.clear_caches()
                    self._programs.clear()
                self._programs.add(program)
            return function(*args, **kwargs)

    def stream(self, items: Iterator[T], program: Hashable = None) -> Iterator[T]:
        """Yield the items of an iterator; the device is free between two of them."""
        end = object()
        while (item := self.call(next, items, end, program=program)) is not end:
            yield item
