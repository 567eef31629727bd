"""CPU operators in C++: products with packed weights, attention over pages and trees.

They are compiled once for a machine and PyTorch version, with whatever C++ compiler there is, into the cache folder.
Without a compiler Parlay runs on PyTorch's own operators.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch
from filelock import FileLock

from parlay.engine.checkpoint import cache_dir

logger = logging.getLogger(__name__)

SOURCES = Path(__file__).parent
PATIENCE = 300  # seconds for the compiler


def compiler() -> str | None:
    """The C++ compiler of this machine."""
    return os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)


@cache
def load() -> bool:
    """Loads the operators as `torch.ops.parlay`, compiling them first where that was not done yet; whether it could."""
    found = compiler()
    if found is None:
        logger.warning("no C++ compiler found, so PyTorch's own operators are used; install g++ for more speed")
        return False
    try:
        _load(found, "ops.cpp", "parlay")
    except (OSError, subprocess.SubprocessError) as error:
        logger.warning("the CPU operators could not be compiled, so PyTorch's own are used: %s", _reason(error))
        return False
    _register_shapes()
    _keep_memory()
    return True


@cache
def load_programs() -> bool:
    """Loads what runs compiled programs without the interpreter's lock; whether it could."""
    found = compiler()
    try:
        if found is not None and load():
            _load(found, "programs.cpp", "programs")
            return True
    except (OSError, subprocess.SubprocessError) as error:
        logger.warning("compiled layers keep the interpreter's lock while they run: %s", _reason(error))
    return False


def _load(made_by: str, source: str, name: str) -> None:
    library = cache_dir() / "native" / f"{name}-{key(made_by)}.so"
    if not library.exists():
        _build(made_by, source, library)
    torch.ops.load_library(str(library))


def key(made_by: str = "") -> str:
    """Names everything that code compiled for this machine depends on."""
    sources = b"".join(path.read_bytes() for path in sorted(SOURCES.iterdir()) if path.suffix in (".h", ".cpp"))
    about = (made_by, torch.__version__, torch.__file__, platform.machine(), _instruction_sets())
    return hashlib.sha256(sources + repr(about).encode()).hexdigest()[:16]


def _instruction_sets() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())


def _build(made_by: str, source: str, library: Path) -> None:
    library.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(library.with_suffix(".lock")):
        if library.exists():
            return
        logger.info("compiling %s, once for this machine (about half a minute)", source)
        torch_folder = Path(torch.__file__).parent
        with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
            built = Path(scratch) / library.name
            command = [
                made_by, "-O3", "-march=native", "-ffp-contract=fast", "-std=c++20", "-Wno-psabi", "-fPIC", "-shared",
                "-fopenmp", f"-I{torch_folder / 'include'}", str(SOURCES / source), "-o", str(built),
                f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-lc10",
            ]  # fmt: skip
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=PATIENCE)
            built.rename(library)


def _reason(error: Exception) -> str:
    said = getattr(error, "stderr", None) or str(error)
    return next((line for line in said.splitlines() if "error" in line), said.strip().splitlines()[0])


def _keep_memory() -> None:
    """Has glibc keep what is freed for the next step; to return it and get it again took 4 ms of a step of 70."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-1, 2**30)  # M_TRIM_THRESHOLD: bytes at the top of the heap
        libc.mallopt(-3, 2**25)  # M_MMAP_THRESHOLD: its upper limit


def give_back_memory() -> None:
    """Has glibc return what it kept, as after loading a model."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def _register_shapes() -> None:
    """Tells PyTorch's compiler the shapes of what the operators return."""

    @torch.library.register_fake("parlay::linear")
    def _linear(
        x: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor | None, bias: torch.Tensor | None, outputs: int
    ) -> torch.Tensor:
        return x.new_empty(*x.shape[:-1], outputs)

    @torch.library.register_fake("parlay::attend")
    def _attend(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: torch.Tensor | float
    ) -> torch.Tensor:
        return query.new_empty(*query.shape[:2], value.shape[2])
