"""What ADED's adaptive n-gram drafter earns beside suffix decoding and prompt lookup, at equal numbers of guesses.

ADED (arXiv 2407.12021) keeps weights of trigrams, raises those of the latest tokens at every step, and searches the
tree of continuations behind the last two tokens by Monte Carlo tree search. Its weights come from a corpus; here they
come from what suffix decoding reads too, the prompt and earlier answers, so that the two rules are compared and not
two corpora. `best first` is the same weights without chance: it takes the nodes that are likeliest along their paths.

Greedy outputs are generated once and replayed, as `benchmarks/suffix.py` does.
"""

from __future__ import annotations

import heapq
import math
import random
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from trial import Conditions, conditions, new_parser

from parlay.bench import environment, report
from parlay.bench.replay import Replayed, Text, generate, replay
from parlay.bench.report import progress, table
from parlay.bench.workloads import load_prompts
from parlay.bets import Tree
from parlay.drafters.base import ShownGuesses
from parlay.drafters.prompt_lookup import PromptLookup
from parlay.drafters.suffix import Suffix
from parlay.policy.trees import by_level
from parlay.types import Offer, Row

RECENT, STEP, MOST, SUCCESSORS = 16, 0.04, 3.0, 12  # ADED's constants: how it adapts, and what it looks at
DEPTH, ROUNDS, C1, C2 = 4, 150, 32.0, 8.0  # and how it searches


class Trigrams:
    """Weights of the tokens that follow two others."""

    def __init__(self) -> None:
        self.after: dict[tuple[int, int], dict[int, float]] = {}

    def count(self, tokens: Sequence[int]) -> None:
        """Every trigram weighs 1 more."""
        for a, b, c in zip(tokens, tokens[1:], tokens[2:], strict=False):
            weights = self.after.setdefault((a, b), {})
            weights[c] = weights.get(c, 0.0) + 1.0

    def adapt(self, tokens: Sequence[int]) -> None:
        """Those of the latest tokens weigh a little more, up to a limit."""
        for a, b, c in zip(tokens, tokens[1:], tokens[2:], strict=False):
            weights = self.after.setdefault((a, b), {})
            weights[c] = max(weights.get(c, 0.0), min(MOST, weights.get(c, 0.0) + STEP))


@dataclass(slots=True, eq=False)
class Node:
    """A token in the searched tree."""

    token: int
    share: float
    weight: float
    children: list[Node] | None = None
    visits: int = 0
    worth: float = 0.0


class AdaptiveNgrams(ShownGuesses):
    """ADED's drafter.

    Args:
        size: Guesses in a tree.
        shared: Whether earlier answers count.
        search: By chance, as ADED does, or best first.
        least: Guesses that are held to be less likely along their path are left out.
    """

    name = "adaptive_ngrams"

    def __init__(self, size: int, shared: bool, search: bool, least: float = 0.0) -> None:
        super().__init__(Tree.chain(DEPTH))
        self.size, self.search, self.least = size, search, least
        self._shared = Trigrams() if shared else None
        self._own: dict[int, Trigrams] = {}
        self._texts: dict[int, tuple[array[int], int]] = {}
        self._random = random.Random(0)

    def guess(self, row: Row) -> Offer | None:
        """See `ShownGuesses`."""
        if row.seq not in self._own:
            self._own[row.seq] = Trigrams()
            self._own[row.seq].count(row.request.prompt)
            self._texts[row.seq] = row.tokens, len(row.request.prompt)
        latest = row.tokens[max(0, row.length - RECENT) : row.length]
        self._own[row.seq].adapt(latest)
        if len(latest) < 2:
            return None
        root, depth = Node(latest[-1], 1.0, 0.0), min(DEPTH, row.max_depth)
        likely = self._searched if self.search else self._followed
        parents, tokens = likely(row.seq, latest[-2], root, depth)
        return Offer(self.name, Tree(tuple(parents)), tuple(tokens)) if tokens else None

    def forget(self, seq: int) -> None:
        """See `Drafter`."""
        super().forget(seq)
        self._own.pop(seq, None)
        text, start = self._texts.pop(seq, (array("i"), 0))
        if self._shared is not None:
            self._shared.count(text[start:])

    def _after(self, seq: int, a: int, b: int) -> list[Node]:
        """The tokens that weigh most behind two others."""
        weights: dict[int, float] = {}
        for some in (self._own[seq], self._shared):
            for token, weight in (some.after.get((a, b), {}) if some else {}).items():
                weights[token] = weights.get(token, 0.0) + weight
        best = heapq.nlargest(SUCCESSORS, weights.items(), key=lambda entry: entry[1])
        total = sum(weight for _, weight in best)
        return [Node(token, weight / total, weight) for token, weight in best]

    def _followed(self, seq: int, before: int, root: Node, depth: int) -> tuple[list[int], list[int]]:
        """Nodes by the product of shares along their paths."""
        parents: list[int] = []
        tokens: list[int] = []
        waiting: list[tuple[float, int, int, int, int]] = []  # minus likelihood, parent, token, the one before, level

        def look_behind(node: int, likely: float, a: int, b: int, level: int) -> None:
            for child in self._after(seq, a, b) if level < depth else ():
                if likely * child.share >= self.least:
                    heapq.heappush(waiting, (-likely * child.share, node, child.token, b, level + 1))

        look_behind(-1, 1.0, before, root.token, 0)
        while waiting and len(tokens) < self.size:
            unlikely, parent, token, last, level = heapq.heappop(waiting)
            parents.append(parent)
            tokens.append(token)
            look_behind(len(tokens) - 1, -unlikely, last, token, level)
        return parents, tokens

    def _searched(self, seq: int, before: int, root: Node, depth: int) -> tuple[list[int], list[int]]:
        """The nodes that the search visited most; a node is not visited less than its children."""
        for _ in range(ROUNDS):
            path, a = [root], before
            while path[-1].children and len(path) <= depth:
                a = path[-1].token
                path.append(max(path[-1].children, key=_score(path[-1])))
            if len(path) <= depth and path[-1].children is None:
                path[-1].children = self._after(seq, a, path[-1].token)
            reward = (
                1.0 + sum(node.weight for node in path) + self._rollout(seq, a, path[-1].token, depth + 1 - len(path))
            )
            for node in path:
                node.visits, node.worth = node.visits + 1, node.worth + reward
        parents: list[int] = []
        tokens: list[int] = []
        waiting: list[tuple[int, int, int, Node]] = [(-root.visits, -2, 0, root)]
        while waiting and len(tokens) < self.size + 1:
            _, parent, _, node = heapq.heappop(waiting)
            number = len(tokens) - 1  # the root comes first, and is -1
            parents.append(parent)
            tokens.append(node.token)
            for place, child in enumerate(node.children or ()):
                if child.visits > max(0.0, self.least * ROUNDS):
                    heapq.heappush(waiting, (-child.visits, number, number * SUCCESSORS + place, child))
        return parents[1:], tokens[1:]

    def _rollout(self, seq: int, a: int, b: int, steps: int) -> float:
        """The weights along a path that is drawn by weight."""
        total = 0.0
        for _ in range(steps):
            children = self._after(seq, a, b)
            if not children:
                break
            chosen = self._random.choices(children, [child.weight for child in children])[0]
            total, a, b = total + chosen.weight, b, chosen.token
        return total


def _score(parent: Node) -> Callable[[Node], float]:
    """PUCT: what a child has earned on average, and a share of curiosity."""
    curious = (C1 + math.log((parent.visits + C2 + 1) / C2)) * math.sqrt(parent.visits)
    return lambda child: (
        child.worth / child.visits + curious * child.share / (1 + child.visits) if child.visits else math.inf
    )


WIDE = by_level([6, 3, 2, 1, 1, 1, 1, 1])
SETTINGS: dict[str, Callable[[], ShownGuesses]] = {"prompt lookup, chain of 4": lambda: PromptLookup(Tree.chain(4))}
for text, earlier in (("own text", False), ("and answers", True)):
    for least in (0.2, 0.1, 0.05, 0.02):
        SETTINGS[f"suffix, {text}, from {least}"] = partial(Suffix, WIDE, 200_000 if earlier else 0, least)
    for least in (0.2, 0.1, 0.05, 0.02):
        SETTINGS[f"best first, {text}, from {least}"] = partial(AdaptiveNgrams, 24, earlier, False, least)
    for size in (2, 4, 8, 24):
        SETTINGS[f"ADED, {text}, {size} guesses"] = partial(AdaptiveNgrams, size, earlier, True)


@dataclass(frozen=True, slots=True)
class Result:
    """One setting."""

    setting: str
    tokens_per_step: float
    guesses_per_step: float


@dataclass(frozen=True, slots=True)
class Results(Conditions):
    """All of them."""

    results: tuple[Result, ...]


def main() -> None:
    options = new_parser(__doc__, "adaptive_ngrams").parse_args()
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
    columns = ("setting", "tokens/step", "guesses/step")
    lines = [(r.setting, f"{r.tokens_per_step:.3f}", f"{r.guesses_per_step:.2f}") for r in found.results]
    report.console().print(table(f"{found.model}, {found.dataset}: {found.prompts} prompts", columns, lines))


def score(setting: str, texts: Sequence[Text], max_tokens: int) -> Result:
    drafter = SETTINGS[setting]()
    total = sum((replay(drafter, text.prompt, text.output, max_tokens) for text in texts), Replayed())
    return Result(setting, total.tokens_per_step, total.drafted / total.steps)


if __name__ == "__main__":
    main()
