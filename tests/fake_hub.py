"""A hub of one user on 127.0.0.1: what huggingface_hub's real client needs to push and to pull.

Repos, branches and commits are held in memory, the bytes of files in a directory. Large files go
the LFS way, for Xet is no HTTP API: `connect` turns it off.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from huggingface_hub import constants

OWNER, TOKEN = "somebody", "hf_fake"
HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)


@dataclass(frozen=True)
class Blob:
    """A file of a commit. oid: git's hash of it, or the SHA-256 of a large one."""

    oid: str
    size: int
    large: bool


@dataclass
class Commit:
    """What a commit says, the files it holds, and the names of those that it brought."""

    oid: str
    message: str
    files: dict[str, Blob]
    brought: list[str]


@dataclass
class Repo:
    """A repo and the commits of its branches, oldest first."""

    private: bool
    branches: dict[str, list[Commit]] = field(default_factory=dict)


@dataclass
class Answer:
    """What the hub answers. code: of an error, as the client looks for it."""

    status: int = 200
    data: Any = None
    body: bytes | None = None
    headers: dict[str, str] = field(default_factory=dict)
    code: str | None = None


class Refused(Exception):
    """Raised with the Answer to a request that cannot be met."""

    def __init__(self, status: int, error: str, code: str | None = None, **more: Any) -> None:
        super().__init__(error)
        self.answer = Answer(status, {"error": error} | more, code=code)


class FakeHub:
    """The hub's state, and what it does for each request."""

    def __init__(self, root: Path) -> None:
        self.root, self.url = root, ""
        self.repos: dict[str, Repo] = {}
        self.routes: list[tuple[str, str, Callable[..., Answer]]] = [
            ("POST", r"/api/repos/create", self._create),
            ("POST", r"/api/validate-yaml", self._validate),
            ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/branch/(?P<name>[^/]+)", self._branch),
            ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/preupload/(?P<rev>[^/]+)", self._modes),
            ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/commit/(?P<rev>[^/]+)", self._commit),
            ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)", self._info),
            ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)/revision/(?P<rev>[^/]+)", self._info),
            ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)/tree/(?P<rev>[^/]+)(/.*)?", self._tree),
            ("POST", r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch", self._batch),
            ("PUT", r"/large/(?P<oid>\w+)", self._store),
            ("GET", r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<rev>[^/]+)/(?P<path>.+)", self._file),
        ]

    def handle(self, method: str, path: str, token: str | None, body: bytes) -> Answer:
        """The answer to a request."""
        try:
            if token not in (None, TOKEN):
                raise Refused(401, "Invalid username or password.")
            for wanted, pattern, act in self.routes:
                found = re.fullmatch(pattern, path)
                if found is None or wanted != ("GET" if method == "HEAD" else method):
                    continue
                given = {name: unquote(value) for name, value in found.groupdict().items()}
                # Where large files go, the client brings no token: the hub signs those URLs.
                if wanted != "GET" and token is None and act != self._store:
                    raise Refused(401, "Invalid username or password.")
                if "repo" in given:
                    self._check(given["repo"], wanted != "GET", token)
                return act(body, **given)
            raise Refused(404, f"{method} {path} is not of this fake")
        except Refused as refused:
            return refused.answer

    def head(self, repo: str, revision: str = "main") -> Commit:
        """A branch's last commit, or the commit of a hash."""
        branches = self.repos[repo].branches
        if revision in branches:
            return branches[revision][-1]
        for commit in (commit for commits in branches.values() for commit in commits):
            if commit.oid == revision:
                return commit
        raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def read(self, repo: str, path: str, revision: str = "main") -> bytes:
        """A file's bytes."""
        return (self.root / self.head(repo, revision).files[path].oid).read_bytes()

    def contents(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """Every file's bytes."""
        files = self.head(repo, revision).files
        return {path: self.read(repo, path, revision) for path in sorted(files)}

    def _check(self, repo: str, writes: bool, token: str | None) -> None:
        if repo not in self.repos or (self.repos[repo].private and token is None):
            # The hub does not tell strangers whether a repo is there.
            status = 404 if token else 401
            raise Refused(status, "Repository not found", "RepoNotFound")
        if writes and not repo.startswith(f"{OWNER}/"):
            raise Refused(403, f"You don't have the rights to write to {repo}")

    def _put(self, content: bytes, large: bool) -> Blob:
        header = b"" if large else f"blob {len(content)}\0".encode()
        oid = (hashlib.sha256 if large else hashlib.sha1)(header + content).hexdigest()
        (self.root / oid).write_bytes(content)
        return Blob(oid, len(content), large)

    def _add_commit(
        self, repo: str, branch: str, message: str, files: dict[str, Blob], brought: list[str]
    ) -> Commit:
        commits = self.repos[repo].branches.setdefault(branch, [])
        told = json.dumps([repo, branch, len(commits), message, sorted(files)])
        commit = Commit(hashlib.sha1(told.encode()).hexdigest(), message, files, brought)
        commits.append(commit)
        return commit

    def _create(self, body: bytes) -> Answer:
        asked = json.loads(body)
        repo = f"{asked['organization'] or OWNER}/{asked['name']}"
        if not repo.startswith(f"{OWNER}/"):
            raise Refused(403, f"You don't have the rights to create {repo}")
        url = f"{self.url}/{repo}"
        if repo in self.repos:
            raise Refused(409, "You already created this model repo", url=url)
        self.repos[repo] = Repo(asked.get("visibility") == "private")
        first = {".gitattributes": self._put(b"*.safetensors filter=lfs\n", large=False)}
        self._add_commit(repo, "main", "initial commit", first, list(first))
        return Answer(data={"url": url})

    def _validate(self, body: bytes) -> Answer:
        metadata = yaml.safe_load(json.loads(body)["content"].split("---\n")[1])
        bases = metadata.get("base_model") or []
        errors = [
            f'"base_model" with value "{base}" is not valid'
            for base in ([bases] if isinstance(bases, str) else bases)
            if not HUB_ID.fullmatch(base)
        ]
        errors += [
            '"model-index" is not valid'
            for model in metadata.get("model-index", [])
            for result in model["results"]
            if not (result["task"]["type"] and result["dataset"]["type"] and result["metrics"])
        ]
        told = {"errors": [{"message": error} for error in errors], "warnings": []}
        return Answer(400 if errors else 200, told)

    def _branch(self, body: bytes, repo: str, name: str) -> Answer:
        if name in self.repos[repo].branches:
            raise Refused(409, f"Reference already exists: {name}")
        self.repos[repo].branches[name] = list(self.repos[repo].branches["main"])
        return Answer(data={})

    def _modes(self, body: bytes, repo: str, rev: str) -> Answer:
        there = self.head(repo, rev).files
        told = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
                "oid": there[file["path"]].oid if file["path"] in there else None,
            }
            for file in json.loads(body)["files"]
        ]
        return Answer(data={"files": told})

    def _batch(self, body: bytes, repo: str) -> Answer:
        told = []
        for wanted in json.loads(body)["objects"]:
            href = f"{self.url}/large/{wanted['oid']}"
            missing = not (self.root / wanted["oid"]).exists()
            told.append(wanted | ({"actions": {"upload": {"href": href}}} if missing else {}))
        return Answer(data={"transfer": "basic", "objects": told})

    def _store(self, body: bytes, oid: str) -> Answer:
        if self._put(body, large=True).oid != oid:
            raise Refused(400, "the hash is another")
        return Answer(data={})

    def _commit(self, body: bytes, repo: str, rev: str) -> Answer:
        files, brought, message = dict(self.head(repo, rev).files), [], ""
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            match line["key"]:
                case "header":
                    message = value["summary"]
                case "file":
                    files[value["path"]] = self._put(base64.b64decode(value["content"]), False)
                    brought.append(value["path"])
                case "lfsFile":
                    if not (self.root / value["oid"]).exists():
                        raise Refused(400, f"{value['path']} was not uploaded")
                    files[value["path"]] = Blob(value["oid"], value["size"], True)
                    brought.append(value["path"])
                case "deletedFile":
                    del files[value["path"]]
        commit = self._add_commit(repo, rev, message, files, brought)
        url = f"{self.url}/{repo}/commit/{commit.oid}"
        return Answer(data={"success": True, "commitOid": commit.oid, "commitUrl": url})

    def _info(self, body: bytes, repo: str, rev: str = "main") -> Answer:
        commit = self.head(repo, rev)
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        told = {"id": repo, "sha": commit.oid, "private": self.repos[repo].private}
        return Answer(data=told | {"siblings": siblings})

    def _tree(self, body: bytes, repo: str, rev: str) -> Answer:
        told = []
        for path, blob in sorted(self.head(repo, rev).files.items()):
            entry: dict[str, Any] = {"type": "file", "path": path, "size": blob.size}
            entry["oid"] = blob.oid[:40]
            if blob.large:
                entry["lfs"] = {"oid": blob.oid, "size": blob.size, "pointerSize": 134}
            told.append(entry)
        return Answer(data=told)

    def _file(self, body: bytes, repo: str, rev: str, path: str) -> Answer:
        commit = self.head(repo, rev)
        if path not in commit.files:
            raise Refused(404, "Entry not found", "EntryNotFound")
        headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{commit.files[path].oid}"'}
        return Answer(body=self.read(repo, path, rev), headers=headers)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # for the client keeps its connections
    hub: FakeHub

    def _respond(self) -> None:
        authorization = self.headers.get("Authorization")
        token = None if authorization is None else authorization.removeprefix("Bearer ")
        path = urlsplit(self.path).path
        answer = self.hub.handle(self.command, path, token, self._body())
        body = json.dumps(answer.data).encode() if answer.body is None else answer.body
        self.send_response(answer.status)
        kind = "application/json" if answer.body is None else "application/octet-stream"
        headers = {"Content-Type": kind, "Content-Length": str(len(body))} | answer.headers
        if answer.code is not None:
            headers["X-Error-Code"] = answer.code
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_HEAD = do_POST = do_PUT = _respond

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: pytest's output is no place for it."""


@contextmanager
def serving(root: Path) -> Iterator[FakeHub]:
    """A hub that answers at its `url`. root: a directory for the files' bytes."""
    hub = FakeHub(root)
    handler = type("Handler", (_Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        hub.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()


def connect(monkeypatch: pytest.MonkeyPatch, url: str, cache: Path) -> None:
    """Make the client of this process ask a hub at `url`, as its user, with a cache of its own.

    The client reads its environment when it is imported, offline mode too: what it made of that is
    changed. An environment of HF_ENDPOINT, HF_HUB_OFFLINE=0, HF_HUB_DISABLE_XET=1, HF_TOKEN and
    HF_HOME does the same for another process.
    """
    for name, value in {
        "ENDPOINT": url,
        "HUGGINGFACE_CO_URL_TEMPLATE": url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_CACHE": str(cache),
        "HF_TOKEN_PATH": str(cache / "token"),
    }.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
