"""The conversation with the Hub: one commit, complete or not at all, and errors in one sentence."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import HFValidationError, validate_repo_id

# Weights that an earlier push may have left under other names: `from_pretrained` might read them instead.
OUR_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json")

REFUSED = {
    401: "the Hub refused the token (401): log in again with `hf auth login`, or set HF_TOKEN to a valid token",
    403: "the token may not write to {repo_id} (403): it needs write permission there",
    404: "the Hub has no such repository or revision (404)",
    412: "{repo_id} changed on the Hub in the meantime (412): look at what came in, then push again",
    429: "the Hub asks to slow down (429): wait, then run the same command again",
}


@dataclass(frozen=True)
class Pushed:
    """Where a push ended: the commit, whether it is a new one, its address and branch, and weights it removed."""

    commit: str
    changed: bool
    url: str
    revision: str
    removed: list[str]


def check_repo_id(repo_id: str) -> None:
    """Raise ValueError unless `repo_id` is user/name as the Hub allows it."""
    try:
        validate_repo_id(repo_id)
        plain = repo_id.count("/") == 1
    except HFValidationError:
        plain = False
    if not plain:
        raise ValueError(
            "repo_id must be user/name, each of letters, digits, '-', '_', '.' (no '--' or '..', none of '-.' at an "
            f"end), got {repo_id!r}"
        )


def push(
    api: HfApi,
    folder: Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    message: str = "Upload model",
) -> Pushed:
    """Make the files of `folder` those of the repository by one commit, or none when they already are.

    Other files of the repository stay, but for weights under names that no longer belong to the model. The repository
    and the branch `revision` are made when there are none; with `create_pr` the commit opens a pull request instead.
    Raises PermissionError, ConnectionError or ValueError in one sentence without the token; the repository is then as
    it was.
    """
    with _explained(api, repo_id):
        api.create_repo(repo_id, private=True if private else None, exist_ok=True)
        if revision is not None and not create_pr and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        before = api.model_info(repo_id, revision=revision)
        if private and before.private is False:
            raise ValueError(f"{repo_id} is public already: private cannot hide it, its settings on the Hub can")
        files = sorted(path for path in folder.iterdir() if path.is_file())
        names = {path.name for path in files}
        there = [entry.rfilename for entry in before.siblings or []]
        removed = [name for name in there if OUR_WEIGHTS.fullmatch(name) and name not in names]
        commit = api.create_commit(
            repo_id,
            [
                *(CommitOperationAdd(path_in_repo=path.name, path_or_fileobj=path) for path in files),
                *(CommitOperationDelete(path_in_repo=name, is_folder=False) for name in removed),
            ],
            commit_message=message,
            revision=revision,
            create_pr=create_pr,
            parent_commit=before.sha,
        )
    changed = commit.oid != before.sha
    url, branch = commit.pr_url or commit.commit_url, commit.pr_revision or revision or "main"
    return Pushed(commit.oid, changed, url, branch, removed if changed else [])


@contextmanager
def _explained(api: HfApi, repo_id: str) -> Iterator[None]:
    """Turn what the client raises into one sentence, without the token and without what was raised before."""
    try:
        yield
    except Exception as error:  # the client's transport raises its own classes, other ones in every version
        explained = _explanation(error, repo_id)
        if explained is None:
            raise
        token = api.token if isinstance(api.token, str) else None
        text = str(explained).replace(token, "<token>") if token else str(explained)
        raise type(explained)(text) from None


def _explanation(error: Exception, repo_id: str) -> Exception | None:
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__) is not None:
        chain.append(cause)
    for link in chain:
        if isinstance(link, HfHubHTTPError):
            return _refusal(link, repo_id)
        if isinstance(link, PermissionError):
            return PermissionError(REFUSED[403].format(repo_id=repo_id))
    for link in reversed(chain):
        # The client's transport is httpx, httpx2 or hf_xet; the last raises ConnectionError and RuntimeError.
        if type(link).__module__.startswith("httpx") or isinstance(link, ConnectionError | RuntimeError):
            return ConnectionError(
                f"the connection to the Hub broke ({type(link).__name__}: {link}): nothing is half done. Run the same "
                "command again; files that arrived are not sent again"
            )
    return None


def _refusal(error: HfHubHTTPError, repo_id: str) -> Exception:
    status = error.response.status_code
    said = " ".join((error.server_message or "").split())
    text = REFUSED.get(status, f"the Hub answered {status}").format(repo_id=repo_id)
    kind = PermissionError if status in (401, 403) else ConnectionError if status >= 500 else ValueError
    return kind(f"{text}; nothing was pushed to {repo_id}{f'. The Hub says: {said}' if said else ''}")
