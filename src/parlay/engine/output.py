"""From emitted tokens to text: incremental detokenisation, and where an output ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from parlay.engine.tokenizer import Tokenizer
from parlay.types import Delta, FinishReason, Request, RowResult, SpeculationStats

CONTEXT = 6  # prompt tokens decoded along, because some tokenizers drop the space before a first token


@dataclass(frozen=True, slots=True)
class Ending:
    """How many of a step's tokens are kept, and why the output ends there, if it does."""

    kept: int
    reason: FinishReason | None = None
    stop: str | int | None = None


class OutputStream:
    """The output of one choice as it grows.

    Text is held back while it ends in part of a character, or in what may become a stop string.

    Args:
        request: Whose output it is.
        choice: Which of its choices.
        tokenizer: Turns tokens into text.
        eos: End-of-sequence ids of the model.
        limit: Most output tokens that the request and the context allow.
    """

    def __init__(self, request: Request, choice: int, tokenizer: Tokenizer, eos: Sequence[int], limit: int) -> None:
        params = request.params
        self.request, self.choice, self.params = request, choice, params
        self._tokenizer = tokenizer
        self._ends = frozenset(params.stop_token_ids) | frozenset(() if params.ignore_eos else eos)
        self._limit = limit
        self._count = 0
        self._recent = list(request.prompt[-CONTEXT:])  # tokens that may still change how later ones read
        self._read = len(self._recent)  # of those, how many are in the text already
        self._held = ""
        self._queued: float | None = None  # seconds from the request's arrival to its first step

    def take(self, result: RowResult, began: float = 0.0) -> Delta:
        """Adds what a step emitted; the result's `tokens` are those that are kept.

        Args:
            result: What the step found.
            began: When the step began, in seconds on `time.perf_counter`'s clock.
        """
        if self._queued is None:
            self._queued = began - self.request.arrival
        ending = self._ending(result.emitted)
        tokens = result.emitted[: ending.kept]
        if self.params.stop:
            text, ending = self._read_until_stop(tokens, ending)
            tokens = tokens[: ending.kept]
        else:
            text = self._decode(self._spoken(tokens, ending), final=ending.reason is not None)
        self._count += len(tokens)
        return Delta(
            request_id=self.request.id,
            choice=self.choice,
            text=text,
            tokens=tokens,
            logprobs=result.logprobs[: len(tokens)],
            prompt_logprobs=result.prompt_logprobs,
            finish_reason=ending.reason,
            stop_reason=ending.stop,
            stats=SpeculationStats(
                steps=int(bool(tokens)),
                drafted=result.drafted,
                accepted=max(0, min(len(result.accepted), len(tokens) - 1)),
            ),
            method=result.method,
            queued=self._queued,
        )

    def _ending(self, emitted: Sequence[int]) -> Ending:
        """Where tokens alone end the output."""
        for index, token in enumerate(emitted, start=1):
            if token in self._ends and self._count + index > self.params.min_tokens:
                stop = token if token in self.params.stop_token_ids else None
                return Ending(index, "stop", stop)
            if self._count + index == self._limit:
                return Ending(index, "length")
        return Ending(len(emitted))

    def _spoken(self, tokens: Sequence[int], ending: Ending) -> Sequence[int]:
        """Tokens whose text is shown: all but the one that stops."""
        return tokens[:-1] if ending.reason == "stop" else tokens

    def _read_until_stop(self, tokens: Sequence[int], ending: Ending) -> tuple[str, Ending]:
        """Reads token by token, so that the one that completes a stop string is the last one kept."""
        text = ""
        spoken = self._spoken(tokens, ending)
        for index, token in enumerate(spoken, start=1):
            self._held += self._decode([token], final=False)
            if self._count + index >= self.params.min_tokens and (found := self._find_stop()):
                at, stop = found
                return text + self._held[:at], Ending(index, "stop", stop)
            safe = len(self._held) - self._possible_stop()
            text, self._held = text + self._held[:safe], self._held[safe:]
        if ending.reason is not None:
            self._held += self._decode([], final=True)
            text, self._held = text + self._held, ""
        return text, ending

    def _find_stop(self) -> tuple[int, str] | None:
        """The earliest stop string in the held text."""
        found = [(self._held.find(stop), stop) for stop in self.params.stop]
        return min(((at, stop) for at, stop in found if at >= 0), default=None)

    def _possible_stop(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = max(map(len, self.params.stop)) - 1
        for size in range(min(longest, len(self._held)), 0, -1):
            if self._held.endswith(tuple(stop[:size] for stop in self.params.stop if len(stop) > size)):
                return size
        return 0

    def _decode(self, tokens: Sequence[int], final: bool) -> str:
        """The text that these tokens add, once it ends in whole characters."""
        self._recent += tokens
        skip = self.params.skip_special_tokens
        known = self._tokenizer.decode(self._recent[: self._read], skip)
        text = self._tokenizer.decode(self._recent, skip)
        if (len(text) <= len(known) or text.endswith("\ufffd")) and not final:
            return ""
        self._recent, self._read = self._recent[self._read :], len(self._recent) - self._read
        return text[len(known) :]
