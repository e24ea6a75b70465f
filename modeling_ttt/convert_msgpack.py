"""msgpack by its headers: step through a file without holding its values, and write the same headers.

A general reader holds every value in memory, twice for nested ones; here a value of gigabytes is an extent in a file.
Every announced length is checked against the bytes that contain it before it is used.
"""

import struct
from pathlib import Path
from typing import BinaryIO, NamedTuple

__all__ = ["Header", "MsgpackWalk", "pack_header", "pack_text"]

MAX_NAME_BYTES = 1024


class Header(NamedTuple):
    """What a value begins with: its kind, its size (or the value of a number), the type code of an extension."""

    kind: str
    size: int
    code: int = 0


class MsgpackWalk:
    """A position in a file of `size` bytes; `place` is what messages name. All errors are ValueError."""

    def __init__(self, path: Path, file: BinaryIO, size: int):
        self.path, self.file, self.size = path, file, size
        self.position, self.place = 0, "the first"

    def header(self, end: int) -> Header:
        """Read what a value begins with; `end` is where the bytes that contain it end."""
        first = self._take(1, end)[0]
        for low, high, kind in _SHORT:
            if low <= first <= high:
                return Header(kind, first - low)
        if first in _CONSTANT:
            return _CONSTANT[first]
        if first >= _NEGATIVE:
            return Header("int", first - 0x100)
        if first in _FIXED_EXTENSION:
            return Header("ext", _FIXED_EXTENSION[first], self._take(1, end)[0])
        if first not in _SIZED:
            raise self.error(f"byte {self.position - 1} begins no msgpack value: 0x{first:02x}")
        kind, layout = _SIZED[first]
        (size,) = struct.unpack(layout, self._take(struct.calcsize(layout), end))
        if kind == "float":
            return Header(kind, 0)
        return Header(kind, size, self._take(1, end)[0] if kind == "ext" else 0)

    def peek(self, end: int) -> Header:
        """The header at the position, which stays."""
        start = self.position
        header = self.header(end)
        self.position = start
        return header

    def expect(self, kind: str, end: int, size: int | None = None) -> int:
        """Read a header of this kind (and size): its size, or the value of a number, which must not be negative."""
        start = self.position
        header = self.header(end)
        if header.kind != kind or header.size < 0 or (size is not None and header.size != size):
            wanted = kind if size is None else f"{kind} of {size}"
            raise self.error(f"expected {wanted} at byte {start}, got {header.kind} of {header.size}")
        return header.size

    def text(self, end: int) -> str:
        """Read a string, a name of at most 1024 bytes."""
        length = self.expect("str", end)
        if length > MAX_NAME_BYTES:
            raise self.error(f"names have at most {MAX_NAME_BYTES} bytes, got {length}")
        raw = self._take(length, end)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.error(f"a name is not UTF-8: {raw!r}") from error

    def skip(self, count: int, end: int) -> int:
        """Step over bytes and give the position."""
        if count > end - self.position:
            where = "the file ends" if end == self.size else "what contains them ends"
            raise self.error(f"{count} bytes are announced at byte {self.position}, but {where} at {end}; cut off?")
        self.position += count
        return self.position

    def step_over(self, end: int) -> int:
        """Go past one value, however deep it is nested, and give the position."""
        pending = 1
        while pending:
            header = self.header(end)
            pending -= 1
            if header.kind in ("str", "bin", "ext"):
                self.skip(header.size, end)
            elif header.kind in ("array", "map"):
                pending += header.size * (2 if header.kind == "map" else 1)
        return self.position

    def error(self, what: str) -> ValueError:
        """An error that names file and leaf."""
        return ValueError(f"{self.path}: leaf {self.place!r}: {what}")

    def _take(self, count: int, end: int) -> bytes:
        start = self.position
        self.skip(count, end)
        self.file.seek(start)
        raw = self.file.read(count)
        if len(raw) != count:
            raise self.error("the file was changed while it was read")
        return raw


def pack_header(kind: str, size: int, code: int = 0) -> bytes:
    """The shortest header of a value of this kind; ValueError when msgpack has none that long."""
    for low, high, short in _SHORT:
        if short == kind and size <= high - low:
            return bytes([low + size])
    for first, fixed in _FIXED_EXTENSION.items():
        if kind == "ext" and size == fixed:
            return bytes([first, code])
    for first, (sized, layout) in _SIZED.items():
        if sized == kind and layout[1].isupper() and size < 1 << 8 * struct.calcsize(layout):
            return bytes([first]) + struct.pack(layout, size) + (bytes([code]) if kind == "ext" else b"")
    raise ValueError(f"msgpack holds no {kind} of {size}")


def pack_text(text: str) -> bytes:
    """A string."""
    raw = text.encode("utf-8")
    return pack_header("str", len(raw)) + raw


_SHORT = ((0x00, 0x7F, "int"), (0x80, 0x8F, "map"), (0x90, 0x9F, "array"), (0xA0, 0xBF, "str"))
_CONSTANT = {0xC0: Header("nil", 0), 0xC2: Header("bool", 0), 0xC3: Header("bool", 1)}
_NEGATIVE = 0xE0
_FIXED_EXTENSION = {0xD4: 1, 0xD5: 2, 0xD6: 4, 0xD7: 8, 0xD8: 16}
# Short ones first; capital layouts are sizes and numbers without a sign.
_SIZED = {
    0xC4: ("bin", ">B"),
    0xC5: ("bin", ">H"),
    0xC6: ("bin", ">I"),
    0xC7: ("ext", ">B"),
    0xC8: ("ext", ">H"),
    0xC9: ("ext", ">I"),
    0xCA: ("float", ">f"),
    0xCB: ("float", ">d"),
    0xCC: ("int", ">B"),
    0xCD: ("int", ">H"),
    0xCE: ("int", ">I"),
    0xCF: ("int", ">Q"),
    0xD0: ("int", ">b"),
    0xD1: ("int", ">h"),
    0xD2: ("int", ">i"),
    0xD3: ("int", ">q"),
    0xD9: ("str", ">B"),
    0xDA: ("str", ">H"),
    0xDB: ("str", ">I"),
    0xDC: ("array", ">H"),
    0xDD: ("array", ">I"),
    0xDE: ("map", ">H"),
    0xDF: ("map", ">I"),
}
