"""A Hugging Face Hub, or a mirror of one, as far as a download needs it: HTTP/1.1 on a real socket.

    with HubServer(Hub({"acme/small": Repo({"config.json": b"{}"})})) as server:
        server.url
    python3 hub_server.py FILE           # the same on port 8000, as the JSON in FILE says: see `hub_of`

A small file is answered after a relative redirect, a large one at an address on another host, `cdn`, that
refuses tokens; sizes, hashes and the commit stand on the redirect. What nobody may know of is 401 without a
token and 404 with one; a gated repository shows its list to all, and its files to who accepted the terms.
https://huggingface.co/docs/hub/api and what huggingface_hub reads of an answer (utils/_http.py,
file_download.py). Needs the standard library alone, so that it runs in any image. Beside the Hub's paths:
`GET /-/requests` tells what was asked, `PUT` and `DELETE /-/slow` let large files wait and go on, and below
`/portal` stands what is no Hub: a proxy's page.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qs, quote, unquote, urlsplit

Content = bytes | Path
LARGE = (".safetensors", ".bin", ".gguf")
CHUNK = 2**20
_REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
_MODEL = re.compile(rf"/api/models/{_REPO}(/revision/(?P<revision>[^/]+))?")
_TREE = re.compile(rf"/api/models/{_REPO}/tree/(?P<revision>[^/]+)")
_RESOLVE = re.compile(rf"/{_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
_CACHED = re.compile(rf"/api/resolve-cache/models/{_REPO}/(?P<revision>[^/]+)/(?P<path>.+)")
_CDN = re.compile(rf"/cdn/{_REPO}/(?P<revision>[^/]+)/(?P<path>.+)")


@dataclass(frozen=True)
class Entry:
    """A file of a repository; `sha256` only of a large one."""

    content: Content
    size: int
    oid: str
    sha256: str = ""

    def open(self) -> io.BufferedIOBase:
        return io.BytesIO(self.content) if isinstance(self.content, bytes) else self.content.open("rb")


@dataclass(frozen=True)
class Repo:
    """One commit, with the branches and tags that name it. `claimed` are sizes that are told and not true."""

    files: Mapping[str, Content]
    revisions: tuple[str, ...] = ("main",)
    private: bool = False
    gated: bool = False
    claimed: Mapping[str, int] = field(default_factory=dict)

    @cached_property
    def commit(self) -> str:
        return hashlib.sha1(json.dumps(sorted(self.files)).encode()).hexdigest()

    @cached_property
    def entries(self) -> dict[str, Entry]:
        return {name: self._entry(name, content) for name, content in self.files.items()}

    def _entry(self, name: str, content: Content) -> Entry:
        real = len(content) if isinstance(content, bytes) else content.stat().st_size
        entry = Entry(content, self.claimed.get(name, real), "")
        with entry.open() as file:
            if name.endswith(LARGE):
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
                return Entry(content, entry.size, hashlib.sha1(sha256.encode()).hexdigest(), sha256)
            blob = file.read()
        return Entry(content, entry.size, hashlib.sha1(b"blob %d\0" % len(blob) + blob).hexdigest())


@dataclass(frozen=True)
class Grant:
    """What a token may read: private repositories, and gated ones whose terms its account has accepted.

    `gated` is what is ticked for a fine-grained token: whether it may use that acceptance at all.
    """

    repos: frozenset[str] = frozenset()
    gated: bool = True


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    entry: Entry | None = None


class Refused(Exception):
    """`code` is what clients tell errors apart by; some refusals have none."""

    def __init__(self, status: int, message: str, code: str = "") -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code

    def answer(self) -> Answer:
        code = {"X-Error-Code": self.code} if self.code else {}
        return Answer(
            self.status, {**code, "X-Error-Message": self.message}, as_json({"error": self.message})
        )


def as_json(value: Any) -> bytes:
    return json.dumps(value).encode()


@dataclass(frozen=True)
class Hub:
    """`cdn` is where large files are, empty for the Hub itself; `page` bounds the files of one list."""

    repos: Mapping[str, Repo]
    tokens: Mapping[str, Grant] = field(default_factory=dict)
    cdn: str = ""
    page: int = 1000

    def answer(self, target: str, authorization: str) -> Answer:
        url = urlsplit(target)
        if url.path.startswith("/portal/"):
            return Answer(200, {"Content-Type": "text/html"}, b"<html>please log in</html>")
        try:
            if found := _CDN.fullmatch(url.path):
                return self._stored(found, authorization)
            grant = self._grant(authorization)
            for pattern, answer in ((_TREE, self._tree), (_MODEL, self._model)):
                if found := pattern.fullmatch(url.path):
                    return answer(found, grant, parse_qs(url.query))
            if found := _RESOLVE.fullmatch(url.path) or _CACHED.fullmatch(url.path):
                return self._file(found, grant)
        except Refused as refused:
            return refused.answer()
        return Answer(404, body=b"<html>no such page</html>")

    def _grant(self, authorization: str) -> Grant | None:
        if not authorization:
            return None
        if (token := authorization.removeprefix("Bearer ")) not in self.tokens:
            raise Refused(401, "Invalid credentials in Authorization header")
        return self.tokens[token]

    def _repo(self, found: re.Match[str], grant: Grant | None) -> Repo:
        repo = self.repos.get(found["repo"])
        if repo is None or (repo.private and (grant is None or found["repo"] not in grant.repos)):
            if grant is None:
                raise Refused(401, "Invalid username or password.")
            raise Refused(404, "Repository not found", "RepoNotFound")
        revision = unquote(found["revision"] or "main")
        if revision not in (*repo.revisions, repo.commit):
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return repo

    def _model(self, found: re.Match[str], grant: Grant | None, query: Mapping[str, list[str]]) -> Answer:
        repo, name = self._repo(found, grant), found["repo"]
        siblings = [
            {"rfilename": path, **(_blob(entry) if query.get("blobs") else {})}
            for path, entry in repo.entries.items()
        ]
        info = {
            "_id": repo.commit[:24],
            "id": name,
            "sha": repo.commit,
            "private": repo.private,
            "gated": "manual" if repo.gated else False,
            "tags": [],
            "siblings": siblings,
        }
        return Answer(200, {"Content-Type": "application/json"}, as_json(info))

    def _tree(self, found: re.Match[str], grant: Grant | None, query: Mapping[str, list[str]]) -> Answer:
        repo, start = self._repo(found, grant), int(query.get("cursor", ["0"])[0])
        page = list(repo.entries.items())[start : start + self.page]
        listed = [{"type": "file", "path": path, **_leaf(entry)} for path, entry in page]
        headers = {"Content-Type": "application/json"}
        if start + self.page < len(repo.entries):
            headers["Link"] = f'<{{origin}}{found[0]}?recursive=True&cursor={start + self.page}>; rel="next"'
        return Answer(200, headers, as_json(listed))

    def _file(self, found: re.Match[str], grant: Grant | None) -> Answer:
        repo, name, path = self._repo(found, grant), found["repo"], unquote(found["path"])
        if repo.gated:
            _check_terms(name, grant)
        commit = {"X-Repo-Commit": repo.commit}
        if (entry := repo.entries.get(path)) is None:
            refused = Refused(404, "Entry not found", "EntryNotFound").answer()
            return Answer(404, {**refused.headers, **commit}, refused.body)
        if entry.sha256:
            linked = {"X-Linked-Size": str(entry.size), "X-Linked-Etag": f'"{entry.sha256}"', **commit}
            return Answer(302, {**linked, "Location": f"{self.cdn}/cdn/{name}/{repo.commit}/{quote(path)}"})
        if found.re is _RESOLVE:
            location = f"/api/resolve-cache/models/{name}/{repo.commit}/{quote(path)}"
            return Answer(307, {**commit, "Location": location})
        return Answer(200, {**commit, "ETag": f'"{entry.oid}"'}, entry=entry)

    def _stored(self, found: re.Match[str], authorization: str) -> Answer:
        """As a store does: an address that is signed by itself, and no second way to say who asks."""
        if authorization:
            raise Refused(400, "Only one auth mechanism allowed")
        entry = self.repos[found["repo"]].entries[unquote(found["path"])]
        return Answer(200, {"ETag": f'"{entry.oid}"'}, entry=entry)


def _blob(entry: Entry) -> dict[str, Any]:
    lfs = {"sha256": entry.sha256, "size": entry.size, "pointerSize": 134}
    return {"size": entry.size, "blobId": entry.oid, **({"lfs": lfs} if entry.sha256 else {})}


def _leaf(entry: Entry) -> dict[str, Any]:
    lfs = {"oid": entry.sha256, "size": entry.size, "pointerSize": 134}
    return {"size": entry.size, "oid": entry.oid, **({"lfs": lfs} if entry.sha256 else {})}


def _check_terms(name: str, grant: Grant | None) -> None:
    if grant is None:
        raise Refused(401, f"Access to model {name} is restricted: log in", "GatedRepo")
    if not grant.gated:
        raise Refused(403, "This fine-grained token may not read public gated repositories")
    if name not in grant.repos:
        raise Refused(403, f"Access to model {name} is restricted: ask for it", "GatedRepo")


@dataclass(frozen=True)
class Asked:
    method: str
    path: str
    with_token: bool
    agent: str


class HubServer:
    """Serves while it is entered. `cuts` are the byte counts after which the next large answers break off."""

    def __init__(self, hub: Hub, address: tuple[str, int] = ("127.0.0.1", 0)) -> None:
        self.hub, self.asked, self.cuts = hub, list[Asked](), list[int]()
        self.may_go_on = threading.Event()
        self.may_go_on.set()
        self._server = ThreadingHTTPServer(address, type("Handler", (_Handler,), {"owner": self}))
        self._server.daemon_threads = True

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def serve(self) -> None:
        self._server.serve_forever(poll_interval=0.05)

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    owner: HubServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        authorization = self.headers.get("Authorization", "")
        if self.path == "/-/requests":
            listed = [vars(asked) for asked in self.owner.asked]
            return self._send(Answer(200, {"Content-Type": "application/json"}, as_json(listed)))
        agent = self.headers.get("User-Agent", "")
        self.owner.asked.append(Asked(self.command, self.path, bool(authorization), agent))
        return self._send(self.owner.hub.answer(self.path, authorization))

    do_HEAD = do_GET  # noqa: N815

    def do_PUT(self) -> None:
        self.owner.may_go_on.clear()
        self._send(Answer(200))

    def do_DELETE(self) -> None:
        self.owner.may_go_on.set()
        self._send(Answer(200))

    def _send(self, answer: Answer) -> None:
        entry = answer.entry
        size = len(answer.body) if entry is None else entry.size
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(wanted[1]) if wanted and entry is not None else 0
        self.send_response(206 if start else answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value.replace("{origin}", f"http://{self.headers['Host']}"))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
        self.send_header("Content-Length", str(size - start))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body) if entry is None else self._send_file(entry, start)

    def _send_file(self, entry: Entry, start: int) -> None:
        cut = self.owner.cuts.pop() if entry.sha256 and self.owner.cuts else 0
        with entry.open() as file:
            file.seek(start)
            while entry.sha256 and not self.owner.may_go_on.wait(0.5):
                self.wfile.write(file.read(1))  # a line that is slow, and not dead
            if cut:
                self.wfile.write(file.read(cut))
                self.close_connection = True
            else:
                shutil.copyfileobj(file, self.wfile, CHUNK)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Said by `asked`."""


def hub_of(told: dict[str, Any]) -> Hub:
    """{"cdn": …, "tokens": {token: {"repos": […], "gated": …}}, "repos": {name: {"folder": …, "add": {path:
    text}, …}}}: a repository has the files of a folder, and those that are added.
    """
    repos = {}
    for name, item in told["repos"].items():
        folder = Path(item.pop("folder"))
        files: dict[str, Content] = {path.name: path for path in sorted(folder.iterdir()) if path.is_file()}
        files |= {path: text.encode() for path, text in item.pop("add", {}).items()}
        repos[name] = Repo(files, revisions=tuple(item.pop("revisions", ["main"])), **item)
    tokens = {
        token: Grant(frozenset(item["repos"]), item.get("gated", True))
        for token, item in told.get("tokens", {}).items()
    }
    return Hub(repos, tokens, told.get("cdn", ""))


if __name__ == "__main__":
    HubServer(hub_of(json.loads(Path(sys.argv[1]).read_text())), ("", 8000)).serve()
