"""Layers that stream from disk: the same output, never more memory than allowed, and errors that end nothing else."""

from __future__ import annotations

import errno
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from parlay.bets import Bet, Tree
from parlay.config import EngineConfig
from parlay.engine import layer_files, streaming
from parlay.engine.engine import Engine
from parlay.engine.layer_files import state_of, write_layer
from parlay.engine.memory import Shelf
from parlay.engine.streaming import Placement, StreamedLayers, aligned, size_of, stream
from parlay.types import Request, SamplingParams
from tests.architectures import make_model

CPU = torch.device("cpu")


class Odd(nn.Module):
    """Tensors of several types and awkward sizes."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.a = nn.Parameter(torch.randn(7, 3))
        self.b = nn.Parameter(torch.randn(16, 32).bfloat16())
        self.register_buffer("c", torch.randint(-9, 9, (5,), dtype=torch.int8))


def odd_layers(count: int) -> list[Odd]:
    return [Odd(seed) for seed in range(count)]


def test_a_file_is_safetensors_and_is_read_as_it_was_written(tmp_path: Path) -> None:
    layer = Odd(0)
    before = {name: tensor.clone() for name, tensor in layer_files.state_of(layer).items()}
    file = write_layer(tmp_path / "layer.safetensors", layer)
    for name, tensor in load_file(file.path).items():
        assert torch.equal(tensor, before[name])
    memory = aligned(file.layout.bytes).zero_()
    file.layout.lay(layer, memory)
    assert not layer.a.any()  # there is nothing in it yet
    file.read(memory)
    for name, tensor in layer_files.state_of(layer).items():
        assert torch.equal(tensor, before[name])


def test_files_that_cannot_be_read_or_written_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_layer(tmp_path / "layer.safetensors", Odd(0))
    memory = aligned(file.layout.bytes).zero_()
    file.path.write_bytes(file.path.read_bytes()[:-9])
    with pytest.raises(OSError, match="ends after"):
        file.read(memory)
    assert write_layer(file.path, Odd(0)).layout == file.layout  # written anew
    file.read(memory)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(layer_files.os, "fsync", full)
    with pytest.raises(OSError, match="cannot take the layers that stream: No space left"):
        write_layer(tmp_path / "other.safetensors", Odd(1))
    assert [path.name for path in tmp_path.iterdir()] == ["layer.safetensors"]


@given(st.integers(2, 60), st.integers(1, 10), st.integers(1, 700))
def test_what_stays_and_what_streams_fits_the_budget(count: int, size: int, budget: int) -> None:
    sizes = [size] * count
    if budget < min(2 * size, count * size):
        with pytest.raises(ValueError, match="does not hold two layers"):
            Placement.of(sizes, budget)
        return
    found = Placement.of(sizes, budget)
    streamed = len(found.streamed)
    assert list(found.streamed) == sorted(set(found.streamed))
    assert set(found.streamed) <= set(range(count))
    assert (count - streamed) * size + 2 * found.slot_bytes <= budget
    if found.streamed:
        assert streamed % 2 == 0 or streamed == count
        assert (count - streamed + 2) * size + 2 * size > budget  # two more would not fit
    else:
        assert count * size <= budget


@pytest.mark.parametrize("kept", [0, 1, 2])
def test_any_order_of_layers_finds_the_right_weights(kept: int, tmp_path: Path) -> None:
    """Also where a drafter runs the first layers again and again, or a step ends early."""
    layers = odd_layers(7)
    expected = [layer.a.detach().clone() for layer in layers]
    streamed = stream(layers, "disk", (2 + kept) * size_of(layers[0]), tmp_path, CPU)
    assert isinstance(streamed, StreamedLayers)
    for _ in range(3):
        for index in (0, 1, 2, 0, 1, 2, 3, 4, 5, 6, 0, 1, 0, 1, 2, 3, 4, 5, 6):
            streamed.bring(index)
            assert torch.equal(layers[index].a, expected[index]), index
    streamed.close()


def test_a_read_that_fails_once_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And files that are removed meanwhile are still read."""
    layers = odd_layers(6)
    expected = [layer.a.detach().clone() for layer in layers]
    streamed = stream(layers, "disk", 2 * size_of(layers[0]), tmp_path, CPU)
    assert streamed is not None
    for path in tmp_path.iterdir():
        path.unlink()
    whole, calls = layer_files.os.preadv, []

    def now_and_then(*given: Any) -> int:
        calls.append(given)
        if len(calls) % 3 == 0:
            raise OSError(errno.EIO, "Input/output error")
        return whole(*given)

    monkeypatch.setattr(layer_files.os, "preadv", now_and_then)
    monkeypatch.setattr(streaming, "PAUSES", (0.0, 0.0))
    for index in range(6):
        streamed.bring(index)
        assert torch.equal(layers[index].a, expected[index])
    assert "trying again" in caplog.text
    streamed.close()


def test_everything_stays_where_it_fits(tmp_path: Path) -> None:
    layers = odd_layers(3)
    expected = [layer.a.detach().clone() for layer in layers]
    assert stream(layers, "disk", 3 * size_of(layers[0]), tmp_path, CPU) is None
    assert all(torch.equal(layer.a, values) for layer, values in zip(layers, expected, strict=True))


def test_memory_is_what_the_budget_allows(tmp_path: Path) -> None:
    """Of layers that stream nothing is left but the two slots, though their tensors were parts of a larger one."""
    layers, shelf = odd_layers(8), Shelf()
    for layer in layers:
        kept = shelf.keep(layer.a.detach())
        assert kept._base is None  # or it would hold the whole shelf, whatever becomes of its values
        layer.a.data = kept
    streamed = stream(layers, "disk", 4 * size_of(layers[0]), tmp_path, CPU)
    assert streamed is not None
    assert streamed.count == 6
    storages = {tensor.untyped_storage().data_ptr() for layer in layers for tensor in state_of(layer).values()}
    assert len(storages) == 2 + 2
    streamed.close()


def answers(engine: Engine) -> list[list[int]]:
    """Three requests at a time, of which one is sampled with a seed."""
    found: dict[str, list[int]] = {"a": [], "b": [], "c": []}
    for number, name in enumerate(found):
        params = SamplingParams(temperature=number / 2, seed=7, max_tokens=20, ignore_eos=True)
        engine.add(Request(name, tuple(range(3, 20 + number)), params))
    while engine.has_work:
        for delta in engine.step():
            found[delta.request_id] += delta.tokens
    return list(found.values())


@pytest.mark.parametrize("bet", [None, Bet("self", Tree((-1, -1, 0, 0, 2)))])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "olmo2"])
def test_output_is_that_of_resident_layers(
    architecture: str, bet: Bet | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PARLAY_CACHE", str(tmp_path / "cache"))
    folder = make_model(tmp_path / "model", architecture, torch.float32, layers=5)
    settings: dict[str, Any] = {"dtype": "float32", "device": "cpu", "compile": "off"}
    whole = Engine(EngineConfig(str(folder), speculation=bet, **settings))
    sizes = [size_of(layer) for layer in whole.model.segments.layers]
    budget = 3 * max(sizes)
    streaming = Engine(EngineConfig(str(folder), speculation=bet, offload="disk", memory_budget=budget, **settings))
    assert answers(streaming) == answers(whole)
    streamed = streaming.model.streamed
    assert streamed is not None
    assert streamed.bytes_read > 0


def test_a_disk_that_fails_ends_the_step_with_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not hang, and the next step tries again."""
    monkeypatch.setenv("PARLAY_CACHE", str(tmp_path / "cache"))
    folder = make_model(tmp_path / "model", "llama", torch.float32, layers=5)
    config = EngineConfig(str(folder), dtype="float32", device="cpu", compile="off", speculation=None)
    whole = Engine(config)
    budget = 3 * size_of(whole.model.segments.layers[0])
    engine = Engine(replace(config, offload="disk", memory_budget=budget))
    streamed = engine.model.streamed
    assert streamed is not None

    def broken(number: int, into: torch.Tensor, mark: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    working = streamed._source.fetch
    monkeypatch.setattr(streamed._source, "fetch", broken)
    with pytest.raises(OSError, match="Input/output"):
        answers(engine)
    for name in ("a", "b", "c"):
        engine.abort(name)
    monkeypatch.setattr(streamed._source, "fetch", working)
    assert answers(engine) == answers(whole)


def test_a_budget_that_is_too_small_is_refused_in_a_sentence(tmp_path: Path) -> None:
    folder = make_model(tmp_path, "llama", layers=3)
    with pytest.raises(ValueError, match=r"memory_budget: 0\.0 MiB does not hold two layers"):
        Engine(EngineConfig(str(folder), device="cpu", offload="disk", memory_budget=1000))
    with pytest.raises(ValueError, match="choose disk"):
        Engine(EngineConfig(str(folder), device="cpu", offload="cpu", memory_budget=1 << 30))
    with pytest.raises(ValueError, match="give both or neither"):
        EngineConfig(str(folder), offload="disk")
