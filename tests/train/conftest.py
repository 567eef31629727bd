"""What the tests of training share."""

from __future__ import annotations

import pytest


@pytest.fixture
def few_and_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few conversations in a file, and short ones."""
    monkeypatch.setattr("parlay.train.dataset.ROUND", 10)
    monkeypatch.setattr("parlay.train.dataset.HELD_OUT", 8)
    monkeypatch.setattr("parlay.train.conversations.QUESTION_TOKENS", 12)
    monkeypatch.setattr("parlay.train.conversations.ANSWER_TOKENS", 40)
