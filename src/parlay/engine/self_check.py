"""At load, compares what the engine computes with plain transformers, on a tree beside another row's prefill."""

from __future__ import annotations

import logging
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from parlay.engine.attention import UnsupportedModel
from parlay.engine.batch import Draft
from parlay.engine.compiled import LayerProgram, Noted
from parlay.engine.model import LoadedModel, TargetModel
from parlay.engine.strict import TILE
from parlay.types import Request, Row, SamplingParams, Tree

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
        return loaded.model(input_ids=torch.tensor([tokens], device=loaded.device), use_cache=False).logits[0]

    def path(node: int) -> list[int]:
        return [*path(TREE.parents[node]), nodes[node]] if node >= 0 else known

    logits = [run(path(node))[-1] for node in range(-1, len(TREE))]
    full = run(known)
    spread = max(_rms(run(known[:size])[-1] - full[size - 1]) for size in (1, 2, 5))
    return Reference(tuple(drawn), torch.stack([*logits, run(other)[-1]]), spread)


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
    """Runs a compiled layer beside the eager one, which goes on."""

    def __init__(self, program: LayerProgram) -> None:
        self._program = program
        self.out: torch.Tensor | None = None  # [1, T, hidden]

    def __call__(self, hidden: torch.Tensor, noted: Noted) -> None:
        self.out = self._program(hidden, noted)


def check_compiled(model: TargetModel, programs: Sequence[LayerProgram]) -> None:
    """Compares every compiled layer with the eager one on the same hidden states.

    Layer by layer, because rounding grows from layer to layer by a factor that differs from model to model.

    Raises:
        UnsupportedModel: when they differ by more than rounding.
    """
    draft, pages = Draft("self-check", TREE, tuple(range(1, len(TREE) + 1))), list(range(1, 13))
    steps = [
        ([_row((3,), 0, 1, pages)], [None]),  # sizes of 1 are where programs for any size go wrong
        ([_row((3, 5), 1, 1, pages)], [None]),
        ([_row((3, 5, 7), 2, 1, pages), _row((4, 2), 0, 2, pages[9:])], [draft, None]),
    ]
    beside = [_Beside(program) for program in programs]
    with model.borrowed_kv(1 + len(pages), model.kv.page_size), model.segments.using(beside):
        for rows, drafts in steps:
            states = model.verify(rows, drafts, taps=range(1, len(programs) + 1)).taps
            for layer, compiled in enumerate(beside, start=1):
                if compiled.out is None:
                    raise UnsupportedModel(f"layer {layer} is called in another way than when it was compiled")
                difference, allowed = (
                    _rms(compiled.out[0] - states[layer]),
                    _rounding(model.dtype) * _rms(states[layer]),
                )
                if not difference <= 2 * allowed:
                    raise UnsupportedModel(
                        f"layer {layer}, compiled, differs by {difference:.3g} (root mean square), and rounding by "
                        f"{allowed:.3g}"
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
