"""The files of the official JAX code: an index of where every leaf lies, and the same files written.

`streaming_train_state*` and `streaming_params*` are msgpack records (key, value) one after another, `flax_params` is
one nested map. Nothing but headers is read until a leaf is asked for; optimizer moments are stepped over.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from .convert_leaves import FLOAT_DTYPES, Leaf, blocks
from .convert_msgpack import MsgpackWalk, pack_header, pack_text

__all__ = ["StreamIndex", "index_stream", "joined", "write_stream"]

Key = tuple[str, ...]
CHUNKED = "__msgpack_chunked_array__"
CHUNK_BYTES = 2**30
ARRAY = 1  # msgpack extension of an array: [shape, dtype name, its numbers in order of C]
MAX_DEPTH = 32
# What a train state holds beside the parameters.
STATE_KEYS = ("step", "opt_state")


@dataclass(frozen=True)
class StreamIndex:
    """The parameters of a file by key, and the number of leaves of the optimizer's state that were stepped over."""

    path: Path
    leaves: dict[Key, Leaf]
    skipped: int


def index_stream(path: str | os.PathLike) -> StreamIndex:
    """Index a file of the official JAX code; leaves are float32, bfloat16, float16 or float64.

    The prefixes of a train state are taken off the keys. FileNotFoundError without the file; ValueError, naming file
    and leaf, for anything that is cut off, malformed, there twice or of another dtype.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"JAX checkpoint {str(path)!r} does not exist or is no file")
    leaves: dict[Key, Leaf] = {}
    skipped = 0
    with path.open("rb") as file:
        walk = MsgpackWalk(path, file, path.stat().st_size)
        for key, end in _entries(walk):
            if key[0] in STATE_KEYS:
                skipped += 1
                walk.skip(end - walk.position, end)
                continue
            name = _without_prefix(key)
            if not name or name in leaves:
                raise walk.error("is there twice" if name else "has no name")
            leaves[name] = _leaf(walk, joined(name), end)
    if not leaves:
        raise ValueError(f"{path}: holds no parameters, only {skipped} leaves of an optimizer's state")
    return StreamIndex(path, leaves, skipped)


def joined(key: Key) -> str:
    """A key as the official code writes it; its components may hold slashes themselves."""
    return "/".join(key)


def _without_prefix(key: Key) -> Key:
    """A train state has params/params before every name, other files once or not at all."""
    for _ in range(2):
        if key[0] == "params" and len(key) > 1:
            key = key[1:]
    return key if key != ("params",) else ()


def _entries(walk: MsgpackWalk) -> Iterator[tuple[Key, int]]:
    """The key of every value and where it ends; the walk stands at its beginning and must be moved to its end."""
    if walk.size == 0:
        raise walk.error("the file is empty")
    kind = walk.peek(walk.size).kind
    if kind == "map":
        yield from _nested(walk, ())
        if walk.position != walk.size:
            raise walk.error(f"{walk.size - walk.position} bytes follow")
    elif kind == "array":
        while walk.position < walk.size:
            yield _record(walk)
    else:
        raise walk.error(f"expected records of key and value, or a map of names, got {kind}")


def _record(walk: MsgpackWalk) -> tuple[Key, int]:
    walk.expect("array", walk.size, size=2)
    parts = walk.expect("array", walk.size)
    if not 1 <= parts <= MAX_DEPTH:
        raise walk.error(f"the next key must have 1 to {MAX_DEPTH} components, got {parts}")
    key = tuple(walk.text(walk.size) for _ in range(parts))
    walk.place = joined(key)
    length = walk.expect("bin", walk.size)
    start = walk.position
    end = walk.skip(length, walk.size)
    walk.position = start
    return key, end


def _nested(walk: MsgpackWalk, above: Key) -> Iterator[tuple[Key, int]]:
    """The values below a map of names; a map of chunks is a value."""
    if len(above) >= MAX_DEPTH:
        raise walk.error(f"maps may be nested {MAX_DEPTH} deep, these are deeper")
    for _ in range(walk.expect("map", walk.size)):
        key = (*above, walk.text(walk.size))
        walk.place = joined(key)
        if walk.peek(walk.size).kind == "map" and not _is_chunked(walk):
            yield from _nested(walk, key)
            continue
        start = walk.position
        end = walk.step_over(walk.size)
        walk.position = start
        yield key, end


def _is_chunked(walk: MsgpackWalk) -> bool:
    start = walk.position
    found = walk.expect("map", walk.size) == 3 and walk.text(walk.size) in (CHUNKED, "shape", "chunks")
    walk.position = start
    return found


def _leaf(walk: MsgpackWalk, name: str, end: int) -> Leaf:
    """The leaf at the position; the walk goes on after it."""
    if walk.peek(end).kind == "map":
        shape, dtype, pieces = _chunked_array(walk, end)
    else:
        shape, dtype, piece = _array(walk, end)
        pieces = [piece]
    if walk.position != end:
        raise walk.error(f"{end - walk.position} bytes follow its numbers")
    if 0 in shape:
        raise walk.error(f"its shape {list(shape)} holds no numbers")
    held, wanted = sum(length for _, length in pieces), prod(shape) * dtype.itemsize
    if held != wanted:
        raise walk.error(f"its shape {list(shape)} of {dtype} needs {wanted} bytes, it has {held}")
    return Leaf(name, shape, dtype, _reader(walk.path, name, shape, dtype, pieces))


def _array(walk: MsgpackWalk, end: int) -> tuple[tuple[int, ...], torch.dtype, tuple[int, int]]:
    """Shape, dtype, and the position and length of the numbers."""
    header = walk.header(end)
    if (header.kind, header.code) != ("ext", ARRAY):
        raise walk.error(
            f"expected an array (msgpack extension {ARRAY}), got {header.kind} {header.code or ''}".strip()
        )
    limit = walk.position + header.size
    if limit > end:
        walk.skip(header.size, end)
    walk.expect("array", limit, size=3)
    rank = walk.expect("array", limit)
    if rank > MAX_DEPTH:
        raise walk.error(f"arrays have at most {MAX_DEPTH} dimensions, got {rank}")
    shape = tuple(walk.expect("int", limit) for _ in range(rank))
    dtype = walk.text(limit)
    if dtype not in FLOAT_DTYPES:
        raise walk.error(f"dtype must be one of {list(FLOAT_DTYPES)}, got {dtype!r}")
    length = walk.expect("bin", limit)
    start = walk.position
    if walk.skip(length, limit) != limit:
        raise walk.error(f"{limit - walk.position} bytes follow its numbers")
    return shape, FLOAT_DTYPES[dtype], (start, length)


def _chunked_array(walk: MsgpackWalk, end: int) -> tuple[tuple[int, ...], torch.dtype, list[tuple[int, int]]]:
    """An array above 1 GiB: its shape, and flat pieces numbered from "0"."""
    shape: list[int] | None = None
    chunks: list[tuple[tuple[int, ...], torch.dtype, tuple[int, int]]] = []
    for _ in range(walk.expect("map", end, size=3)):
        name = walk.text(end)
        if name == CHUNKED:
            walk.expect("bool", end, size=1)
        elif name == "shape":
            shape = _numbered(walk, end, lambda: walk.expect("int", end))
        elif name == "chunks":
            chunks = _numbered(walk, end, lambda: _array(walk, end))
        else:
            raise walk.error(f"a chunked array has {CHUNKED}, shape and chunks, got {name!r}")
    if shape is None or len({dtype for _, dtype, _ in chunks}) != 1:
        raise walk.error("a chunked array needs its shape, and chunks of one dtype")
    for part, dtype, (_, length) in chunks:
        if len(part) != 1 or part[0] * dtype.itemsize != length:
            raise walk.error(f"a chunk of shape {list(part)} and {dtype} has {length} bytes")
    return tuple(shape), chunks[0][1], [piece for _, _, piece in chunks]


def _numbered(walk: MsgpackWalk, end: int, read: Callable) -> list:
    """The values of a map whose keys are "0", "1", ..."""
    values = []
    for number in range(walk.expect("map", end)):
        found = walk.text(end)
        if found != str(number):
            raise walk.error(f"numbered values come in order, got {found!r} where '{number}' belongs")
        values.append(read())
    return values


def _reader(
    path: Path, name: str, shape: tuple[int, ...], dtype: torch.dtype, pieces: list[tuple[int, int]]
) -> Callable[[], Tensor]:
    def read() -> Tensor:
        raw = torch.empty(sum(length for _, length in pieces), dtype=torch.uint8)
        view, filled = memoryview(raw.numpy()), 0
        with path.open("rb", buffering=0) as file:
            for start, length in pieces:
                file.seek(start)
                stop = filled + length
                while filled < stop:
                    count = file.readinto(view[filled:stop])
                    if not count:
                        raise ValueError(f"{path}: leaf {name!r}: the file was changed while it was read")
                    filled += count
        return raw.view(dtype).reshape(shape)

    return read


def write_stream(
    path: str | os.PathLike,
    leaves: Mapping[Key, Leaf],
    dtype: torch.dtype | None = None,
    *,
    progress: Callable[[int], None] | None = None,
    chunk_bytes: int = CHUNK_BYTES,
) -> None:
    """Write leaves as `streaming_params`, sorted by key as the official code does, in their own dtype or another.

    Arrays of more than `chunk_bytes` are chunked; `progress` is called with the bytes of each leaf.
    """
    names = {value: name for name, value in FLOAT_DTYPES.items()}
    with Path(path).open("wb") as file:
        for key in sorted(leaves):
            leaf = leaves[key]
            target = dtype or leaf.dtype
            head, heads = _value_heads(leaf.shape, names[target], target.itemsize, chunk_bytes)
            size = len(head) + sum(len(start) + count * target.itemsize for start, count in heads)
            file.write(pack_header("array", 2) + pack_header("array", len(key)))
            file.write(b"".join(map(pack_text, key)) + pack_header("bin", size) + head)
            flat = leaf.read()
            if len(heads) > 1:
                flat = flat.reshape(-1)
            for start, count in heads:
                file.write(start)
                part, flat = (flat[:count], flat[count:]) if len(heads) > 1 else (flat, flat)
                for block in blocks(part, target):
                    file.write(memoryview(block.view(-1).view(torch.uint8).numpy()))
            if progress is not None:
                progress(leaf.nbytes)


def _value_heads(shape: tuple[int, ...], dtype: str, itemsize: int, chunk_bytes: int):
    """What stands before the value, and per run of numbers what stands before it and how many they are."""
    count = prod(shape)
    if count * itemsize <= chunk_bytes:
        return b"", [(_array_head(shape, dtype, count * itemsize), count)]
    step = max(1, chunk_bytes // itemsize)
    sizes = [min(step, count - start) for start in range(0, count, step)]
    dimensions = b"".join(pack_text(str(i)) + pack_header("int", n) for i, n in enumerate(shape))
    head = pack_header("map", 3) + pack_text(CHUNKED) + b"\xc3"
    head += pack_text("shape") + pack_header("map", len(shape)) + dimensions
    head += pack_text("chunks") + pack_header("map", len(sizes))
    return head, [
        (pack_text(str(i)) + _array_head((size,), dtype, size * itemsize), size) for i, size in enumerate(sizes)
    ]


def _array_head(shape: tuple[int, ...], dtype: str, nbytes: int) -> bytes:
    inner = pack_header("array", 3) + pack_header("array", len(shape))
    inner += b"".join(pack_header("int", n) for n in shape) + pack_text(dtype) + pack_header("bin", nbytes)
    return pack_header("ext", len(inner) + nbytes, ARRAY) + inner
