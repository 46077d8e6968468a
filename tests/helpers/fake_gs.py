"""Fake Google Cloud Storage on the local machine, for gs:// paths in tests.

A training run accesses a bucket through four clients, and all of them see the objects of one local folder:
TensorStore and array_record's reader, HTTP clients in C++, through a server on loopback; `etils.epath`,
through an fsspec file system; Orbax's check of the kind of bucket, through a fake module
google.cloud.storage. As in the real store, there is no append, rename or directory: an object appears when
its upload is complete, and a folder is the prefix of an object.

With VAR_JAX_GCSFS=1 the Python clients are the real gcsfs and google-cloud-storage, connected to the server.

    python -m tests.helpers.fake_gs train.py --workdir=gs://...

runs a script, or a module by its dotted name, in a process that sees the store.
"""

import contextlib
import fnmatch
import io
import json
import os
import re
import runpy
import sys
import threading
import types
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote, urlsplit

import fsspec

REAL_CLIENTS = "VAR_JAX_GCSFS"
FOLDER = "VAR_JAX_FAKE_GS"
SERVERS = ("TENSORSTORE_GCS_HTTP_URL", "CLOUD_STORAGE_EMULATOR_ENDPOINT")  # TensorStore's, array_record's


class Bucket:
    """Bucket of objects, each a file in a local folder; puts are atomic."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)

    def _file(self, name: str) -> Path:
        return self.folder / quote(name, safe="")

    def put(self, name: str, content: bytes) -> int:
        """Write an object and return its generation."""
        partial = self.folder / f"%partial-{os.getpid()}-{threading.get_ident()}"
        partial.write_bytes(content)
        partial.replace(self._file(name))
        return self.generation(name)

    def generation(self, name: str) -> int:
        """Return the generation of an object; 0 if it does not exist."""
        try:
            return self._file(name).stat().st_mtime_ns
        except FileNotFoundError:
            return 0

    def get(self, name: str) -> bytes:
        return self._file(name).read_bytes()

    def delete(self, name: str) -> None:
        self._file(name).unlink()

    def list(self, prefix: str = "") -> dict[str, int]:
        """Return the sizes in bytes of the objects with a prefix, by name."""
        sizes = {}
        for entry in os.scandir(self.folder):
            name = unquote(entry.name)
            if name.startswith(prefix) and not entry.name.startswith("%partial"):
                with contextlib.suppress(FileNotFoundError):  # deleted in the meantime
                    sizes[name] = entry.stat().st_size
        return dict(sorted(sizes.items()))


class _Handler(BaseHTTPRequestHandler):
    """HTTP handler of the part of the JSON API that TensorStore, gcsfs and google-cloud-storage use."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def _answer(self, status: int, content: bytes | dict = b"", **headers) -> None:
        if isinstance(content, dict):
            content = json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _resource(self, bucket: str, name: str) -> dict:
        store = self.server.bucket(bucket)
        generation = str(store.generation(name))
        return {
            "kind": "storage#object",
            "name": name,
            "bucket": bucket,
            "size": str(len(store.get(name))),
            "generation": generation,
            "metageneration": "1",
            "updated": "2026-01-01T00:00:00.000Z",
            "timeCreated": "2026-01-01T00:00:00.000Z",
        }

    def _precondition(self, bucket: str, name: str, query: dict) -> bool:
        generation = str(self.server.bucket(bucket).generation(name))
        return query.get("ifGenerationMatch", generation) == generation

    def _handle(self) -> None:
        url = urlsplit(self.path)
        query = {key: values[-1] for key, values in parse_qs(url.query).items()}
        body = self._body()
        method, path = self.command, url.path
        if match := re.fullmatch(r"/upload/storage/v1/b/([^/]+)/o", path):
            return self._upload(match[1], query, body)
        path = path.removeprefix("/download")
        if match := re.fullmatch(r"/storage/v1/b/([^/]+)", path):
            return self._answer(200, {"kind": "storage#bucket", "name": match[1], "metageneration": "1"})
        if match := re.fullmatch(r"/storage/v1/b/([^/]+)/o", path):
            return self._list(match[1], query)
        if match := re.fullmatch(r"/storage/v1/b/([^/]+)/o/([^/]+)/moveTo/o/([^/]+)", path):
            store = self.server.bucket(match[1])
            store.put(unquote(match[3]), store.get(unquote(match[2])))
            store.delete(unquote(match[2]))
            return self._answer(200, self._resource(match[1], unquote(match[3])))
        if match := re.fullmatch(r"/storage/v1/b/([^/]+)/o/([^/]+)", path):
            return self._object(method, match[1], unquote(match[2]), query)
        if path == "/batch/storage/v1":
            return self._batch(body)
        return self._answer(404, {"error": {"code": 404, "message": f"not faked: {method} {self.path}"}})

    def _upload(self, bucket: str, query: dict, body: bytes) -> None:
        store = self.server.bucket(bucket)
        kind, name = query.get("uploadType"), query.get("name")
        if kind == "multipart":
            boundary = re.search(r"boundary=['\"]?([^'\";]+)", self.headers["Content-Type"])[1].encode()
            metadata, content = body.split(b"--" + boundary)[1:3]
            name = json.loads(re.split(rb"\r?\n\r?\n", metadata, maxsplit=1)[1])["name"]
            body = re.sub(rb"\r?\n\Z", b"", re.split(rb"\r?\n\r?\n", content, maxsplit=1)[1])
        elif kind == "resumable" and "upload_id" not in query:
            name = name or json.loads(body)["name"]
            query = f"uploadType=resumable&upload_id=1&name={quote(name, safe='')}"
            location = f"{self.server.url}{urlsplit(self.path).path}?{query}"
            return self._answer(200, {}, Location=location)
        elif kind == "resumable":
            key = (bucket, name)
            pattern = r"bytes (?:(\d+)-(\d+)|\*)/(\d+|\*)"
            full_range = f"bytes 0-{len(body) - 1}/{len(body)}" if body else "bytes */0"
            start, end, total = re.fullmatch(pattern, self.headers.get("Content-Range", full_range)).groups()
            uploaded = self.server.uploads.setdefault(key, bytearray())
            if start is not None:
                uploaded[int(start) : int(end) + 1] = body
            if total == "*":
                return self._answer(308, Range=f"bytes=0-{len(uploaded) - 1}")
            body = bytes(self.server.uploads.pop(key))
        if not self._precondition(bucket, name, query):
            return self._answer(412, {"error": {"code": 412, "message": "generation"}})
        store.put(name, body)
        return self._answer(200, self._resource(bucket, name))

    def _list(self, bucket: str, query: dict) -> None:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        items, prefixes = [], set()
        for name in self.server.bucket(bucket).list(prefix):
            if not query.get("startOffset", "") <= name < query.get("endOffset", "\U0010ffff"):
                continue
            rest = name[len(prefix) :]
            if delimiter and delimiter in rest:
                prefixes.add(prefix + rest.split(delimiter)[0] + delimiter)
            else:
                items.append(self._resource(bucket, name))
        self._answer(200, {"kind": "storage#objects", "items": items, "prefixes": sorted(prefixes)})

    def _object(self, method: str, bucket: str, name: str, query: dict) -> None:
        store = self.server.bucket(bucket)
        generation = store.generation(name)
        if not generation or query.get("generation", str(generation)) != str(generation):
            return self._answer(404, {"error": {"code": 404, "message": f"No such object: {bucket}/{name}"}})
        if not self._precondition(bucket, name, query):
            return self._answer(412, {"error": {"code": 412, "message": "generation"}})
        if method == "DELETE":
            store.delete(name)
            return self._answer(204)
        if query.get("alt") != "media":
            return self._answer(200, self._resource(bucket, name))
        if query.get("ifGenerationNotMatch") == str(generation):
            return self._answer(304)
        content = store.get(name)
        status, extra = 200, {}
        if match := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", "")):
            start = int(match[1]) if match[1] else max(0, len(content) - int(match[2]))
            stop = int(match[2]) + 1 if match[1] and match[2] else len(content)
            if start >= len(content) and content:
                return self._answer(416)
            stop = min(stop, len(content))
            status, extra = 206, {"Content_Range": f"bytes {start}-{stop - 1}/{len(content)}"}
            content = content[start:stop]
        extra |= {"x_goog_generation": generation, "Content_Type": "application/octet-stream"}
        return self._answer(status, content, **extra)

    def _batch(self, body: bytes) -> None:
        """Delete many objects in one request, as gcsfs does."""
        parts = []
        for number, path in enumerate(re.findall(rb"DELETE (\S+) HTTP", body), 1):
            match = re.search(r"/b/([^/]+)/o/([^/?]+)", path.decode())
            try:
                self.server.bucket(match[1]).delete(unquote(match[2]))
                status = "204 No Content"
            except FileNotFoundError:
                status = "404 Not Found"
            parts.append(
                f"--batch\r\nContent-Type: application/http\r\nContent-ID: <response-{number}>\r\n\r\n"
                f"HTTP/1.1 {status}\r\nContent-Length: 0\r\n\r\n\r\n"
            )
        content = ("".join(parts) + "--batch--\r\n").encode()
        self._answer(200, content, Content_Type="multipart/mixed; boundary=batch")

    def _handle_safely(self) -> None:
        try:
            self._handle()
        except FileNotFoundError:
            self._answer(404, {"error": {"code": 404, "message": f"No such object: {self.path}"}})

    do_GET = do_POST = do_PUT = do_DELETE = _handle_safely


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.uploads = folder, {}
        self.url = f"http://127.0.0.1:{self.server_port}"

    def bucket(self, name: str) -> Bucket:
        return Bucket(self.folder / name)

    def handle_error(self, request, client_address):
        """Print no traceback if a client disconnects during a response."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class _Upload(io.BytesIO):
    """File being written; the object appears when it is closed."""

    def __init__(self, bucket: Bucket, name: str, listings: dict):
        super().__init__()
        self.bucket, self.name, self.listings = bucket, name, listings

    def close(self) -> None:
        if not self.closed:
            self.bucket.put(self.name, self.getvalue())
            self.listings.clear()
        super().close()


class FakeGcs(fsspec.AbstractFileSystem):
    """fsspec file system of the buckets, like gcsfs on buckets without a hierarchical namespace.

    Like gcsfs, it caches listings until it writes itself, unless `use_listings_cache` is False.
    """

    protocol = ("gs", "gcs")

    def __init__(self, finalize_on_close: bool = False, use_listings_cache: bool = True, **kwargs):
        super().__init__(use_listings_cache=use_listings_cache, **kwargs)
        self.caches_listings = use_listings_cache
        self.listings = {}

    @classmethod
    def _strip_protocol(cls, path):
        return re.sub(r"^gc?s:/+", "", os.fspath(path)).rstrip("/")

    def _split(self, path: str) -> tuple[Bucket, str]:
        bucket, _, name = self._strip_protocol(path).partition("/")
        return Bucket(Path(os.environ[FOLDER]) / bucket), name

    def ls(self, path, detail=True, **_):
        entries = self.listings.get(self._strip_protocol(path)) or self._list(path)
        if self.caches_listings:
            self.listings[self._strip_protocol(path)] = entries
        return list(entries.values()) if detail else sorted(entries)

    def _list(self, path) -> dict[str, dict]:
        bucket, name = self._split(path)
        root = self._strip_protocol(path).partition("/")[0]
        entries = {}
        prefix = f"{name}/" if name else ""
        for key, size in bucket.list(prefix).items():
            first, _, rest = key[len(prefix) :].partition("/")
            if first:
                full = f"{root}/{prefix}{first}"
                kind = "directory" if rest or full in entries else "file"
                entries[full] = {"name": full, "size": size if kind == "file" else 0, "type": kind}
        if not entries:
            if not bucket.generation(name):
                raise FileNotFoundError(path)
            full = self._strip_protocol(path)
            entries[full] = {"name": full, "size": len(bucket.get(name)), "type": "file"}
        return entries

    def info(self, path, **_):
        bucket, name = self._split(path)
        full = self._strip_protocol(path)
        if name and bucket.generation(name):
            return {"name": full, "size": len(bucket.get(name)), "type": "file"}
        if not name or bucket.list(f"{name}/"):
            return {"name": full, "size": 0, "type": "directory"}
        raise FileNotFoundError(path)

    def isdir(self, path):
        try:
            return self.info(path)["type"] == "directory"
        except FileNotFoundError:
            return False

    def glob(self, path, **_):
        folder, _, pattern = self._strip_protocol(path).rpartition("/")
        names = self.ls(folder, detail=False) if self.exists(folder) else []
        return [name for name in names if fnmatch.fnmatch(name.rpartition("/")[2], pattern)]

    def mkdir(self, path, create_parents=True, **_):
        pass  # there are no directories

    makedirs = mkdir

    def open(self, path, mode="rb", **_):
        bucket, name = self._split(path)
        if "a" in mode:
            raise NotImplementedError("objects cannot be appended to")
        if "w" in mode:
            file = _Upload(bucket, name, self.listings)
        elif bucket.generation(name):
            file = io.BytesIO(bucket.get(name))
        else:
            raise FileNotFoundError(path)
        return file if "b" in mode else io.TextIOWrapper(file, encoding="utf-8")

    def rm(self, path, recursive=False, **_):
        self.listings.clear()
        bucket, name = self._split(path)
        names = [name] if bucket.generation(name) else list(bucket.list(f"{name}/")) if recursive else []
        if not names:
            raise FileNotFoundError(path)
        for key in names:
            with contextlib.suppress(FileNotFoundError):
                bucket.delete(key)

    def mv(self, path, target, recursive=False, **_):
        """Copy and delete object by object."""
        self.listings.clear()
        bucket, name = self._split(path)
        _, target_name = self._split(target)
        names = [name] if bucket.generation(name) else list(bucket.list(f"{name}/"))
        for key in names:
            bucket.put(target_name + key[len(name) :], bucket.get(key))
            bucket.delete(key)

    rename = mv


def install() -> None:
    """Register the store named in the environment for gs:// URLs; call before epath opens its first URL."""
    if os.environ.get(REAL_CLIENTS):
        return
    for protocol in ("gs", "gcs"):
        fsspec.register_implementation(protocol, FakeGcs, clobber=True)
    storage = types.ModuleType("google.cloud.storage")
    bucket = types.SimpleNamespace(hierarchical_namespace_enabled=False)
    storage.Client = lambda: types.SimpleNamespace(get_bucket=lambda _: bucket)
    cloud = sys.modules.get("google.cloud") or types.ModuleType("google.cloud")
    cloud.storage = storage
    sys.modules["google.cloud"], sys.modules["google.cloud.storage"] = cloud, storage


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[dict[str, str]]:
    """Serve buckets under a folder; yield the environment variables that give processes access to them."""
    server = _Server(folder)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    environment = {FOLDER: str(folder), **dict.fromkeys(SERVERS, server.url)}
    if os.environ.get(REAL_CLIENTS):
        environment["STORAGE_EMULATOR_HOST"] = server.url
    try:
        yield environment
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


if __name__ == "__main__":
    install()
    del sys.argv[0]
    if sys.argv[0].endswith(".py"):
        sys.path.insert(0, os.getcwd())
        runpy.run_path(sys.argv[0], run_name="__main__")
    else:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
