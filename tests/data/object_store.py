"""A stand-in for Google Cloud Storage: gs:// served from a local folder, to Python and to C++.

epath and TFDS reach it through fsspec, as they do the real one (without append, folders or their renaming);
array_record's reader, which is C++ with a client of its own, through HTTP.
"""

import contextlib
import http.server
import json
import re
import threading
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

import fsspec


class Bucket(fsspec.AbstractFileSystem):
    """Objects under `root`; a folder is no more than a common prefix of names."""

    protocol = ("gcs", "gs")
    root: Path

    def _file(self, path: str) -> Path:
        return self.root / self._strip_protocol(path)

    def info(self, path: str, **_) -> dict:
        file, name = self._file(path), self._strip_protocol(path)
        if not file.exists() or (file.is_dir() and not any(file.iterdir())):
            raise FileNotFoundError(path)
        if file.is_dir():
            return {"name": name, "size": 0, "type": "directory"}
        return {"name": name, "size": file.stat().st_size, "type": "file"}

    def ls(self, path: str, detail: bool = True, **_) -> list:
        if self.info(path)["type"] == "file":
            found = [self.info(path)]
        else:
            found = [self.info(f"{self._strip_protocol(path)}/{p.name}") for p in self._file(path).iterdir()]
        return found if detail else [entry["name"] for entry in found]

    def _open(self, path: str, mode: str = "rb", **_):
        if mode not in ("rb", "wb"):
            raise NotImplementedError(f"objects cannot be opened with mode {mode!r}")
        if mode == "wb":
            self._file(path).parent.mkdir(parents=True, exist_ok=True)
        return open(self._file(path), mode)

    def mkdir(self, path: str, **_) -> None:
        """Nothing: there are no folders."""

    makedirs = mkdir

    def cp_file(self, source: str, target: str, **_) -> None:
        self._file(target).parent.mkdir(parents=True, exist_ok=True)
        self._file(target).write_bytes(self._file(source).read_bytes())

    def rm_file(self, path: str) -> None:
        self._file(path).unlink()


class _Handler(http.server.BaseHTTPRequestHandler):
    """Objects and ranges of them, at the addresses of the JSON API."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        bucket, name = re.fullmatch(r"/storage/v1/b/([^/]+)/o/([^?]+).*", self.path).groups()
        file = Bucket.root / bucket / urllib.parse.unquote(name)
        if not file.is_file():
            return self._reply(404, b"")
        data = file.read_bytes()
        if "alt=media" not in self.path:
            record = {"kind": "storage#object", "bucket": bucket, "name": name, "size": str(len(data))}
            return self._reply(200, json.dumps({**record, "generation": "1"}).encode())
        first, last = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("range", "bytes=0-")).groups()
        start = int(first) if first else max(0, len(data) - int(last))
        stop = min(int(last) + 1, len(data)) if first and last else len(data)
        return self._reply(206, data[start:stop], f"bytes {start}-{stop - 1}/{len(data)}")

    def _reply(self, code: int, body: bytes, content_range: str = "") -> None:
        with contextlib.suppress(ConnectionError):  # the client has what it wants
            self.send_response(code)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("x-goog-generation", "1")
            if content_range:
                self.send_header("Content-Range", content_range)
            self.end_headers()
            self.wfile.write(body)

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def served(root: Path, monkeypatch) -> Iterator[None]:
    """gs://NAME/... is `root`/NAME/... inside."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.handle_error = lambda *_: None  # the client closes connections once it has what it wants
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("CLOUD_STORAGE_EMULATOR_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(Bucket, "root", root, raising=False)
    fsspec.register_implementation("gcs", Bucket, clobber=True)
    yield
    server.shutdown()
