"""Settings for all tests."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch
from transformers.utils import logging as transformers_logging

torch.set_num_threads(1)  # tiny models only lose by sharing their work
transformers_logging.disable_progress_bar()


class _Failures(logging.Handler):
    """Keeps what engines say of drafters and policies that raised: requests go on without them."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


@pytest.fixture(autouse=True)
def no_failure_goes_unseen(request: pytest.FixtureRequest) -> Iterator[None]:
    """Output stays right when a drafter or a policy fails, so no other check would notice."""
    handler, loggers = _Failures(), [logging.getLogger(f"parlay.{name}") for name in ("engine.engine", "drafters.base")]
    for logger in loggers:
        logger.addHandler(handler)
    yield
    for logger in loggers:
        logger.removeHandler(handler)
    if request.node.get_closest_marker("failures") is None:
        assert not handler.said
