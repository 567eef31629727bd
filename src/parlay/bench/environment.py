"""What a measurement was taken with, so that a number is never without its conditions."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

PACKAGES = ("parlay", "torch", "transformers", "numpy", "httpx")
SECRETS = ("--api-key", "--reference-api-key")  # options whose values stay out of every record


@dataclass(frozen=True, slots=True)
class Environment:
    """Where, when and with what a measurement ran. Holds no paths of the machine."""

    command: str
    date: str
    revision: str | None
    python: str
    packages: dict[str, str]
    system: str
    cpu: str
    cores: int
    threads: int | None  # of torch; None where torch was not used
    memory_gib: float
    gpu: str | None
    load_average: tuple[float, float, float] | None  # who else was busy, where the system tells


def capture() -> Environment:
    """Describes this process and machine; to be called before measuring, with torch imported if it is used at all."""
    torch: Any = sys.modules.get("torch")
    return Environment(
        command=_command(),
        date=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        revision=_revision(),
        python=platform.python_version(),
        packages={name: version for name in PACKAGES if (version := _version(name)) is not None},
        system=f"{platform.system()} {platform.machine()}",
        cpu=_cpu(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        threads=torch.get_num_threads() if torch else None,
        memory_gib=round(psutil.virtual_memory().total / 2**30, 1),
        load_average=os.getloadavg() if hasattr(os, "getloadavg") else None,
        gpu=torch.cuda.get_device_name() if torch and torch.cuda.is_available() else None,
    )


def write_json(path: Path, environment: Environment, results: Any) -> None:
    """Writes a dataclass of results beside the environment they were measured in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(as_json(environment, results), encoding="utf-8")


def as_json(environment: Environment, results: Any) -> str:
    """The document that `write_json` writes."""
    document = {"environment": dataclasses.asdict(environment), **dataclasses.asdict(results)}
    return json.dumps(document, indent=1, ensure_ascii=False, default=_written) + "\n"


def _written(value: object) -> str:
    if not isinstance(value, Path):
        raise TypeError(f"{type(value).__name__} cannot be written as JSON")
    return portable(str(value))


def deliver(target: str, environment: Environment, results: Any) -> None:
    """Writes the document to the file of this name; `-` is standard output."""
    if target == "-":
        sys.stdout.write(as_json(environment, results))
    else:
        write_json(Path(target), environment, results)


def _command() -> str:
    told: list[str] = []
    for argument in sys.argv:
        option, given, _ = argument.partition("=")
        if told and told[-1] in SECRETS:
            told.append("...")
        else:
            told.append(f"{option}=..." if given and option in SECRETS else portable(argument))
    return " ".join(told)


def portable(argument: str) -> str:
    """The argument without the machine's own folders, where it is a path that has some, or NAME=PATH."""
    name, given, value = argument.partition("=")
    if given:
        return f"{name}={portable(value)}"
    path = Path(argument)
    if ".." in path.parts:  # it says where the machine keeps what lies outside of the project
        return path.name
    if not path.is_absolute():
        return argument
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else path.name


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        if package != "parlay":
            return None
        from parlay import __version__  # run from a source tree

        return __version__


def _revision() -> str | None:
    """The commit of the source tree, marked where files differ from it; None outside of one."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
