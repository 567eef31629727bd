"""At load, compares what the engine computes with plain transformers, on a tree beside another row's prefill."""

from __future__ import annotations

import logging
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from parlay.bets import Tree
from parlay.engine.attention import UnsupportedModel, current_step
from parlay.engine.batch import Draft, pack
from parlay.engine.compiled import LayerProgram, Noted
from parlay.engine.model import LoadedModel, TargetModel
from parlay.engine.path_attention import PathAttention
from parlay.engine.strict import TILE
from parlay.types import Request, Row, SamplingParams

logger = logging.getLogger(__name__)

TREE = Tree((-1, -1, 0, 0, 1, 2))
PAGE = 4
KNOWN, CACHED, OTHER = 9, 6, 7  # tokens of the row with the tree, those in KV before, tokens of the other row


@dataclass(frozen=True, slots=True)
class Reference:
    """What plain transformers says, taken before the engine takes the model over.

    Attributes:
        tokens: The random tokens: the tree's row, the other row, the nodes.
        logits: [1 + nodes + 1, vocab]: after the known tokens, after every node, after the other row.
        spread: Root mean square difference between transformers' own results for the same tokens in other shapes.
    """

    tokens: tuple[int, ...]
    logits: torch.Tensor
    spread: float


def _row(tokens: tuple[int, ...], start: int, count: int, pages: list[int]) -> Row:
    request = Request("self-check", tokens, SamplingParams(temperature=0))
    return Row(0, request, 0, array("i", tokens), len(tokens), start, count, 0, len(TREE), pages)


def _rms(values: torch.Tensor) -> float:
    return float(values.to(torch.float64).square().mean().sqrt())


@torch.inference_mode()
def reference(loaded: LoadedModel) -> Reference:
    """Runs each root-to-node path of the check as a sequence of its own."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(0, loaded.config.vocab_size, (KNOWN + OTHER + len(TREE),), generator=generator).tolist()
    known, other, nodes = drawn[:KNOWN], drawn[KNOWN : KNOWN + OTHER], drawn[KNOWN + OTHER :]

    def run(tokens: list[int]) -> torch.Tensor:
        return loaded.model(input_ids=torch.tensor([tokens], device=loaded.model.device), use_cache=False).logits[0]

    def path(node: int) -> list[int]:
        return [*path(TREE.parents[node]), nodes[node]] if node >= 0 else known

    logits = [run(path(node))[-1] for node in range(-1, len(TREE))]
    full = run(known)
    spread = max(_rms(run(known[:size])[-1] - full[size - 1]) for size in (1, 2, 5))
    return Reference(tuple(drawn), torch.stack([*logits, run(other)[-1]]).to(loaded.device), spread)


def check(model: TargetModel, expected: Reference) -> None:
    """Verifies the same tree and prefill as one packed step.

    Raises:
        UnsupportedModel: when the difference exceeds what transformers itself shows between shapes.
    """
    known = expected.tokens[:KNOWN]
    other = expected.tokens[KNOWN : KNOWN + OTHER]
    nodes = expected.tokens[KNOWN + OTHER :]
    pages = list(range(1, 9))[::-1]
    rows = [_row(known, CACHED, KNOWN - CACHED, pages[:4]), _row(other, 0, OTHER, pages[4:])]
    with model.borrowed_kv(1 + len(pages), PAGE):
        model.verify([_row(known, 0, CACHED, pages[:4])], [None])
        logits = model.verify(rows, [Draft("self-check", TREE, nodes), None]).logits
    difference = _rms(logits - expected.logits)
    allowed = 4 * expected.spread + _rounding(model.dtype) * _rms(expected.logits)
    if not difference <= allowed:
        raise UnsupportedModel(
            "self-check failed: a packed step differs from plain transformers by "
            f"{difference:.3g} (root mean square of logits), and {allowed:.3g} is what this dtype explains; "
            "this architecture cannot be served exactly"
        )


def _rounding(dtype: torch.dtype) -> float:
    """Of logits, relatively; transformers' eager attention takes its softmax in float32 whatever the dtype."""
    return 4 * torch.finfo(dtype).eps + 16 * torch.finfo(torch.float32).eps


class _Beside:
    """Runs a compiled layer beside the eager one, which goes on and writes the same KV again."""

    def __init__(self, program: LayerProgram, layer: int) -> None:
        self._program, self._layer = program, layer
        self.hidden = self.out = self.written = torch.empty(0)  # [T, hidden] before and after; [T, kv_heads, D]

    def __call__(self, hidden: torch.Tensor, noted: Noted, *, freely: bool = False) -> None:
        out, step = self._program(hidden, noted, freely=freely), current_step()
        if out is None or not isinstance(step, PathAttention):
            raise UnsupportedModel("a layer is called in another way than when it was compiled")
        self.hidden, self.out = hidden[0], out[0]
        self.written = step.kv.slots[self._layer][step.paths.slots].clone()


@torch.inference_mode()
def check_compiled(model: TargetModel, programs: Sequence[LayerProgram]) -> None:
    """Compares what every compiled layer adds to the hidden states, and writes as KV, with what the eager one does.

    Layer by layer, because rounding grows from layer to layer by a factor that differs from model to model.

    Raises:
        UnsupportedModel: when they differ by more than rounding.
    """
    pages = list(range(1, 13))
    tokens = [token % model.vocab_size for token in range(3, 12)]
    draft = Draft("self-check", TREE, tuple(tokens[: len(TREE)]))
    steps = [
        ([_row((tokens[0],), 0, 1, pages)], [None]),  # sizes of 1 are where programs for any size go wrong
        ([_row(tuple(tokens[:2]), 1, 1, pages)], [None]),
        ([_row(tuple(tokens[:3]), 2, 1, pages), _row(tuple(tokens[3:5]), 0, 2, pages[9:])], [draft, None]),
    ]
    beside = [_Beside(program, layer) for layer, program in enumerate(programs)]
    with model.borrowed_kv(1 + len(pages), model.kv.page_size), model.segments.using(beside):
        for rows, drafts in steps:
            states = model.verify(rows, drafts, taps=range(1, len(programs) + 1)).taps
            slots = pack(rows, drafts, model.kv.page_size, model.device).slots
            for layer, compiled in enumerate(beside):
                require_close("the output", layer, compiled.out, states[layer + 1], compiled.hidden)
                written = model.kv.slots[layer][slots]
                require_close("the KV", layer, compiled.written, written, torch.zeros_like(written))


def require_close(what: str, layer: int, found: torch.Tensor, expected: torch.Tensor, before: torch.Tensor) -> None:
    """Compares two results for the same tokens.

    A number may be off by its own storage's rounding, since a layer adds little to what may be much, and beyond that
    a token's numbers by the rounding of what was added to `before`.
    """
    expected64, before64 = expected.flatten(1).to(torch.float64), before.flatten(1).to(torch.float64)
    beyond = (found.flatten(1) - expected64).abs() - 2 * torch.finfo(expected.dtype).eps * expected64.abs()
    off, added = (each.square().mean(-1).sqrt() for each in (beyond.clamp(min=0), expected64 - before64))
    allowed = 2 * _rounding(expected.dtype)
    if not bool((off <= allowed * added).all()):
        raise UnsupportedModel(
            f"{what} of layer {layer}, compiled, differs by {float((off / added).max()):.3g} of what the layer adds, "
            f"and rounding by {allowed:.3g}"
        )


def check_strict(model: TargetModel) -> None:
    """Verifies the same guesses at other places of other tiles, and asks for the same bits.

    Where the library that multiplies matrices treats the lines of a product differently, it gets one thread.

    Raises:
        UnsupportedModel: when they differ even so.
    """
    if _is_invariant(model):
        return
    assert model.products is not None
    logger.warning("matrix products depend on the number of threads here, so --parity strict uses one")
    model.products.threads = 1
    if not _is_invariant(model):
        raise UnsupportedModel(
            "--parity strict cannot hold here: a token's logits depend on its place in a matrix product; use --parity "
            "fast, or another --dtype or device"
        )


def _is_invariant(model: TargetModel) -> bool:
    """Whether a chain of guesses gets equal logits alone and behind rows of other lengths."""
    draft = Draft("self-check", Tree.chain(2 * TILE), tuple(range(1, 2 * TILE + 1)))
    pages = list(range(1, 1 + 4 * TILE // PAGE))
    row = _row((1,), 0, 1, pages[TILE // PAGE :])
    with model.borrowed_kv(1 + len(pages), PAGE):
        alone = model.verify([row], [draft]).logits
        return all(
            torch.equal(model.verify([_row((2,) * shift, 0, shift, pages), row], [None, draft]).logits[1:], alone)
            for shift in (1, 3, 7, TILE - 1)
        )
