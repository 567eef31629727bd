"""Offline use: a list of prompts in, a list of outputs out."""

from __future__ import annotations

import itertools
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from parlay.config import EngineConfig
from parlay.engine.engine import Engine
from parlay.types import (
    CompletionOutput,
    Delta,
    FinishReason,
    Request,
    RequestOutput,
    SamplingParams,
    SpeculationStats,
    TokenIds,
    TokenLogprobs,
)

Prompt = str | TokenIds


class LLM:
    """Generates from a model without a server.

    Args:
        model: A configuration, or a model's name with the configuration's other fields as keywords.
    """

    def __init__(self, model: str | EngineConfig, **options: Any) -> None:
        config = EngineConfig.from_dict({"model": model, **options}) if isinstance(model, str) else model
        self.engine = Engine(config)
        self._ids = itertools.count()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Continues every prompt, all of them batched.

        Args:
            prompts: Text or token ids, one or many.
            params: One for all, or one per prompt.
            use_tqdm: Show a progress bar (named as vLLM's users know it).

        Returns:
            One output per prompt, in their order.

        Raises:
            InvalidRequest: before anything runs, naming the field and the remedy.
        """
        single = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int))
        many: list[Any] = [prompts] if single else list(prompts)
        tokens = [tuple(self.engine.tokenizer.encode(p)) if isinstance(p, str) else tuple(p) for p in many]
        texts = [p if isinstance(p, str) else None for p in many]
        return self._run(tokens, texts, params, use_tqdm)

    def chat(
        self,
        conversations: Sequence[Any],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Answers one conversation (a list of messages) or many, through the model's chat template.

        Raises:
            InvalidRequest: when the model has no chat template, and as for `generate`.
        """
        many = [conversations] if conversations and isinstance(conversations[0], dict) else conversations
        tokens = [tuple(self.engine.tokenizer.apply_chat_template(messages)) for messages in many]
        return self._run(tokens, [None] * len(tokens), params, use_tqdm)

    def _run(
        self,
        prompts: Sequence[tuple[int, ...]],
        texts: Sequence[str | None],
        params: SamplingParams | Sequence[SamplingParams] | None,
        progress: bool,
    ) -> list[RequestOutput]:
        each = [params or SamplingParams()] * len(prompts) if not isinstance(params, Sequence) else list(params)
        if len(each) != len(prompts):
            raise ValueError(f"params: got {len(each)} for {len(prompts)} prompts; give one, or one per prompt")
        now = time.perf_counter()
        requests = [
            Request(f"generate-{next(self._ids)}", prompt, param, now)
            for prompt, param in zip(prompts, each, strict=True)
        ]
        outputs = {request.id: _Collected(request) for request in requests}
        try:
            for request in requests:
                self.engine.add(request)
            with _progress(len(requests), progress) as advance:
                while self.engine.has_work:
                    for delta in self.engine.step():
                        advance(outputs[delta.request_id].take(delta))
        except BaseException:
            for request in requests:
                self.engine.abort(request.id)
            raise
        return [outputs[r.id].output(text) for r, text in zip(requests, texts, strict=True)]


@dataclass(slots=True)
class _Choice:
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    stats: SpeculationStats = field(default_factory=SpeculationStats)
    methods: defaultdict[str, SpeculationStats] = field(default_factory=lambda: defaultdict(SpeculationStats))
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None

    def output(self, index: int) -> CompletionOutput:
        assert self.finish_reason is not None, "a choice never ended"
        return CompletionOutput(
            index=index,
            text=self.text,
            token_ids=tuple(self.tokens),
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
            logprobs=tuple(self.logprobs),
            stats=self.stats,
            methods=dict(self.methods),
        )


class _Collected:
    """The deltas of one request, put together."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.choices = [_Choice() for _ in range(request.params.n)]
        self.prompt_logprobs: list[TokenLogprobs] = []

    def take(self, delta: Delta) -> bool:
        """Adds a delta; True when it finished the request."""
        choice = self.choices[delta.choice]
        choice.text += delta.text
        choice.tokens += delta.tokens
        choice.logprobs += delta.logprobs
        choice.stats += delta.stats
        if delta.method is not None:
            choice.methods[delta.method] += delta.stats
        self.prompt_logprobs += delta.prompt_logprobs
        choice.finish_reason, choice.stop_reason = delta.finish_reason, delta.stop_reason
        return delta.finish_reason is not None and all(c.finish_reason for c in self.choices)

    def output(self, prompt: str | None) -> RequestOutput:
        outputs = tuple(choice.output(index) for index, choice in enumerate(self.choices))
        return RequestOutput(self.request.id, prompt, self.request.prompt, outputs, tuple(self.prompt_logprobs))


class _progress:
    """A progress bar over requests on stderr, or nothing."""

    def __init__(self, total: int, shown: bool) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._bar = Progress(*columns, console=Console(stderr=True), disable=not shown)
        self._task = self._bar.add_task("generating", total=total)

    def __enter__(self) -> Callable[[bool], None]:
        self._bar.start()
        return lambda done: self._bar.advance(self._task, int(done))

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
