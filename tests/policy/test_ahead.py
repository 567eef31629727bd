"""Beginning next tokens is chosen by what such steps take, as it was measured and as it turns out."""

from __future__ import annotations

import math

import pytest

from parlay.bets import Bet, Tree
from parlay.policy.ahead import Ahead
from parlay.policy.cost import DraftCost, Profile, VerifyCost
from parlay.policy.goodput import Goodput
from parlay.types import Offer, RowResult, StepResult
from tests.policy.machine import rows

COSTS = {"ppd": DraftCost(ahead=((1, 0.8), (3, 1.2)))}
AHEAD = Offer("ppd", Tree.chain(3), ahead=True)
CHAIN = Offer("prompt_lookup", Tree.chain(4), tokens=(1, 2, 3, 4))
PROFILE = Profile("m", "m", "f", VerifyCost((1, 512), (0.01, 0.02)), COSTS)


def test_it_knows_what_a_step_takes_by_its_rows() -> None:
    ahead = Ahead()
    for count, ratio in ((1, 0.8), (2, 1.0), (3, 1.2), (9, 1.2)):
        found = ahead.best(rows(count), [[AHEAD]] * count, COSTS.__getitem__, 0.01)
        assert found is not None
        assert found.bet == Bet("ppd", Tree.chain(3))
        assert found.seconds == pytest.approx(0.01 * ratio)
    assert ahead.best(rows(2), [[AHEAD], []], COSTS.__getitem__, 0.01) is None, "all rows or none"
    assert ahead.best(rows(1), [[AHEAD]], lambda _: DraftCost(), 0.01) is None, "never measured"


def test_it_learns_and_forgets() -> None:
    ahead = Ahead()

    def seconds() -> float:
        found = ahead.best(rows(1), [[AHEAD]], COSTS.__getitem__, 0.01)
        assert found is not None
        return found.seconds

    for _ in range(200):
        found = ahead.best(rows(1), [[AHEAD]], COSTS.__getitem__, 0.01)
        assert found is not None
        ahead.observe(found, 0.016)
        ahead.observe(found, -1.0)
        ahead.observe(found, math.nan)
    assert seconds() == pytest.approx(0.016, rel=0.01)
    for _ in range(5000):
        ahead.rest()
    assert seconds() == pytest.approx(0.008, rel=0.01)


def test_a_row_that_wants_to_be_begun_keeps_nobody_from_learning() -> None:
    policy = Goodput(PROFILE, priors={"prompt_lookup": (0.9,)})
    for _ in range(50):
        plan = policy.plan(rows(2), [[CHAIN], []], 64)
        bet = plan.bets[0]
        tree = bet.tree if bet else Tree(())
        theirs = RowResult("ppd", Tree(()), (), (7,))
        got = RowResult(bet.method if bet else None, tree, (), (7,))
        policy.observe(rows(2), StepResult((got, theirs), {"verify": 0.01 + 2e-5 * len(tree)}))
    assert policy.drafters["prompt_lookup"].acceptance.matrices[0][0, 0] < 0.5


def test_goodput_takes_what_brings_more() -> None:
    for accept, expected in ((0.02, "ppd"), (0.9, "prompt_lookup")):
        policy, made = Goodput(PROFILE, priors={"prompt_lookup": (accept,)}), []
        for _ in range(300):
            plan = policy.plan(rows(1), [[CHAIN, AHEAD]], 64)
            bet = plan.bets[0]
            made.append(bet.method if bet else None)
            begun = bet is not None and bet.method == "ppd"
            tree = bet.tree if bet is not None and not begun else Tree(())
            won = tuple(range(len(tree))) if accept > 0.5 else ()
            got = RowResult(bet.method if bet else None, tree, won, (7,) * (1 + len(won)))
            policy.observe(rows(1), StepResult((got,), {"verify": 0.008 if begun else 0.01 + 2e-5 * len(tree)}))
        assert made[-20:].count(expected) > 15, (accept, made[-20:])
        assert None in made or "prompt_lookup" in made, "plain steps and probes are still made"
