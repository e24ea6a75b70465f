"""What the Hub holds under a name: a model of Transformers, or files of the official JAX code, which are fetched."""

import re
from collections.abc import Collection
from pathlib import Path
from typing import Literal

from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, OfflineModeIsEnabled
from huggingface_hub.file_download import repo_folder_name

_KINDS = ("streaming_params", "streaming_train_state", "flax_params")
_STREAM = re.compile(rf"(?:(step_\d+)/)?({'|'.join(_KINDS)})(_\d+)?")


def jax_files(names: Collection[str], where: str) -> list[str]:
    """Of the files of a repository, the JAX checkpoint and its configuration; an empty list where there is none.

    The choice is that of a folder: the top before `step_<n>`, parameters before a train state. ValueError, naming
    `where`, when it holds several checkpoints.
    """
    found = [match for name in sorted(names) if (match := _STREAM.fullmatch(name))]
    found = [match for match in found if match[1] is None] or found
    kind = min((_KINDS.index(match[2]) for match in found), default=None)
    chosen = [match for match in found if _KINDS.index(match[2]) == kind]
    folders = {match[1] for match in found}
    if len(chosen) > 1 or len(folders) > 1:
        listed = ", ".join(match[0] for match in (found if len(folders) > 1 else chosen))
        raise ValueError(f"{where} holds several JAX checkpoints ({listed}): download one and name its folder")
    if not chosen:
        return []
    folder, step = f"{chosen[0][1]}/" if chosen[0][1] else "", chosen[0][3] or ""
    configs = dict.fromkeys((f"metadata{step}.pkl", "metadata.pkl", "model_config.json"))
    return [chosen[0][0], *(folder + name for name in configs if folder + name in names)]


def holds_jax(repo_id: str, revision: str | None = None) -> list[str] | None:
    """The files that `jax_files` finds in a repository of the Hub; None when the Hub cannot be reached.

    There are none of them where there is a config.json, and where the repository cannot be read: what is asked for
    next says why. ConnectionError when the connection breaks.
    """
    there = has_config(repo_id, revision)
    if there is False:
        return jax_files(_listing(repo_id, revision), f"repository {repo_id!r}")
    return None if there == "unknown" else []


def has_config(repo_id: str, revision: str | None = None) -> bool | Literal["unknown"]:
    """Whether a repository of the Hub has a config.json; "unknown" when the Hub cannot be reached.

    True also where the repository cannot be read for any other reason.
    """
    try:
        hf_hub_download(repo_id, "config.json", revision=revision)
    except (LocalEntryNotFoundError, OfflineModeIsEnabled):
        return "unknown"
    except EntryNotFoundError:
        return False
    except (OSError, ValueError):
        pass
    return True


def fetch_jax(repo_id: str, revision: str | None = None) -> Path | None:
    """Fetch the files of the JAX checkpoint in a repository of the Hub and give their folder; None without one.

    Where the Hub cannot be reached, files that were fetched before serve. OSError when fetching fails, ValueError
    when there are several checkpoints.
    """
    files = holds_jax(repo_id, revision)
    if files is None:
        return _fetched_before(repo_id, revision)
    return Path(snapshot_download(repo_id, revision=revision, allow_patterns=files)) if files else None


def broken_connection(error: BaseException) -> BaseException | None:
    """What an error of the libraries hides: the Hub was not reached, or the connection broke; None otherwise."""
    chain: list[BaseException] = [error]
    while (below := chain[-1].__cause__ or chain[-1].__context__) is not None and below not in chain:
        chain.append(below)
    return next((link for link in reversed(chain) if isinstance(link, ConnectionError) or _of_transport(link)), None)


def _of_transport(error: BaseException) -> bool:
    """Whether nothing came back: an answer such as 404 is no broken connection."""
    # The client's transport is httpx or httpx2, as the version of huggingface_hub has it.
    return any(cls.__name__ == "TransportError" and cls.__module__.startswith("httpx") for cls in type(error).__mro__)


def _fetched_before(repo_id: str, revision: str | None) -> Path | None:
    # The layout of the client's cache; the client itself wants all files of a repository, or their names.
    kept = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo_id, repo_type="model")
    ref = kept / "refs" / (revision or "main")
    folder = kept / "snapshots" / (ref.read_text(encoding="utf-8") if ref.is_file() else revision or "none")
    names = [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()]
    return folder if "config.json" not in names and jax_files(names, f"repository {repo_id!r}") else None


def _listing(repo_id: str, revision: str | None) -> list[str]:
    try:
        return HfApi().list_repo_files(repo_id, revision=revision)
    except Exception as error:  # the transport of the client raises its own classes, other ones in every version
        broken = broken_connection(error)
        if broken is None or isinstance(error, OSError):
            raise
        raise ConnectionError(f"{type(broken).__name__}: {broken}") from error
