"""Get the test files of the installed Transformers from its source distribution; run as a script to do so."""

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

CACHE = Path(__file__).resolve().parents[2] / ".cache" / "transformers_suite"


def sources_folder() -> Path:
    """Where the test files of the installed version lie, or would lie."""
    return CACHE / version("transformers")


def sources_available() -> bool:
    """Whether the test files of the installed version are there."""
    return (sources_folder() / "test_modeling_common.py").is_file()


def fetch() -> Path:
    """Download the source distribution and unpack `tests/*.py` of it; does nothing when that is done already.

    Raises:
        subprocess.CalledProcessError: pip could not download it.
        ValueError: it holds no model tests.
    """
    target = sources_folder()
    if sources_available():
        return target
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        unpacked = Path(scratch) / "tests"
        unpacked.mkdir()
        _unpack(_download(Path(scratch)), unpacked)
        if not (unpacked / "test_modeling_common.py").is_file():
            raise ValueError(f"the source distribution of transformers {target.name} has no model tests")
        # One of the files imports the folder it lies in.
        (unpacked / "__init__.py").touch()
        shutil.rmtree(target, ignore_errors=True)
        os.replace(unpacked, target)
    return target


def _download(folder: Path) -> Path:
    requirement = f"transformers=={version('transformers')}"
    options = ["--quiet", "--disable-pip-version-check", "--no-input", "--no-deps", "--no-binary", "transformers"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), requirement]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    return next(folder.glob("transformers-*.tar.gz"))


def _unpack(archive: Path, folder: Path) -> None:
    with tarfile.open(archive) as tar:
        for member in tar:
            parts = Path(member.name).parts
            if member.isfile() and len(parts) == 3 and parts[1] == "tests" and parts[2].endswith(".py"):
                (folder / parts[2]).write_bytes(tar.extractfile(member).read())


if __name__ == "__main__":
    print(f"Test files of transformers {version('transformers')}: {fetch()}")
