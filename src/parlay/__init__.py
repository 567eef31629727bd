"""Parlay: an LLM serving engine that decides, per request and step, what to bet on speculation.

Only the names below are public. `LLM` comes with torch, so it is imported when first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from parlay.config import EngineConfig
from parlay.types import CompletionOutput, InvalidRequest, RequestOutput, SamplingParams

if TYPE_CHECKING:
    from parlay.engine.llm import LLM

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "CompletionOutput",
    "EngineConfig",
    "InvalidRequest",
    "RequestOutput",
    "SamplingParams",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name == "LLM":
        from parlay.engine.llm import LLM

        return LLM
    raise AttributeError(f"module 'parlay' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
