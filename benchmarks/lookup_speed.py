"""What prompt lookup gives one request at a time, on texts whose prompts say much of the answer.

Every prompt is answered greedily without and with guesses, the two taking turns to go first, by engines that keep no
prompts. Tokens per second are told for the whole request and for what comes after its first token, since guessing
cannot hasten the reading of a long prompt. Run it on an otherwise idle machine.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from parlay.bench import environment, report
from parlay.bench.report import progress, table
from parlay.bench.workloads import by_category, encode, load_prompts, take_turns
from parlay.config import EngineConfig
from parlay.engine.engine import Engine
from parlay.types import Request, SamplingParams, Speculation

BAR = 1.5
ARMS: tuple[Speculation, Speculation] = ("off", "auto")


@dataclass(frozen=True, slots=True)
class Answer:
    """One request, timed in seconds."""

    first: float  # until the first tokens
    whole: float
    first_tokens: int  # that came together at first
    tokens: tuple[int, ...]
    steps: int


@dataclass(frozen=True, slots=True)
class Pair:
    """The same prompt without and with guesses."""

    category: str
    prompt_tokens: int
    off: Answer
    guessed: Answer


@dataclass(frozen=True, slots=True)
class Gain:
    """Guessing against not guessing, tokens per second over all requests of a category.

    What tells of decoding is None where no request went on after its first tokens.
    """

    category: str
    requests: int
    prompt_tokens: float  # the mean
    tokens_per_step: float
    decode_off: float | None
    decode_guessed: float | None
    decode_ratio: float | None  # above 1: guessing is faster
    median_ratio: float | None  # of the requests' own ratios
    whole_off: float
    whole_guessed: float
    whole_ratio: float
    equal_outputs: int


@dataclass(frozen=True, slots=True)
class LookupSpeed:
    """All results of this benchmark; the first gain is over all categories together."""

    model: str
    dtype: str
    dataset: str
    depth: int
    max_tokens: int
    gains: tuple[Gain, ...]
    pairs: tuple[Pair, ...]


def main() -> None:
    options = parse()
    captured = environment.capture()
    engine = Engine(
        EngineConfig(
            options.model,
            dtype=options.dtype,
            speculation=f"prompt_lookup:{options.depth}",  # type: ignore[arg-type]
            prefix_caching=False,
            compile="wait",
        )
    )
    groups = by_category(load_prompts(options.dataset))
    wanted = options.categories or list(groups)
    if missing := sorted(set(wanted) - groups.keys()):
        raise SystemExit(f"categories: {options.dataset} has no {', '.join(missing)}, but {', '.join(groups)}")
    prompts = list(take_turns(prompt for category in wanted for prompt in groups[category][: options.limit]))
    encoded = encode(prompts, engine.tokenizer)
    for arm in ARMS:
        answer(engine, encoded[0], arm, 8)
    pairs: list[Pair] = []
    with progress("answering", len(prompts)) as advance:
        for number, (prompt, tokens) in enumerate(zip(prompts, encoded, strict=True)):
            order = ARMS if number % 2 == 0 else ARMS[::-1]
            got = {arm: answer(engine, tokens, arm, options.max_tokens) for arm in order}
            pairs.append(Pair(prompt.category, len(tokens), got["off"], got["auto"]))
            advance()
    gains = [gain("all together", pairs)]
    gains += [gain(category, [pair for pair in pairs if pair.category == category]) for category in wanted]
    dtype = str(engine.model.dtype).removeprefix("torch.")
    name = options.dataset.name if options.dataset else "parlay's own prompts"
    model = environment.portable(options.model)
    result = LookupSpeed(model, dtype, name, options.depth, options.max_tokens, tuple(gains), tuple(pairs))
    environment.write_json(options.json, captured, result)
    show(result)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="what to run (default: %(default)s)")
    parser.add_argument("--dtype", default="auto", help="of its weights (default: %(default)s)")
    parser.add_argument("--dataset", type=Path, help="prompts, as for parlay bench; by default Parlay's own")
    parser.add_argument("--categories", nargs="+", help="of the dataset; by default all")
    parser.add_argument("--limit", type=int, help="prompts of each category; by default all")
    parser.add_argument("--depth", type=int, default=8, help="guesses in a row (default: %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=128, help="output limit per prompt (default: %(default)s)")
    parser.add_argument(
        "--json", type=Path, default=Path("benchmarks/results/lookup_speed.json"), help="JSON (default: %(default)s)"
    )
    return parser.parse_args()


def answer(engine: Engine, prompt: tuple[int, ...], arm: Speculation, max_tokens: int) -> Answer:
    """Answers one prompt on an idle engine."""
    params = SamplingParams(temperature=0, max_tokens=max_tokens, speculation=arm)
    began = time.perf_counter()
    engine.add(Request(arm, prompt, params, began))
    tokens: list[int] = []
    first, first_tokens, steps = 0.0, 0, 0
    while engine.has_work:
        for delta in engine.step():
            tokens += delta.tokens
            steps += delta.stats.steps
            if not first:
                first, first_tokens = time.perf_counter() - began, len(tokens)
    return Answer(first, time.perf_counter() - began, first_tokens, tuple(tokens), steps)


def gain(category: str, pairs: Sequence[Pair]) -> Gain:
    """Sums up requests; a category's speed is its tokens over its requests' own time."""
    off, guessed = [pair.off for pair in pairs], [pair.guessed for pair in pairs]
    ratios = [ratio for p in pairs if (ratio := _decode_ratio([p.off], [p.guessed])) is not None]
    return Gain(
        category=category,
        requests=len(pairs),
        prompt_tokens=statistics.mean(pair.prompt_tokens for pair in pairs),
        tokens_per_step=sum(len(each.tokens) for each in guessed) / sum(each.steps for each in guessed),
        decode_off=_decoding(off),
        decode_guessed=_decoding(guessed),
        decode_ratio=_decode_ratio(off, guessed),
        median_ratio=statistics.median(ratios) if ratios else None,
        whole_off=_whole(off),
        whole_guessed=_whole(guessed),
        whole_ratio=_whole(guessed) / _whole(off),
        equal_outputs=sum(pair.off.tokens == pair.guessed.tokens for pair in pairs),
    )


def _decode_ratio(off: Sequence[Answer], guessed: Sequence[Answer]) -> float | None:
    before, after = _decoding(off), _decoding(guessed)
    return None if before is None or after is None else after / before


def _decoding(answers: Sequence[Answer]) -> float | None:
    """Tokens per second after the first ones; None where nothing came after them."""
    made = sum(len(a.tokens) - a.first_tokens for a in answers)
    return made / sum(a.whole - a.first for a in answers) if made else None


def _whole(answers: Iterable[Answer]) -> float:
    answers = list(answers)
    return sum(len(a.tokens) for a in answers) / sum(a.whole for a in answers)


def show(result: LookupSpeed) -> None:
    """The gains by category, and the bar."""
    console = report.console()
    columns = (
        *("category", "requests", "prompt tokens", "tokens/step", "decode tokens/s off", "with guesses", "ratio"),
        *("median ratio", "whole request off", "with guesses", "ratio", "equal outputs"),
    )
    rows = (
        (
            g.category,
            g.requests,
            f"{g.prompt_tokens:.0f}",
            f"{g.tokens_per_step:.2f}",
            _text(g.decode_off, ".1f"),
            _text(g.decode_guessed, ".1f"),
            _text(g.decode_ratio, ".2f", "x"),
            _text(g.median_ratio, ".2f", "x"),
            f"{g.whole_off:.1f}",
            f"{g.whole_guessed:.1f}",
            f"{g.whole_ratio:.2f}x",
            f"{g.equal_outputs} of {g.requests}",
        )
        for g in result.gains
    )
    title = f"{result.model}, {result.dtype}, {result.dataset}: prompt lookup of {result.depth}, one request at a time"
    console.print(table(title, columns, rows))
    if (ratio := result.gains[0].decode_ratio) is None:
        console.print("no request went on after its first tokens: raise --max-tokens", highlight=False)
        return
    verdict = "met" if ratio >= BAR else "missed"
    console.print(f"tokens/s over off, all together: {ratio:.2f}x (bar: >= {BAR}x, {verdict})", highlight=False)


def _text(value: float | None, spec: str, unit: str = "") -> str:
    return "" if value is None else f"{value:{spec}}{unit}"


if __name__ == "__main__":
    main()
