"""What the reproductions share: where results go, and how much better one policy is than another."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parlay.bench.environment import Environment, write_json
from parlay.bench.simulating import Outcome

RESULTS, IMAGES = Path("benchmarks/results"), Path("docs/images")


@dataclass(frozen=True, slots=True)
class Found:
    """The document that a reproduction writes."""

    results: Any


def keep(name: str, environment: Environment, results: Any) -> None:
    """Writes `benchmarks/results/reproduce_NAME.json`."""
    write_json(RESULTS / f"reproduce_{name}.json", environment, Found(results))


def latency(outcomes: Sequence[Outcome], load: str, policy: str) -> float:
    """Mean latency of a request, the mean over seeds."""
    return statistics.mean(
        outcome.summary["latency_mean"] for outcome in outcomes if (outcome.load, outcome.policy) == (load, policy)
    )


def fixed_policies(outcomes: Sequence[Outcome]) -> list[str]:
    """Those that do the same whatever happens: off, and every fixed length."""
    policies = dict.fromkeys(outcome.policy for outcome in outcomes)
    return [policy for policy in policies if policy == "off" or policy.startswith("fixed")]


def over_best_fixed(outcomes: Sequence[Outcome], load: str, policy: str) -> float:
    """Latency of the best of these, in hindsight for this load, over the policy's: above 1 the policy is better."""
    best = min(latency(outcomes, load, fixed) for fixed in fixed_policies(outcomes))
    return best / latency(outcomes, load, policy)
