"""Fuzz the readers of weight files: damaged files must give tensors, or a ValueError with their name.

    python -m tests.helpers.fuzz --seconds=600 --seed=1          # or --count=20000

Reading a file must take under 2 s of CPU time and 300 MB of memory, and all bytes of a tensor must be
readable. Files are read in a child process with a limited address space, so that crashes (SIGSEGV, SIGBUS),
hangs and large allocations are detected. A failure has a number: `--index=N --count=1` repeats it.
"""

import argparse
import collections
import contextlib
import functools
import io
import json
import math
import os
import random
import re
import resource
import signal
import string
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from benchmarks.goldens import golden_folder
from tests.helpers import pickles

REPOSITORY = Path(__file__).parents[2]
DATA = REPOSITORY / "tests" / "interop" / "data"
GOLDENS = golden_folder()
ENV = {**os.environ, "JAX_PLATFORMS": "cpu"}
MAX_SECONDS, MAX_BYTES = 2.0, 300 << 20
NUMBERS = re.compile(rb"\d+")
EXTREMES = (
    0,
    1,
    2,
    0x7F,
    0x80,
    0xFF,
    0xFFFF,
    1 << 20,
    1 << 30,
    0x7FFFFFFF,
    0x80000000,
    0xFFFFFFFF,
    1 << 62,
    -1,
)
SIGNATURES = (b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07")


# --- damaged files


def safetensors(tensors: dict[str, np.ndarray]) -> bytes:
    """Return the bytes of a `.safetensors` file."""
    header = {}
    offset = 0
    for name, tensor in tensors.items():
        span = [offset, offset + tensor.nbytes]
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": span}
        offset = span[1]
    encoded = json.dumps(header).encode()
    return struct.pack("<Q", len(encoded)) + encoded + b"".join(t.tobytes() for t in tensors.values())


def architecture(rng: random.Random) -> dict[str, np.ndarray]:
    """Return tensors that determine the architecture of a network, some with other names or shapes."""
    tensors = {
        "pos_1LC": (1, 21, 4),
        "lvl_1L": (1, 21),
        "word_embed.weight": (4, 4),
        "class_emb.weight": (6, 4),
        "head.weight": (16, 4),
        "blocks.0.attn.scale_mul_1H11": (1, 1, 1, 1),
        "encoder.conv_in.weight": (32, 3, 3, 3),
        "encoder.down.0.block.0.conv1.weight": (32, 32, 3, 3),
        "quant_conv.weight": (4, 4, 3, 3),
        "quantize.embedding.weight": (8, 4),
        "quantize.ema_vocab_hit_SV": (10, 8),
    }
    for _ in range(rng.randint(1, 3)):
        name = rng.choice(list(tensors))
        shape = list(tensors.pop(name))
        kind = rng.randrange(4)
        if kind == 0:
            shape = [rng.choice((0, 1, 2, 3, 7, 4096)) for _ in range(rng.randint(0, 3))]
        elif kind == 1 and shape:
            shape[rng.randrange(len(shape))] = rng.choice((0, 1, 2, 20_000))
        elif kind == 2:
            name = re.sub(r"\d+", lambda _: str(rng.choice((0, 1, 7, 256, 9999, 10**12, 10**30))), name)
        if kind < 3 and math.prod(shape) < 10**6:  # a large file may take memory
            tensors[name] = tuple(shape)
    levels = np.repeat([0, 1, 2], [1, 4, 16])[None]
    arrays = {name: np.zeros(shape, np.float16) for name, shape in tensors.items()}
    if arrays.get("lvl_1L", levels).shape == levels.shape:
        levels[0, rng.randrange(21)] = rng.choice((0, 1, 2, 3, -1, 1 << 40))
        arrays["lvl_1L"] = levels
    return arrays


def damaged(data: bytes, others: list[bytes], rng: random.Random) -> bytes:
    """Return a file with one to four random changes."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        if not data:
            break
        offset, kind = rng.randrange(len(data)), rng.randrange(9)
        if kind == 0:
            data[offset] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[offset] = rng.randrange(256)
        elif kind == 2:
            data[offset] = ord(
                rng.choice(string.printable[:94] + "\x80\x85\x86\x87\x88\x89\x8a\x8c\x93\x94\x95")
            )
        elif kind == 3:
            del data[offset:]
        elif kind == 4:
            del data[offset : offset + rng.choice((1, 2, 8, 100))]
        elif kind == 5:
            data[offset:offset] = rng.randbytes(rng.choice((1, 2, 8, 100)))
        elif kind == 6:
            other = rng.choice(others)
            start, size = rng.randrange(len(other)), rng.choice((4, 30, 500))
            data[offset : offset + size] = other[start : start + size]
        elif kind == 7:
            layout = rng.choice(("<B", "<H", "<I", "<Q", ">I"))
            size = struct.calcsize(layout)
            value = (rng.choice(EXTREMES) + rng.randint(-1, 1)) % (1 << 8 * size)
            data[offset : offset + size] = struct.pack(layout, value)
        elif spans := [match.span() for match in NUMBERS.finditer(data)]:
            start, end = rng.choice(spans)
            data[start:end] = str(rng.choice((*EXTREMES, 10**30))).encode()
    return bytes(data)


def damaged_zip_fields(data: bytes, rng: random.Random) -> bytes:
    """Return a zip archive with one or two extreme numbers in its headers."""
    data = bytearray(data)
    headers = [m.start() for signature in SIGNATURES for m in re.finditer(re.escape(signature), data)]
    for _ in range(rng.randint(1, 2)):
        offset = rng.choice(headers) + rng.randrange(4, 46, 2)
        layout = rng.choice(("<H", "<I", "<Q"))
        size = struct.calcsize(layout)
        data[offset : offset + size] = struct.pack(layout, rng.choice(EXTREMES) % (1 << 8 * size))
    return bytes(data)


def case(index: int, seed: int, files: dict[str, bytes]) -> tuple[str, bytes]:
    """Return the suffix and content of the damaged file of an index and seed; deterministic."""
    rng = random.Random(seed * 1_000_003 + index)
    if rng.random() < 0.05:
        path = Path(tempfile.gettempdir()) / f"fuzz-{seed}-{index}"
        content = pickles.save(path, architecture(rng)).read_bytes()
        path.unlink()
        return ".pth", content
    name = rng.choice(sorted(files))
    data, suffix = files[name], Path(name).suffix
    others = list(files.values())
    if suffix == ".safetensors" and rng.random() < 0.6:  # a changed header of the right length
        (length,) = struct.unpack("<Q", data[:8])
        header = damaged(data[8 : 8 + length], others, rng)
        return suffix, struct.pack("<Q", len(header)) + header + data[8 + length :]
    if zipfile.is_zipfile(io.BytesIO(data)):
        chance = rng.random()
        if chance < 0.2:
            return suffix, damaged_zip_fields(data, rng)
        if chance < 0.7:  # a changed pickle in a valid archive
            return suffix, with_changed_pickle(data, others, rng)
    return suffix, damaged(data, others, rng)


def with_changed_pickle(data: bytes, others: list[bytes], rng: random.Random) -> bytes:
    """Return a zip archive with a damaged pickle."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as archive, zipfile.ZipFile(buffer, "w") as changed:
        for info in archive.infolist():
            content = archive.read(info)
            if info.filename.endswith("data.pkl"):
                content = damaged(content, others, rng)
            changed.writestr(info.filename, content)
    return buffer.getvalue()


# --- the child process


class TooSlow(BaseException):
    """Raised by the timer; a BaseException, so that the code under test does not catch it."""


def touch(value) -> None:
    """Read every byte of the tensors in nested containers."""
    if isinstance(value, np.ndarray):
        np.ascontiguousarray(value).view(np.uint8).sum() if value.ndim else value.tobytes()
    elif isinstance(value, dict | list | tuple):
        for child in value.values() if isinstance(value, dict) else value:
            touch(child)


def read(path: Path) -> None:
    """Read the tensors of a file, and derive the network if they are a state dict."""
    from var_jax.interop.load import published_next_scale, published_tokenizer, read_network
    from var_jax.interop.pth import read_pth
    from var_jax.interop.tensor_files import read_networks

    content = read_pth(path) if path.suffix == ".pth" else read_networks(path)
    touch(content)
    networks = {}
    with suppress_named_error(path):
        networks = read_networks(path)
    for kind, tensors in networks.items():
        if kind != "tokenizer":
            with suppress_named_error(path):
                published_next_scale(path, tensors)
        if kind != "next_scale":
            with suppress_named_error(path):
                published_tokenizer(path, tensors)
            with suppress_named_error(path):
                read_network(path, "tokenizer")


@contextlib.contextmanager
def suppress_named_error(path: Path) -> Iterator[None]:
    """Suppress a ValueError whose message names a file."""
    try:
        yield
    except ValueError as error:
        if str(path) not in str(error):
            raise


def peak_bytes() -> int:
    """Return the peak resident memory since the last `reset_peak`."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status)[1])


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def child(seed: int, first: int, count: int, folder: Path) -> None:
    """Read damaged files in sequence; print a line of JSON before and after each."""
    import jax

    from var_jax.interop import load

    files = originals()
    jax.random.key(0)  # starts the backend
    # Most files imply one of few architectures, whose parameters take up to a second to trace.
    load.tokenizer_shapes = functools.cache(load.tokenizer_shapes)
    load.transformer_shapes = functools.cache(load.transformer_shapes)
    for name, data in files.items():  # triggers compilation and imports on first use
        path = folder / name
        path.write_bytes(data)
        with contextlib.suppress(ValueError):
            read(path)
    size = 1024 * int(re.search(r"VmSize:\s+(\d+)", Path("/proc/self/status").read_text())[1])
    resource.setrlimit(resource.RLIMIT_AS, (size + 2 * MAX_BYTES,) * 2)

    def stop(*_):
        raise TooSlow

    signal.signal(signal.SIGPROF, stop)
    for index in range(first, first + count):
        suffix, content = case(index, seed, files)
        path = folder / f"case{suffix}"
        path.write_bytes(content)
        print(json.dumps({"index": index}), flush=True)
        reset_peak()
        bytes_before = peak_bytes()
        start = time.process_time()
        signal.setitimer(signal.ITIMER_PROF, 5 * MAX_SECONDS)
        outcome = "tensors"
        try:
            read(path)
        except ValueError as error:
            outcome = "ValueError" if str(path) in str(error) else f"unnamed: {error}"
        except BaseException as error:
            outcome = f"{type(error).__name__}: {error}"[:500]
        signal.setitimer(signal.ITIMER_PROF, 0)
        seconds = time.process_time() - start
        num_bytes = peak_bytes() - bytes_before
        print(json.dumps({"outcome": outcome, "seconds": seconds, "bytes": num_bytes}), flush=True)


def originals() -> dict[str, bytes]:
    """Return small real files of every format, by name."""
    files = {path.name: path.read_bytes() for path in DATA.glob("*.pth")}
    for name in ("legacy.pth", "legacy_python2.pth", "zip.pth"):
        files[f"golden_{name}"] = (GOLDENS / name).read_bytes()
    rng = np.random.default_rng(0)
    tensors = {f"blocks.{i}.weight": rng.standard_normal((i + 1, 3)).astype(np.float32) for i in range(9)}
    return files | {"x.safetensors": safetensors(tensors)}


# --- the parent


def run(seed: int, first: int, count: int, on_result: Callable[[int, dict], None]) -> None:
    """Read `count` damaged files in child processes; a child that dies is replaced.

    Args:
      seed: seed of the damage.
      first: index of the first file.
      count: number of files.
      on_result: called with the index of each file and its outcome, seconds and bytes.
    """
    end = first + count
    while first < end:
        with tempfile.TemporaryDirectory(prefix="fuzz") as folder:
            command = [sys.executable, "-m", "tests.helpers.fuzz", f"--seed={seed}", f"--index={first}"]
            command += [f"--count={end - first}", f"--folder={folder}", "--child"]
            with subprocess.Popen(
                command, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY, env=ENV
            ) as process:
                index = None
                for line in process.stdout:
                    message = json.loads(line)
                    if "index" in message:
                        index = message["index"]
                    else:
                        on_result(index, message)
                        index, first = None, index + 1
            if process.returncode:
                if index is None:
                    raise RuntimeError(f"the child process failed with code {process.returncode}")
                on_result(
                    index, {"outcome": f"died with code {process.returncode}", "seconds": 0.0, "bytes": 0}
                )
                first = index + 1


class Summary:
    """Counts of outcomes, the slowest and the largest file, and failures."""

    def __init__(self):
        self.outcomes, self.failures = collections.Counter(), []
        self.slowest, self.largest = (0.0, None), (0, None)

    def add(self, index: int, result: dict) -> None:
        outcome, seconds, num_bytes = result["outcome"], result["seconds"], result["bytes"]
        self.outcomes[outcome if outcome in ("tensors", "ValueError") else "failure"] += 1
        self.slowest = max(self.slowest, (seconds, index), key=lambda pair: pair[0])
        self.largest = max(self.largest, (num_bytes, index), key=lambda pair: pair[0])
        if outcome not in ("tensors", "ValueError"):
            self.failures.append(f"{index}: {outcome}")
        elif seconds > MAX_SECONDS or num_bytes > MAX_BYTES:
            self.failures.append(f"{index}: {outcome} after {seconds:.1f} s with {num_bytes / 2**20:.0f} MB")

    def __str__(self) -> str:
        return (
            f"{self.outcomes.total()} files: {dict(self.outcomes)}; most CPU time {self.slowest[0]:.2f} s "
            f"(number {self.slowest[1]}), most memory {self.largest[0] >> 20} MB (number {self.largest[1]})"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--seconds", type=float, default=60, help="stop after the batch of 1000 files that ends later"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--index", type=int, default=0, help="index of the first file")
    parser.add_argument("--count", type=int, help="number of files, instead of --seconds")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.child:
        child(flags.seed, flags.index, flags.count, flags.folder)
        return
    summary = Summary()
    start, index = time.monotonic(), flags.index
    while True:
        num_reported = len(summary.failures)
        batch = min(flags.count - (index - flags.index), 1000) if flags.count else 1000
        run(flags.seed, index, batch, summary.add)
        index += batch
        lines = [f"{time.monotonic() - start:.0f} s: {summary}", *summary.failures[num_reported:]]
        print("\n".join(lines), flush=True)
        if index - flags.index >= flags.count if flags.count else time.monotonic() - start > flags.seconds:
            break
    sys.exit(bool(summary.failures))


if __name__ == "__main__":
    main()
