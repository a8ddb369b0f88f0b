"""A hub on loopback with what an upload asks of it, which can drop the connection in the middle of a file.

with FakeHub() as hub:
    hub.drop_at = 2                      # the second large file is cut half-way, and from then on nobody is there
    HfApi(endpoint=hub.url, token="…")   # without xet: files of at least LARGE bytes go by LFS
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qs

LARGE = 1000


class FakeHub:
    """Files by name, objects by SHA-256. sent: every body that has arrived; puts: objects that have arrived whole."""

    def __init__(self) -> None:
        self.exists, self.private = False, False
        self.files: dict[str, bytes] = {}
        self.objects: dict[str, bytes] = {}
        self.sent: list[bytes] = []
        self.puts: list[str] = []
        self.commits: list[list[str]] = []
        self.drop_at = 0
        self.down = False

    def __enter__(self) -> Self:
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Requests,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def row(self, name: str) -> dict[str, Any]:
        content = self.files[name]
        lfs = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 127}
        found = {"type": "file", "path": name, "size": len(content), "oid": git_hash(content)}
        return found | ({"lfs": lfs} if len(content) >= LARGE else {})

    def commit(self, lines: list[dict[str, Any]]) -> None:
        names = []
        for line in lines[1:]:
            value = line["value"]
            file = line["key"] == "file"
            self.files[value["path"]] = base64.b64decode(value["content"]) if file else self.objects[value["oid"]]
            names.append(value["path"])
        self.commits.append(names)


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


class Requests(BaseHTTPRequestHandler):
    """What huggingface_hub 1 and 2 ask for."""

    hub: FakeHub

    def log_message(self, *_: object) -> None:
        pass

    def do_POST(self) -> None:
        self.respond(self.rfile.read(int(self.headers["Content-Length"])))

    def respond(self, body: bytes) -> None:
        hub, path = self.hub, self.path.split("?")[0]
        if hub.down:
            self.close_connection = True
            return
        hub.sent.append(body)
        if path == "/api/repos/create":
            known, hub.exists, hub.private = hub.exists, True, json.loads(body).get("private", False)
            self.answer({"url": f"{hub.url}/org/tiny", "id": "org/tiny"}, 409 if known else 200)
        elif path.endswith("/paths-info/main"):
            self.answer([hub.row(name) for name in parse_qs(body.decode())["paths"] if name in hub.files])
        elif path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif path.endswith("/preupload/main"):
            files = [{**file, "shouldIgnore": False} for file in json.loads(body)["files"]]
            self.answer({"files": [{**f, "uploadMode": "lfs" if f["size"] >= LARGE else "regular"} for f in files]})
        elif path.endswith("/info/lfs/objects/batch"):
            rows = [row for row in json.loads(body)["objects"] if row["oid"] not in hub.objects]
            actions = [{"upload": {"href": f"{hub.url}/objects/{row['oid']}"}} for row in rows]
            found = [{**row, "actions": action} for row, action in zip(rows, actions, strict=True)]
            self.answer({"transfer": "basic", "objects": found})
        elif path.endswith("/commit/main"):
            hub.commit([json.loads(line) for line in body.splitlines()])
            self.answer({"commitUrl": f"{hub.url}/org/tiny/commit/1", "commitOid": "1" * 40})
        else:
            self.answer({"error": f"unknown: {path}"}, 404)

    def do_PUT(self) -> None:
        hub, length = self.hub, int(self.headers["Content-Length"])
        if hub.drop_at and len(hub.puts) + 1 >= hub.drop_at:
            self.rfile.read(length // 2)
            hub.down = True
        if hub.down:
            self.close_connection = True
            return
        content = self.rfile.read(length)
        name = self.path.rpartition("/")[2]
        assert hashlib.sha256(content).hexdigest() == name
        hub.objects[name] = content
        hub.sent.append(content)
        hub.puts.append(name)
        self.answer({})

    def answer(self, content: Any, status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
