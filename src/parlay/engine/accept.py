"""Lossless verification: which guesses are kept, and what is emitted after them.

Words: a guess is *accepted* when it is kept; after a rejection the next token is *recovered*, sampled from what the
target's distribution still holds; after a fully accepted path it is a *bonus*. Emitted = accepted + 1.

Every row walks down its tree. At each node the target's processed distribution P decides:

- `greedy`: the argmax of P.
- `coupled`: argmax(log p + g) with Gumbel noise g keyed by (seed, choice, position, token), so that the token does not
  depend on what was guessed (drafter-invariant speculation, Daliri et al. 2024).
- `optimal`, deterministic children: a sample from P. Accepting a child when it is that sample has the same law as
  trying the children one by one with q = 1.
- `optimal`, sampled children: Sequoia's rule for children drawn without replacement (Chen et al. 2024, algorithm 2),
  or, as a baseline, SpecInfer's for independent ones (Miao et al. 2024, multi-step speculative sampling).

In each case the outcome is one token; if it is a child, the walk goes on there, else it ends by emitting it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from parlay.bets import NO_TREE
from parlay.engine import siblings
from parlay.engine.batch import Draft
from parlay.engine.sampling import Draws, Path, argmax, process
from parlay.types import Row, RowResult, TokenLogprobs


@dataclass(frozen=True, slots=True, eq=False)
class Scores:
    """What verification returned.

    Attributes:
        logits: [N, vocab]; per sampling row the last known token's line, then one per node.
        first_read: Per row, its first line; -1 where the row does not sample.
        prompt_logprobs: Per row, for the prompt positions of this step that were asked for.
        taps: By layer, the hidden states after it of the packed step: per row its known tokens, then its nodes.
    """

    logits: torch.Tensor
    first_read: tuple[int, ...]
    prompt_logprobs: tuple[tuple[TokenLogprobs, ...], ...]
    taps: Mapping[int, torch.Tensor] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class _Walk:
    """One row on its way down its tree."""

    row: Row
    draft: Draft | None
    first_read: int
    node: int = -1
    accepted: list[int] = field(default_factory=list)
    emitted: list[int] = field(default_factory=list)
    children: dict[int, list[int]] = field(init=False)

    def __post_init__(self) -> None:
        self.children = self.draft.tree.children() if self.draft else {}

    @property
    def read(self) -> int:
        """The line of logits that follow the current node."""
        return self.first_read + 1 + self.node

    @property
    def reads(self) -> list[int]:
        """The lines behind every emitted token."""
        return [self.first_read, *(self.first_read + 1 + node for node in self.accepted)]

    @property
    def options(self) -> list[int]:
        """Tokens of the current node's children, in draw order."""
        if self.draft is None:
            return []
        return [self.draft.tokens[child] for child in self.children.get(self.node, ())]

    @property
    def is_sampled(self) -> bool:
        """Whether the current node has children that were sampled."""
        return self.draft is not None and self.draft.probs is not None and self.node in self.children

    @property
    def ids(self) -> torch.Tensor | None:
        """[W] the target's tokens that its drafter can say; None for all."""
        return self.draft.ids if self.draft is not None else None

    @property
    def proposal(self) -> torch.Tensor:
        """[W] what the current node's children were sampled from."""
        assert self.draft is not None
        assert self.draft.probs is not None
        return self.draft.probs[sorted(self.children).index(self.node)]

    def take(self, token: int) -> bool:
        """Emits a token and follows it into the tree; False when the walk has ended."""
        self.emitted.append(token)
        for child in self.children.get(self.node, ()):
            if self.draft is not None and self.draft.tokens[child] == token:
                self.node = child
                self.accepted.append(child)
                return True
        return False

    def key(self) -> tuple[int, int, int]:
        params = self.row.request.params
        position = len(self.row.tokens) - len(self.row.request.prompt) + len(self.emitted)
        return params.seed or 0, self.row.choice, position


class Acceptor:
    """Applies each request's verification mode to a step's scores.

    Args:
        draws: The source of chance.
        eos: End-of-sequence ids, which may not come before a request's `min_tokens`.
    """

    def __init__(self, draws: Draws, eos: Sequence[int]) -> None:
        self.draws = draws
        self.eos = tuple(eos)

    def accept(self, rows: Sequence[Row], drafts: Sequence[Draft | None], scores: Scores) -> tuple[RowResult, ...]:
        """Walks every sampling row down its tree and returns one result per row."""
        walks = [_Walk(row, draft, first) for row, draft, first in zip(rows, drafts, scores.first_read, strict=True)]
        sampling = [walk for walk in walks if walk.first_read >= 0]
        self._walk_argmax([walk for walk in sampling if self._is_argmax(walk)], scores.logits)
        self._walk_levels([walk for walk in sampling if not self._is_argmax(walk)], scores.logits)
        logprobs = self._logprobs(sampling, scores.logits)
        return tuple(
            RowResult(
                method=walk.draft.method if walk.draft else None,
                tree=walk.draft.tree if walk.draft else NO_TREE,
                accepted=tuple(walk.accepted),
                emitted=tuple(walk.emitted),
                logprobs=logprobs.get(walk.row.seq, ()),
                prompt_logprobs=prompt,
            )
            for walk, prompt in zip(walks, scores.prompt_logprobs, strict=True)
        )

    def _is_argmax(self, walk: _Walk) -> bool:
        """Whether the row only ever needs the raw logits' argmax."""
        params = walk.row.request.params
        return params.mode == "greedy" and not params.min_tokens and Path(params, (), ()).is_plain

    def _walk_argmax(self, walks: Sequence[_Walk], logits: torch.Tensor) -> None:
        if walks:
            best = argmax(logits).tolist()
            for walk in walks:
                while walk.take(best[walk.read]):
                    pass

    def _walk_levels(self, walks: Sequence[_Walk], logits: torch.Tensor) -> None:
        """Moves all rows down together, one level at a time, so that only visited nodes are ever processed."""
        while walks:
            current = _lines(logits, [walk.read for walk in walks])
            current = current.to(torch.promote_types(current.dtype, torch.float32))
            tokens = self._choose(
                walks, process(current, [Path.behind(walk.row, walk.emitted, self.eos) for walk in walks])
            )
            walks = [walk for walk, token in zip(walks, tokens, strict=True) if walk.take(token)]

    def _choose(self, walks: Sequence[_Walk], logits: torch.Tensor) -> list[int]:
        """One token per walk from processed logits [A, vocab], by the mode of each."""
        tokens = [0] * len(walks)
        by_rule: dict[str, list[int]] = {}
        for line, walk in enumerate(walks):
            mode = walk.row.request.params.mode
            by_rule.setdefault("residual" if mode == "optimal" and walk.is_sampled else mode, []).append(line)
        for rule, lines in by_rule.items():
            chosen = _lines(logits, lines)
            some = [walks[line] for line in lines]
            if rule == "greedy":
                found = argmax(chosen).tolist()
            elif rule == "coupled":
                noise = self.draws.gumbel([walk.key() for walk in some], chosen)
                found = argmax(chosen + noise).tolist()
            elif rule == "optimal":
                found = self.draws.categorical(chosen.softmax(-1)).tolist()
            else:
                found = self._residual(some, chosen.softmax(-1))
            for line, token in zip(lines, found, strict=True):
                tokens[line] = token
        return tokens

    def _residual(self, walks: Sequence[_Walk], target: torch.Tensor) -> list[int]:
        """One token per walk whose current node has sampled children. target: [A, vocab] probabilities."""
        tokens = [0] * len(walks)
        by_support: dict[int, list[int]] = {}
        for line, walk in enumerate(walks):
            by_support.setdefault(id(walk.ids), []).append(line)
        for lines in by_support.values():
            some = [walks[line] for line in lines]
            found = siblings.choose(
                _lines(target, lines),
                torch.stack([walk.proposal for walk in some]),
                some[0].ids,
                [walk.options for walk in some],
                [walk.draft is not None and walk.draft.replaced for walk in some],
                self.draws,
            )
            for line, token in zip(lines, found.tolist(), strict=True):
                tokens[line] = token
        return tokens

    def _logprobs(self, walks: Sequence[_Walk], logits: torch.Tensor) -> dict[int, tuple[TokenLogprobs, ...]]:
        """Log-probabilities of emitted tokens for the rows that asked, from the raw logits."""
        found: dict[int, tuple[TokenLogprobs, ...]] = {}
        for walk in walks:
            count = walk.row.request.params.logprobs
            if count is not None:
                lines = torch.tensor(walk.reads, device=logits.device)
                found[walk.row.seq] = token_logprobs(logits.index_select(0, lines), walk.emitted, count)
        return found


def _lines(logits: torch.Tensor, lines: Sequence[int]) -> torch.Tensor:
    """Some lines of [N, vocab]; not copied when they are all lines."""
    if list(lines) == list(range(len(logits))):
        return logits
    return logits.index_select(0, torch.tensor(lines, device=logits.device))


def token_logprobs(logits: torch.Tensor, tokens: Sequence[int], count: int) -> tuple[TokenLogprobs, ...]:
    """Log-probability of each token and of the `count` most likely ones. logits: [A, vocab], raw."""
    logprobs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    chosen = logprobs.gather(1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0].tolist()
    values, ids = logprobs.topk(min(count, logprobs.shape[-1]), dim=-1)
    tops = [tuple(zip(line, row, strict=True)) for line, row in zip(ids.tolist(), values.tolist(), strict=True)]
    return tuple(TokenLogprobs(*entry) for entry in zip(tokens, chosen, tops, strict=True))
