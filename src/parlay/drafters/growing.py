"""Trees that grow level by level: a drafter's forward pass per level, for all rows at once.

Three ways to choose a node's children, by the row's verification mode:

- `greedy`: the most likely tokens. Of a tree that is free only size and depth count: it grows where it is most likely
  to be right (EAGLE-2, Li et al. 2024): every level expands its best nodes by the product of probabilities along their
  paths, and the best of all are kept, which are ancestor-closed. Nothing here is by chance. What other drafters show
  for the row takes part: their guesses are nodes like its own, with their word for how likely they are.
- `optimal`: the planned shape, children sampled without replacement (Sequoia, Chen et al. 2024), distributions kept.
  As baselines, children sampled independently (SpecInfer, Miao et al. 2024), or the most likely ones (top-k).
- `coupled`: the planned shape, children by the noise that verification will use (Daliri et al. 2024).
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch

from parlay.bets import Bet, Tree
from parlay.config import TreeSampling
from parlay.engine.batch import Draft, PackedRow, pack_row
from parlay.engine.sampling import Path, argmax, draw_without_replacement, gumbel_at, process
from parlay.types import Offer, Row

WIDTH = 6  # nodes that a level of a growing tree expands at most,
SHARE = 8  # or one in so many of its guesses, if that is more
BRANCH = 8  # children of each
CANDIDATES = 64  # most likely tokens among which noise picks children
LEAST = 1e-30  # what is less likely is never drawn: among such numbers float32 cannot tell which is likelier


@dataclass(slots=True)
class Hint:
    """A guess that others show.

    Attributes:
        share: How likely it is held to be, if those before it are right.
        after: What is guessed behind it, by token.
    """

    share: float = 0.0
    after: dict[int, Hint] = field(default_factory=dict)

    @classmethod
    def of(cls, offers: Sequence[Offer]) -> Hint:
        """All that is shown behind a row's last known token."""
        root = cls()
        for offer in offers:
            places: list[Hint] = [root]
            for parent, token, share in zip(
                offer.tree.parents, offer.tokens or (), offer.confidence or (), strict=True
            ):
                place = places[parent + 1].after.setdefault(token, cls())
                place.share = max(place.share, share)
                places.append(place)
        return root


@dataclass(slots=True, eq=False)
class Growth:
    """One row's guesses on their way.

    Attributes:
        row: The row.
        bet: What was planned for it.
        eos: End-of-sequence ids of the target.
        shown: What others show behind the last known token; taken in where the tree is free.
        parents: Of each node so far, -1 for the root's children.
        tokens: Of each node.
        survival: Of each node, the product of how likely the tokens along its path are held to be.
        ran: Nodes that the drafter has run, in order; each has a scratch slot behind the known tokens.
        frontier: Nodes whose children are drawn next, -1 for the root.
        probs: What the children of each node with children were drawn from, where they were sampled.
        replaced: Whether they were drawn with replacement.
    """

    row: Row
    bet: Bet
    eos: Sequence[int]
    shown: Sequence[Offer] = ()
    parents: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    survival: list[float] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    ran: list[int] = field(default_factory=list)
    frontier: list[int] = field(default_factory=lambda: [-1])
    probs: list[torch.Tensor] = field(default_factory=list)
    replaced: bool = False
    planned: Tree = field(init=False)  # level by level
    places: dict[int, list[int]] = field(init=False)  # its children
    is_free: bool = field(init=False)  # whether it grows where it is likely to be right
    hinted: dict[int, Hint] = field(init=False)  # of nodes behind which others' guesses were not looked at yet

    def __post_init__(self) -> None:
        self.is_free = self.bet.free and self.mode == "greedy"
        self.hinted = {-1: Hint.of(self.shown)} if self.is_free and self.shown else {}
        self.planned = by_levels(self.bet.tree)
        self.places = self.planned.children()

    @property
    def mode(self) -> str:
        return self.row.request.params.mode

    def branches(self, node: int) -> int:
        """How many children the drafter gives a node."""
        return min(BRANCH, len(self.planned)) if self.is_free else len(self.places.get(node, ()))

    def add(self, parent: int, tokens: Sequence[int], probabilities: Sequence[float]) -> None:
        """Puts children behind a node, in draw order; where others show some as well, the likeliest first."""
        assert self.is_free or len(tokens) == len(self.places[parent]), "fewer tokens than planned siblings"
        hints = self.hinted.pop(parent).after if parent in self.hinted else {}
        shares = dict(zip(tokens, probabilities, strict=True))
        order: Sequence[int] = tokens
        if hints:
            shares |= {token: max(hint.share, shares.get(token, 0.0)) for token, hint in hints.items()}
            order = sorted(shares, key=lambda token: -shares[token])
        before = self.survival[parent] if parent >= 0 else 1.0
        for token in order:
            if token in hints and hints[token].after:
                self.hinted[len(self.tokens)] = hints[token]
            self.parents.append(parent)
            self.tokens.append(token)
            self.survival.append(before * shares[token])
            self.depths.append(self.depths[parent] + 1 if parent >= 0 else 1)

    def advance(self, first: int) -> None:
        """Chooses which of the nodes from `first` on get children."""
        new = range(first, len(self.tokens))
        if self.is_free:
            room = min(max(WIDTH, len(self.planned) // SHARE), len(self.planned) - len(self.ran))
            deeper = bool(new) and self.depths[first] < self.planned.depth
            # A node that is not among the best by now has no child among them either.
            enough = heapq.nlargest(len(self.planned), self.survival)[-1] if len(new) < len(self.tokens) else 0.0
            open_ = [node for node in new if self.survival[node] >= enough] if deeper else []
            self.frontier = sorted(heapq.nlargest(room, open_, key=lambda node: (self.survival[node], -node)))
        else:
            self.frontier = [node for node in new if node in self.places]
        self.ran += self.frontier

    def packed(self, page_size: int, first_page: int = 0) -> PackedRow:
        """The frontier's nodes, to be run."""
        place = {-1: -1} | {node: index for index, node in enumerate(self.ran)}
        tree = Tree(tuple(place[self.parents[node]] for node in self.ran))
        guesses = [self.tokens[node] for node in self.frontier]
        pages, skipped = self.row.pages[first_page:], first_page * page_size
        return pack_row((), self.row.length - skipped, pages, page_size, tree, guesses, skipped)

    def path(self, node: int) -> Path:
        """What the processing of the logits behind a node may depend on; -1 is the root."""
        guesses: list[int] = []
        while node >= 0:
            guesses.append(self.tokens[node])
            node = self.parents[node]
        return Path.behind(self.row, guesses[::-1], self.eos)

    def key(self, node: int) -> tuple[int, int, int]:
        """Of the noise for the token behind a node; as in `accept`."""
        row = self.row
        depth = self.depths[node] if node >= 0 else 0
        return row.request.params.seed or 0, row.choice, row.length - len(row.request.prompt) + depth

    def draft(self, method: str, ids: torch.Tensor | None) -> Draft:
        """What it has grown to."""
        if self.is_free:
            self._add_hints()
        nodes: Sequence[int] = range(len(self.tokens))
        if self.is_free:
            nodes = sorted(heapq.nsmallest(len(self.planned), nodes, key=lambda node: (-self.survival[node], node)))
        number = {-1: -1} | {node: i for i, node in enumerate(nodes)}
        tree = Tree(tuple(number[self.parents[node]] for node in nodes))
        probs = torch.stack(self.probs) if self.probs else None
        tokens = tuple(self.tokens[node] for node in nodes)
        return Draft(method, tree, tokens, probs, ids if self.probs else None, self.replaced)

    def _add_hints(self) -> None:
        """Adds what others guess behind nodes that got no children."""
        while self.hinted:
            node = next(iter(self.hinted))
            if node >= 0 and self.depths[node] >= self.planned.depth:
                del self.hinted[node]
            else:
                self.add(node, (), ())


@lru_cache(maxsize=1024)
def by_levels(tree: Tree) -> Tree:
    """The same shape with its nodes numbered level by level."""
    order = sorted(range(len(tree)), key=lambda node: (tree.depths[node], node))
    number = {-1: -1} | {node: i for i, node in enumerate(order)}
    return Tree(tuple(number[tree.parents[node]] for node in order))


def draw_children(
    growths: Sequence[Growth],
    logits: torch.Tensor,
    ids: torch.Tensor | None,
    generator: torch.Generator,
    sampling: TreeSampling,
) -> None:
    """Gives every frontier node its children, and moves the frontiers on.

    Args:
        growths: Rows that still grow.
        logits: [N, V] of their frontier nodes, row by row.
        ids: [V] the target's tokens of these logits; None where they are all of them.
        generator: For sampled children.
        sampling: How children are drawn in `optimal` mode.
    """
    lines = [(growth, node) for growth in growths for node in growth.frontier]
    before = [len(growth.tokens) for growth in growths]
    by_mode: dict[str, list[int]] = {}
    for line, (growth, _) in enumerate(lines):
        by_mode.setdefault(growth.mode, []).append(line)
    drawn: dict[int, tuple[list[int], list[float]]] = {}
    for mode, members in by_mode.items():
        some = [lines[line] for line in members]
        counts = [growth.branches(node) for growth, node in some]
        chosen = logits if len(members) == len(lines) else logits[torch.tensor(members, device=logits.device)]
        paths = [growth.path(node) for growth, node in some]
        told = any(node in growth.hinted for growth, node in some)
        if mode == "greedy" and max(counts) == 1 and not told and all(path.is_plain for path in paths):
            found = argmax(chosen)[:, None]  # nobody asks how sure it is: one child has no rival
            tokens = found if ids is None else ids[found]
            drawn |= {line: (row, [1.0]) for line, row in zip(members, tokens.tolist(), strict=True)}
            continue
        chosen = _processed(chosen, paths, ids)
        found, sure = _children(mode if mode != "optimal" else sampling, some, chosen, max(counts), ids, generator)
        tokens = found if ids is None else ids[found]
        for line, count, row, values in zip(members, counts, tokens.tolist(), sure.tolist(), strict=True):
            drawn[line] = row[:count], values[:count]
    for line, (growth, node) in enumerate(lines):
        growth.add(node, *drawn[line])
    for growth, first in zip(growths, before, strict=True):
        growth.advance(first)


def _children(
    rule: str,
    nodes: Sequence[tuple[Growth, int]],
    logits: torch.Tensor,
    count: int,
    ids: torch.Tensor | None,
    generator: torch.Generator,
) -> tuple[torch.Tensor, torch.Tensor]:
    """[N, count] places in the vocabulary in draw order, and how likely each is held to be."""
    count = min(count, logits.shape[-1])
    probs = logits.softmax(-1)
    if rule in ("sequoia", "specinfer"):
        probs = torch.where(probs < LEAST, 0, probs)
        replaced = rule == "specinfer"
        draw = torch.multinomial(probs, count, replaced, generator=generator) if replaced else None
        found = draw_without_replacement(probs, count, generator) if draw is None else draw
        for (growth, _), line in zip(nodes, probs, strict=True):
            growth.probs.append(line)
            growth.replaced = replaced
    elif rule == "coupled":
        best = logits.topk(min(max(count, CANDIDATES), logits.shape[-1]), dim=-1)
        noise = gumbel_at([g.key(node) for g, node in nodes], best.indices if ids is None else ids[best.indices])
        found = best.indices.gather(1, (best.values + noise).topk(count, dim=-1).indices)
    else:
        found = probs.topk(count, dim=-1).indices
    return found, probs.gather(1, found)


def _processed(logits: torch.Tensor, paths: Sequence[Path], ids: torch.Tensor | None) -> torch.Tensor:
    """Logits [N, V] after the requests' parameters, as verification processes the target's."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if ids is None or all(path.is_plain for path in paths):
        return process(logits, paths)
    vocab = 1 + max(
        int(ids.max()),
        *(max((*path.prompt, *path.output, *path.params.logit_bias, *path.forbidden), default=0) for path in paths),
    )
    whole = logits.new_full((len(logits), vocab), float("-inf"))
    whole[:, ids] = logits
    return process(whole, paths)[:, ids]
