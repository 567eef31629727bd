"""Layers on several devices: the same output, nothing that mixes devices, and nothing held twice."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from parlay.bets import parse_bet
from parlay.config import EngineConfig
from parlay.engine import engine as engine_file
from parlay.engine.calibration import hardware
from parlay.engine.compute_unit import Unit
from parlay.engine.engine import Engine
from parlay.engine.placement import SpreadAttention, bring, devices, spread
from parlay.types import Request, SamplingParams
from tests.architectures import make_model, plain_model
from tests.pretended import DEVICES, Pretending, pretend

PROMPTS = [tuple(range(3, 20)), (5, 6, 7, 5, 6, 7, 5), tuple(range(40, 72))]


def engine(folder: Path, device: str, bet: str | None = None, **settings: Any) -> Engine:
    speculation = parse_bet(bet) if bet else None
    common = {"dtype": "float64", "compile": "off", "max_num_batched_tokens": 24, "max_num_seqs": 8}
    return Engine(EngineConfig(str(folder), device=device, speculation=speculation, **common, **settings))


def answers(some: Engine, prompts: Sequence[tuple[int, ...]] = PROMPTS, **params: Any) -> list[list[int]]:
    found: dict[str, list[int]] = {}
    settings = SamplingParams(**{"temperature": 0, "max_tokens": 24, "ignore_eos": True, **params})
    for number, prompt in enumerate(prompts):
        some.add(Request(str(number), prompt, settings))
    while some.has_work:
        for delta in some.step():
            found.setdefault(delta.request_id, []).extend(delta.tokens)
    some.check_integrity()
    return [found[str(number)] for number in range(len(prompts))]


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_output_is_that_of_one_device(architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_model(tmp_path, architecture, layers=None if architecture == "gemma2" else 5)
    one = engine(folder, "cpu", "prompt_lookup:3")
    expected = answers(one), answers(one, temperature=0.8, seed=5)
    pretend(monkeypatch)
    with Pretending():
        several = engine(folder, "pretended", "prompt_lookup:3")
        assert (answers(several), answers(several, temperature=0.8, seed=5)) == expected


def test_each_device_has_its_layers_and_their_kv_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch)
    with Pretending():
        model = engine(make_model(tmp_path, "llama", layers=5), "pretended").model
    first, second = DEVICES
    assert [next(layer.parameters()).device for layer in model.segments.layers] == [*[first] * 3, *[second] * 2]
    assert [pool.device for pool in model.kv.pools] == [*[first] * 3, *[second] * 2]
    embedding: Any = model.segments.model.get_input_embeddings()  # type: ignore[operator]
    assert embedding.weight.device == first


def test_a_tensor_of_the_other_device_is_noticed() -> None:
    with Pretending(), pytest.raises(RuntimeError, match="mixes"):
        torch.ones(2, device=DEVICES[0]).add(torch.ones(2, device=DEVICES[1]))


@pytest.mark.parametrize("candidates", [1, 3])
@pytest.mark.parametrize("exit", [3, 4])  # where the first device ends, and on the second one
def test_the_first_device_begins_what_comes_next(
    candidates: int, exit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_model(tmp_path, "llama", layers=5)
    expected = answers(engine(folder, "cpu"))
    pretend(monkeypatch)
    with Pretending():
        ahead = engine(folder, "pretended", f"ppd:{candidates}", drafters={"ppd": str(exit)})
        assert answers(ahead) == expected
        assert ahead.model.pipeline is not None
        tally = ahead.model.pipeline.tally
        assert tally.matches > 0
        assert tally.layers > 0


def test_an_early_exit_drafts_on_several_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_model(tmp_path, "llama", layers=5)
    expected = answers(engine(folder, "cpu"))
    pretend(monkeypatch)
    with Pretending():
        several = engine(folder, "pretended", "self:12x3", drafters={"self": "4"})
        assert answers(several) == expected
        assert not several.drafters.failed


def test_strict_parity_holds_on_several_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_model(tmp_path, "llama", layers=5)
    expected = answers(engine(folder, "cpu", parity="strict"), temperature=0.8, seed=5)
    pretend(monkeypatch)
    with Pretending():
        several = engine(folder, "pretended", "prompt_lookup:3", parity="strict")
        assert answers(several, temperature=0.8, seed=5) == expected


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("tpu", "none of auto, cpu, cuda"),
        ("cuda:x", "none of auto, cpu, cuda"),
        ("cpu,cpu", "each once"),
        ("cpu:0,cpu:1", "CUDA devices by their numbers"),
        ("cuda:0", "choose cpu"),
        ("cuda:0,cuda:1", "choose cpu"),
        ("", "none of auto"),
    ],
)
def test_devices_that_cannot_be_had(name: str, remedy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=f"device: .*{remedy}"):
        devices(name)


@pytest.mark.parametrize(
    ("name", "remedy"), [("cuda:0,cuda:2", "no cuda:2"), ("cuda:1,cuda:1", "each once"), ("cuda,cuda:1", "numbers")]
)
def test_devices_that_this_machine_lacks(name: str, remedy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert devices("cuda:0, cuda:1") == (torch.device("cuda:0"), torch.device("cuda:1"))
    with pytest.raises(ValueError, match=f"device: .*{remedy}"):
        devices(name)


def test_what_is_tied_stays_tied(tmp_path: Path) -> None:
    folder, cpu = make_model(tmp_path, "llama", layers=3), torch.device("cpu")
    model = plain_model(folder)
    model.tie_weights()
    ids = torch.arange(5)[None]
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    before, kept = model(ids).logits, [tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())]
    bring(model, model.model.layers, cpu, [cpu] * 3)
    assert torch.allclose(model(ids).logits, before)
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    assert not {*kept} & {tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())}


def test_keys_of_an_earlier_layer_are_brought() -> None:
    asked = []

    class Noting:
        def __init__(self, device: torch.device) -> None:
            self.device = device

        def __call__(self, call: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            asked.append([self.device, query.device, key.device, value.device])
            return query

    attend: Any = SpreadAttention(Noting)
    with Pretending():
        first, second = (torch.ones(1, 1, 4, device=device) for device in DEVICES)
        attend(None, first, first, first)
        attend(None, second, first, first)
    assert asked == [[DEVICES[0]] * 4, [DEVICES[1]] * 4]


def test_the_exit_is_where_the_first_of_two_devices_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_model(tmp_path, "llama", layers=5)
    assert engine(folder, "cpu", "ppd:1").model.pipeline._exit == 4  # type: ignore[union-attr]
    pretend(monkeypatch)
    with Pretending():
        assert engine(folder, "pretended", "ppd:1").model.pipeline._exit == 3  # type: ignore[union-attr]


def test_the_pool_fits_on_every_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_model(tmp_path, "llama", layers=5)
    pretend(monkeypatch)
    with Pretending():
        page = 2 * 16 * 8 * 16  # of one layer: 2 heads with 16 numbers of 8 bytes, 16 positions
        room = {DEVICES[0]: 12 * page, DEVICES[1]: 6 * page}
        monkeypatch.setattr(engine_file, "_kv_memory", lambda config, device: room[device])
        found = engine(folder, "pretended")
    assert found.scheduler.blocks.num_pages == 3, "6 pages of one layer are 3 of two layers"
    assert "+" not in hardware([torch.device("cpu")])


def test_a_unit_has_a_stream_on_every_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for CUDA: which streams wait for which, and which is the current one."""
    said: list[str] = []
    over = torch.device("cuda:1"), torch.device("cuda:0")

    class Stream:
        def __init__(self, device: torch.device, name: str = "unit") -> None:
            self.device, self.name = device, f"{name} {device.index}"

        def wait_stream(self, other: Stream) -> None:
            said.append(f"{self.name} waits for {other.name}")

        def synchronize(self) -> None:
            said.append(f"{self.name} is done")

    @contextmanager
    def current(stream: Stream) -> Iterator[None]:
        said.append(f"on {stream.name}")
        yield

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream(device, "target"))
    monkeypatch.setattr(torch.cuda, "stream", current)
    unit = Unit(over)
    unit.run(unit.pace).result()
    unit.await_target()
    unit.join()
    unit.close()
    assert said == [
        *("unit 1 waits for target 1", "unit 0 waits for target 0", "on unit 0", "on unit 1"),
        *("unit 1 is done", "unit 0 is done", "target 1 is done"),
        *("target 1 waits for unit 1", "target 0 waits for unit 0"),
    ]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")
    assert hardware(over) == "GPU 1 + GPU 0"


def test_layers_are_shared_in_order() -> None:
    over = [torch.device(f"cuda:{number}") for number in range(3)]
    assert spread(5, over) == (over[0], over[0], over[1], over[1], over[2])
    assert spread(3, over[:1]) == (over[0],) * 3
    with pytest.raises(ValueError, match="device: 3 devices are too many for 2 layers"):
        spread(2, over)


def test_layers_that_stream_go_to_one_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch)
    with pytest.raises(ValueError, match="offload: layers stream to one device"):
        engine(make_model(tmp_path, "llama", layers=5), "pretended", offload="disk", memory_budget=1 << 20)
