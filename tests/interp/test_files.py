"""Files are whole or absent, and one that cannot be read is named."""

from pathlib import Path

import pyarrow as pa
import pytest

from interp.files import read_json, read_parquet, read_text, to_json, write_beside, write_parquet, write_text


def test_text_is_read_without_a_byte_order_mark(tmp_path):
    file = tmp_path / "a.txt"
    write_text(file, "naïve\n")
    assert read_text(file) == "naïve\n"
    file.write_bytes(b"\xef\xbb\xbfa")
    assert read_text(file) == "a"


def test_a_failed_write_keeps_the_old_file_and_leaves_nothing_else(tmp_path):
    file = tmp_path / "a.txt"
    write_text(file, "old")
    with pytest.raises(RuntimeError), write_beside(file) as beside:
        beside.write_text("new")
        raise RuntimeError
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a.txt", "old")]


def test_tables_are_joined(tmp_path):
    write_parquet(tmp_path / "a.parquet", (pa.table({"n": [i]}) for i in range(3)))
    assert read_parquet(tmp_path / "a.parquet").column("n").to_pylist() == [0, 1, 2]
    with pytest.raises(ValueError, match="no table to write"):
        write_parquet(tmp_path / "b.parquet", [])
    assert [path.name for path in tmp_path.iterdir()] == ["a.parquet"]


@pytest.mark.parametrize("read", [read_text, read_json, read_parquet])
def test_what_cannot_be_read_is_named(tmp_path, read):
    (tmp_path / "noise.bin").write_bytes(b"\xff\x00\xff")
    for name in ("noise.bin", "absent.bin"):
        with pytest.raises(ValueError, match=name):
            read(tmp_path / name)


def test_json_is_strict():
    assert to_json({"path": Path("a")}) == '{\n  "path": "a"\n}\n'
    with pytest.raises(ValueError, match="JSON compliant"):
        to_json(float("nan"))
    with pytest.raises(TypeError, match="only JSON values"):
        to_json(object())
