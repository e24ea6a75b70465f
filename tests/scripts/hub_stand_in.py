"""A small Hub on 127.0.0.1 that keeps its repositories in RAM: what publishing and loading ask for, and no more.

It speaks the HTTP interface of the Hub as huggingface_hub 1.5 to 2.4 use it with Git LFS: create_repo, branches,
validate-yaml, preupload, LFS batch, upload and verify, commit (all or nothing), pull requests, model_info, tree,
resolve.
Large files are served from another origin, as the Hub does, so that a token sent there shows. Xet is not spoken.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import huggingface_hub.constants
import pytest

LFS_SUFFIXES = (".safetensors", ".bin", ".png")
ID = r"(?P<repo>[^/]+/[^/]+)"


@dataclass
class Repository:
    """Branches and pull requests by name -> commit, commits by hash -> files, files by path -> content."""

    private: bool
    refs: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    history: dict[str, list[str]] = field(default_factory=dict)

    def resolve(self, revision: str) -> str | None:
        """The commit that a branch, a pull request or a hash names."""
        return revision if revision in self.commits else self.refs.get(revision)

    def commit(self, ref: str, files: dict[str, bytes], parent: str | None) -> str:
        """Add a commit and let `ref` point at it."""
        listing = "".join(f"{path} {git_oid(content)}\n" for path, content in sorted(files.items()))
        sha = hashlib.sha1(f"{parent} {len(self.commits)}\n{listing}".encode()).hexdigest()
        self.commits[sha], self.refs[ref] = files, sha
        self.history[ref] = [*self.history.get(ref, []), sha]
        return sha


class HubStandIn:
    """Serves repositories while a `with` block lasts; what happened is in its attributes.

    `tokens` maps a token to "write" or "read". `breaks_upload(n)` says whether the connection of the n-th upload
    (from 0) breaks in the middle, `breaks_download` whether those that fetch large files do. `uploads` lists (oid,
    whole) in order, `requests` (method, path, token or None).
    """

    def __init__(self, tokens: dict[str, str]):
        self.tokens = tokens
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.uploads: list[tuple[str, bool]] = []
        self.requests: list[tuple[str, str, str | None]] = []
        self.unknown: list[tuple[str, str]] = []
        self.breaks_upload: Callable[[int], bool] = lambda number: False
        self.breaks_download = False
        self.lock = threading.Lock()

    def __enter__(self) -> "HubStandIn":
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    @property
    def storage_url(self) -> str:
        """The same server under another name: for a client another origin."""
        return f"http://localhost:{self.server.server_port}"

    def put(self, repo_id: str, files: dict[str, bytes], *, private: bool = False, revision: str = "main") -> None:
        """Add a commit that holds these files and no others."""
        repository = self.repositories.setdefault(repo_id, Repository(private))
        self.objects |= {hashlib.sha256(content).hexdigest(): content for content in files.values()}
        repository.commit(revision, files, None)

    def be_the_only(self, monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
        """Let the client of this process know no other Hub, cache and token than those here and below `home`."""
        constants = huggingface_hub.constants
        path = constants.HUGGINGFACE_CO_URL_TEMPLATE.removeprefix(constants._HF_DEFAULT_ENDPOINT)
        for name, value in {
            "ENDPOINT": self.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": self.url + path,
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
            "HF_TOKEN_PATH": str(home / "token"),
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_HOME": str(home),
        }.items():
            monkeypatch.setattr(constants, name, value)

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """What a revision holds, path -> content."""
        repository = self.repositories[repo_id]
        return repository.commits[repository.refs[revision]]


def git_oid(content: bytes) -> str:
    """The hash of a git blob."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def is_lfs(path: str) -> bool:
    return path.endswith(LFS_SUFFIXES)


class Refusal(Exception):
    """An answer other than success."""

    def __init__(self, status: int, message: str, code: str | None = None, body: dict | None = None):
        super().__init__(message)
        self.status, self.code, self.body = status, code, body or {"error": message}


class _Handler(BaseHTTPRequestHandler):
    hub: HubStandIn
    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        """Stay silent."""

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_POST = do_PUT = do_GET

    def _serve(self) -> None:
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        self.hub.requests.append((self.command, unquote(self.path), token))
        if self.command == "PUT":
            return self._receive_object(url.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        try:
            for method, pattern, action in ROUTES:
                match = re.fullmatch(pattern, url.path)
                if match and self.command in method:
                    self.role = self._role(token)
                    with self.hub.lock:
                        return action(self, body, **{k: unquote(v or "") for k, v in match.groupdict().items()})
            self.hub.unknown.append((self.command, self.path))
            raise Refusal(404, "Sorry, we can't find the page you are looking for.")
        except Refusal as refusal:
            headers = {"X-Error-Message": str(refusal)}
            if refusal.code:
                headers["X-Error-Code"] = refusal.code
            self._answer(refusal.body, refusal.status, headers)

    def _answer(self, body: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    # Who may do what.

    def _role(self, token: str | None) -> str | None:
        if token is not None and token not in self.hub.tokens:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return self.hub.tokens.get(token) if token else None

    def _must_write(self, repo: str) -> None:
        if self.role is None:
            raise Refusal(401, "Invalid username or password.")
        if self.role != "write":
            namespace = repo.split("/")[0]
            raise Refusal(403, f'You don\'t have the rights to create a model under the namespace "{namespace}"')

    def _readable(self, repo: str) -> Repository:
        repository = self.hub.repositories.get(repo)
        if repository is None or (repository.private and self.role is None):
            raise Refusal(404 if self.role else 401, "Repository not found", "RepoNotFound")
        return repository

    def _writable(self, repo: str) -> Repository:
        self._must_write(repo)
        return self._readable(repo)

    def _commit_of(self, repository: Repository, revision: str) -> str:
        sha = repository.resolve(revision)
        if sha is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha

    # Repositories and branches.

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        repo = f"{asked['organization'] or 'someone'}/{asked['name']}"
        self._must_write(repo)
        answer = {"url": f"{self.hub.url}/{repo}", "name": repo, "id": repo}
        if repo in self.hub.repositories:
            raise Refusal(409, "You already created this model repo", body={**answer, "error": "exists"})
        private = asked.get("visibility") == "private" or asked.get("private") is True
        repository = self.hub.repositories[repo] = Repository(private)
        repository.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"}, None)
        self._answer(answer)

    def branch(self, body: bytes, repo: str, branch: str) -> None:
        repository = self._writable(repo)
        if branch in repository.refs:
            raise Refusal(409, f"Reference already exists: {branch}")
        start = json.loads(body or b"{}").get("startingPoint", "main")
        repository.refs[branch] = self._commit_of(repository, start)
        self._answer({})

    def refs(self, _: bytes, repo: str) -> None:
        names = [name for name in self._readable(repo).refs if not name.startswith("refs/")]
        branches = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": self._readable(repo).refs[n]} for n in names]
        self._answer({"branches": branches, "converts": [], "tags": []})

    def validate_yaml(self, body: bytes) -> None:
        if not json.loads(body)["content"].startswith("---\n"):
            raise Refusal(400, "bad card", body={"errors": [{"message": "no metadata"}], "warnings": []})
        self._answer({"errors": [], "warnings": []})

    # Uploading.

    def preupload(self, body: bytes, repo: str, revision: str) -> None:
        repository = self._writable(repo)
        files = repository.commits[self._commit_of(repository, revision)]
        self._answer({"files": [self._upload_mode(file["path"], files) for file in json.loads(body)["files"]]})

    def _upload_mode(self, path: str, files: dict[str, bytes]) -> dict:
        mode = {"path": path, "uploadMode": "lfs" if is_lfs(path) else "regular", "shouldIgnore": False}
        if path in files:
            content = files[path]
            mode["oid"] = hashlib.sha256(content).hexdigest() if is_lfs(path) else git_oid(content)
        return mode

    def lfs_batch(self, body: bytes, repo: str) -> None:
        self._writable(repo)
        answers = []
        for item in json.loads(body)["objects"]:
            answer = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in self.hub.objects:
                upload = {"href": f"{self.hub.storage_url}/lfs/{item['oid']}"}
                answer["actions"] = {"upload": upload, "verify": {"href": f"{self.hub.url}/lfs-verify"}}
            answers.append(answer)
        self._answer({"transfer": "basic", "objects": answers})

    def _receive_object(self, path: str) -> None:
        oid, size = path.removeprefix("/lfs/"), int(self.headers["Content-Length"])
        with self.hub.lock:
            number = len(self.hub.uploads)
            self.hub.uploads.append((oid, False))
        if self.hub.breaks_upload(number):
            self.rfile.read(size // 2)
            self.close_connection = True
            return
        content = self.rfile.read(size)
        if hashlib.sha256(content).hexdigest() != oid:
            return self._answer({"error": "content does not match its hash"}, 422)
        with self.hub.lock:
            self.hub.objects[oid] = content
            self.hub.uploads[number] = (oid, True)
        self._answer({})

    def lfs_verify(self, body: bytes) -> None:
        asked = json.loads(body)
        if len(self.hub.objects.get(asked["oid"], b"")) != asked["size"]:
            raise Refusal(404, "object not found")
        self._answer({})

    def commit(self, body: bytes, repo: str, revision: str) -> None:
        """Apply all operations or none."""
        repository = self._writable(repo)
        parent = self._commit_of(repository, revision)
        lines = [json.loads(line) for line in body.splitlines()]
        header = lines[0]["value"]
        if header.get("parentCommit", parent) != parent:
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        files = dict(repository.commits[parent])
        for line in lines[1:]:
            self._apply(line["key"], line["value"], files)
        pull_request = self.query.get("create_pr") == ["1"]
        ref = f"refs/pr/{1 + sum(name.startswith('refs/pr/') for name in repository.refs)}"
        sha = repository.commit(ref if pull_request else revision, files, parent)
        answer = {"commitUrl": f"{self.hub.url}/{repo}/commit/{sha}", "commitOid": sha}
        if pull_request:
            answer["pullRequestUrl"] = f"{self.hub.url}/{repo}/discussions/{ref.rsplit('/', 1)[1]}"
        self._answer(answer)

    def _apply(self, kind: str, value: dict, files: dict[str, bytes]) -> None:
        if kind == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif kind == "lfsFile":
            if value["oid"] not in self.hub.objects:
                raise Refusal(400, f"lfs object {value['oid']} was not uploaded")
            files[value["path"]] = self.hub.objects[value["oid"]]
        elif kind == "deletedFile" and value["path"] in files:
            del files[value["path"]]
        else:
            raise Refusal(400, f"cannot do {kind} {value['path']}")

    # Reading.

    def info(self, _: bytes, repo: str, revision: str = "main") -> None:
        repository = self._readable(repo)
        sha = self._commit_of(repository, revision or "main")
        siblings = [{"rfilename": path} for path in sorted(repository.commits[sha])]
        answer = {"id": repo, "modelId": repo, "sha": sha, "private": repository.private, "siblings": siblings}
        self._answer({**answer, "tags": [], "downloads": 0, "likes": 0})

    def tree(self, _: bytes, repo: str, revision: str, path: str = "") -> None:
        repository = self._readable(repo)
        files = repository.commits[self._commit_of(repository, revision)]
        prefix = f"{path}/" if path else ""
        found = {name: content for name, content in files.items() if name.startswith(prefix)}
        if path and not found:
            raise Refusal(404, f"{path} does not exist", "EntryNotFound")
        self._answer([_tree_entry(name, content) for name, content in sorted(found.items())])

    def resolve(self, _: bytes, repo: str, revision: str, path: str) -> None:
        repository = self._readable(repo)
        sha = self._commit_of(repository, revision)
        content = repository.commits[sha].get(path)
        headers = {"X-Repo-Commit": sha}
        if content is None:
            headers.update({"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"})
            return self._answer(b"Entry not found", 404, headers)
        if not is_lfs(path):
            return self._answer(
                content, 200, {**headers, "ETag": f'"{git_oid(content)}"', "Content-Type": "text/plain"}
            )
        oid = hashlib.sha256(content).hexdigest()
        linked = {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(content))}
        self._answer(b"", 302, {**headers, **linked, "Location": f"{self.hub.storage_url}/lfs/{oid}"})

    def nothing(self, _: bytes) -> None:
        raise Refusal(404, "Not found")

    def stored(self, _: bytes, oid: str) -> None:
        if self.hub.breaks_download and self.command == "GET":
            self.close_connection = True
            return
        self._answer(self.hub.objects[oid], 200, {"ETag": f'"{oid}"', "Content-Type": "application/octet-stream"})


def _tree_entry(name: str, content: bytes) -> dict:
    entry = {"type": "file", "path": name, "size": len(content), "oid": git_oid(content)}
    if is_lfs(name):
        entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
    return entry


ROUTES = [
    (("GET",), "/api/agent-harnesses", _Handler.nothing),
    (("POST",), "/api/repos/create", _Handler.create),
    (("POST",), "/api/validate-yaml", _Handler.validate_yaml),
    (("POST",), f"/api/models/{ID}/branch/(?P<branch>[^/]+)", _Handler.branch),
    (("POST",), f"/api/models/{ID}/preupload/(?P<revision>[^/]+)", _Handler.preupload),
    (("POST",), f"/api/models/{ID}/commit/(?P<revision>[^/]+)", _Handler.commit),
    (("POST",), rf"/{ID}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    (("POST",), "/lfs-verify", _Handler.lfs_verify),
    (("GET",), f"/api/models/{ID}", _Handler.info),
    (("GET",), f"/api/models/{ID}/refs", _Handler.refs),
    (("GET",), f"/api/models/{ID}/revision/(?P<revision>[^/]+)", _Handler.info),
    (("GET",), f"/api/models/{ID}/tree/(?P<revision>[^/]+)", _Handler.tree),
    (("GET",), f"/api/models/{ID}/tree/(?P<revision>[^/]+)/(?P<path>.+)", _Handler.tree),
    (("GET", "HEAD"), f"/{ID}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _Handler.resolve),
    (("GET", "HEAD"), "/lfs/(?P<oid>[0-9a-f]{64})", _Handler.stored),
]
