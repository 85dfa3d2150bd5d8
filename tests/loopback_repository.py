"""What a Hub on 127.0.0.1 holds (see loopback_hub.py): repositories with commits, branches, tags and pull requests, and files as
git and Git LFS name them."""

from __future__ import annotations

import hashlib
import json
import threading
from dataclasses import dataclass, field
from typing import Any


LFS_SUFFIXES = (".safetensors", ".bin", ".parquet", ".arrow", ".npy", ".zip")
LFS_SIZE = 10 * 2**20
LICENSES = {"apache-2.0", "mit", "cc-by-4.0", "cc-by-sa-4.0", "openrail", "other", "unknown"}


class Refusal(Exception):
    """An answer other than success."""

    def __init__(self, status: int, message: str, code: str | None = None, body: dict[str, Any] | None = None):
        super().__init__(message)
        self.status, self.message, self.code, self.body = status, message, code, body


@dataclass(frozen=True)
class File:
    """One version of one file."""

    content: bytes
    is_lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def blob_id(self) -> str:
        """Git's name for what git stores: the content, or for LFS a pointer to it."""
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.content)}\n"
        stored = pointer.encode() if self.is_lfs else self.content
        return hashlib.sha1(b"blob %d\0%s" % (len(stored), stored)).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.is_lfs else self.blob_id

    def describe(self, path: str) -> dict[str, Any]:
        entry: dict[str, Any] = {"type": "file", "path": path, "oid": self.blob_id, "size": len(self.content)}
        if self.is_lfs:
            entry["lfs"] = {"oid": self.sha256, "size": len(self.content), "pointerSize": 134}
        return entry


@dataclass(frozen=True)
class Commit:
    sha: str
    files: dict[str, File]
    title: str
    parent: str | None


@dataclass
class Repository:
    id: str
    private: bool = False
    gated: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    pull_requests: dict[str, str] = field(default_factory=dict)
    titles: dict[str, str] = field(default_factory=dict)
    authors: dict[str, str] = field(default_factory=dict)
    lock: threading.RLock = field(default_factory=threading.RLock)

    def __post_init__(self) -> None:
        self.branches["main"] = self.add(
            {".gitattributes": File(b"*.safetensors filter=lfs\n", False)}, "initial commit", None
        )

    @property
    def owner(self) -> str:
        return self.id.split("/")[0]

    @property
    def head(self) -> Commit:
        return self.commits[self.branches["main"]]

    def add(self, files: dict[str, File], title: str, parent: str | None) -> str:
        names = [(path, file.sha256) for path, file in sorted(files.items())]
        sha = hashlib.sha1(json.dumps([parent, title, names, len(self.commits)]).encode()).hexdigest()
        self.commits[sha] = Commit(sha, files, title, parent)
        return sha

    def history(self, revision: str = "main") -> list[Commit]:
        """Newest first."""
        commits, sha = [], self.resolve(revision)
        while sha:
            commits.append(self.commits[sha])
            sha = self.commits[sha].parent
        return commits

    def resolve(self, revision: str) -> str:
        for known in (self.branches, self.tags, self.pull_requests):
            if revision in known:
                return known[revision]
        if revision in self.commits:
            return revision
        raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def move(self, revision: str, sha: str) -> None:
        known = self.pull_requests if revision in self.pull_requests else self.branches
        if revision not in known:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        known[revision] = sha

    def edit(self, path: str, content: str, title: str = "Edited on the web page") -> None:
        """What a visitor does in the browser."""
        self.branches["main"] = self.add(self.head.files | {path: File(content.encode(), False)}, title, self.head.sha)

    def merge(self, number: int) -> None:
        self.branches["main"] = self.pull_requests.pop(f"refs/pr/{number}")

    def text(self, path: str, revision: str = "main") -> str:
        return self.commits[self.resolve(revision)].files[path].content.decode()
