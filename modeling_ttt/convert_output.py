"""A folder that is whole or absent, and safetensors written into it one leaf at a time."""

import glob
import json
import os
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from .convert_leaves import Leaf, blocks

__all__ = ["RECORD", "folder_beside", "write_safetensors"]

RECORD = "conversion.json"
"""What a conversion says about itself, and the sign that a folder may be replaced by another one."""

_LOCK = ".lock"
_OLD = ".old"
_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}


@contextmanager
def folder_beside(output: str | os.PathLike, *, overwrite: bool = False) -> Iterator[Path]:
    """Give a folder beside `output` to write to; it takes the place of `output` if the block succeeds.

    What killed processes left there is removed. `overwrite` replaces the output of an earlier conversion. ValueError
    when `output` is there and may not be replaced.
    """
    output = Path(os.path.abspath(output))
    output.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(output)
    _check_replaceable(output, overwrite)
    beside = Path(tempfile.mkdtemp(prefix=_prefix(output), dir=output.parent))
    lock = FileLock(beside / _LOCK)
    lock.acquire()
    try:
        yield beside
        # A folder made by mkdtemp is closed to others.
        beside.chmod(0o777 & ~_umask())
        _check_replaceable(output, overwrite)
        _replace(beside, output)
        (output / _LOCK).unlink(missing_ok=True)
    finally:
        lock.release()
        shutil.rmtree(beside, ignore_errors=True)


def _check_replaceable(output: Path, overwrite: bool) -> None:
    if not os.path.lexists(output):
        return
    if not overwrite:
        raise ValueError(f"output {str(output)!r} is there already; name another folder or pass overwrite")
    if not (output / RECORD).is_file():
        raise ValueError(
            f"output {str(output)!r} is no earlier conversion (it has no {RECORD}) and is not overwritten"
        )


def _replace(beside: Path, output: Path) -> None:
    if output.exists():
        # It waits beside; a process killed before the next line leaves it to `_remove_abandoned`, which puts it back.
        old = beside.with_name(beside.name + _OLD)
        os.replace(output, old)
        os.replace(beside, output)
        shutil.rmtree(old)
    else:
        os.replace(beside, output)


def _prefix(output: Path) -> str:
    return f".{output.name}.part-"


def _remove_abandoned(output: Path) -> None:
    """A folder whose lock is free has no writer any more; an output that it had moved away comes back."""
    # Backwards, so that what was moved away comes before its writer.
    for beside in sorted(output.parent.glob(f"{glob.escape(_prefix(output))}*"), reverse=True):
        with suppress(Timeout, OSError):
            if beside.name.endswith(_OLD):
                _settle(beside, output)
            elif (beside / _LOCK).is_file():
                with FileLock(beside / _LOCK, timeout=0):
                    shutil.rmtree(beside)


def _settle(old: Path, output: Path) -> None:
    """Put an earlier output back if its writer was killed before the new one took its place; else remove it."""
    places = (old.with_name(old.name.removesuffix(_OLD)), output)
    lock = next((place / _LOCK for place in places if (place / _LOCK).is_file()), None)
    with nullcontext() if lock is None else FileLock(lock, timeout=0):
        if output.exists():
            shutil.rmtree(old)
            (output / _LOCK).unlink(missing_ok=True)
        else:
            os.replace(old, output)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_safetensors(
    folder: Path,
    leaves: Mapping[str, Leaf],
    dtype: torch.dtype,
    *,
    max_shard_bytes: int,
    progress: Callable[[int], None],
) -> list[str]:
    """Write leaves as `model.safetensors`, or as shards with their index, and give the names of the files.

    One leaf is in memory at a time. A leaf larger than `max_shard_bytes` has a shard to itself; `progress` is called
    with the bytes of each leaf, as they are in the source.
    """
    sizes = {name: _count(leaf) * dtype.itemsize for name, leaf in leaves.items()}
    shards: list[list[str]] = [[]]
    for name in sorted(leaves):
        if shards[-1] and sum(sizes[other] for other in shards[-1]) + sizes[name] > max_shard_bytes:
            shards.append([])
        shards[-1].append(name)
    files = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        files = ["model.safetensors"]
    for file, names in zip(files, shards, strict=True):
        _write_shard(folder / file, {name: leaves[name] for name in names}, dtype, progress)
    if len(shards) > 1:
        places = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return files


def _write_shard(file: Path, leaves: Mapping[str, Leaf], dtype: torch.dtype, progress: Callable[[int], None]) -> None:
    header: dict = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, leaf in leaves.items():
        start, end = end, end + _count(leaf) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(leaf.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    with file.open("wb") as target:
        target.write(struct.pack("<Q", len(text)) + text)
        for leaf in leaves.values():
            for block in blocks(leaf.read(), dtype):
                target.write(memoryview(block.view(-1).view(torch.uint8).numpy()))
            progress(leaf.nbytes)


def _count(leaf: Leaf) -> int:
    return torch.Size(leaf.shape).numel()
