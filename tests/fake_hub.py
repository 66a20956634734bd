"""A hub on loopback: enough of huggingface.co's protocol for transformers, datasets and huggingface_hub to download.

    hub = FakeHub()
    hub.models["tiny/llama"] = Repo(folder)
    with hub:  # then HF_ENDPOINT=hub.url in the process that downloads

It serves files (HEAD and GET with ETag, X-Repo-Commit and ranges), repository information, listings and access checks,
and it misbehaves on request: gated repositories, and connections that are cut or stall in the middle of a file.
"""

import hashlib
import json
import re
import struct
import threading
import urllib.parse
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_with_access"


@dataclass
class Repo:
    """A repository whose files are those of ``folder``; ``gated`` ones are served to holders of `TOKEN` only."""

    folder: Path
    gated: bool = False

    def files(self) -> dict[str, Path]:
        return {str(p.relative_to(self.folder)): p for p in sorted(self.folder.rglob("*")) if p.is_file()}


@dataclass
class FakeHub:
    """The server, the repositories it serves, and what it was asked.

    Attributes:
        cut: file name to byte count: the connection closes once after so many bytes of that file.
        stall: the same, but the connection stays open and nothing more comes.
        requests: (method, path, Range header or None, bytes of body sent), in order.
    """

    models: dict[str, Repo] = field(default_factory=dict)
    datasets: dict[str, Repo] = field(default_factory=dict)
    cut: dict[str, int] = field(default_factory=dict)
    stall: dict[str, int] = field(default_factory=dict)
    requests: list[tuple[str, str, str | None, int]] = field(default_factory=list)
    port: int = 0
    running: bool = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), handler)
        self._server.daemon_threads = True
        self.port, self.running = self._server.server_address[1], True
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def stop(self) -> None:
        """Refuse connections from now on, and hang up on those that are open."""
        self.running = False
        self._server.shutdown()
        self._server.server_close()

    def __enter__(self) -> "FakeHub":
        self.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self.stop()

    def downloads(self, suffix: str = "") -> list[tuple[str, str | None, int]]:
        """(path, Range header, bytes) of the GET requests for repository files whose path ends in ``suffix``."""
        return [r[1:] for r in self.requests if r[0] == "GET" and "/resolve/" in r[1] and r[1].endswith(suffix)]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def log_message(self, *_arguments: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", "0"))).decode()
        if self.headers.get("Content-Type", "").startswith("application/json"):
            self._answer(json.loads(body)["paths"])
        else:
            self._answer(urllib.parse.parse_qs(body).get("paths", []))

    def _answer(self, paths: list[str] | None = None) -> None:
        if not self.hub.running:
            self.close_connection = True
            return
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        if match := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            kind, name, revision, file = match.groups()
            repo = self._repo("datasets" if kind else "models", name, check_access=True)
            if repo and self._revision(revision):
                self._file(repo, file)
        elif match := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(.*))?", path):
            kind, name, rest = match.groups()
            verb, _, rest = (rest or "").partition("/")
            repo = self._repo(kind, name, check_access=verb == "auth-check")
            if repo:
                self._api(repo, name, verb, rest, paths)
        else:
            self._error(404, "NotFound", "no such page")

    def _repo(self, kind: str, name: str, check_access: bool) -> Repo | None:
        repo: Repo | None = getattr(self.hub, kind).get(name)
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if repo is None:
            self._error(404 if token else 401, "RepoNotFound", "Repository not found")
        elif check_access and repo.gated and token != TOKEN:
            where = f"Access to {kind[:-1]} {name} is restricted"
            self._error(403 if token else 401, "GatedRepo", where)
        else:
            return repo
        return None

    def _revision(self, revision: str) -> bool:
        if revision in ("main", COMMIT):
            return True
        self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return False

    def _api(self, repo: Repo, name: str, verb: str, rest: str, paths: list[str] | None) -> None:
        files = repo.files()
        if verb in ("", "revision"):
            if not rest or self._revision(rest):
                self._json(_information(name, repo))
        elif verb == "auth-check":
            self._json({})
        elif verb == "paths-info":
            self._json(_entries({p: f for p, f in files.items() if p in (paths or [])}, ""))
        elif verb == "tree":
            folder = rest.partition("/")[2]
            entries = _entries(files, folder, "recursive=true" in self.path.lower())
            if folder and not entries:
                self._error(404, "EntryNotFound", f"{folder} does not exist")
            else:
                self._json(entries)
        else:
            self._error(404, "NotFound", verb)

    def _file(self, repo: Repo, name: str) -> None:
        path = repo.files().get(name)
        if path is None:
            self._error(404, "EntryNotFound", "Entry not found")
            return
        content = path.read_bytes()
        headers = {"ETag": f'"{_digest(content)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        start, end, status = 0, len(content), 200
        if span := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end = int(span[1]), min(end, int(span[2] or end) + 1)
            status, headers["Content-Range"] = 206, f"bytes {start}-{end - 1}/{len(content)}"
        self._send(status, content[start:end], headers, path.name)

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _error(self, status: int, code: str, message: str) -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": message, "Content-Type": "application/json"}
        self._send(status, json.dumps({"error": message}).encode(), headers)

    def _send(self, status: int, body: bytes, headers: dict[str, str], file: str = "") -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        sent = b"" if self.command == "HEAD" else body
        stalls = bool(sent) and file in self.hub.stall
        if stalls or (sent and file in self.hub.cut):
            sent, self.close_connection = body[: (self.hub.stall if stalls else self.hub.cut).pop(file)], True
        path = urllib.parse.urlsplit(self.path).path
        self.hub.requests.append((self.command, path, self.headers.get("Range"), len(sent)))
        self.wfile.write(sent)
        if stalls:
            self.rfile.read(1)  # until the client hangs up


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _entries(files: dict[str, Path], folder: str, recursive: bool = True) -> list[dict[str, Any]]:
    prefix = f"{folder}/" if folder else ""
    entries: dict[str, dict[str, Any]] = {}
    for name, path in files.items():
        if not name.startswith(prefix):
            continue
        rest = name.removeprefix(prefix)
        if "/" in rest:
            directory = prefix + rest.split("/")[0]
            entries[directory] = {"type": "directory", "path": directory, "oid": COMMIT, "size": 0}
        if recursive or "/" not in rest:
            oid = _digest(path.read_bytes())[:40]
            entries[name] = {"type": "file", "path": name, "oid": oid, "size": path.stat().st_size}
    return list(entries.values())


def _information(name: str, repo: Repo) -> dict[str, Any]:
    files = repo.files()
    information: dict[str, Any] = {
        "_id": "1", "id": name, "modelId": name, "sha": COMMIT, "private": False, "disabled": False,
        "gated": "manual" if repo.gated else False, "downloads": 0, "likes": 0, "tags": [],
        "lastModified": "2024-01-01T00:00:00.000Z", "createdAt": "2024-01-01T00:00:00.000Z",
        "siblings": [{"rfilename": file, "size": path.stat().st_size} for file, path in files.items()],
    }  # fmt: skip
    counts: dict[str, int] = {}
    for path in files.values():
        if path.suffix == ".safetensors":
            with path.open("rb") as file:
                header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
            for tensor in (value for key, value in header.items() if key != "__metadata__"):
                size = 1
                for extent in tensor["shape"]:
                    size *= extent
                counts[tensor["dtype"]] = counts.get(tensor["dtype"], 0) + size
    if counts:
        information["safetensors"] = {"parameters": counts, "total": sum(counts.values())}
    return information
