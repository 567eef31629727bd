"""Runs a Hugging Face model in segments: embedding, any range of layers, norm and head.

The model's own forward keeps its embedding, position encoding, norm, head and logit scaling, whatever they are. Its
layers are replaced by stand-ins that only note how they were called; the last one then runs the real layers that
were asked for, from the given hidden state, handing out the states that were tapped. A hook in front of the head
keeps only the positions that somebody reads.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn

from parlay.engine.compiled import Noted


class Program(Protocol):
    """Computes a layer's output from the hidden state and how the model calls the layer; None leaves it to the layer.

    Where several threads run layers at a time, each wants to be run `freely`, without a lock.
    """

    def __call__(self, hidden: torch.Tensor, noted: Noted, *, freely: bool = False) -> torch.Tensor | None: ...


@dataclass(frozen=True, slots=True)
class SegmentOutput:
    """What a segment gave: the hidden state after it, tapped states by layer, logits of the positions read."""

    hidden: torch.Tensor  # [T, hidden]
    taps: dict[int, torch.Tensor]  # after this many layers: [T, hidden]; see `SegmentedModel.__call__`
    logits: torch.Tensor  # [N, vocab]


@dataclass(slots=True)
class _Work:
    """One forward's orders and findings, shared between the stand-ins and the head's hook."""

    layers: range
    hidden: torch.Tensor | None
    taps: frozenset[int]
    reads: torch.Tensor
    then: Callable[[torch.Tensor], torch.Tensor] | None
    tapped: dict[int, torch.Tensor] = field(default_factory=dict)


class _Passing(threading.local):
    """What a thread is about: several may be in the model's own forward at a time.

    Attributes:
        work: Of the segment under way.
        noted: How each layer was called in the thread's last pass.
        went: By device, what went there of what the thread's last pass calls layers with; see `_brought`.
    """

    def __init__(self, layers: int) -> None:
        self.work: _Work | None = None
        self.noted: list[Noted] = [((), {})] * layers
        self.went: dict[torch.device, dict[int, tuple[Any, Any]]] = {}


def _brought(value: Any, device: torch.device, done: dict[int, tuple[Any, Any]]) -> Any:
    """What a layer is called with, its tensors on the layer's device; `done` has each tensor that went there."""
    if isinstance(value, torch.Tensor):
        if id(value) not in done:
            done[id(value)] = value, value.to(device)  # the original is kept, so that its id stays its own
        return done[id(value)][1]
    if isinstance(value, tuple | list):
        return type(value)(_brought(some, device, done) for some in value)
    if isinstance(value, dict):
        return {key: _brought(some, device, done) for key, some in value.items()}
    return value


class _StandIn(nn.Module):
    """Stands where a layer stood and notes how the model would have called it."""

    def __init__(self, layer: nn.Module, index: int, passing: _Passing, returns_tuple: bool) -> None:
        super().__init__()
        self.layer, self.index, self.passing = layer, index, passing
        self.returns_tuple = returns_tuple
        self.then: Callable[[torch.Tensor], torch.Tensor] | None = None  # what the last one does with the hidden state
        self.program: Program | None = None
        self.before: Callable[[], None] | None = None  # brings its weights
        self.device: torch.device | None = None  # where it is, if not all layers are at one place

    def __call__(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:  # without a module's ceremony
        self.passing.noted[self.index] = args, kwargs
        hidden = hidden_states if self.then is None else self.then(hidden_states)
        return (hidden,) if self.returns_tuple else hidden

    def run(self, hidden: torch.Tensor, noted: Noted, *, freely: bool = False) -> torch.Tensor:
        if self.before is not None:
            self.before()
        if self.device is not None:
            hidden = hidden.to(self.device)
            noted = _brought(noted, self.device, self.passing.went.setdefault(self.device, {}))
        if self.program is not None and (done := self.program(hidden, noted, freely=freely)) is not None:
            return done
        args, kwargs = noted
        out = self.layer(hidden, *args, **kwargs)
        return out[0] if self.returns_tuple else out

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:  # such as a layer's attention type, which models read from their layers
            return getattr(self._modules["layer"], name)


class SegmentedModel:
    """A causal LM whose layers can be run range by range.

    Args:
        model: The Hugging Face model; it can only be called through this object afterwards.
        layers: Its list of decoder layers.
        returns_tuple: Whether those layers return a tuple around the hidden state.
    """

    def __init__(self, model: nn.Module, layers: nn.ModuleList, returns_tuple: bool) -> None:
        self.model = model
        self.num_layers = len(layers)
        self._passing = _Passing(len(layers))
        self._stand_ins = [_StandIn(layer, i, self._passing, returns_tuple) for i, layer in enumerate(layers)]
        for index, stand_in in enumerate(self._stand_ins):
            layers[index] = stand_in
        self._stand_ins[-1].then = self._run_layers
        self.layers = [stand_in.layer for stand_in in self._stand_ins]
        model.get_output_embeddings().register_forward_pre_hook(self._keep_read)  # type: ignore[operator]

    @property
    def noted(self) -> list[Noted]:
        """How each layer was called in this thread's last pass."""
        return [*self._passing.noted]

    @property
    def programs(self) -> list[Program | None]:
        """What runs each layer; None for itself."""
        return [stand_in.program for stand_in in self._stand_ins]

    def use(self, programs: Sequence[Program | None]) -> None:
        """Runs each layer by its program, or as it is."""
        for stand_in, program in zip(self._stand_ins, programs, strict=True):
            stand_in.program = program

    def begin(self, tokens: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, list[Noted]]:
        """The state [T, hidden] before the first layer, and how each would be called; inside a `forward_batch`."""
        return self(tokens, positions, layers=range(0), taps=(0,)).taps[0], self.noted

    def run_layer(self, index: int, hidden: torch.Tensor, noted: Noted) -> torch.Tensor:
        """One layer alone, called as was noted; any thread may, where layers do not stream. hidden: [1, T, hidden]."""
        return self._stand_ins[index].run(hidden, noted, freely=True)

    def before_each(self, bring: Callable[[int], None]) -> None:
        """Calls this with a layer's number before the layer runs."""
        for index, stand_in in enumerate(self._stand_ins):
            stand_in.before = partial(bring, index)

    def place(self, devices: Sequence[torch.device]) -> None:
        """Says where each layer is; what a pass is given and gives is where the embedding is."""
        for stand_in, device in zip(self._stand_ins, devices, strict=True):
            stand_in.device = device

    @contextmanager
    def using(self, programs: Sequence[Program]) -> Iterator[None]:
        """Runs each layer by its program for a while."""
        before = self.programs
        self.use(programs)
        try:
            yield
        finally:
            self.use(before)

    def __call__(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        *,
        layers: range | None = None,
        hidden: torch.Tensor | None = None,
        taps: Sequence[int] = (),
        reads: torch.Tensor | None = None,
        then: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> SegmentOutput:
        """Runs one segment, inside a `forward_batch` scope.

        Args:
            tokens: [T] ids.
            positions: [T].
            layers: The layers to run; None runs all.
            hidden: [T, hidden] state before the first of them; None starts from the embedding.
            taps: Return the state after so many layers (0 is the embedding's); one more than there are is what the
                head reads, that is the last state after the final norm.
            reads: [N] positions in the packed step whose logits are wanted; None wants none.
            then: What the state after the layers goes through on its way to the norm; the output's is the one before.
        """
        work = _Work(
            layers=range(self.num_layers) if layers is None else layers,
            hidden=hidden,
            taps=frozenset(taps),
            reads=tokens[:0] if reads is None else reads,
            then=then,
        )
        self._passing.work = work
        self._passing.went.clear()
        logits = self.model(input_ids=tokens[None], position_ids=positions[None], use_cache=False).logits[0]
        assert work.hidden is not None
        return SegmentOutput(work.hidden, work.tapped, logits)

    def _run_layers(self, embedded: torch.Tensor) -> torch.Tensor:
        work, noted = self._passing.work, self._passing.noted
        assert work is not None
        home, hidden = embedded.device, embedded if work.hidden is None else work.hidden[None]
        if work.layers.start in work.taps:
            work.tapped[work.layers.start] = hidden[0]
        for index in work.layers:
            hidden = self._stand_ins[index].run(hidden, noted[index])
            if index + 1 in work.taps:
                work.tapped[index + 1] = hidden[0].to(home)
        hidden = hidden.to(home)
        work.hidden = hidden[0]
        return hidden if work.then is None else work.then(hidden)

    def _keep_read(self, _head: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        work = self._passing.work
        assert work is not None
        if self.num_layers + 1 in work.taps:
            work.tapped[self.num_layers + 1] = args[0][0]
        return (args[0].index_select(1, work.reads), *args[1:])
