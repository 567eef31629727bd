"""Profiles of published or measured machines, to plan and to simulate with where nothing was measured yet."""

from __future__ import annotations

import difflib
from pathlib import Path

from parlay.policy.cost import Profile

_FOLDER = Path(__file__).parent

BUILTIN = tuple(sorted(path.stem for path in _FOLDER.glob("*.json")))


def read_profile(text: str) -> Profile:
    """A built-in profile by its name, or one from a file.

    Raises:
        ValueError: when it is neither, with the nearest name.
    """
    if text in BUILTIN:
        return Profile.load(_FOLDER / f"{text}.json")
    if not Path(text).exists():
        near = difflib.get_close_matches(text, BUILTIN, n=1)
        hint = f"did you mean {near[0]}?" if near else f"built in: {', '.join(BUILTIN)}"
        raise ValueError(f"profile {text!r}: no such file, and no such built-in profile; {hint}")
    return Profile.load(Path(text))
