"""Drafters that come with Parlay, for its built-in models: each in a folder MODEL/METHOD, with its card."""

from __future__ import annotations

from pathlib import Path

from parlay.engine.checkpoint import BUILT_IN


def all_shipped(model: str) -> dict[str, str]:
    """By method, the folders of all drafters that come with Parlay for a model."""
    folder = Path(__file__).parent / model
    if model not in BUILT_IN or not folder.is_dir():
        return {}
    return {path.name: str(path) for path in sorted(folder.iterdir()) if path.is_dir()}


def shipped(model: str, method: str) -> str | None:
    """The folder of the drafter that is used for a model where the user names none."""
    folder = Path(__file__).parent / model / method
    return str(folder) if model in BUILT_IN and folder.is_dir() else None
