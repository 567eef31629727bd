"""Policies by the names that users write."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from parlay.policy.acceptance import LEVELS, RANKS, Trials
from parlay.policy.base import Policy
from parlay.policy.cost import Profile
from parlay.policy.fixed import Fixed, Off, Synergy
from parlay.policy.goodput import Goodput
from parlay.policy.offers import Drafter
from parlay.policy.planner import Planner, length_table
from parlay.policy.sequoia import OptimalTrees
from parlay.policy.smartspec import SmartSpec
from parlay.policy.trees import Floats, Ints
from parlay.policy.workload import Kind, Recorded, Workload, mixture
from parlay.types import Offer, Tree

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)  # that a table is made for
PUBLISHED_EVERY = 20  # steps for which SmartSpec's authors keep a length


@dataclass(frozen=True, slots=True)
class Situation:
    """What a policy may be made from.

    Attributes:
        profile: What steps cost.
        kinds: What kinds of requests there are.
        workload: The requests themselves: for the oracle, and for the mean length of a context.
        offers: What could be bet on every row; published policies, which know one drafter, take the first.
        reuse: Steps for which a plan is kept.
    """

    profile: Profile
    kinds: tuple[Kind, ...]
    workload: Workload
    offers: tuple[Offer, ...]
    reuse: int = 1


def make(name: str, situation: Situation) -> Callable[[], Policy]:
    """What makes a policy of this name: off, fixed:LENGTH, synergy, smartspec, goodput or oracle.

    Raises:
        ValueError: for any other name.
    """
    method, longest = situation.offers[0].method, situation.offers[0].tree.depth
    profile, (head, _, rest) = situation.profile, name.partition(":")
    if head == "off" and not rest:
        return Off
    if head == "fixed" and rest.isdecimal() and int(rest) > 0:
        if int(rest) > longest:
            raise ValueError(f"policy {name!r}: the drafter offers {longest} levels at most")
        return lambda: Fixed(method, Tree.chain(int(rest)))
    if name == "synergy":
        table = length_table(_profiled(situation, method, longest), BATCHES).lengths
        return lambda: Synergy(method, table)
    if name == "smartspec":
        return lambda: SmartSpec(profile, method, longest, every=max(1, PUBLISHED_EVERY // situation.reuse))
    if name == "goodput":
        return lambda: Goodput(profile)
    if name == "oracle":
        return lambda: _oracle(situation)
    known = ["off", "fixed:3", "synergy", "smartspec", "goodput", "oracle"]
    near = difflib.get_close_matches(name, known, n=1)
    raise ValueError(f"policy {name!r}: {f'did you mean {near[0]}?' if near else f'known: {chr(44).join(known)}'}")


def _profiled(situation: Situation, method: str, longest: int) -> Planner:
    """What profiling by hand would have found: chains, at the load's mean context and mixture of requests."""
    work = situation.workload
    context = int(np.average(work.prompt + work.output / 2, weights=work.output))
    acceptance = {method: mixture(situation.kinds, method)}
    return Planner(situation.profile, acceptance, context=context, depth=longest, chains=True)


def offered(kinds: Sequence[Kind], size: int, depth: int) -> tuple[Offer, ...]:
    """What drafters offer: the best tree of this size for any of these requests, and a chain as deep as it may be.

    A recording says what chains gain and nothing else, so a method that has one offers the chain alone.
    """
    found = []
    for method in dict.fromkeys(method for kind in kinds for method in kind.acceptance):
        recorded = any(isinstance(kind.acceptance.get(method), Recorded) for kind in kinds)
        tree = Tree.chain(depth) if recorded else _with_chain(mixture(kinds, method), size, depth)
        found.append(Offer(method, tree))
    return tuple(found)


def _with_chain(matrix: Floats, size: int, depth: int) -> Tree:
    tree = OptimalTrees(np.atleast_2d(matrix), size, depth).tree(size, depth)
    parents, node = list(tree.parents), -1
    for _ in range(depth):
        children = [child for child, parent in enumerate(parents) if parent == node]
        if not children:
            parents.append(node)
            children = [len(parents) - 1]
        node = children[0]
    return Tree(tuple(parents))


# ---- the oracle -----------------------------------------------------------------------------------------------------


class Known:
    """An acceptance that needs no learning, since it is the truth. Groups are kinds of requests.

    Args:
        kinds: What kinds there are.
        method: Whose guesses.
        kind: [n] the kind of every request, by its number.
    """

    def __init__(self, kinds: Sequence[Kind], method: str, kind: Ints) -> None:
        self.matrices = np.zeros((len(kinds), LEVELS, RANKS))
        self._kind = kind
        for place, some in enumerate(kinds):
            matrix = some.matrix(method)[:LEVELS, :RANKS]
            self.matrices[place, : len(matrix), : matrix.shape[1]] = matrix
            self.matrices[place, len(matrix) :, : matrix.shape[1]] = matrix[-1]

    def groups(self, seqs: Sequence[int]) -> Ints:
        """See `Acceptance.groups`."""
        return self._kind[seqs]

    def observe(self, seq: int, trials: Trials) -> None:
        """Has nothing to learn."""

    def tick(self) -> None:
        """Has nothing to forget."""

    def forget(self, seq: int) -> None:
        """Has nothing to forget."""


def _oracle(situation: Situation) -> Goodput:
    """The goodput policy that knows how every request can be guessed, and so never probes nor hesitates."""
    policy = Goodput(situation.profile, margin=0.0, probe_share=0.0)
    for offer in situation.offers:
        known = Known(situation.kinds, offer.method, situation.workload.kind)
        policy.drafters[offer.method] = Drafter(offer.method, known)
    return policy
