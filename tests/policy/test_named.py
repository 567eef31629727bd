from __future__ import annotations

import numpy as np
import pytest

from parlay.bets import Tree
from parlay.policy.named import Situation, make, offered
from parlay.policy.profiles import read_profile
from parlay.policy.server import Server
from parlay.policy.simulate import simulate
from parlay.policy.trees import overlap
from parlay.policy.workload import Kind, Phase, draw

PROFILE = read_profile("h100-llama-8b")
KINDS = (Kind("code", 1.0, {"eagle": np.array([0.85, 0.05])}), Kind("chat", 1.0, {"eagle": np.array([0.45, 0.1])}))
NAMES = ("off", "fixed:1", "fixed:3", "fixed:6", "synergy", "smartspec", "goodput", "oracle")


def latency(name: str, rate: float, seed: int = 0) -> float:
    work = draw([Phase(120 / rate, rate)], (np.array([128]), np.array([128])), KINDS, seed)
    situation = Situation(PROFILE, KINDS, work, offered(KINDS, 16, 8), reuse=4)
    found = simulate(Server(PROFILE), work, KINDS, situation.offers, make(name, situation), seed=seed, reuse=4)
    return float(found.latency.mean())


@pytest.mark.parametrize("rate", [2.0, 60.0])
def test_the_adaptive_policies_keep_up_with_the_best_fixed_one(rate: float) -> None:
    found = {name: latency(name, rate) for name in NAMES}
    best = min(found[name] for name in NAMES if name.startswith(("fixed", "off")))
    assert found["goodput"] < 1.02 * best
    assert found["goodput"] < found["off"] / 0.99
    assert found["oracle"] < 1.01 * best
    assert found["synergy"] < 1.1 * best
    assert found["smartspec"] < 1.1 * best


def test_an_offered_tree_holds_the_best_tree_and_a_deep_chain() -> None:
    (offer,) = offered([Kind("a", 1.0, {"eagle": np.array([0.4, 0.3, 0.1])})], 12, 8)
    assert len(overlap(offer.tree, Tree.chain(8))) == 8
    assert 12 <= len(offer.tree) < 20


@pytest.mark.parametrize(
    ("name", "message"),
    [("of", "did you mean 'off'"), ("fixed:0", "from 1 to 8"), ("fixed:99", "from 1 to 8"), ("off:1", "leave it out")],
)  # fmt: skip
def test_unknown_policies_are_refused(name: str, message: str) -> None:
    work = draw([Phase(10, 1)], (np.array([8]), np.array([8])), KINDS, 0)
    situation = Situation(PROFILE, KINDS, work, offered(KINDS, 8, 8))
    with pytest.raises(ValueError, match=message):
        make(name, situation)
