"""Which settings of prompt lookup earn most: n-gram sizes, order of matches, depth and branches.

Greedy outputs are generated once, without guesses. Every setting is then replayed on them without a model: what
verification would have accepted is known from the output. A step counts once however many guesses it verifies, so
read tokens per step together with guesses per step, which is what they cost.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal

from trial import Conditions, conditions, new_parser

from parlay.bench import environment, report
from parlay.bench.replay import Replayed, Text, generate, replay
from parlay.bench.report import Advance, progress, table
from parlay.bench.workloads import load_prompts
from parlay.drafters.prompt_lookup import PromptLookup
from parlay.policy.trees import chains

Order = Literal["recent", "earliest"]
ORDERS: tuple[Order, ...] = ("recent", "earliest")


@dataclass(frozen=True, slots=True)
class Setting:
    """One way to look up."""

    max_ngram: int
    min_ngram: int
    order: Order
    depth: int
    branches: int

    def drafter(self) -> PromptLookup:
        return PromptLookup(chains(self.branches, self.depth), self.max_ngram, self.min_ngram, self.order)


@dataclass(frozen=True, slots=True)
class Score:
    """What a setting earned on the texts of one category."""

    category: str
    tokens_per_step: float
    guesses_per_step: float
    acceptance: float  # accepted guesses over verified ones
    totals: Replayed


@dataclass(frozen=True, slots=True)
class SettingResult:
    """One setting's scores: all texts together, then by category."""

    setting: Setting
    overall: Score
    categories: tuple[Score, ...]


@dataclass(frozen=True, slots=True)
class Ablation(Conditions):
    """All results of this benchmark, the best setting first."""

    output_tokens: int
    default: Setting
    results: tuple[SettingResult, ...]


DEFAULT = Setting(max_ngram=3, min_ngram=1, order="recent", depth=4, branches=1)


def main() -> None:
    options = parse()
    captured = environment.capture()
    prompts = load_prompts(options.dataset, options.limit)
    with progress("generating", len(prompts)) as advance:
        texts = generate(options.model, options.dtype, prompts, options.max_tokens, options.concurrency, advance)
    grid = list(settings())
    with progress("replaying", len(grid)) as advance:
        results = [score(setting, texts, options.max_tokens, advance) for setting in grid]
    results.sort(key=lambda result: -result.overall.tokens_per_step)
    ablation = Ablation(
        **conditions(options, prompts),
        output_tokens=sum(len(text.output) for text in texts),
        default=DEFAULT,
        results=tuple(results),
    )
    environment.write_json(options.json, captured, ablation)
    show(ablation, options.top)


def parse() -> argparse.Namespace:
    parser = new_parser(__doc__, "prompt_lookup")
    parser.add_argument(
        "--concurrency", type=int, default=16, help="prompts generated at a time (default: %(default)s)"
    )
    parser.add_argument("--top", type=int, default=12, help="settings in the table (default: %(default)s)")
    return parser.parse_args()


def settings() -> Iterator[Setting]:
    """The whole grid."""
    for longest, shortest, order, depth, branches in product(range(1, 5), (1, 2), ORDERS, (2, 4, 8), (1, 2)):
        if shortest <= longest:
            yield Setting(longest, shortest, order, depth, branches)


def score(setting: Setting, texts: Sequence[Text], max_tokens: int, advance: Advance) -> SettingResult:
    drafter = setting.drafter()
    totals: dict[str, Replayed] = {}
    for text in texts:
        earned = replay(drafter, text.prompt, text.output, max_tokens)
        totals[text.category] = totals.get(text.category, Replayed()) + earned
    advance()
    overall = sum(totals.values(), Replayed())
    return SettingResult(setting, _score("all", overall), tuple(_score(*entry) for entry in totals.items()))


def _score(category: str, totals: Replayed) -> Score:
    return Score(
        category=category,
        tokens_per_step=totals.tokens_per_step,
        guesses_per_step=totals.drafted / totals.steps,
        acceptance=totals.accepted / max(1, totals.drafted),
        totals=totals,
    )


def show(ablation: Ablation, top: int) -> None:
    """The best settings and the default, whatever its place, and these two by category."""
    console = report.console()
    ranked = list(enumerate(ablation.results, start=1))
    default = next(result for result in ablation.results if result.setting == ablation.default)
    columns = ("place", "n-gram", "order", "depth", "branches", "tokens/step", "guesses/step", "accepted")
    rows = (
        (
            f"{place}, default" if result is default else place,
            f"{result.setting.min_ngram}-{result.setting.max_ngram}",
            result.setting.order,
            result.setting.depth,
            result.setting.branches,
            f"{result.overall.tokens_per_step:.3f}",
            f"{result.overall.guesses_per_step:.2f}",
            f"{result.overall.acceptance:.0%}",
        )
        for place, result in ranked
        if place <= top or result is default
    )
    title = f"{ablation.model}, {ablation.dataset}: {ablation.prompts} prompts, {ablation.output_tokens} output tokens"
    console.print(table(title, columns, rows, texts=3))
    best = ablation.results[0]
    pairs = zip(best.categories, default.categories, strict=True)
    rows = ((b.category, f"{b.tokens_per_step:.2f}", f"{d.tokens_per_step:.2f}") for b, d in pairs)
    console.print(table("tokens/step by category", ("category", "best setting", "default"), rows))


if __name__ == "__main__":
    main()
