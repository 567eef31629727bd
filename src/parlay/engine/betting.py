"""Who guesses and who decides: an engine's drafters and its policy, by the names that users write."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from parlay import registry
from parlay.bets import Bet, Tree, likely_tree
from parlay.config import Calibrate, EngineConfig
from parlay.drafters.base import Drafter, Drafters
from parlay.drafters.shipped import all_shipped, shipped
from parlay.engine.model import LoadedModel
from parlay.engine.profiles import profile_for
from parlay.policy.base import Policy
from parlay.policy.cost import Profile
from parlay.policy.fixed import Fixed, Off
from parlay.policy.goodput import PRIOR
from parlay.policy.named import BATCHES, Means, named
from parlay.policy.planner import Planner, length_table

if TYPE_CHECKING:
    from parlay.engine.engine import Engine

FREE = ("suffix",)  # what costs no weights is always there
STREAMED = 768, 20  # guesses and levels of the largest tree where layers stream: reading them takes as long anyway


def make_drafters(config: EngineConfig, loaded: LoadedModel) -> Drafters:
    """What may be bet on: the configured method, or everything there is for this model.

    Raises:
        ValueError: in a sentence with the remedy, for a drafter that is unknown or cannot guess for this target.
    """
    bet = config.speculation
    if bet == "auto":
        sources = all_shipped(config.model) | dict(config.drafters)
        made = [_make(method, None, loaded, sources.get(method), config) for method in (*FREE, *sources)]
        return Drafters(made, sources)
    others = [method for method in config.drafters if bet is None or method != bet.method]
    if others:
        raise ValueError(f"drafter {others[0]}: nothing bets on it; name it in --speculation or leave it out")
    if bet is None:
        return Drafters([])
    source = config.drafters.get(bet.method) or shipped(config.model, bet.method)
    return Drafters([_make(bet.method, bet.tree, loaded, source, config)], {bet.method: source} if source else {})


def _make(method: str, tree: Tree | None, loaded: LoadedModel, source: str | None, config: EngineConfig) -> Drafter:
    kind: type[Drafter] = registry.drafters.find(method)
    largest = likely_tree(*STREAMED) if config.offload and not kind.largest.is_chain else kind.largest
    drafter = kind.for_target(tree or largest, loaded, source)
    if drafter.name != method:
        raise ValueError(f"the drafter registered as {method!r} calls itself {drafter.name!r}; rename one")
    drafter.sampling = config.tree_sampling
    return drafter


def policy_for(engine: Engine, name: str | None, calibrate: Calibrate) -> Policy:
    """The policy of this name; None stands for what the configured bet calls for, and so does `auto`.

    Args:
        engine: Whose drafters it bets on.
        name: See `parlay.policy.named`.
        calibrate: How to measure what steps cost where that was not done before; only `skip` will do for an engine that
            has work.

    Raises:
        ValueError: for an unknown name.
    """
    bet, drafters = engine.config.speculation, engine.drafters
    if name is None or name == "auto":
        if isinstance(bet, Bet):
            return Fixed(bet.method, bet.tree, bet.free)
        name = "goodput" if bet == "auto" else "off"
    if not drafters.by_name:
        if name != "off" and bet is None:
            raise ValueError(f"policy {name!r}: with speculation off there is nothing to bet on; leave one of them out")
        return Off()
    method = next((method for method in drafters.by_name if method in drafters.sources), next(iter(drafters.by_name)))

    if name not in ("goodput", "off") and drafters.by_name[method].begins_next:
        raise ValueError(
            f"policy {name!r}: it counts guesses, and {method} wins time instead; use goodput or no policy"
        )

    def profile() -> Profile:
        if engine.profile is None:
            engine.profile = profile_for(engine, calibrate)
        return engine.profile

    longest = (bet.tree if isinstance(bet, Bet) else drafters.by_name[method].largest).depth

    def lengths() -> dict[int, int]:
        planner = Planner(profile(), {method: np.array(PRIOR[:1])}, depth=longest, chains=True)
        return dict(length_table(planner, BATCHES).lengths)

    return named(name, Means(profile, method, longest, lengths))
