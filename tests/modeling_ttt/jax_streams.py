"""Files of the official JAX code written with msgpack itself: an oracle for our own reader and writer."""

from pathlib import Path

import msgpack
import numpy as np
import torch

CHUNKED = "__msgpack_chunked_array__"
NUMPY = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float64: "float64"}


def packed(tensor: torch.Tensor, chunk_values: int | None = None) -> bytes:
    """A leaf as flax serialises it; in chunks of so many values if it has more."""
    if chunk_values is None or tensor.numel() <= chunk_values:
        return msgpack.packb(_array(tensor))
    parts = tensor.flatten().split(chunk_values)
    return msgpack.packb(
        {
            CHUNKED: True,
            "shape": {str(i): n for i, n in enumerate(tensor.shape)},
            "chunks": {str(i): _array(part) for i, part in enumerate(parts)},
        }
    )


def write_records(path: Path, leaves: dict[tuple[str, ...], bytes]) -> Path:
    """A stream: (key, value) after (key, value)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    packer = msgpack.Packer(use_bin_type=True)
    path.write_bytes(b"".join(packer.pack((list(key), value)) for key, value in leaves.items()))
    return path


def read_records(path: Path) -> dict[tuple[str, ...], bytes]:
    """Key and serialised value of every record, in order."""
    with path.open("rb") as file:
        return {tuple(key): value for key, value in msgpack.Unpacker(file, raw=False, max_buffer_size=2**31 - 1)}


def unpacked(value: bytes) -> np.ndarray:
    """The array in a serialised leaf that is not chunked, bfloat16 as its bits."""
    code, data = msgpack.unpackb(value, raw=False)
    assert code == 1
    shape, dtype, raw = msgpack.unpackb(data, raw=False)
    return np.frombuffer(raw, np.uint16 if dtype == "bfloat16" else dtype).reshape(shape)


def _array(tensor: torch.Tensor) -> msgpack.ExtType:
    raw = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return msgpack.ExtType(1, msgpack.packb((list(tensor.shape), NUMPY[tensor.dtype], raw)))
