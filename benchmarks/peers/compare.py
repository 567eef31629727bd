"""How long one decoding step takes in Parlay, and in others on the same machine with the same weights.

`benchmarks/peers/setup.sh` installs the others first; docs/peers.md says what is compared and how. All take turns, and
whoever does not measure is stopped by a signal. Run it on an otherwise idle machine.
"""

from __future__ import annotations

import argparse
import math
import os
import signal
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from itertools import chain, product
from pathlib import Path

from tokenizers import Tokenizer
from workers import OURS, PEERS, REFERENCE, About, Answer, Limits, Peer, Prompt, Worker, WorkerFailed

from parlay.bench import environment, report
from parlay.bench.report import Spread, progress, table
from parlay.bench.workloads import load_prompts
from parlay.engine.checkpoint import pull

WARM_UP_TOKENS = 4
TRIAL_TOKENS = 16
TRIAL_BATCHES = (1, 8)


@dataclass(frozen=True, slots=True)
class Turn:
    """One engine's requests for one batch: for all tokens, and for the first only."""

    whole: Answer
    first: Answer

    @property
    def step_ms(self) -> float:
        """Milliseconds for each token after the first."""
        return 1000 * (self.whole.seconds - self.first.seconds) / (len(self.whole.tokens[0]) - 1)


@dataclass(frozen=True, slots=True)
class Trial:
    """A short look at one precision of a peer, to find its fastest."""

    engine: str
    step_ms: dict[int, float]  # by batch

    @property
    def score(self) -> float:
        """The geometric mean: the lowest is kept."""
        return math.exp(sum(map(math.log, self.step_ms.values())) / len(self.step_ms))


@dataclass(frozen=True, slots=True)
class Cell:
    """One engine at one batch.

    Attributes:
        step_ms: Milliseconds per decoding step.
        first_token_seconds: Of a request for one token of each prompt.
        request_seconds: Of a request for all tokens, prompts included.
        times_parlays: Its median step over that of Parlay's first precision.
        agreement: Share of tokens before a text first differs from transformers' in float32; None without that.
    """

    engine: str
    batch: int
    step_ms: Spread
    first_token_seconds: Spread
    request_seconds: Spread
    times_parlays: float | None
    agreement: float | None
    raw_first_token_seconds: tuple[float, ...]
    raw_request_seconds: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Comparison:
    """All results of this benchmark."""

    model: str
    prompt_tokens: int
    new_tokens: int
    repeats: int
    threads: int
    engines: tuple[About, ...]
    trials: tuple[Trial, ...]
    failures: tuple[str, ...]
    cells: tuple[Cell, ...]


def main() -> None:
    options = _options()
    captured = environment.capture()
    most = max(options.batches)
    prompts = load_pieces(most, options.prompt_tokens)
    context = options.prompt_tokens + max(options.tokens, TRIAL_TOKENS)
    limits = Limits(options.threads, most, context, budget=most * options.prompt_tokens)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit("stopped"))  # by way of the stack, which ends stopped workers too
    with ExitStack() as stack:
        team = Team(stack, limits, prompts)
        for peer in (PEERS[name] for name in options.peers):
            team.hire(peer, options.tokens)
        turns = take_turns(team.workers, prompts, options.batches, options.tokens, options.repeats)
        cells = tuple(summarise(turns, team.reference))
    result = Comparison(
        model="smollm2-135m",
        prompt_tokens=options.prompt_tokens,
        new_tokens=options.tokens,
        repeats=options.repeats,
        threads=options.threads,
        engines=tuple(worker.about for worker in team.workers),
        trials=tuple(team.trials),
        failures=tuple(team.failures),
        cells=cells,
    )
    environment.write_json(options.json, captured, result)
    show(result)


def load_pieces(count: int, length: int) -> list[Prompt]:
    """Cuts Parlay's own prompts into pieces of one length, so that no engine has to pad."""
    tokenizer = Tokenizer.from_file(str(pull("smollm2-135m") / "tokenizer.json"))
    texts = [tokenizer.encode(prompt.text).ids for prompt in load_prompts()]
    pieces = chain.from_iterable(zip(*[iter(text)] * length, strict=False) for text in texts)
    found = list(dict.fromkeys(pieces))[:count]
    if len(found) < count:
        raise SystemExit(f"--prompt-tokens {length}: there are {len(found)} such prompts, {count} are needed; lower it")
    return found


class Team:
    """Starts workers, and keeps those that are to be measured.

    Attributes:
        workers: Those that were kept.
        trials: What decided.
        failures: Who could not be loaded, and why.
        reference: transformers' texts in float32; None where it was not started.
    """

    def __init__(self, stack: ExitStack, limits: Limits, prompts: Sequence[Prompt]) -> None:
        self.workers: list[Worker] = []
        self.trials: list[Trial] = []
        self.failures: list[str] = []
        self.reference: Answer | None = None
        self._stack, self._limits, self._prompts = stack, limits, prompts
        self._console = report.console(stderr=True)

    def hire(self, peer: Peer, max_tokens: int) -> None:
        """Starts a peer in each of its precisions and keeps the fastest; of Parlay, all."""
        scored: list[tuple[float, Worker]] = []
        for variant in peer.variants:
            self._console.print(f"loading {peer.name} {variant}", highlight=False)
            try:
                worker = self._stack.enter_context(closing(Worker(peer, variant, self._limits)))
                if (peer.name, variant) == REFERENCE:
                    with worker.awake():
                        self.reference = worker.ask(self._prompts, max_tokens)
                trial = self._try(worker)
            except WorkerFailed as failure:
                self._console.print(str(failure), highlight=False, markup=False)
                self.failures.append(str(failure))
                continue
            self.trials.append(trial)
            scored.append((trial.score, worker))
        scored.sort(key=lambda pair: pair[0])
        kept = [w for _, w in scored if peer.name == OURS] or [w for _, w in scored[:1]]
        for _, worker in scored:
            if worker not in kept:
                worker.close()
        self.workers += sorted(kept, key=lambda worker: peer.variants.index(worker.variant))

    def _try(self, worker: Worker) -> Trial:
        batches = sorted({min(batch, len(self._prompts)) for batch in TRIAL_BATCHES})
        found = {batch: take_turn(worker, self._prompts[:batch], TRIAL_TOKENS).step_ms for batch in batches}
        times = ", ".join(f"{ms:.1f} ms at {batch}" for batch, ms in found.items())
        self._console.print(f"  {worker.about.precision}: {times}", highlight=False)
        return Trial(str(worker.about), found)


def take_turn(worker: Worker, prompts: Sequence[Prompt], max_tokens: int) -> Turn:
    """Wakes the worker, warms it up and times it."""
    with worker.awake():
        worker.ask(prompts, WARM_UP_TOKENS)
        return Turn(whole=worker.ask(prompts, max_tokens), first=worker.ask(prompts, 1))


def take_turns(
    workers: Sequence[Worker], prompts: Sequence[Prompt], batches: Sequence[int], max_tokens: int, repeats: int
) -> dict[tuple[str, int], list[Turn]]:
    """Every worker at every batch, in an order that rotates from batch to batch and from repeat to repeat.

    Returns:
        The turns by engine and batch.
    """
    turns: dict[tuple[str, int], list[Turn]] = {(str(w.about), batch): [] for w in workers for batch in batches}
    with progress("decoding", repeats * len(batches) * len(workers)) as advance:
        for repeat, (place, batch) in product(range(repeats), enumerate(batches)):
            first = (repeat + place) % len(workers)
            for worker in (*workers[first:], *workers[:first]):
                turns[str(worker.about), batch].append(take_turn(worker, prompts[:batch], max_tokens))
                advance()
    return turns


def summarise(turns: Mapping[tuple[str, int], Sequence[Turn]], reference: Answer | None) -> Iterator[Cell]:
    """One cell for each engine and batch."""
    steps = {place: Spread.of(turn.step_ms for turn in found) for place, found in turns.items()}
    ours = f"{OURS} {PEERS[OURS].variants[0]}"
    for (engine, batch), found in turns.items():
        parlays = steps.get((ours, batch))
        whole = tuple(turn.whole.seconds for turn in found)
        first = tuple(turn.first.seconds for turn in found)
        yield Cell(
            engine=engine,
            batch=batch,
            step_ms=steps[engine, batch],
            first_token_seconds=Spread.of(first),
            request_seconds=Spread.of(whole),
            times_parlays=steps[engine, batch].median / parlays.median if parlays else None,
            agreement=agreement((turn.whole for turn in found), reference) if reference else None,
            raw_first_token_seconds=first,
            raw_request_seconds=whole,
        )


def agreement(answers: Iterable[Answer], reference: Answer) -> float:
    """The share of all tokens that stand before the first difference of their text from the reference's."""
    equal = total = 0
    for answer in answers:
        for made, expected in zip(answer.tokens, reference.tokens, strict=False):  # the reference has every prompt
            pairs = enumerate(zip(made, expected, strict=True))
            equal += next((place for place, (token, other) in pairs if token != other), len(made))
            total += len(made)
    return equal / total


def show(result: Comparison) -> None:
    console = report.console()
    batches = list(dict.fromkeys(cell.batch for cell in result.cells))
    found = {(cell.engine, cell.batch): cell for cell in result.cells}
    engines = list(map(str, result.engines))
    of = f"{result.new_tokens} tokens after {result.prompt_tokens}, {result.threads} threads"
    headings = ("engine", *(f"{batch} at a time" for batch in batches))

    def rows(spec: str, part: str) -> Iterator[tuple[str, ...]]:
        for engine in engines:
            yield engine, *(_text(getattr(found[engine, batch], part), spec) for batch in batches)

    ours = f"{OURS} {PEERS[OURS].variants[0]}"
    for title, spec, part in (
        (f"{result.model}, {of}: ms per decoding step, median (min-max)", ".1f", "step_ms"),
        (f"the same, in times of {ours}'s (above 1: Parlay is faster)", ".2f", "times_parlays"),
        ("seconds for the whole request, median (min-max)", ".2f", "request_seconds"),
        ("share of tokens before the first difference from transformers in float32", ".3f", "agreement"),
    ):
        console.print(table(title, headings, rows(spec, part)))
    about = ((str(e), e.precision, ", ".join(f"{k} {v}" for k, v in e.versions.items())) for e in result.engines)
    console.print(table("what was measured", ("engine", "precision", "versions"), about, texts=3))
    for failure in result.failures:
        console.print(failure, highlight=False, markup=False)


def _text(value: Spread | float | None, spec: str) -> str:
    return "" if value is None else f"{value:{spec}}"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    installed = [name for name, peer in PEERS.items() if peer.python.exists()]
    cores = len(os.sched_getaffinity(0))
    parser.add_argument(
        "--peers", nargs="+", choices=installed, default=installed, help="whom to measure (default: all installed)"
    )
    parser.add_argument("--threads", type=int, default=cores, help="of each (default: one per core, %(default)s)")
    parser.add_argument(
        "--batches", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32], help="at a time (default: %(default)s)"
    )
    parser.add_argument("--prompt-tokens", type=int, default=64, help="of each prompt (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=64, help="new ones of each, 2 or more (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="turns (default: %(default)s)")
    parser.add_argument(
        "--json", type=Path, default=Path("benchmarks/results/peers.json"), help="JSON (default: %(default)s)"
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
