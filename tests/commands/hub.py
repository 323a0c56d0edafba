"""A stand-in of the hub: what its client asks for when a folder is uploaded."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Repositories = dict[str, dict[str, bytes]]


@contextmanager
def hub() -> Iterator[tuple[str, Repositories]]:
    """Its address, and the files of every repository that was made; every file is a small one."""
    repositories: Repositories = {}

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args: Any) -> None:
            """Quiet."""

        def answer(self, content: Any, code: int = 200) -> None:
            body = json.dumps(content).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self) -> None:
            name = self.path.partition("/api/models/")[2].partition("/revision")[0]
            self.answer({"id": name, "modelId": name, "sha": "0" * 40, "siblings": [], "tags": []})

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if self.path == "/api/repos/create":
                told = json.loads(body)
                owner = f"{told['organization']}/" if told.get("organization") else ""
                name = owner + told["name"]
                repositories.setdefault(name, {})
                return self.answer({"url": f"{self.server.address}/{name}", "name": name})
            name, _, verb = self.path.removeprefix("/api/models/").rpartition("/")
            name, _, verb = name.rpartition("/")
            if verb == "preupload":
                files = [
                    {"path": one["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for one in json.loads(body)["files"]
                ]
                return self.answer({"files": files})
            if verb == "commit":
                for line in body.splitlines():
                    entry = json.loads(line)
                    if entry["key"] == "file":
                        content = base64.b64decode(entry["value"]["content"])
                        repositories[name][entry["value"]["path"]] = content
                oid = "1" * 40
                url = f"{self.server.address}/{name}/commit/{oid}"
                return self.answer({"commitUrl": url, "commitOid": oid, "success": True})
            return self.answer({})  # validate-yaml

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.address = f"http://127.0.0.1:{server.server_port}"  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.address, repositories  # type: ignore[attr-defined]
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
