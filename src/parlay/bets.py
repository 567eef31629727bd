"""What may be bet: trees of guesses, bets, and how users write them. No torch here."""

from __future__ import annotations

import heapq
import json
import re
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

Auto = Literal["auto"]
MOST = 768  # guesses of a bet
LONGEST = 4096  # characters of a bet as users write it


@dataclass(frozen=True, slots=True)
class Tree:
    """The shape of a row's guesses, without their values.

    `parents[i]` is the parent of node i, and -1 stands for the row's last known token. Parents come before their
    children, and siblings are tried in the order of their indices, which is the order in which they were drawn.
    """

    parents: tuple[int, ...]
    depths: tuple[int, ...] = field(init=False, repr=False, compare=False)  # 1 for children of the root
    depth: int = field(init=False, repr=False, compare=False)  # of the deepest guess; 0 without any
    is_chain: bool = field(init=False, repr=False, compare=False)  # whether it is one path

    def __post_init__(self) -> None:
        depths: list[int] = []
        for node, parent in enumerate(self.parents):
            if not -1 <= parent < node:
                raise ValueError(f"node {node} of a tree must come after its parent, got parent {parent}")
            depths.append(1 if parent < 0 else depths[parent] + 1)
        object.__setattr__(self, "depths", tuple(depths))
        object.__setattr__(self, "depth", max(depths, default=0))
        object.__setattr__(self, "is_chain", self.depth == len(depths))

    @staticmethod
    @lru_cache(maxsize=256)
    def chain(depth: int) -> Tree:
        """The tree that is one path of `depth` guesses."""
        return Tree(tuple(range(-1, depth - 1)))

    def __len__(self) -> int:
        return len(self.parents)

    def children(self) -> dict[int, list[int]]:
        """Children of every inner node (and of the root, -1) in draw order."""
        found: dict[int, list[int]] = {}
        for node, parent in enumerate(self.parents):
            found.setdefault(parent, []).append(node)
        return found

    def trim(self, size: int, depth: int) -> Tree:
        """At most the first `size` nodes, none deeper than `depth`; decided before any guess is drawn."""
        if len(self) <= size and self.depth <= depth:
            return self
        if self.is_chain:
            return Tree.chain(max(0, min(size, depth, len(self))))
        renumbered = {-1: -1}
        for node, parent in enumerate(self.parents):
            if len(renumbered) <= size and self.depths[node] <= depth and parent in renumbered:
                renumbered[node] = len(renumbered) - 1
        return Tree(tuple(renumbered[self.parents[node]] for node in renumbered if node >= 0))


NO_TREE = Tree(())


@dataclass(frozen=True, slots=True)
class Bet:
    """A drafter and a tree bound to a row before any guess is drawn; the tree is an upper bound.

    Attributes:
        method: The drafter's name.
        tree: The shape of the guesses.
        free: Where guesses are not sampled, the drafter may grow another tree of at most this size and depth.
    """

    method: str
    tree: Tree
    free: bool = False


def parse_bet(text: str) -> Bet | Auto | None:
    """Reads the command-line form of what to bet.

    It is `off`, `auto` (every drafter there is, as the policy decides), `METHOD` (a chain of 4), `METHOD:DEPTH` (a
    chain), `METHOD:SIZExDEPTH` (a tree that grows where its guesses are likely) or `METHOD:[-1,0,0,...]` (the parents
    of a tree, -1 being the last known token).

    Raises:
        ValueError: with the accepted forms, when `text` is none of them.
    """
    if text == "off":
        return None
    if text == "auto":
        return "auto"
    if len(text) > LONGEST:
        raise ValueError(f"speculation {text[:40]!r}...: takes at most {LONGEST} characters")
    shapes = r"(?P<size>\d{1,3})x(?P<levels>\d{1,2})|(?P<depth>\d{1,3})|(?P<parents>\[[-\d,\s]*\])"
    form = re.fullmatch(rf"(?P<method>\w+)(:({shapes}))?", text)
    try:
        if form is None:
            raise ValueError("it is none of these")
        if form["parents"] is not None:
            tree = Tree(tuple(json.loads(form["parents"])))
        elif form["size"] is not None:
            tree = likely_tree(int(form["size"]), int(form["levels"]))
        else:
            tree = Tree.chain(int(form["depth"] or 4))
        if len(tree) > MOST:
            raise ValueError(f"it may have at most {MOST} guesses")
    except ValueError as error:
        raise ValueError(
            f"speculation {text!r}: write off, auto, METHOD, METHOD:DEPTH, METHOD:SIZExDEPTH or METHOD:[parents of a "
            f"tree] ({error})"
        ) from error
    return Bet(form["method"], tree, free=form["size"] is not None) if tree else None


def likely_tree(size: int, depth: int) -> Tree:
    """The tree of this size with most accepted guesses, where a first child is accepted in 6 of 10 cases, and each
    further one a quarter as often.

    Raises:
        ValueError: when there is no room for a tree as deep.
    """
    if not 0 < depth <= size:
        raise ValueError(f"a tree of {size} guesses cannot have {depth} levels")
    parents: list[int] = []
    # Survival, then what to add: the next child of this node, at this level.
    waiting = [(-0.6, 0, -1, 1)]
    for node in range(size):
        chance, _, parent, level = heapq.heappop(waiting)
        parents.append(parent)
        heapq.heappush(waiting, (chance / 4, 2 * node + 1, parent, level))
        if level < depth:
            heapq.heappush(waiting, (0.6 * chance, 2 * node + 2, node, level + 1))
    return Tree(tuple(parents))
