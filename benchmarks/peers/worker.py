"""What all workers share: a peer's side of the conversation with `compare.py`.

A worker is run by its peer's own Python, which has no Parlay, so this file needs nothing but the standard library. It
loads the model once, says so in one JSON line, then answers each JSON line on standard input with one on standard
output. Whatever the peer prints goes to standard error.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

Tokens = list[int]
Decode = Callable[[list[Tokens], int], list[Tokens]]  # prompts, tokens to make of each -> what was made


@dataclass(frozen=True, slots=True)
class Options:
    """What every peer is started with.

    Attributes:
        models: The folder of the model as safetensors, or the one that holds it as GGUF files, as the peer reads it.
        variant: One of the precisions that the worker knows.
        threads: As many as there are cores.
        rows: Requests that run at a time, at most.
        context: Tokens of one request, prompt included, at most.
        budget: Tokens in one step: all prompts, so that each of them is read in the first step of any peer.
    """

    models: Path
    variant: str
    threads: int
    rows: int
    context: int
    budget: int


@dataclass(frozen=True, slots=True)
class Loaded:
    """A peer that is ready.

    Attributes:
        decode: Continues all prompts at once, greedily and past the end of a text.
        precision: Of weights, arithmetic and KV cache, in words.
        versions: By package.
        settings: How the peer was tuned, by its own names.
    """

    decode: Decode
    precision: str
    versions: dict[str, str]
    settings: dict[str, Any]


def serve(load: Callable[[Options], Loaded]) -> None:
    """Loads the peer and answers until standard input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    options = _options()
    loaded = load(options)
    about = asdict(loaded)
    del about["decode"]
    print(json.dumps({"ready": True, **about}), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        prompts, max_tokens = request["prompts"], request["max_tokens"]
        began = time.perf_counter()
        tokens = loaded.decode(prompts, max_tokens)
        seconds = time.perf_counter() - began
        if [len(made) for made in tokens] != [max_tokens] * len(prompts):
            raise RuntimeError(f"{max_tokens} tokens were asked for, the peer made {[len(made) for made in tokens]}")
        print(json.dumps({"seconds": seconds, "tokens": tokens}), file=answers, flush=True)


def versions(packages: Iterable[str]) -> dict[str, str]:
    """The installed versions."""
    return {name: importlib.metadata.version(name) for name in packages}


def _options() -> Options:
    parser = argparse.ArgumentParser(description="A peer's worker; compare.py starts it.")
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--variant", required=True)
    for name in ("threads", "rows", "context", "budget"):
        parser.add_argument(f"--{name}", type=int, required=True)
    return Options(**vars(parser.parse_args()))
