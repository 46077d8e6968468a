"""Load check of the web page: clients that generate and edit for some minutes, failures, latency, memory.

    python -m benchmarks.app_load --workdir=runs/digits --clients=20 --minutes=5

Starts `python -m var_jax.app`.  Each client is a visitor that draws four images with a seed of its own, edits
the first one, and repeats; every tenth time it leaves and comes back as a new visitor.  Prints one JSON line.
"""

import argparse
import base64
import collections
import contextlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
from PIL import Image

VISIT = 10  # rounds until a client leaves and comes back
SAMPLES = 6  # of the memory, besides that at the start
ERRORS_SHOWN = 3


def resident_mb(pid: int) -> float:
    """Return the resident memory of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return round(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, 1)


def painting(side: int) -> str:
    """Return a mask of the lower half, as the painter of the page sends it."""
    pixels = np.zeros((side, side, 4), np.uint8)
    pixels[side // 2 :] = 255
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    return "data:image/png;base64," + base64.b64encode(content.getvalue()).decode()


class Load:
    """Clients of one server, and the latencies and errors of their requests."""

    def __init__(self, url: str, mask: str, end: float):
        self.url, self.mask, self.end = url, mask, end
        self.seconds: list[float] = []
        self.errors: collections.Counter[str] = collections.Counter()

    def run_client(self, number: int) -> None:
        """Generate and edit until the time is over."""
        rounds = 0
        while time.monotonic() < self.end:
            try:
                client = connect(self.url)
            except Exception as error:  # whatever a client meets is a failure to count
                self.errors[f"connect: {error!r}"] += 1
                time.sleep(1)
                continue
            for _ in range(VISIT):
                if time.monotonic() >= self.end:
                    break
                seed = 1000 * number + rounds
                fields = [seed % 10, seed, 4, 0, 1, 0, 0, "", "", "", ""]
                self.request(client, "/generate", fields)
                self.request(client, "/choose_first", [])
                self.request(client, "/edit", [self.mask, bool(seed % 2), *fields])
                rounds += 1
            client.close()

    def request(self, client, name: str, fields: list) -> None:
        """Send a request, and note its latency or its error."""
        start = time.monotonic()
        try:
            client.predict(*fields, api_name=name)
        except Exception as error:
            self.errors[f"{name}: {error!r}"] += 1
        else:
            self.seconds.append(time.monotonic() - start)


def connect(url: str):
    """Return a client that is a visitor of its own."""
    from gradio_client import Client

    return Client(url, verbose=False, analytics_enabled=False)


@contextlib.contextmanager
def running_app(flags: list[str]):
    """Start the page on a free port; yield its process, address and the seconds until it served."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start = time.monotonic()
    with tempfile.NamedTemporaryFile("w+", suffix=".log") as log:
        command = [sys.executable, "-m", "var_jax.app", *flags, f"--port={port}"]
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            while "The page is at" not in Path(log.name).read_text():
                if process.poll() is not None:
                    sys.exit(f"app_load: the page did not start: {Path(log.name).read_text()}")
                time.sleep(0.1)
            yield process, f"http://127.0.0.1:{port}", time.monotonic() - start
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)
            if "Traceback" in (text := Path(log.name).read_text()):
                print(text, file=sys.stderr)


def measure(args: argparse.Namespace) -> dict:
    """Run the clients; return the figures."""
    flags = [f"--{name}={value}" for name in FLAGS if (value := getattr(args, name)) is not None]
    with running_app(flags) as (process, url, start_seconds):
        load = Load(url, painting(args.side), time.monotonic() + 60 * args.minutes)
        begin = time.monotonic()
        load.request(connect(url), "/generate", [0, 0, 4, 0, 1, 0, 0, "", "", "", ""])
        first_image = start_seconds + time.monotonic() - begin
        load.seconds.clear()
        threads = [threading.Thread(target=load.run_client, args=(i,)) for i in range(args.clients)]
        memory = [resident_mb(process.pid)]
        for thread in threads:
            thread.start()
        for i in range(SAMPLES):
            time.sleep(max(0.0, begin + (i + 1) / SAMPLES * 60 * args.minutes - time.monotonic()))
            memory.append(resident_mb(process.pid))
        for thread in threads:
            thread.join()
        time.sleep(args.settle)
        memory.append(resident_mb(process.pid))
    seconds = np.array(load.seconds or [np.nan])
    return {
        "clients": args.clients,
        "minutes": args.minutes,
        "requests": len(load.seconds) + sum(load.errors.values()),
        "failures": sum(load.errors.values()),
        "errors": dict(load.errors.most_common(ERRORS_SHOWN)),
        "latency_p50_s": round(float(np.quantile(seconds, 0.5)), 3),
        "latency_p95_s": round(float(np.quantile(seconds, 0.95)), 3),
        "serving_after_s": round(start_seconds, 1),
        "first_image_after_s": round(first_image, 1),
        "memory_mb": memory,
    }


FLAGS = ("workdir", "tokenizer", "checkpoint")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in FLAGS:
        parser.add_argument(f"--{name}", help="as for var_jax.app")
    parser.add_argument("--side", type=int, default=8, help="side of the images of the model")
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--settle", type=float, default=15.0, help="seconds until memory is read at the end")
    print(json.dumps(measure(parser.parse_args())))


if __name__ == "__main__":
    main()
