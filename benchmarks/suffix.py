"""What suffix decoding earns beside prompt lookup, with and without earlier answers, and what it costs.

Greedy outputs are generated once, without guesses, and every setting is replayed on them without a model, one prompt
after the other, as `benchmarks/prompt_lookup.py` does. Every guess that is offered is verified, so read tokens per step
together with guesses per step. Microseconds are of this machine, for the offer of one row in one step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from trial import Conditions, conditions, new_parser

from parlay.bench import environment, report
from parlay.bench.replay import Replayed, Text, generate, replay
from parlay.bench.report import progress, table
from parlay.bench.workloads import load_prompts
from parlay.bets import Tree
from parlay.drafters.base import Drafter
from parlay.drafters.prompt_lookup import PromptLookup
from parlay.drafters.suffix import Suffix
from parlay.policy.trees import by_level
from parlay.types import Offer, Row

CHAIN, LONG, TREE = Tree.chain(4), Tree.chain(12), by_level([3, 2, 2, 1, 1, 1, 1, 1])
SETTINGS: dict[str, Callable[[], Drafter]] = {
    "prompt lookup, chain of 4": lambda: PromptLookup(CHAIN),
    "suffix, own text, chain of 4": lambda: Suffix(CHAIN, shared=0, least=0.0),
    "suffix, own text, chain of 12 from 0.1": lambda: Suffix(LONG, shared=0, least=0.1),
    "suffix, own text, chain of 12 from 0.3": lambda: Suffix(LONG, shared=0, least=0.3),
    "suffix, own text, tree from 0.1": lambda: Suffix(TREE, shared=0, least=0.1),
    "suffix, and answers, chain of 4": lambda: Suffix(CHAIN, least=0.0),
    "suffix, and answers, chain of 12 from 0.1": lambda: Suffix(LONG, least=0.1),
    "suffix, and answers, tree from 0.05": lambda: Suffix(TREE),
    "suffix, and answers, tree from 0.1": lambda: Suffix(TREE, least=0.1),
}


@dataclass(frozen=True, slots=True)
class Result:
    """One setting; tokens per step by category, microseconds of an offer."""

    setting: str
    tokens_per_step: float
    guesses_per_step: float
    acceptance: float
    median_us: float
    p99_us: float
    categories: dict[str, float]


@dataclass(frozen=True, slots=True)
class Results(Conditions):
    """All of them."""

    results: tuple[Result, ...]


class Timed:
    """Notes how long a drafter's offers take."""

    def __init__(self, drafter: Drafter) -> None:
        self._drafter, self.seconds = drafter, []

    def offer(self, rows: Sequence[Row]) -> Sequence[Offer | None]:
        began = time.perf_counter()
        offers = self._drafter.offer(rows)
        self.seconds.append(time.perf_counter() - began)
        return offers

    def forget(self, seq: int) -> None:
        self._drafter.forget(seq)


def main() -> None:
    options = new_parser(__doc__, "suffix").parse_args()
    captured = environment.capture()
    prompts = load_prompts(options.dataset, options.limit)
    with progress("generating", len(prompts)) as advance:
        texts = generate(options.model, options.dtype, prompts, options.max_tokens, 16, advance)
    with progress("replaying", len(SETTINGS)) as advance:
        results = []
        for setting in SETTINGS:
            results.append(score(setting, texts, options.max_tokens))
            advance()
    found = Results(**conditions(options, prompts), results=tuple(results))
    environment.write_json(options.json, captured, found)
    show(found)


def score(setting: str, texts: Sequence[Text], max_tokens: int) -> Result:
    drafter = Timed(SETTINGS[setting]())
    totals: dict[str, Replayed] = {}
    for text in texts:
        earned = replay(drafter, text.prompt, text.output, max_tokens)
        totals[text.category] = totals.get(text.category, Replayed()) + earned
    overall, seconds = sum(totals.values(), Replayed()), sorted(drafter.seconds)
    return Result(
        setting,
        overall.tokens_per_step,
        overall.drafted / overall.steps,
        overall.accepted / max(1, overall.drafted),
        1e6 * seconds[len(seconds) // 2],
        1e6 * seconds[int(0.99 * len(seconds))],
        {category: some.tokens_per_step for category, some in totals.items()},
    )


def show(found: Results) -> None:
    out = report.console()
    columns = ("setting", "tokens/step", "guesses/step", "accepted", "offer, median us", "p99")
    lines = [
        (r.setting, f"{r.tokens_per_step:.3f}", f"{r.guesses_per_step:.2f}", f"{r.acceptance:.0%}",
         f"{r.median_us:.0f}", f"{r.p99_us:.0f}")
        for r in found.results
    ]  # fmt: skip
    out.print(table(f"{found.model}, {found.dataset}: {found.prompts} prompts", columns, lines))
    first, *_, last = found.results
    pairs = ((name, f"{value:.2f}", f"{last.categories[name]:.2f}") for name, value in first.categories.items())
    out.print(table("tokens/step by category", ("category", first.setting, last.setting), pairs, texts=1))


if __name__ == "__main__":
    main()
