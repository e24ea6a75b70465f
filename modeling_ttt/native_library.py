"""Compiles `inner_loop.cpp` with the C++ compiler of this machine, once, and loads it.

The library is kept in the cache folder of Hugging Face under a name made of the source, the compiler and the
processor, so that another version or machine that shares the folder makes its own.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from huggingface_hub import constants
from transformers.utils import logging

__all__ = ["NativeLibrary", "load_library"]

logger = logging.get_logger(__name__)

SOURCE = Path(__file__).with_name("inner_loop.cpp")
HEADERS = ("math", "task", "forward", "backward")  # inner_loop_*.h
COMPILERS = ("c++", "g++", "clang++")
COMMON_FLAGS = (
    *("-std=gnu++17", "-O3", "-fPIC", "-shared"),
    *("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-fopenmp-simd"),
)
# In the order in which they are tried: a compiler may know none of the processor's names, or have no OpenMP.
VARIANTS = (("-march=native", "-fopenmp"), ("-mcpu=native", "-fopenmp"), ("-march=native",), ("-mcpu=native",), ())


class NativeLibrary:
    """The functions of `inner_loop.cpp` by pass and dtype; each takes a pointer to a `Call`."""

    def __init__(self, path: Path):
        self.path = path
        self._library = ctypes.CDLL(str(path))
        self._library.ttt_call_bytes.restype = ctypes.c_int64

    @property
    def call_bytes(self) -> int:
        """Size of a `Call` as the compiler laid it out."""
        return self._library.ttt_call_bytes()

    def run(self, name: str, call: ctypes.Structure) -> None:
        """Run one of the exported passes.

        Raises:
            MemoryError: there was no memory for what a pass keeps.
        """
        if getattr(self._library, name)(ctypes.byref(call)):
            raise MemoryError(f"{name}: no memory for the inner loop")


@functools.cache
def load_library() -> tuple[NativeLibrary | None, str]:
    """The library, compiled when this machine has not done so yet, or None and the reason why there is none."""
    missing = next((file.name for file in _files() if not file.is_file()), None)
    if missing:
        return None, f"{missing} is not beside its module (a checkpoint's own code comes without it)"
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX", ""), *COMPILERS))), None)
    if compiler is None:
        names = ", ".join(COMPILERS)
        return None, f"it is compiled on first use and there is no C++ compiler: none of {names} is found"
    try:
        path = _folder() / f"inner_loop-{_key(compiler)}.so"
        if not path.is_file():
            _compile(compiler, path)
        return NativeLibrary(path), ""
    except (OSError, subprocess.SubprocessError) as error:
        return None, f"{compiler} could not make its library: {error}"


def _files() -> list[Path]:
    return [SOURCE, *(SOURCE.with_name(f"inner_loop_{part}.h") for part in HEADERS)]


def _folder() -> Path:
    folder = Path(constants.HF_HOME) / "modeling_ttt"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _key(compiler: str) -> str:
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout
    sources = b"\0".join(file.read_bytes() for file in _files())
    parts = (sources, version, repr((COMMON_FLAGS, VARIANTS)).encode(), _processor().encode())
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _processor() -> str:
    """What "native" means here."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    features = sorted({line for line in lines if line.startswith(("flags", "Features", "model name", "CPU part"))})
    return "\n".join([platform.system(), platform.machine(), platform.processor(), *features])


def _compile(compiler: str, path: Path) -> None:
    """Write the library whole or not at all; the first set of flags the compiler takes."""
    logger.warning_once(f"Compiling {SOURCE.name} with {compiler}, once on this machine: this takes seconds.")
    with tempfile.TemporaryDirectory(dir=path.parent) as room:
        made = Path(room) / path.name
        failures = []
        for flags in VARIANTS:
            command = [compiler, *COMMON_FLAGS, *flags, str(SOURCE), "-o", str(made)]
            done = subprocess.run(command, capture_output=True, text=True, errors="replace")
            if done.returncode == 0:
                os.replace(made, path)
                return
            failures.append(done.stderr.strip() or f"exit status {done.returncode}")
    raise OSError(failures[0][-500:])
