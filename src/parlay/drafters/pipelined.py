"""Predictive pipelined decoding as a method: candidates for the next token, begun while the target runs this one."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Self

from parlay.bets import NO_TREE, Bet, Tree
from parlay.drafters.base import Drafter
from parlay.drafters.early_exit import find_exit, prepared
from parlay.drafters.exit_part import ExitPart
from parlay.engine.batch import Draft
from parlay.engine.model import LoadedModel, TargetModel
from parlay.engine.pipelined import Pipeline
from parlay.types import Offer, Row

logger = logging.getLogger(__name__)


def exit_of(source: str, target: LoadedModel) -> tuple[int, ExitPart | None]:
    """The layers before an exit as the user wrote it, and its part if it is a trained one.

    Raises:
        ValueError: where that is none, or in the lower half of the layers.
    """
    found, layers = find_exit(Pipelined.name, source, target), len(target.shapes)
    exit = found.shape.exit if isinstance(found, ExitPart) else found
    if exit is None or not layers / 2 <= exit < layers:
        raise ValueError(
            f"drafter ppd: the exit must be in the upper half, from layer {-(-layers // 2)} to {layers - 1}, or "
            f"candidates would need candidates of their own; not {exit}"
        )
    return exit, prepared(found, target) if isinstance(found, ExitPart) else None


class Pipelined(Drafter):
    """Offers rows a head start; see `parlay.engine.pipelined`. Of a bet only the size counts: so many candidates.

    Rows that sample get no offer: their tokens are drawn, not read off. A step is only pipelined where all its rows
    are, so beside a prompt or another drafter's guesses nothing is begun.

    Args:
        candidates: At most so many.
        exit: Layers after which candidates are read off, in the upper half of them.
        part: What a trained exit does to the state there.

    Attributes:
        candidates: As given.
    """

    name = "ppd"
    largest = Tree.chain(3)
    begins_next = True

    def __init__(self, candidates: int, exit: int, part: ExitPart | None = None) -> None:
        self.candidates, self._exit, self._part = candidates, exit, part
        self._told = False  # why some requests are decoded plainly

    @classmethod
    def for_target(cls, tree: Tree, target: LoadedModel, source: str | None) -> Self:
        """See `Drafter`. A user writes the number of layers before the exit, or the folder of a trained one.

        Raises:
            ValueError: for an exit in the lower half of the layers.
        """
        if getattr(target.config, "num_kv_shared_layers", 0):
            raise ValueError(
                f"drafter ppd: {target.config.model_type} has layers that take the keys of earlier ones, which a token "
                "that was begun elsewhere would lack; leave ppd out"
            )
        layers, first = len(target.places), target.places.count(target.device)
        shared = layers / 2 <= first < layers  # with another device, while whose layers run the first one is idle
        exit, part = exit_of(source or str(first if shared else min(layers - 1, -(-2 * layers // 3))), target)
        return cls(len(tree), exit, part)

    def attach(self, target: TargetModel) -> None:
        """See `Drafter`."""
        if target.strict:
            raise ValueError("ppd: --parity strict runs passes of one shape only; leave one of them out")
        if target.streamed is not None:
            raise ValueError("ppd: layers that stream are there one at a time, and two are needed; leave --offload out")
        target.pipeline = Pipeline(target, self._exit, self._part)
        self._target = target

    def detach(self) -> None:
        """See `Drafter`."""
        if (pipeline := self._target.pipeline) is not None:
            pipeline.close()
        self._target.pipeline = None

    def offer(self, rows: Sequence[Row]) -> list[Offer | None]:
        """See `Drafter`."""
        if self._target.pipeline is None:
            raise RuntimeError("ppd: its unit failed")
        tree = Tree.chain(self.candidates)
        greedy = [row.request.params.mode == "greedy" for row in rows]
        if not (self._told or all(greedy)):
            self._told = True
            logger.warning(
                "ppd: tokens that are sampled cannot be read off ahead, so such requests are decoded plainly"
            )
        return [
            Offer(self.name, tree, ahead=True) if fits and row.count == 1 else None
            for row, fits in zip(rows, greedy, strict=True)
        ]

    def draft(self, rows: Sequence[Row], bets: Sequence[Bet], budget: int) -> list[Draft | None]:
        """See `Drafter`."""
        del rows, budget
        return [Draft(self.name, NO_TREE, (), ahead=len(bet.tree)) for bet in bets]
