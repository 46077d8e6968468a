"""Stand-in of the Hugging Face hub on this machine, for repositories of small files.

It speaks the part of the hub's HTTP API that creating, uploading to and downloading from a repository need.
"""

import base64
import contextlib
import hashlib
import http.server
import json
import re
import threading
from collections.abc import Iterator

DOWNLOAD = re.compile(r"/(?P<repo>[\w.-]+/[\w.-]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")
MODEL = re.compile(r"/api/models/(?P<repo>[\w.-]+/[\w.-]+?)/(?P<call>preupload|commit)/[^/?]+(?:\?.*)?")


class Hub(http.server.ThreadingHTTPServer):
    """Server of repositories: name -> file -> content."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.address = f"http://127.0.0.1:{self.server_port}"

    def revision(self, repo: str) -> str:
        """Return the hash of the content of a repository, in place of a commit's."""
        return hashlib.sha1(repr(sorted(self.repositories[repo].items())).encode()).hexdigest()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_):
        pass

    def _reply(self, status: int, body: bytes = b"", **headers):
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _reply_json(self, value):
        self._reply(200, json.dumps(value).encode(), Content_Type="application/json")

    def _not_found(self, code: str):
        self._reply(404, b'{"error": "not found"}', X_Error_Code=code, X_Error_Message="not found")

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        repositories = self.server.repositories
        if download := DOWNLOAD.fullmatch(self.path):
            files = repositories.get(download["repo"])
            if files is None:
                return self._not_found("RepoNotFound")
            if download["file"] not in files:
                return self._not_found("EntryNotFound")
            body = files[download["file"]]
            etag = f'"{hashlib.sha1(body).hexdigest()}"'
            return self._reply(200, body, ETag=etag, X_Repo_Commit=self.server.revision(download["repo"]))
        self._not_found("RepoNotFound")

    def do_POST(self):
        size = self.headers.get("Content-Length")
        body = self.rfile.read(int(size)) if size else self._read_chunks()
        if self.path == "/api/repos/create":
            request = json.loads(body)
            repo = f"{request.get('organization') or 'me'}/{request['name']}"
            self.server.repositories.setdefault(repo, {})
            return self._reply_json({"url": f"{self.server.address}/{repo}", "name": repo})
        if self.path == "/api/validate-yaml":
            return self._reply_json({"errors": [], "warnings": []})
        model = MODEL.fullmatch(self.path)
        if model is None or model["repo"] not in self.server.repositories:
            return self._not_found("RepoNotFound")
        if model["call"] == "preupload":
            files = [
                {**file, "uploadMode": "regular", "shouldIgnore": False} for file in json.loads(body)["files"]
            ]
            return self._reply_json({"files": files})
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                content = base64.b64decode(line["value"]["content"])
                self.server.repositories[model["repo"]][line["value"]["path"]] = content
        oid = self.server.revision(model["repo"])
        url = f"{self.server.address}/{model['repo']}/commit/{oid}"
        self._reply_json({"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": ""})

    def _read_chunks(self) -> bytes:
        """Read a body in chunked transfer encoding."""
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body


@contextlib.contextmanager
def serving() -> Iterator[Hub]:
    """Run a hub."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        thread.join()
