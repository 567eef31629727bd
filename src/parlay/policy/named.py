"""Policies by the names that users write."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from parlay import registry
from parlay.bets import Tree
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
from parlay.types import Offer

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


@dataclass(frozen=True, slots=True)
class Means:
    """What policies are made of, by the names that users write; what takes long is worked out when it is needed.

    Attributes:
        profile: What steps cost.
        method: Whom published policies, which know one drafter, bet on.
        longest: Most levels that it offers.
        lengths: Synergy's table: best length by batch size.
        every: Steps for which SmartSpec keeps a length.
    """

    profile: Callable[[], Profile]
    method: str
    longest: int
    lengths: Callable[[], Mapping[int, int]]
    every: int = PUBLISHED_EVERY


def named(name: str, means: Means) -> Policy:
    """A policy by its name: off, fixed:LENGTH, synergy, smartspec, goodput, or what a third party has registered.

    What is registered is called with what stands behind the name's colon, if anything, and the means.

    Raises:
        ValueError: for an unknown name.
    """
    head, colon, rest = name.partition(":")
    make: Callable[..., Policy] = registry.policies.find(head)
    if colon and len(inspect.signature(make).parameters) < 2:
        raise ValueError(f"policy {name!r}: {head} takes nothing behind a colon; leave it out")
    return make(means, rest) if colon else make(means)


def off(means: Means) -> Off:
    """Never bets."""
    del means
    return Off()


def fixed(means: Means, length: str = "3") -> Fixed:
    """The same chain for every row.

    Raises:
        ValueError: for a length that the drafter does not offer.
    """
    if not length.isdecimal() or not 0 < int(length) <= means.longest:
        raise ValueError(f"policy 'fixed:{length}': write a length from 1 to {means.longest}, what the drafter offers")
    return Fixed(means.method, Tree.chain(int(length)))


def synergy(means: Means) -> Synergy:
    """A length by batch size."""
    return Synergy(means.method, means.lengths())


def smartspec(means: Means) -> SmartSpec:
    """A length by goodput, as published."""
    return SmartSpec(means.profile(), means.method, means.longest, every=means.every)


def goodput(means: Means) -> Goodput:
    """Parlay's own."""
    return Goodput(means.profile())


def make(name: str, situation: Situation) -> Callable[[], Policy]:
    """What makes a policy of this name for the simulator, which also has an oracle.

    Raises:
        ValueError: for an unknown name.
    """
    if name == "oracle":
        return lambda: _oracle(situation)
    method, longest = situation.offers[0].method, situation.offers[0].tree.depth
    table = cache(lambda: length_table(_profiled(situation, method, longest), BATCHES).lengths)
    every = max(1, PUBLISHED_EVERY // situation.reuse)
    means = Means(lambda: situation.profile, method, longest, table, every)
    named(name, means)  # what is wrong with it is said at once
    return lambda: named(name, means)


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

    def group(self, seq: int) -> int:
        """See `Acceptance.group`."""
        return int(self._kind[seq])

    def observe(self, seq: int, trials: Trials) -> None:
        """Has nothing to learn."""

    def tick(self) -> None:
        """Has nothing to forget."""

    def forget(self, seq: int) -> None:
        """Has nothing to forget."""


def _oracle(situation: Situation) -> Goodput:
    """The goodput policy that knows how every request can be guessed, and so never probes nor hesitates."""
    policy = Goodput(situation.profile, margin=0.0, probe_share=0.0, control_share=0.0)
    for offer in situation.offers:
        known = Known(situation.kinds, offer.method, situation.workload.kind)
        policy.drafters[offer.method] = Drafter(offer.method, known)
    return policy
