from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest

from parlay.config import EngineConfig
from parlay.engine.engine import Engine
from tests.serving import Server, serving
from tests.tiny import make_tiny_llama


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    folder = make_tiny_llama(tmp_path_factory.mktemp("tiny"))
    return Engine(EngineConfig(model=str(folder), dtype="float32", device="cpu", max_num_seqs=8))


@pytest.fixture(scope="session")
def server(engine: Engine) -> Iterator[Server]:
    """A real engine behind a real port."""
    with serving(engine, max_body_bytes=2**16) as running:
        yield running


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with server.client() as client:
        yield client
