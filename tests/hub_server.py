"""A stand-in for the hub on 127.0.0.1: the endpoints that huggingface_hub's own client calls to look for,
create and fill a model's repository. It refuses what the hub refuses: a wrong token, a name that is taken, a
front matter that is no YAML, content of another hash than announced, a commit without its uploads."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

TOKEN = "hf_right"


class Hub(ThreadingHTTPServer):
    """repositories: name -> (visibility, {path: bytes}). requests: "METHOD path" of each. fails_at: parts of
    paths; the next request whose path has the first of them is answered with 403."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.repositories: dict[str, tuple[str, dict[str, bytes]]] = {}
        self.requests: list[str] = []
        self.uploaded: dict[str, bytes] = {}
        self.fails_at: list[str] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Answer(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer("GET")

    def do_POST(self) -> None:
        self._answer("POST")

    def do_PUT(self) -> None:
        self._answer("PUT")

    def _answer(self, method: str) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = self.path.partition("?")[0]
        self.server.requests.append(f"{method} {path}")
        if method == "PUT":  # a presigned address, without a token
            self.server.uploaded[path.rpartition("/")[2]] = body
            self._send(200, {})
            return
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._send(401, {}, **{"X-Error-Message": "User access token has expired"})
            return
        if self.server.fails_at and self.server.fails_at[0] in path:
            self.server.fails_at.pop(0)
            self._send(403, {"error": "you may not write here"})
            return
        for pattern, answer in ROUTES:
            if found := re.fullmatch(pattern, f"{method} {path}"):
                answer(self, body, *found.groups())
                return
        self._send(404, {"error": "no such endpoint"})

    def _send(self, status: int, content: Any, **headers: str) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def info(self, body: bytes, name: str) -> None:
        if name not in self.server.repositories:
            self._send(404, {}, **{"X-Error-Code": "RepoNotFound"})
            return
        visibility, files = self.server.repositories[name]
        siblings = [{"rfilename": path} for path in files]
        self._send(200, {"id": name, "sha": "0", "private": visibility == "private", "siblings": siblings})

    def whoami(self, body: bytes) -> None:
        self._send(200, {"type": "user", "name": "me", "orgs": []})

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}"
        assert asked.get("type", "model") == "model"
        if name in self.server.repositories:
            self._send(409, {"error": "taken", "url": f"{self.server.address}/{name}"})
            return
        visibility = asked.get("visibility") or ("private" if asked.get("private") else "public")
        self.server.repositories[name] = (visibility, {".gitattributes": b""})
        self._send(200, {"url": f"{self.server.address}/{name}", "id": name})

    def validate(self, body: bytes) -> None:
        front = re.match(r"---\n(.*?)\n---\n", json.loads(body)["content"], re.DOTALL)
        try:
            assert front is not None and isinstance(YAML(typ="safe").load(front[1]), dict)
        except (AssertionError, YAMLError):
            self._send(400, {"errors": [{"message": "invalid YAML"}], "warnings": []})
            return
        self._send(200, {"errors": [], "warnings": []})

    def preupload(self, body: bytes, name: str) -> None:
        def mode(path: str) -> str:
            return "lfs" if path.endswith((".safetensors", ".gguf")) else "regular"

        files = json.loads(body)["files"]
        self._send(200, {"files": [
            {"path": f["path"], "uploadMode": mode(f["path"]), "shouldIgnore": False, "oid": None}
            for f in files
        ]})  # fmt: skip

    def batch(self, body: bytes, name: str) -> None:
        objects = [
            asked | {"actions": {"upload": {"href": f"{self.server.address}/store/{asked['oid']}"}}}
            for asked in json.loads(body)["objects"]
        ]
        self._send(200, {"transfer": "basic", "objects": objects})

    def commit(self, body: bytes, name: str) -> None:
        header, *operations = [json.loads(line) for line in body.splitlines()]
        assert header["key"] == "header" and header["value"]["summary"]
        files = {}
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                assert value["encoding"] == "base64"
                files[value["path"]] = base64.b64decode(value["content"])
            else:
                assert operation["key"] == "lfsFile" and value["algo"] == "sha256"
                content = self.server.uploaded[value["oid"]]
                assert hashlib.sha256(content).hexdigest() == value["oid"] and len(content) == value["size"]
                files[value["path"]] = content
        self.server.repositories[name][1].update(files)
        address = f"{self.server.address}/{name}/commit/1"
        self._send(200, {"success": True, "commitUrl": address, "commitOid": "1"})


NAME = r"([\w.-]+/[\w.-]+)"
ROUTES = [
    (rf"GET /api/models/{NAME}", Answer.info),
    (r"GET /api/whoami-v2", Answer.whoami),
    (r"POST /api/repos/create", Answer.create),
    (r"POST /api/validate-yaml", Answer.validate),
    (rf"POST /api/models/{NAME}/preupload/main", Answer.preupload),
    (rf"POST /{NAME}\.git/info/lfs/objects/batch", Answer.batch),
    (rf"POST /api/models/{NAME}/commit/main", Answer.commit),
]


@contextmanager
def serve_hub() -> Iterator[Hub]:
    with Hub() as hub:
        thread = threading.Thread(target=hub.serve_forever)
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()
