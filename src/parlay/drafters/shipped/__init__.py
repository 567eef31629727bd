"""Drafters that come with Parlay, for its built-in models: each in a folder MODEL/METHOD, with its card."""

from __future__ import annotations

from pathlib import Path

from parlay.engine.checkpoint import BUILT_IN


def shipped(model: str, method: str) -> str | None:
    """The folder of the drafter that is used for a model where the user names none."""
    folder = Path(__file__).parent / model / method
    return str(folder) if model in BUILT_IN and folder.is_dir() else None
