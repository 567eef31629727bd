"""How fast one request at a time is answered, by method and category, beside transformers' own methods if wanted.

Every prompt is answered by every method in turn, a different one going first each time, by engines that keep no
prompts. Speeds are told for what comes after the first tokens, which guessing cannot hasten, and for the whole request.
A repeat begins with drafters that remember nothing, or suffix decoding would know the answers from the repeat before.
Greedy answers are compared with those without guesses. Run it on an otherwise idle machine.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from trial import Answer, Conditions, Estimate, Tokens, add_drafters, check_drafters, conditions, new_engine, new_parser

from parlay.bench import environment, report
from parlay.bench.figures import check_name, legend_below, new_figure, save, title
from parlay.bench.report import Advance, Spread, progress, table
from parlay.bench.workloads import Prompt, by_category, encode, load_prompts, take_turns
from parlay.bets import parse_bet
from parlay.engine.engine import Engine
from parlay.policy.trees import Floats
from parlay.types import Request, SamplingParams

OFF = "off"
ALL = "all together"
WARM_UP = 8  # tokens


@dataclass(frozen=True, slots=True)
class Trial:
    """One answer, and what it is an answer to."""

    prompt: int  # its number
    category: str
    prompt_tokens: int
    repeat: int
    method: str
    answer: Answer


@dataclass(frozen=True, slots=True)
class Score:
    """One method on one category: tokens per second of sums over its requests, beside the method that guesses nothing.

    What tells of decoding is None where no request went on after its first tokens, and what tells of equality where
    answers are sampled.
    """

    category: str
    method: str
    beside: str  # the method that guesses nothing, of the same program
    requests: int
    tokens_per_step: float
    decode: float | None  # tokens per second after the first ones
    whole: float
    decode_ratio: Estimate | None  # above 1: faster than the method beside it
    whole_ratio: Estimate
    decode_by_repeat: Spread | None  # the ratio, repeat by repeat
    over_off: Estimate | None  # decoding beside Parlay without guesses, for methods of other programs too
    equal_outputs: int | None  # to Parlay's without guesses


@dataclass(frozen=True, slots=True)
class OneRequest(Conditions):
    """All results of this benchmark; `left_out` says why where a method could not be run."""

    dtype: str
    temperature: float
    repeats: int
    left_out: dict[str, str]
    scores: tuple[Score, ...]
    trials: tuple[Trial, ...]


@dataclass(frozen=True, slots=True)
class Method:
    """One way to answer a prompt.

    Attributes:
        name: As the user wrote it.
        beside: The method that it is compared with.
        answer: Answers a prompt with at most so many tokens.
        forget: Drops what it has learnt from earlier answers.
    """

    name: str
    beside: str
    answer: Callable[[Tokens, int], Answer]
    forget: Callable[[], None] = lambda: None


def main() -> None:
    options = parse()
    captured = environment.capture()
    prompts = choose(load_prompts(options.dataset), options.categories, options.per_category)[: options.limit]
    names = list(dict.fromkeys((OFF, *(options.method or ["prompt_lookup:4"]))))
    engines = {
        name: new_engine(options, parse_bet(name), max_num_seqs=1, compile="wait", self_check=name == OFF)
        for name in names
    }
    methods = [ours(name, engine, options.temperature) for name, engine in engines.items()]
    left_out: dict[str, str] = {}
    if options.transformers:
        from transformers_methods import load_methods  # a file of its own: most runs need none of it

        theirs, left_out = load_methods(options, engines[OFF])
        methods += [Method(name, beside, answer) for name, beside, answer in theirs]
    encoded = encode(prompts, engines[OFF].tokenizer)
    with progress("answering", len(prompts) * len(methods) * options.repeats) as advance:
        trials = list(answer_all(methods, prompts, encoded, options.repeats, options.max_tokens, advance))
    for engine in engines.values():
        check_drafters(engine)
    beside = {method.name: method.beside for method in methods}
    result = OneRequest(
        **conditions(options, prompts),
        dtype=str(engines[OFF].model.dtype).removeprefix("torch."),
        temperature=options.temperature,
        repeats=options.repeats,
        left_out=left_out,
        scores=tuple(summarise(trials, beside, greedy=options.temperature == 0)),
        trials=tuple(trials),
    )
    environment.write_json(options.json, captured, result)
    show(result)
    draw(result, options.plot)


def parse() -> argparse.Namespace:
    parser = new_parser(__doc__, "one_request")
    parser.add_argument("--categories", nargs="+", help="of the dataset; by default all")
    parser.add_argument("--per-category", type=int, help="prompts of each category; by default all")
    parser.add_argument(
        "--method", action="append", help="as --speculation; may be repeated (default: prompt_lookup:4). off is added"
    )
    add_drafters(parser)
    parser.add_argument("--temperature", type=float, default=0.0, help="(default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=1, help="times every prompt is asked (default: %(default)s)")
    parser.add_argument(
        "--transformers", action="store_true", help="also transformers' generate, on the same weights in the same type"
    )
    parser.add_argument("--assistant", type=Path, help="a folder: transformers' assistant_model")
    parser.add_argument("--plot", type=Path, default=Path("docs/images/one_request.svg"), help="(default: %(default)s)")
    options = parser.parse_args()
    if options.assistant is not None and not options.transformers:
        parser.error("--assistant: is transformers' draft model; add --transformers")
    check_name(options.plot)
    return options


def choose(prompts: Sequence[Prompt], categories: Sequence[str] | None, per_category: int | None) -> list[Prompt]:
    """So many prompts of each of these categories, which take turns.

    Raises:
        SystemExit: for a category that is not there.
    """
    groups = by_category(prompts)
    wanted = categories or list(groups)
    if missing := sorted(set(wanted) - groups.keys()):
        raise SystemExit(f"categories: there is no {', '.join(missing)}, but {', '.join(groups)}")
    return list(take_turns(prompt for name in wanted for prompt in groups[name][:per_category]))


def ours(name: str, engine: Engine, temperature: float) -> Method:
    """A bet of Parlay's, or its own choice of bets."""
    return Method(name, OFF, partial(answer, engine, temperature), engine.forget_answers)


def answer(engine: Engine, temperature: float, prompt: Tokens, max_tokens: int) -> Answer:
    """Answers one prompt on an idle engine."""
    params = SamplingParams(temperature=temperature, max_tokens=max_tokens)
    began = time.perf_counter()
    engine.add(Request("one", prompt, params, began))
    tokens: list[int] = []
    first, first_tokens, steps = 0.0, 0, 0
    while engine.has_work:
        for delta in engine.step():
            tokens += delta.tokens
            steps += delta.stats.steps
            if not first:
                first, first_tokens = time.perf_counter() - began, len(tokens)
    return Answer(first, time.perf_counter() - began, first_tokens, tuple(tokens), steps)


def answer_all(
    methods: Sequence[Method],
    prompts: Sequence[Prompt],
    encoded: Sequence[Tokens],
    repeats: int,
    max_tokens: int,
    advance: Advance,
) -> Iterator[Trial]:
    """Lets the methods take turns, after one short answer that is not timed."""
    for method in methods:
        method.answer(encoded[0], WARM_UP)
    for repeat in range(repeats):
        for method in methods:
            method.forget()
        for number, (prompt, tokens) in enumerate(zip(prompts, encoded, strict=True)):
            first = (number + repeat) % len(methods)
            for method in (*methods[first:], *methods[:first]):
                found = method.answer(tokens, max_tokens)
                yield Trial(number, prompt.category, len(tokens), repeat, method.name, found)
                advance()


# ---- arithmetic -----------------------------------------------------------------------------------------------------


def summarise(trials: Sequence[Trial], beside: dict[str, str], *, greedy: bool) -> Iterator[Score]:
    """Every method on all categories together, then on each."""
    for category in (ALL, *dict.fromkeys(trial.category for trial in trials)):
        some = [trial for trial in trials if category in (ALL, trial.category)]
        for method in beside:
            yield score(category, method, beside[method], some, greedy=greedy)


def score(category: str, method: str, beside: str, trials: Sequence[Trial], *, greedy: bool) -> Score:
    """One method on some trials, which are those of all methods on the same prompts."""
    answers = [trial.answer for trial in trials if trial.method == method]
    sums, base, off = (sums_by_prompt(trials, name) for name in (method, beside, OFF))
    repeats = sorted({trial.repeat for trial in trials})
    one_by_one = [[trial for trial in trials if trial.repeat == repeat] for repeat in repeats]
    by_repeat = [
        ratio.value
        for some in one_by_one
        if (ratio := decode_ratio(sums_by_prompt(some, method), sums_by_prompt(some, beside))) is not None
    ]
    plain = {(trial.prompt, trial.repeat): trial.answer.tokens for trial in trials if trial.method == OFF}
    equal = sum(t.answer.tokens == plain[t.prompt, t.repeat] for t in trials if t.method == method)
    total = sums.sum(axis=0)
    return Score(
        category=category,
        method=method,
        beside=beside,
        requests=len(answers),
        tokens_per_step=sum(len(each.tokens) for each in answers) / sum(each.steps for each in answers),
        decode=float(total[0] / total[1]) if total[0] else None,
        whole=float(total[2] / total[3]),
        decode_ratio=decode_ratio(sums, base),
        whole_ratio=Estimate.speedup(sums[:, 2:], base[:, 2:]),
        decode_by_repeat=Spread.of(by_repeat) if by_repeat else None,
        over_off=decode_ratio(sums, off),
        equal_outputs=equal if greedy else None,
    )


def sums_by_prompt(trials: Sequence[Trial], method: str) -> Floats:
    """[prompts, 4] tokens after the first ones and their seconds, all tokens and all seconds, over the repeats."""
    found: dict[int, Floats] = {}
    for trial in trials:
        if trial.method == method:
            one = trial.answer
            later = (len(one.tokens) - one.first_tokens, one.whole - one.first, len(one.tokens), one.whole)
            found[trial.prompt] = found.get(trial.prompt, np.zeros(4)) + later
    return np.array([found[prompt] for prompt in sorted(found)])


def decode_ratio(sums: Floats, base: Floats) -> Estimate | None:
    """None where one of the two did not go on after its first tokens."""
    if not (sums[:, 0].any() and base[:, 0].any()):
        return None
    return Estimate.speedup(sums[:, :2], base[:, :2])


# ---- pictures -------------------------------------------------------------------------------------------------------


def show(result: OneRequest) -> None:
    """All categories together, then the gains by category."""
    out = report.console()
    title_ = (
        f"{result.model}, {result.dtype}, temperature {result.temperature:g}, {result.dataset}: {result.prompts} "
        f"prompts, {result.repeats} times, one request at a time"
    )
    together = [score for score in result.scores if score.category == ALL]
    # Plain is the same program without guesses, off is Parlay's.
    columns = (
        *("method", "tokens/step", "decode tokens/s", "over plain (95%)", "by repeat", "over off (95%)"),
        *("whole tokens/s", "over plain (95%)", "equal outputs"),
    )
    rows = (
        (
            s.method,
            f"{s.tokens_per_step:.2f}",
            _text(s.decode, ".1f"),
            "" if s.method == s.beside else _text(s.decode_ratio, ".2f"),
            "" if s.method == s.beside or result.repeats == 1 else _text(s.decode_by_repeat, ".2f"),
            "" if s.method == OFF or s.beside == OFF else _text(s.over_off, ".2f"),
            f"{s.whole:.1f}",
            "" if s.method == s.beside else f"{s.whole_ratio:.2f}",
            "" if s.equal_outputs is None or s.method == OFF else f"{s.equal_outputs} of {s.requests}",
        )
        for s in together
    )
    out.print(table(title_, columns, rows))
    categories = list(dict.fromkeys(score.category for score in result.scores))
    by_place = {(score.category, score.method): score for score in result.scores}
    for text, value in (
        ("decode tokens/s", lambda s: _text(s.decode, ".1f")),
        ("decode tokens/s over the same program's without guesses", lambda s: _text(s.decode_ratio, ".2f", False)),
        ("tokens/step", lambda s: f"{s.tokens_per_step:.2f}"),
    ):
        methods = [s.method for s in together if "over" not in text or s.method != s.beside]
        lines = [(category, *(value(by_place[category, method]) for method in methods)) for category in categories]
        out.print(table(text, ("category", *methods), lines))
    different = sum(s.requests - s.equal_outputs for s in together if s.equal_outputs is not None and s.beside == OFF)
    if result.temperature == 0:
        out.print(f"answers of Parlay's that differ from those without guesses: {different}", highlight=False)
    for method, why in result.left_out.items():
        out.print(f"left out: {method}: {why}", highlight=False)


def _text(value: Estimate | Spread | float | None, spec: str, whole: bool = True) -> str:
    """`whole` is with the interval."""
    if value is None:
        return ""
    if isinstance(value, Estimate) and not whole:
        value = value.value
    return format(value, spec)


def draw(result: OneRequest, path: Path) -> None:
    """Bars by category, one colour per method."""
    from matplotlib import colormaps

    categories = list(dict.fromkeys(score.category for score in result.scores))
    methods = list(dict.fromkeys(score.method for score in result.scores))
    figure, (axes,) = new_figure(1, width=max(8.0, 0.16 * len(categories) * (len(methods) + 1)), height=4)
    width = 0.86 / len(methods)
    for number, method in enumerate(methods):
        some = [score for score in result.scores if score.method == method]
        places = [place + width * (number - (len(methods) - 1) / 2) for place in range(len(some))]
        colour = "#8a93a6" if method == OFF else colormaps["tab10"](number % 10)
        axes.bar(places, [score.decode or 0.0 for score in some], 0.95 * width, color=colour, label=method)
        for place, one in zip(places, some, strict=True):
            if one.decode and one.decode_ratio is not None and method != one.beside:
                text = f"{one.decode_ratio.value:.1f}x"
                axes.annotate(text, (place, one.decode), (0, 2), textcoords="offset points", ha="center", fontsize=5)
    axes.set_xticks(range(len(categories)), categories, rotation=30, ha="right", fontsize=8)
    title(axes, f"{result.model}, {result.dtype}, one request at a time", "", "tokens per second")
    legend_below(figure, [axes])
    save(figure, path)


if __name__ == "__main__":
    main()
