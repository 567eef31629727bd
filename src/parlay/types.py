"""Frozen value types that cross borders. No torch here, and nothing is filled in later.

Words (see docs/architecture.md): a *row* is a live request in a step, that is its known tokens not yet in KV plus a
tree of guesses; a *draft token* is a guess; *accepted* is verified and kept; *emitted* = accepted + 1.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from parlay.bets import Bet, Tree, parse_bet

Speculation = Literal["off", "auto", "max"]
Verification = Literal["greedy", "optimal", "coupled"]
FinishReason = Literal["stop", "length"]


class InvalidRequest(ValueError):
    """A request that cannot be served as written.

    `param` names the field, the message names the remedy, and `code` is OpenAI's code where clients look for one.
    """

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code


def _require(ok: bool, param: str, remedy: str) -> None:
    if not ok:
        raise InvalidRequest(f"{param}: {remedy}", param)


def _read_bet(text: str) -> Bet:
    try:
        bet = parse_bet(text)
    except ValueError as error:
        raise InvalidRequest(f'speculation: must be "off", "auto", "max" or a bet; {error}', "speculation") from None
    if not isinstance(bet, Bet):
        raise InvalidRequest(f'speculation: {text!r} bets on no guess; write "off" for that', "speculation")
    return bet


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the tokens of one request are chosen. Field names and meanings follow vLLM and the OpenAI API.

    Attributes:
        n: Number of independent choices for the prompt.
        temperature: 0 means greedy.
        top_k: Keep the k most likely tokens; 0 or -1 keeps all.
        top_p: Keep the smallest set of tokens with at least this probability mass.
        min_p: Keep tokens with at least this fraction of the top token's probability.
        repetition_penalty: Divides positive and multiplies negative logits of tokens seen in prompt or output.
        presence_penalty: Subtracted once from the logit of each token seen in the output.
        frequency_penalty: Subtracted from a token's logit once per occurrence in the output.
        logit_bias: Added to the logits of these token ids before anything else.
        seed: Selects `coupled` verification, and fixes its output whatever is guessed and whoever shares the batch.
        stop: The output ends before the first of these strings.
        stop_token_ids: The output ends after any of these tokens.
        ignore_eos: Go on after the model's end-of-sequence token.
        min_tokens: No end-of-sequence or stop token before this many output tokens.
        max_tokens: Output limit; None means up to the context limit.
        logprobs: Return the chosen token's log-probability and this many alternatives (of the model's raw logits).
        prompt_logprobs: The same for prompt tokens; such a request takes no prefix hit.
        speculation: "off" never guesses for this request, "auto" lets the policy decide, "max" asks for the
            lowest latency of this request, whatever it costs others. A bet, or a text that `parlay.bets.parse_bet`
            reads, such as "eagle:3", is made in every step as far as the drafter can, whatever the policy.
        target_tpot_ms: Milliseconds per output token that this request wants to stay under; the goodput policy serves
            those first that would not.
        verification: Force a lossless verification mode; None picks greedy at temperature 0, coupled with a seed,
            optimal otherwise.
        skip_special_tokens: Leave special tokens out of the text.
    """

    n: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    max_tokens: int | None = 16
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    speculation: Speculation | Bet = "auto"
    target_tpot_ms: float | None = None
    verification: Literal["optimal", "coupled"] | None = None
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):  # a lone string is what users of every client write
            object.__setattr__(self, "stop", (self.stop,))
        object.__setattr__(self, "stop", tuple(self.stop))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        _require(1 <= self.n <= 128, "n", "must be from 1 to 128")
        _require(
            self.temperature == 0 or 1e-5 <= self.temperature < math.inf, "temperature", "must be 0, or 0.00001 or more"
        )
        _require(self.top_k >= -1, "top_k", "must be -1 or 0 (all tokens), or a positive count")
        _require(0 < self.top_p <= 1, "top_p", "must be above 0 and at most 1")
        _require(0 <= self.min_p <= 1, "min_p", "must be from 0 to 1")
        finite = math.isfinite(self.repetition_penalty)
        _require(finite and self.repetition_penalty > 0, "repetition_penalty", "must be above 0 (1 means none)")
        _require(-2 <= self.presence_penalty <= 2, "presence_penalty", "must be from -2 to 2")
        _require(-2 <= self.frequency_penalty <= 2, "frequency_penalty", "must be from -2 to 2")
        _require(len(self.logit_bias) <= 1024, "logit_bias", "takes at most 1024 tokens")
        small = all(-100 <= bias <= 100 for bias in self.logit_bias.values())
        _require(small, "logit_bias", "values must be from -100 to 100")
        _require(self.seed is None or -(2**63) <= self.seed < 2**63, "seed", "must fit in 64 bits")
        _require(all(self.stop), "stop", "strings must not be empty")
        _require(len(self.stop) <= 16, "stop", "takes at most 16 strings")
        _require(self.max_tokens is None or self.max_tokens >= 1, "max_tokens", "must be 1 or more")
        _require(self.min_tokens >= 0, "min_tokens", "must be 0 or more")
        _require(
            self.max_tokens is None or self.min_tokens <= self.max_tokens, "min_tokens", "must not exceed max_tokens"
        )
        _require(self.logprobs is None or 0 <= self.logprobs <= 20, "logprobs", "must be from 0 to 20")
        _require(
            self.prompt_logprobs is None or 0 <= self.prompt_logprobs <= 20, "prompt_logprobs", "must be from 0 to 20"
        )
        _require(isinstance(self.speculation, str | Bet), "speculation", 'must be "off", "auto", "max" or a bet')
        if isinstance(self.speculation, str) and self.speculation not in get_args(Speculation):
            object.__setattr__(self, "speculation", _read_bet(self.speculation))
        wanted = self.target_tpot_ms
        _require(wanted is None or 0 < wanted < math.inf, "target_tpot_ms", "must be above 0")
        _require(
            self.verification in (None, "optimal", "coupled"), "verification", 'must be "optimal", "coupled" or None'
        )

    @property
    def mode(self) -> Verification:
        """The lossless verification rule that serves this request."""
        if self.temperature == 0:
            return "greedy"
        if self.verification is not None:
            return self.verification
        return "optimal" if self.seed is None else "coupled"


@dataclass(frozen=True, slots=True)
class Request:
    """One accepted request: a tokenised prompt and how to continue it."""

    id: str
    prompt: tuple[int, ...]
    params: SamplingParams
    arrival: float = 0.0  # the end of tokenisation, in seconds on time.perf_counter's clock


@dataclass(frozen=True, slots=True)
class Row:
    """One live request in one step: which known tokens run now, and how deep guesses may go after them."""

    seq: int  # the engine's number for this choice of this request
    request: Request
    choice: int
    tokens: array[int]  # the known tokens; shared with the scheduler, which appends to it when the step is over
    length: int  # how many there are in this step
    start: int  # tokens[:start] are in KV
    count: int  # tokens[start : start + count] run in this step
    scored: int  # prompt positions whose log-probabilities were delivered in earlier steps
    max_depth: int  # 0 where nothing may be guessed in this step
    pages: list[int]  # KV pages of positions 0..; shared with the scheduler, read only

    @property
    def samples(self) -> bool:
        """Whether this step reaches the last known token, so that something is emitted."""
        return self.start + self.count == self.length

    @property
    def speculation(self) -> Speculation:
        wish = self.request.params.speculation
        return "auto" if isinstance(wish, Bet) else wish

    @property
    def own_bet(self) -> Bet | None:
        """What the request wants to be bet, if it said so."""
        wish = self.request.params.speculation
        return wish if isinstance(wish, Bet) else None

    @property
    def is_greedy(self) -> bool:
        return self.request.params.mode == "greedy"

    @property
    def target_tpot(self) -> float | None:
        """Seconds per output token that the request wants to stay under, if it said so."""
        wanted = self.request.params.target_tpot_ms
        return None if wanted is None else wanted / 1000

    @property
    def prompt_reads(self) -> range:
        """Positions of this step whose next token's log-probability the request still wants."""
        if self.request.params.prompt_logprobs is None or self.choice:
            return range(0)
        return range(max(self.start, self.scored), min(self.start + self.count, len(self.request.prompt) - 1))


@dataclass(frozen=True, slots=True)
class Offer:
    """What one drafter could bet on one row.

    Attributes:
        method: The drafter's name.
        tree: The largest tree that it could fill.
        tokens: The guesses themselves, only where they are deterministic.
        confidence: The drafter's own estimate for each node that it is accepted if its parent is, where it has one;
            no higher than an elder sibling's.
        catch_up: Known tokens that the drafter would have to read first.
        ahead: Whether these are candidates for the next token, begun beside this one: of the tree only the size counts,
            and what is won is time, not tokens.
    """

    method: str
    tree: Tree
    tokens: tuple[int, ...] | None = None
    confidence: tuple[float, ...] | None = None
    catch_up: int = 0
    ahead: bool = False

    @property
    def shows_odds(self) -> bool:
        """Whether others can take its guesses in, knowing how likely they are."""
        return self.tokens is not None and self.confidence is not None


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One bet, or None for none, per row; and the methods whose offers nobody will look at in the next step."""

    bets: tuple[Bet | None, ...]
    resting: Container[str] = ()


class _Everything:
    def __contains__(self, _: object) -> bool:
        return True


EVERYTHING: Container[str] = _Everything()


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probability of one token and of the most likely ones, from the model's raw logits."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class RowResult:
    """What one row got out of a step."""

    method: str | None
    tree: Tree  # of the guesses that were verified
    accepted: tuple[int, ...]  # tree nodes on the accepted path, root side first
    emitted: tuple[int, ...]  # accepted tokens and the one after them; empty while known tokens remain
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()

    @property
    def drafted(self) -> int:
        return len(self.tree)


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step did: one result per row, and seconds by part."""

    rows: tuple[RowResult, ...]
    seconds: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class SpeculationStats:
    """Totals over the life of one choice."""

    steps: int = 0
    drafted: int = 0
    accepted: int = 0

    def __add__(self, other: SpeculationStats) -> SpeculationStats:
        return SpeculationStats(self.steps + other.steps, self.drafted + other.drafted, self.accepted + other.accepted)


@dataclass(frozen=True, slots=True)
class Delta:
    """What one choice of one request gained in a step: the unit of streaming.

    `method` is the drafter whose guesses were verified, None where there were none. `queued` is the time in seconds
    from the end of tokenisation, which is the request's `arrival`, to the choice's first step.
    """

    request_id: str
    choice: int
    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    stats: SpeculationStats = SpeculationStats()
    method: str | None = None
    queued: float = 0.0


@dataclass(frozen=True, slots=True)
class StepReport:
    """A whole step, for those who listen.

    Attributes:
        rows: Of the step.
        offers: Per row, what could be bet.
        result: What became of them.
        deltas: What each row gained, empty ones too.
        ended: When it was over, in seconds on `time.perf_counter`'s clock.
        explored: Whether bets were neither the policy's nor the requests' own.
    """

    rows: Sequence[Row]
    offers: Sequence[Sequence[Offer]]
    result: StepResult
    deltas: Sequence[Delta]
    ended: float
    explored: bool = False


@dataclass(frozen=True, slots=True)
class EngineStatus:
    """How an engine stands between two steps.

    Attributes:
        slots: Choices that may run at a time.
        running: Choices that run.
        waiting: Choices that do not run yet, or not again after a preemption.
        kv_usage: Share of the KV pages that live choices hold, from 0 to 1.
        preemptions: Choices that lost their pages to others, since the start.
        prefix_queries: Tokens that were looked up among published pages, since the start. Choices that take over the
            prompt of their request's first choice look nothing up.
        prefix_hits: Those of them that were found, and so were not computed again.
        failed_drafters: Methods that raised an error and were switched off.
    """

    slots: int
    running: int = 0
    waiting: int = 0
    kv_usage: float = 0.0
    preemptions: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    failed_drafters: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One finished choice.

    `stats` is of all its steps, and `methods` of those whose guesses each drafter made.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    stop_reason: str | int | None
    logprobs: tuple[TokenLogprobs, ...]
    stats: SpeculationStats
    methods: Mapping[str, SpeculationStats]


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """All choices of one finished request."""

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...]
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()


TokenIds = Sequence[int]
