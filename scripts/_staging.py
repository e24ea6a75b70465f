"""From a folder of a checkpoint to the files of its repository, checked before anything leaves the machine."""

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save

from modeling_ttt import TTTForCausalLM

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
WRITTEN_ANEW = {"config.json", "generation_config.json", INDEX}
COPIED_SUFFIXES = {".json", ".csv", ".md", ".txt", ".png", ".svg", ".model", ".jinja"}
COPIED_NAMES = {"LICENSE", "NOTICE"}
TOKENIZER_FILES = re.compile(
    r"tokenizer.*\.json|special_tokens_map\.json|added_tokens\.json|vocab\.(json|txt)|merges\.txt|.*\.model|.*\.jinja"
)
ABSOLUTE_PATH = re.compile(r"(?<![\w.:/<~)\]-])(?:/[\w.+-]+){2,}/?|\b[A-Za-z]:\\\w+|(?<!\w)~/\w+|file://\S+")


@dataclass(frozen=True)
class Staged:
    """A folder laid out as the repository, the model it was made of, and what of the source stays behind."""

    folder: Path
    model: PreTrainedModel
    left_out: list[str]
    has_tokenizer: bool
    machine_paths: dict[str, str]

    @property
    def files(self) -> dict[str, int]:
        """Name -> bytes of all files, sorted by name."""
        return {path.name: path.stat().st_size for path in sorted(self.folder.iterdir())}


def stage(
    source: str | Path, target: str | Path, *, max_shard_size: str = "5GB", tokenizer: str | None = None
) -> Staged:
    """Lay out in the empty folder `target` what belongs into the repository of the checkpoint `source`.

    Weights and configuration are read, checked and written anew, every bit of the weights kept; a TTT model gets its
    code beside them; tokenizer and other small files are copied. `source` is only read. `tokenizer` is a folder or Hub
    id that takes the place of the checkpoint's own. Raises ValueError or OSError when anything is missing or broken.
    """
    source, target = Path(source), Path(target)
    check_shard_size(max_shard_size)
    model = load_checked(source)
    if isinstance(model, TTTForCausalLM):
        # On this model alone: `register_for_auto_class` would change how the whole process saves.
        model._auto_class = "AutoModelForCausalLM"
        custom_object_save(model, target)
    model.save_pretrained(target, max_shard_size=max_shard_size)
    left_out = _copy_others(source, target, own_tokenizer=tokenizer is None)
    if tokenizer is not None:
        _save_tokenizer(tokenizer, target)
    has_tokenizer = _check_tokenizer(target, model.config.vocab_size)
    return Staged(target, model, left_out, has_tokenizer, machine_paths(target))


def check_shard_size(size: str) -> None:
    """Raise ValueError unless the size is a number with a unit, such as 5GB or 500MB."""
    if not re.fullmatch(r"[1-9]\d*([KMG]i?B)", size):
        raise ValueError(f"max_shard_size must be a number with KB, MB, GB, KiB, MiB or GiB, as 5GB, got {size!r}")


def load_checked(folder: Path) -> PreTrainedModel:
    """Load a causal language model in its stored dtype; ValueError unless every weight is there and finite."""
    _check_config(folder)
    dtype = _stored_dtype(_weight_files(folder))
    # Without its auto_map: no code of the folder is run.
    model, info = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        local_files_only=True,
        trust_remote_code=False,
    )
    wrong = {
        "missing": sorted(info["missing_keys"]),
        "not of this model": sorted(info["unexpected_keys"]),
        "of another shape": sorted(str(key[0]) for key in info["mismatched_keys"]),
        "not finite": [name for name, value in model.state_dict().items() if not torch.isfinite(value).all()],
    }
    found = [f"{len(names)} {kind} ({_some(names)})" for kind, names in wrong.items() if names]
    if found:
        raise ValueError(f"model {str(folder)!r} cannot be published, of its weights {', '.join(found)}")
    return model


def _check_config(folder: Path) -> None:
    if not folder.is_dir():
        raise ValueError(f"model must be the folder of a checkpoint, got {str(folder)!r}, which is no folder")
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"model must be a folder with a config.json, {str(folder)!r} has none")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"config.json of model {str(folder)!r} is not valid json: {error}") from None
    if not isinstance(config, dict) or not config.get("model_type"):
        raise ValueError(f"config.json of model {str(folder)!r} must name a model_type, as 'ttt'")


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint; ValueError when there are none or a shard is missing."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        raise ValueError(
            f"model {str(folder)!r} must hold {WEIGHTS} or {INDEX}; convert_checkpoint.py makes them of other formats"
        )
    try:
        names = sorted(set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{INDEX} of model {str(folder)!r} must be json with a weight_map of file names") from None
    missing = [name for name in names if Path(name).name != name or not (folder / name).is_file()]
    if missing or not names:
        raise ValueError(f"{INDEX} of model {str(folder)!r} names files that are not there: {_some(missing)}")
    return [folder / name for name in names]


def _stored_dtype(paths: list[Path]) -> torch.dtype:
    found: set[str] = set()
    for path in paths:
        try:
            with safe_open(path, "pt") as file:
                found |= {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118  (no mapping)
        except SafetensorError as error:
            raise ValueError(f"weights {path.name!r} are no whole safetensors file: {error}") from None
    if len(found) != 1 or not found <= set(DTYPES):
        raise ValueError(
            f"weights must all be stored in one of {', '.join(DTYPES.values())}, got {_some(sorted(found))}; "
            "otherwise publishing would round them"
        )
    return getattr(torch, DTYPES[found.pop()])


def _copy_others(source: Path, target: Path, own_tokenizer: bool) -> list[str]:
    """Copy the small files that are not written anew and name those that stay behind."""
    written = {path.name for path in target.iterdir()}
    left_out = []
    for path in sorted(source.iterdir()):
        name = path.name
        if name in written or name in WRITTEN_ANEW or name.endswith(".safetensors"):
            continue
        wanted = path.suffix in COPIED_SUFFIXES or name in COPIED_NAMES
        if not own_tokenizer and TOKENIZER_FILES.fullmatch(name):
            wanted = False
        if wanted and path.is_file() and not name.startswith("."):
            shutil.copyfile(path, target / name)
        else:
            left_out.append(name)
    return left_out


def _save_tokenizer(name: str, target: Path) -> None:
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # the loaders of tokenizers raise whatever their formats make of a broken file
        raise ValueError(f"tokenizer {name!r} does not load: {str(error).splitlines()[0]}") from None
    # How the tokenizer was found here says nothing to whoever loads it there.
    for key in ("is_local", "local_files_only"):
        tokenizer.init_kwargs.pop(key, None)
    tokenizer.save_pretrained(target)


def _check_tokenizer(folder: Path, vocab_size: int) -> bool:
    """Whether there is a tokenizer; ValueError when it is broken or has more entries than the model has embeddings."""
    if not any(TOKENIZER_FILES.fullmatch(path.name) for path in folder.iterdir()):
        return False
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # as above
        raise ValueError(f"the tokenizer beside the model does not load: {str(error).splitlines()[0]}") from None
    if len(tokenizer) > vocab_size:
        raise ValueError(
            f"tokenizer has {len(tokenizer)} entries, the model embeds {vocab_size}: they do not belong together"
        )
    return True


def machine_paths(folder: Path) -> dict[str, str]:
    """File name -> the first absolute path in it, of json, csv and text files that are not the tokenizer's."""
    found = {}
    for path in sorted(folder.iterdir()):
        if path.suffix in (".json", ".csv", ".txt") and not TOKENIZER_FILES.fullmatch(path.name):
            match = ABSOLUTE_PATH.search(path.read_text(encoding="utf-8", errors="replace"))
            if match:
                found[path.name] = match.group()
    return found


def _some(names: list[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")
