"""Checkpoints of a training in progress: safetensors and json, written beside and then renamed."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

PREFIX = "checkpoint-"


def save_checkpoint(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict,
    *,
    keep: int = 2,
    keep_every: int | None = None,
) -> Path:
    """Write `checkpoint-<step>` into `folder`: model, optimiser, random state, and `state` as json.

    The `keep` newest checkpoints stay, and those whose step is a multiple of `keep_every`. A reader never sees a
    half-written one.
    """
    path, beside = folder / f"{PREFIX}{step}", folder / f".{PREFIX}{step}.part"
    for killed in folder.glob(f".{PREFIX}*.part"):
        shutil.rmtree(killed)
    beside.mkdir(parents=True)
    names = {parameter: name for name, parameter in model.named_parameters()}
    save_file(_model_tensors(model), beside / "model.safetensors")
    moments = {
        f"{key}/{names[parameter]}": value.contiguous()
        for parameter, entry in optimizer.state.items()
        for key, value in entry.items()
    }
    save_file(moments, beside / "optimizer.safetensors")
    save_file({"torch": torch.get_rng_state()}, beside / "random.safetensors")
    (beside / "state.json").write_text(json.dumps({**state, "step": step}, indent=2) + "\n", encoding="utf-8")
    if path.exists():
        shutil.rmtree(path)
    os.replace(beside, path)
    for old in checkpoints(folder)[:-keep]:
        if keep_every is None or _step(old) % keep_every:
            shutil.rmtree(old)
    return path


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in a folder, oldest first."""
    found = [path for path in folder.glob(f"{PREFIX}*") if path.name[len(PREFIX) :].isdigit()]
    return sorted(found, key=_step)


def load_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict:
    """Put model, optimiser and random state back in place and return the json.

    Raises ValueError when a file is missing or does not fit the model.
    """
    missing = [name for name in _FILES if not (path / name).is_file()]
    if missing:
        raise ValueError(f"checkpoint {path} is incomplete: {', '.join(missing)} not there")
    tensors = load_file(path / "model.safetensors")
    expected = _model_tensors(model)
    if {name: value.shape for name, value in tensors.items()} != {n: v.shape for n, v in expected.items()}:
        raise ValueError(f"checkpoint {path} holds another model: names or shapes differ")
    model.load_state_dict(tensors, strict=False)
    _load_moments(path, model, optimizer)
    torch.set_rng_state(load_file(path / "random.safetensors")["torch"])
    return json.loads((path / "state.json").read_text(encoding="utf-8"))


def weights_hash(model: nn.Module) -> str:
    """What tells a model's parameters from others'."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _step(path: Path) -> int:
    return int(path.name[len(PREFIX) :])


_FILES = ("model.safetensors", "optimizer.safetensors", "random.safetensors", "state.json")


def _model_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters (a tied one once) and persistent buffers by name."""
    parameters = {name: value.detach().contiguous() for name, value in model.named_parameters()}
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    buffers = {name: value for name, value in model.state_dict().items() if name not in tied}
    return {**parameters, **buffers}


def _load_moments(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    tensors = load_file(path / "optimizer.safetensors")
    by_name: dict[str, dict[str, torch.Tensor]] = {}
    for joined, value in tensors.items():
        key, name = joined.split("/", 1)
        by_name.setdefault(name, {})[key] = value
    parameters = dict(model.named_parameters())
    unknown = sorted(set(by_name) - set(parameters))
    if unknown:
        raise ValueError(f"checkpoint {path} holds moments of unknown parameters: {', '.join(unknown[:3])}")
    numbers = {
        parameter: number
        for number, parameter in enumerate(p for group in optimizer.param_groups for p in group["params"])
    }
    state = {numbers[parameters[name]]: entry for name, entry in by_name.items()}
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
