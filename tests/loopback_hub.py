"""A Hub on 127.0.0.1 for the real huggingface_hub client, with the faults of a real network on demand.

    with LoopbackHub() as hub:
        os.environ.update(hub.environment(cache))  # before huggingface_hub is imported: it reads them then
        ...
        hub.fail("PUT", status=503)                # the next such request
        hub.cut("model.safetensors", after=1000)   # the next such download stops in the middle

It holds model repositories in memory: commits, branches, pull requests, tags, private and gated repositories, Git LFS with
downloads from another address (as the real Hub sends them to a CDN), and the Hub's checks of tokens, parents and card
metadata. Only the standard library and PyYAML.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import yaml
from loopback_repository import LFS_SIZE, LFS_SUFFIXES, LICENSES, Commit, File, Refusal, Repository


@dataclass
class Fault:
    """What to do to the next `times` requests that match: refuse them, or stop in the middle of the answer."""

    pattern: str
    times: int
    status: int | None = None
    after: int | None = None


class LoopbackHub:
    """The server. Tokens: `write`, `read` and `org` belong to the user "ada" (`org` also writes for "lab"), `other` to "bob"."""

    write, read, org, other = "hf_write", "hf_read", "hf_org", "hf_other"

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.uploads: dict[str, bytes] = {}
        self.requests: list[tuple[str, str, int]] = []
        self.idle = threading.Condition()
        self.in_progress = 0
        self.faults: list[Fault] = []
        self.lock = threading.Lock()
        self.servers: list[ThreadingHTTPServer] = []

    def __enter__(self) -> LoopbackHub:
        for _ in ("hub", "files"):
            handler = type("BoundHandler", (_Handler,), {"hub": self})
            server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
            self.servers.append(server)
        return self

    def __exit__(self, *_: Any) -> None:
        for server in self.servers:
            server.shutdown()
            server.server_close()
        self.servers.clear()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.servers[0].server_port}"

    @property
    def files_url(self) -> str:
        """Where LFS files are served: another host for the client, to which it must not send its token."""
        return f"http://localhost:{self.servers[1].server_port}"

    def environment(self, cache: str | Path) -> dict[str, str]:
        return {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": self.write,
            "HF_HOME": str(cache),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",  # the client has no way back to plain HTTP once it has asked for Xet
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1,localhost",
            "no_proxy": "127.0.0.1,localhost",
        }

    def __getitem__(self, repo_id: str) -> Repository:
        return self.repositories[repo_id]

    def fail(self, pattern: str, status: int, times: int = 1) -> None:
        """Answer the next requests whose `METHOD path` matches with an error."""
        self.faults.append(Fault(pattern, times, status=status))

    def cut(self, pattern: str, after: int, times: int = 1) -> None:
        """Drop the connection after so many bytes of the next answers to a request that matches."""
        self.faults.append(Fault(pattern, times, after=after))

    @contextlib.contextmanager
    def recording(self) -> Iterator[list[tuple[str, str, int]]]:
        """The requests that come in meanwhile."""
        start = self._count_requests()
        seen: list[tuple[str, str, int]] = []
        yield seen
        seen += self.requests[start : self._count_requests()]

    def _count_requests(self) -> int:
        """How many there were, with those whose answer the client has but which are not noted down yet."""
        with self.idle:
            assert self.idle.wait_for(lambda: self.in_progress == 0, timeout=10)
            return len(self.requests)

    def take_fault(self, request: str, wants: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if getattr(fault, wants) is not None and re.search(fault.pattern, request):
                    fault.times -= 1
                    if not fault.times:
                        self.faults.remove(fault)
                    return fault
        return None


USERS = {
    LoopbackHub.write: ("ada", "write", ()),
    LoopbackHub.read: ("ada", "read", ()),
    LoopbackHub.org: ("ada", "write", ("lab",)),
    LoopbackHub.other: ("bob", "write", ()),
}


def check_card(content: str) -> list[str]:
    """What the Hub finds wrong with a card's metadata: the rules that matter to us, not all of them."""
    block = re.match(r"\s*---\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", content, re.DOTALL)
    if block is None:
        return []
    try:
        data = yaml.safe_load(block[1]) or {}
    except yaml.YAMLError as error:
        return [f"invalid YAML: {error}"]
    errors = []
    identifier = re.compile(r"[\w.-]+(/[\w.-]+)?")
    for key in ("base_model", "datasets"):
        for name in _as_list(data.get(key)):
            if not isinstance(name, str) or not identifier.fullmatch(name):
                errors.append(f'"{key}" must be ids of the Hub, not {name!r}')
    if data.get("base_model_relation", "adapter") not in ("adapter", "merge", "quantized", "finetune"):
        errors.append('"base_model_relation" must be one of [adapter, merge, quantized, finetune]')
    if data.get("license", "mit") not in LICENSES:
        errors.append('"license" must be one of the known ones')
    for key in ("library_name", "pipeline_tag"):
        if not isinstance(data.get(key, ""), str):
            errors.append(f'"{key}" must be a string')
    if not all(isinstance(tag, str) for tag in _as_list(data.get("tags"))):
        errors.append('"tags" must be strings')
    return errors + _check_model_index(data.get("model-index"))


def _check_model_index(index: Any) -> list[str]:
    errors = []
    for number, model in enumerate(_as_list(index)):
        if not isinstance(model, dict) or not isinstance(model.get("name"), str) or not model.get("results"):
            errors.append(f'"model-index[{number}]" needs "name" and "results"')
            continue
        for result in model["results"]:
            if not result.get("task", {}).get("type"):
                errors.append(f'"model-index[{number}].results.task.type" is required')
            for key in ("name", "type"):
                if not result.get("dataset", {}).get(key):
                    errors.append(f'"model-index[{number}].results.dataset.{key}" is required')
            if not all("type" in metric and "value" in metric for metric in result.get("metrics") or [{}]):
                errors.append(f'"model-index[{number}].results.metrics" need "type" and "value"')
    return errors


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: LoopbackHub

    def log_message(self, *_: Any) -> None:
        pass

    def _handle(self) -> None:
        status = 0
        with self.hub.idle:
            self.hub.in_progress += 1
        parts = urllib.parse.urlsplit(self.path)
        request = f"{self.command} {parts.path}"
        self.query = {name: values[-1] for name, values in urllib.parse.parse_qs(parts.query).items()}
        try:
            self.body = self._read_body()
            fault = self.hub.take_fault(request, "status")
            if fault is not None and fault.status is not None:
                raise Refusal(fault.status, "a fault made by the test")
            status = self._dispatch(parts.path)
        except Refusal as refusal:
            status = refusal.status
            headers = {"X-Error-Message": refusal.message} | ({"X-Error-Code": refusal.code} if refusal.code else {})
            self._send(status, refusal.body or {"error": refusal.message}, headers)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        finally:
            with self.hub.idle:
                self.hub.requests.append((self.command, self.path, status))
                self.hub.in_progress -= 1
                self.hub.idle.notify_all()

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _handle

    def _dispatch(self, path: str) -> int:
        for methods, pattern, handler in _ROUTES:
            found = re.fullmatch(pattern, path)
            if found and self.command in methods:
                return handler(self, *(group and urllib.parse.unquote(group) for group in found.groups())) or 200
        raise Refusal(404, f"the loopback Hub has no {self.command} {path}")

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _send(self, status: int, body: Any = b"", headers: dict[str, str] | None = None) -> int:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        given = {"Content-Type": "application/json", "Content-Length": str(len(content)), "X-Request-Id": "loopback"}
        for name, value in {**given, **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return status
        fault = self.hub.take_fault(f"{self.command} {self.path}", "after") if status < 300 else None
        if fault is not None:
            content, self.close_connection = content[: fault.after], True
        self.wfile.write(content)
        return status

    @property
    def _json(self) -> dict[str, Any]:
        return json.loads(self.body or b"{}")

    # Who asks

    def _user(self) -> tuple[str, str, tuple[str, ...]] | None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if not token:
            return None
        if token not in USERS:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return USERS[token]

    def _writer(self, owner: str | None = None) -> str:
        user = self._user()
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        name, role, organizations = user
        if role != "write" or (owner is not None and owner not in (name, *organizations)):
            raise Refusal(403, f'You don\'t have the rights to write to the namespace "{owner or name}"')
        return name

    def _repository(self, repo_id: str, files: bool = False) -> Repository:
        """The repository, if the user may see it; `files=True`, if they may read its files."""
        user, found = self._user(), self.hub.repositories.get(repo_id)
        member = user is not None and repo_id.split("/")[0] in (user[0], *user[2])
        if found is None or (found.private and not member):
            raise Refusal(401 if user is None else 404, "Repository not found", "RepoNotFound")
        if files and found.gated and not member:
            raise Refusal(403, f"Access to model {repo_id} is restricted", "GatedRepo")
        return found

    # Accounts and repositories

    def _whoami(self) -> int:
        user = self._user()
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        organizations = [{"type": "org", "name": name} for name in user[2]]
        token = {"type": "access_token", "accessToken": {"displayName": "test", "role": user[1]}}
        return self._send(200, {"type": "user", "id": user[0], "name": user[0], "orgs": organizations, "auth": token})

    def _validate(self) -> int:
        errors = check_card(self._json["content"])
        answer = {"errors": [{"message": error} for error in errors], "warnings": []}
        return self._send(400 if errors else 200, answer)

    def _create(self) -> int:
        asked = self._json
        owner = asked.get("organization") or self._writer()
        self._writer(owner)
        repo_id = f"{owner}/{asked['name']}"
        answer = {"url": f"{self.hub.url}/{repo_id}", "name": repo_id}
        with self.hub.lock:
            if repo_id in self.hub.repositories:
                raise Refusal(
                    409,
                    "You already created this model repo",
                    body={"error": "You already created this model repo", **answer},
                )
            self.hub.repositories[repo_id] = Repository(repo_id, private=asked.get("visibility") == "private")
        return self._send(200, answer)

    def _info(self, repo_id: str, revision: str | None = None) -> int:
        repository = self._repository(repo_id)
        commit = repository.commits[repository.resolve(revision or "main")]
        siblings = []
        for path, file in sorted(commit.files.items()):
            entry: dict[str, Any] = {"rfilename": path}
            if self.query.get("blobs"):
                entry |= {"size": len(file.content), "blobId": file.blob_id}
                if file.is_lfs:
                    entry["lfs"] = {"sha256": file.sha256, "size": len(file.content), "pointerSize": 134}
            siblings.append(entry)
        info = {
            "id": repo_id,
            "modelId": repo_id,
            "sha": commit.sha,
            "private": repository.private,
            "siblings": siblings,
        }
        info |= {"gated": "manual" if repository.gated else False, "downloads": 0, "likes": 0, "tags": []}
        card = commit.files.get("README.md")
        block = re.match(r"---\r?\n(.*?)\r?\n---", card.content.decode(), re.DOTALL) if card else None
        if block:
            info["cardData"] = data = yaml.safe_load(block[1])
            info |= {key: data[key] for key in ("library_name", "pipeline_tag", "tags") if key in data}
        return self._send(200, info)

    def _refs(self, repo_id: str) -> int:
        repository = self._repository(repo_id)

        def listed(refs: dict[str, str], prefix: str) -> list[dict[str, str]]:
            return [{"name": name, "ref": prefix + name, "targetCommit": sha} for name, sha in refs.items()]

        answer = {
            "branches": listed(repository.branches, "refs/heads/"),
            "tags": listed(repository.tags, "refs/tags/"),
        }
        return self._send(200, answer | {"converts": [], "pullRequests": listed(repository.pull_requests, "")})

    def _tree(self, repo_id: str, revision: str, folder: str | None) -> int:
        repository = self._repository(repo_id, files=True)
        files = repository.commits[repository.resolve(revision)].files
        prefix = f"{folder.strip('/')}/" if folder else ""
        inside = {path: file for path, file in sorted(files.items()) if path.startswith(prefix)}
        if prefix and not inside:
            raise Refusal(404, f"{folder} does not exist", "EntryNotFound")
        if self.query.get("recursive", "").lower() in ("true", "1"):
            return self._send(200, [file.describe(path) for path, file in inside.items()])
        entries = {}
        for path, file in inside.items():
            first, _, rest = path.removeprefix(prefix).partition("/")
            name = prefix + first
            entries[name] = (
                {"type": "directory", "path": name, "oid": "0" * 40, "size": 0} if rest else file.describe(path)
            )
        return self._send(200, list(entries.values()))

    def _paths_info(self, repo_id: str, revision: str) -> int:
        repository = self._repository(repo_id, files=True)
        files = repository.commits[repository.resolve(revision)].files
        asked = self._json if self.body[:1] == b"{" else urllib.parse.parse_qs(self.body.decode())
        return self._send(200, [files[path].describe(path) for path in _as_list(asked["paths"]) if path in files])

    def _history(self, repo_id: str, revision: str) -> int:
        commits = self._repository(repo_id).history(revision)
        date = "2026-01-01T00:00:00.000Z"
        return self._send(
            200, [{"id": c.sha, "title": c.title, "message": "", "authors": [], "date": date} for c in commits]
        )

    def _branch(self, repo_id: str, name: str) -> int:
        repository = self._repository(repo_id)
        self._writer(repository.owner)
        if name in repository.branches:
            raise Refusal(409, "Reference already exists")
        repository.branches[name] = repository.resolve(self._json.get("startingPoint") or "main")
        return self._send(201, {})

    def _tag(self, repo_id: str, revision: str) -> int:
        repository = self._repository(repo_id)
        self._writer(repository.owner)
        name = self._json["tag"]
        if name in repository.tags:
            raise Refusal(409, "Tag already exists")
        repository.tags[name] = repository.resolve(revision)
        return self._send(200, {})

    def _discussions(self, repo_id: str) -> int:
        repository = self._repository(repo_id)
        listed = [
            {
                "num": int(reference.rpartition("/")[2]),
                "title": repository.titles[reference],
                "status": "open",
                "isPullRequest": True,
                "author": {"name": repository.authors.get(reference, repository.owner)},
                "createdAt": "2026-01-01T00:00:00.000Z",
                "repo": {"name": repo_id, "type": "model"},
            }
            for reference in repository.pull_requests  # merged ones are gone from here
        ]
        listed = [one for one in listed if self.query.get("author") in (None, one["author"]["name"])]
        return self._send(200, {"discussions": listed, "count": len(listed), "start": 0})

    # Uploads

    def _preupload(self, repo_id: str, revision: str) -> int:
        repository = self._repository(repo_id)
        self._writer(None if self.query.get("create_pr") else repository.owner)
        files = repository.commits[repository.resolve(revision)].files
        answers = []
        for asked in self._json["files"]:
            path, size = asked["path"], asked["size"]
            is_lfs = size > LFS_SIZE or (size > 0 and path.endswith(LFS_SUFFIXES))
            answers.append({"path": path, "uploadMode": "lfs" if is_lfs else "regular", "shouldIgnore": False})
            if path in files:
                answers[-1]["oid"] = files[path].etag
        return self._send(200, {"files": answers})

    def _lfs_batch(self, repo_id: str) -> int:
        self._repository(repo_id)
        self._writer()
        objects = []
        for asked in self._json["objects"]:
            place = f"{self.hub.files_url}/uploads/{asked['oid']}"
            actions = {"upload": {"href": place}, "verify": {"href": f"{place}/verify"}}
            objects.append(asked if asked["oid"] in self.hub.uploads else asked | {"actions": actions})
        return self._send(200, {"transfer": "basic", "objects": objects})

    def _upload(self, oid: str) -> int:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refusal(400, "the content is not what its name says")
        self.hub.uploads[oid] = self.body
        return self._send(200)

    def _verify(self, oid: str) -> int:
        whole = len(self.hub.uploads.get(oid, b"")) == self._json["size"]
        return self._send(200 if whole else 404, {})

    def _commit(self, repo_id: str, revision: str) -> int:
        repository = self._repository(repo_id)
        proposes = bool(self.query.get("create_pr"))
        self._writer(None if proposes else repository.owner)
        with repository.lock:
            head = repository.commits[repository.resolve(revision)]
            files, title = dict(head.files), ""
            for line in self.body.splitlines():
                operation = json.loads(line)
                title = self._apply(operation["key"], operation["value"], head, files) or title
            sha = repository.add(files, title, head.sha)
            answer = {
                "success": True,
                "commitOid": sha,
                "commitUrl": f"{self.hub.url}/{repo_id}/commit/{sha}",
                "hookOutput": "",
            }
            if proposes:
                number = len(repository.commits)  # any number that is not in use
                repository.pull_requests[f"refs/pr/{number}"] = sha
                repository.titles[f"refs/pr/{number}"] = title
                answer["pullRequestUrl"] = f"{self.hub.url}/{repo_id}/discussions/{number}"
            else:
                repository.move(revision, sha)
        return self._send(200, answer)

    def _apply(self, key: str, value: dict[str, Any], head: Commit, files: dict[str, File]) -> str:
        """One line of a commit; returns the title that the header holds."""
        if key == "header":
            if value.get("parentCommit") not in (None, head.sha):
                raise Refusal(412, "A commit has happened since. Please refresh and try again.")
            return value["summary"]
        if key == "file":
            files[value["path"]] = File(base64.b64decode(value["content"]), False)
        elif key == "lfsFile":
            if value["oid"] not in self.hub.uploads:
                raise Refusal(400, f"{value['path']} points to a file that was never uploaded")
            files[value["path"]] = File(self.hub.uploads[value["oid"]], True)
        elif key == "deletedFile":
            if files.pop(value["path"], None) is None:
                raise Refusal(404, "A file with this name doesn't exist", "EntryNotFound")
        else:
            raise Refusal(400, f"unknown operation {key}")
        return ""

    # Downloads

    def _resolve(self, repo_id: str, revision: str, path: str) -> int:
        repository = self._repository(repo_id, files=True)
        commit = repository.commits[repository.resolve(revision)]
        if path not in commit.files:
            headers = {
                "X-Error-Code": "EntryNotFound",
                "X-Error-Message": "Entry not found",
                "X-Repo-Commit": commit.sha,
            }
            return self._send(404, b"Entry not found", headers)
        file = commit.files[path]
        headers = {"X-Repo-Commit": commit.sha, "ETag": f'"{file.etag}"', "Accept-Ranges": "bytes"}
        if not file.is_lfs:
            return self._send_range(file.content, headers)
        self.hub.uploads.setdefault(file.sha256, file.content)
        headers |= {"X-Linked-Etag": f'"{file.etag}"', "X-Linked-Size": str(len(file.content))}
        return self._send(302, b"", headers | {"Location": f"{self.hub.files_url}/lfs/{file.sha256}/{path}"})

    def _download(self, oid: str, path: str) -> int:
        if self.headers.get("Authorization"):
            raise Refusal(400, "the token was sent to another server than the Hub's")
        return self._send_range(self.hub.uploads[oid], {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"})

    def _send_range(self, content: bytes, headers: dict[str, str]) -> int:
        headers = {"Content-Type": "application/octet-stream", **headers}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if asked is None:
            return self._send(200, content, headers)
        start, stop = int(asked[1]), int(asked[2] or len(content) - 1) + 1
        headers["Content-Range"] = f"bytes {start}-{min(stop, len(content)) - 1}/{len(content)}"
        return self._send(206, content[start:stop], headers)


_REPO = r"([^/]+/[^/]+)"
_ROUTES: list[tuple[str, str, Callable[..., int]]] = [
    ("GET", r"/api/whoami-v2", _Handler._whoami),
    ("POST", r"/api/validate-yaml", _Handler._validate),
    ("POST", r"/api/repos/create", _Handler._create),
    ("GET", rf"/api/models/{_REPO}", _Handler._info),
    ("GET", rf"/api/models/{_REPO}/revision/(.+)", _Handler._info),
    ("GET", rf"/api/models/{_REPO}/refs", _Handler._refs),
    ("GET", rf"/api/models/{_REPO}/tree/([^/]+)(?:/(.+))?", _Handler._tree),
    ("POST", rf"/api/models/{_REPO}/paths-info/([^/]+)", _Handler._paths_info),
    ("GET", rf"/api/models/{_REPO}/commits/([^/]+)", _Handler._history),
    ("GET", rf"/api/models/{_REPO}/discussions", _Handler._discussions),
    ("POST", rf"/api/models/{_REPO}/branch/([^/]+)", _Handler._branch),
    ("POST", rf"/api/models/{_REPO}/tag/([^/]+)", _Handler._tag),
    ("POST", rf"/api/models/{_REPO}/preupload/([^/]+)", _Handler._preupload),
    ("POST", rf"/api/models/{_REPO}/commit/([^/]+)", _Handler._commit),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", _Handler._lfs_batch),
    ("PUT", r"/uploads/([0-9a-f]{64})", _Handler._upload),
    ("POST", r"/uploads/([0-9a-f]{64})/verify", _Handler._verify),
    ("GET", r"/lfs/([0-9a-f]{64})/(.+)", _Handler._download),
    ("GET HEAD", rf"/{_REPO}/resolve/([^/]+)/(.+)", _Handler._resolve),
]
