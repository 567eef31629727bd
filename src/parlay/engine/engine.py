"""The engine: one step is a page."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Container, Sequence
from dataclasses import replace
from functools import partial
from typing import Protocol

import psutil
import torch

from parlay.bets import Bet
from parlay.config import EngineConfig
from parlay.drafters.base import Drafters
from parlay.engine import self_check
from parlay.engine.accept import Acceptor
from parlay.engine.betting import make_drafters, policy_for
from parlay.engine.blocks import Blocks
from parlay.engine.checkpoint import resolve
from parlay.engine.compiling import Compiling, whole_model
from parlay.engine.kv import PagedKV
from parlay.engine.laps import Laps
from parlay.engine.model import LoadedModel, TargetModel, load_model
from parlay.engine.output import OutputStream
from parlay.engine.placement import bring
from parlay.engine.sampling import FreshDraws
from parlay.engine.scheduler import Scheduler
from parlay.engine.tokenizer import Tokenizer
from parlay.policy.base import Policy
from parlay.policy.cost import Profile
from parlay.policy.fixed import Off
from parlay.policy.own_bets import plan_around
from parlay.types import (
    Delta,
    EngineStatus,
    InvalidRequest,
    Offer,
    Request,
    Row,
    RowResult,
    StepPlan,
    StepReport,
    StepResult,
)

logger = logging.getLogger(__name__)


class Explorer(Protocol):
    """Bets now and then whatever the policy says, so that it is known what else could be won."""

    @property
    def awake(self) -> bool:
        """Whether all methods shall make offers in the next step, wanted or not."""
        ...

    def bets(
        self, rows: Sequence[Row], offers: Sequence[Sequence[Offer]], own: Sequence[Bet | None]
    ) -> Sequence[Bet | None]:
        """Bets that are made whatever the policy says: `own` itself, those that rows asked for, or more."""
        ...


class Engine:
    """Continuous batching with lossless speculation over one model. Not thread-safe: one thread owns it.

    Args:
        config: What to serve, and how.
        drafters: Makes the drafters for the target; None makes those that the configuration asks for.

    Raises:
        CheckpointError: when the model cannot be had.
        UnsupportedModel: when it could not be served exactly.
    """

    def __init__(self, config: EngineConfig, drafters: Callable[[LoadedModel], Drafters] | None = None) -> None:
        self.config = config
        strict = config.parity == "strict"
        loaded = load_model(resolve(config.model), config)
        expected = self_check.reference(loaded) if config.self_check else None
        if config.offload is not None or len(loaded.devices) > 1:
            bring(loaded.model, loaded.layers, loaded.device, () if config.offload else loaded.places)
        self.eos = loaded.eos
        self.vocab_size = int(loaded.config.vocab_size)
        longest = _max_model_len(config, loaded)
        self.drafters = (drafters or partial(make_drafters, config))(loaded)
        blocks = Blocks(_num_pages(config, loaded, longest, self.drafters.bytes_per_position), config.page_size)
        self.max_model_len = _fitting(config, longest, blocks)
        self.tokenizer = Tokenizer(loaded.tokenizer, self.max_model_len)
        self.model = TargetModel(
            loaded, blocks.num_pages + 1, config.page_size, strict, config.offload, config.memory_budget or 0
        )
        if expected is not None:
            self_check.check(self.model, expected)
        if strict:
            self_check.check_strict(self.model)
        self.drafters.attach(self.model)
        parts = [whole_model(self.model), *self.drafters.compilables()]
        self._compiling = [Compiling(part, config.compile) for part in parts if not strict and self.model.by_paths]
        self._adopt_compiled()
        self.scheduler = Scheduler(config, blocks, self.max_model_len)
        self._random = random.Random(config.seed)
        generator = torch.Generator(self.model.device).manual_seed(self._random.getrandbits(63))
        self.acceptor = Acceptor(FreshDraws(generator), self.eos)
        self._streams: dict[int, OutputStream] = {}
        self.listeners: list[Callable[[StepReport], None]] = []
        self.policy: Policy = Off()
        self.policy_name, self._policies = "off", dict[str, Policy]()
        self.profile: Profile | None = None  # what steps cost, once a policy has asked
        self.explorer: Explorer | None = None
        self._explored = False  # by this step's bets
        self._resting: Container[str] = ()  # methods whose offers nobody will look at
        self._take_policy(config.policy or "auto", policy_for(self, config.policy, config.calibrate))

    # ---- requests -------------------------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        """Queues a request.

        Raises:
            InvalidRequest: naming the field and the remedy.
        """
        params = request.params
        if not request.prompt:
            raise InvalidRequest("prompt: must not be empty", "prompt")
        self.scheduler.check(request)
        for name, ids in (
            ("prompt", request.prompt),
            ("logit_bias", params.logit_bias),
            ("stop_token_ids", params.stop_token_ids),
        ):
            if not all(0 <= token < self.vocab_size for token in ids):
                raise InvalidRequest(f"{name}: token ids must be from 0 to {self.vocab_size - 1}", name)
        self.drafters.check(params.speculation)
        if params.mode == "coupled" and params.seed is None:
            params = replace(params, seed=self._random.getrandbits(63))
            request = replace(request, params=params)
        limit = self.max_model_len - len(request.prompt)
        if params.max_tokens is not None:
            limit = min(limit, params.max_tokens)
        for seq in self.scheduler.add(request):
            self._streams[seq.seq] = OutputStream(request, seq.choice, self.tokenizer, self.eos, limit)

    def abort(self, request_id: str) -> None:
        """Forgets a request and frees its pages at once; unknown ids are ignored."""
        for seq in self.scheduler.abort(request_id):
            self._forget(seq.seq)
        if not self.has_work:
            self.model.idle()

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    @property
    def compiled(self) -> bool:
        """Whether the model's layers run compiled."""
        return all(self.model.segments.programs)

    def status(self) -> EngineStatus:
        """How it stands now; cheap enough for every step."""
        scheduler, running = self.scheduler, len(self.scheduler.running)
        return EngineStatus(
            slots=self.config.max_num_seqs,
            running=running,
            waiting=len(self._streams) - running,
            kv_usage=scheduler.blocks.usage,
            preemptions=scheduler.preemptions,
            prefix_queries=scheduler.prefix_queries,
            prefix_hits=scheduler.prefix_hits,
            failed_drafters=self.drafters.failed,
        )

    def forget_answers(self) -> None:
        """Lets drafters forget what they have learnt from answers to earlier requests."""
        self.drafters.forget_answers()

    def use_policy(self, name: str) -> None:
        """Lets another policy decide from the next step on; `auto` is the one that the configuration asks for.

        One that decided before goes on with what it knew.

        Raises:
            InvalidRequest: for an unknown name.
        """
        try:
            found = self._policies.get(name)
            if found is None:
                found = policy_for(self, self.config.policy if name == "auto" else name, "skip")
        except ValueError as error:
            said = str(error).removeprefix("policy ")
            raise InvalidRequest(f"policy: {said}", "policy") from error
        self._take_policy(name, found)
        logger.info("the policy is %s now", name)

    def _take_policy(self, name: str, policy: Policy) -> None:
        """Lets this policy decide, and keeps it under all of its names."""
        usual = self.config.policy or ("goodput" if self.config.speculation == "auto" else "auto")
        names = {usual, "auto"} if name in (usual, "auto") else {name}
        self._policies |= dict.fromkeys(names, policy)
        self.policy, self.policy_name, self._resting = policy, name, ()

    # ---- a step ---------------------------------------------------------------------------------------------

    def step(self) -> list[Delta]:
        """Advances every scheduled row by at least one token, or by a chunk of its prompt."""
        self._adopt_compiled()
        lap = Laps(self.model.device)
        rows = self.scheduler.schedule()
        if not rows:
            return []
        lap("schedule")
        offers = self.drafters.offer(rows, self._resting)
        plan = self._plan(rows, offers)
        self._resting = () if self.explorer is not None and self.explorer.awake else plan.resting
        plan = self.scheduler.reserve(rows, plan)
        self.model.kv.copy_pages(self.scheduler.take_page_copies())
        lap("plan")
        drafts = self.drafters.draft(rows, plan, self.scheduler.budget, offers)
        lap("draft")
        scores = self.model.verify(rows, drafts, self.drafters.taps)
        lap("verify")
        outcome = self.acceptor.accept(rows, drafts, scores)
        lap("accept")
        deltas, kept = self._read_out(rows, outcome, lap.began)
        lap("detokenise")
        self.model.compact(rows, kept)
        self.drafters.commit(rows, kept, scores.taps)
        self.scheduler.commit(rows, kept)
        self._finish(rows, deltas)
        if not self.has_work:
            self.model.idle()
        lap("commit")
        result = StepResult(outcome, lap.parts())
        self._observe(rows, result)
        if self.listeners:
            self._tell(StepReport(rows, offers, result, deltas, lap.ended, self._explored))
        return [delta for delta in deltas if delta.tokens or delta.prompt_logprobs]

    def _plan(self, rows: list[Row], offers: list[list[Offer]]) -> StepPlan:
        """What to bet; nothing for now where the policy fails, and plain decoding from then on."""
        bets, budget = self._bets(rows, offers), self.scheduler.budget
        try:
            return plan_around(self.policy, bets, rows, offers, budget)
        except Exception:  # whatever it is, requests go on without its bets
            self._drop_policy()
            return plan_around(self.policy, bets, rows, offers, budget)

    def _bets(self, rows: list[Row], offers: list[list[Offer]]) -> Sequence[Bet | None]:
        """Those that rows asked for, and now and then the explorer's."""
        own = [row.own_bet for row in rows]
        self._explored = False
        if self.explorer is None:
            return own
        try:
            bets = self.explorer.bets(rows, offers, own)
        except Exception:  # nobody's request ends for it
            logger.exception("exploring failed and ends")
            self.explorer = None
            return own
        self._explored = bets is not own
        return bets

    def _observe(self, rows: list[Row], result: StepResult) -> None:
        """Tells the policy what came of its plan; whole results, since an output's end is not a rejection."""
        try:
            self.policy.observe(rows, result)
        except Exception:
            self._drop_policy()

    def _drop_policy(self) -> None:
        """Decodes plainly from now on; the policy that failed begins anew when somebody asks for it."""
        logger.exception("the policy %s failed: nothing is bet from now on", self.policy_name)
        self._policies = {name: some for name, some in self._policies.items() if some is not self.policy}
        self.policy, self.policy_name, self._resting = Off(), "off", ()

    def _tell(self, report: StepReport) -> None:
        for listener in tuple(self.listeners):
            try:
                listener(report)
            except Exception:  # a full disk, say: nobody's request ends for it
                logger.exception("a listener failed and hears no more steps")
                self.listeners.remove(listener)
                self.explorer = None  # nobody may be left to learn from it

    def _read_out(
        self, rows: list[Row], results: tuple[RowResult, ...], began: float
    ) -> tuple[list[Delta], tuple[RowResult, ...]]:
        """Turns tokens into text, and cuts each row's result where its output ends."""
        deltas = [self._streams[row.seq].take(got, began) for row, got in zip(rows, results, strict=True)]
        cut = tuple(
            got if len(delta.tokens) == len(got.emitted) else _cut(got, len(delta.tokens))
            for got, delta in zip(results, deltas, strict=True)
        )
        return deltas, cut

    def _finish(self, rows: list[Row], deltas: list[Delta]) -> None:
        ended = {row.seq for row, delta in zip(rows, deltas, strict=True) if delta.finish_reason}
        for seq in [seq for seq in self.scheduler.running if seq.seq in ended]:
            self.scheduler.remove(seq)
            self._forget(seq.seq)

    def _forget(self, seq: int) -> None:
        self._streams.pop(seq, None)
        self.drafters.forget(seq)

    def _adopt_compiled(self) -> None:
        """Takes compiled layers once they are there."""
        if self._compiling:
            self._compiling = [one for one in self._compiling if not one.is_over()]

    def check_integrity(self) -> None:
        """Checks pages, sequences and outputs against each other.

        Raises:
            AssertionError: naming the first broken invariant.
        """
        self.scheduler.check_integrity()
        live = {seq.seq for seq in self.scheduler.sequences()}
        assert live == self._streams.keys(), "an output stream without a sequence, or the other way round"


def _cut(result: RowResult, count: int) -> RowResult:
    return replace(
        result,
        emitted=result.emitted[:count],
        accepted=result.accepted[:count],
        logprobs=result.logprobs[:count],
    )


def _max_model_len(config: EngineConfig, loaded: LoadedModel) -> int:
    if config.max_model_len is None:
        return loaded.context
    if config.max_model_len > loaded.context:
        raise ValueError(
            f"max_model_len: {config.max_model_len} exceeds the model's context of {loaded.context}; lower it"
        )
    return config.max_model_len


def _fitting(config: EngineConfig, longest: int, blocks: Blocks) -> int:
    """The context that the KV pool can hold for one request."""
    fits = blocks.num_pages * config.page_size
    if fits >= longest:
        return longest
    if config.max_model_len is not None:
        raise ValueError(
            f"max_model_len: {longest} positions do not fit in a KV cache of {fits}; lower it or raise kv_cache_memory"
        )
    logger.warning("the KV cache holds %d positions, so the context is %d, not %d", fits, fits, longest)
    return fits


def _num_pages(config: EngineConfig, loaded: LoadedModel, max_model_len: int, beside: int) -> int:
    """Pages of the pool, the null page included: what was asked for, or what rows can use within a share of memory.

    Drafters take `beside` bytes for every position.
    """
    page_bytes = dict.fromkeys(loaded.devices, 0)
    for shape, device in zip(loaded.shapes, loaded.places, strict=True):
        page_bytes[device] += PagedKV.bytes_per_position([shape], loaded.dtype) * config.page_size
    page_bytes[loaded.device] += beside * config.page_size
    if config.kv_cache_memory is not None:
        return config.kv_cache_memory // sum(page_bytes.values())
    useful = config.max_num_seqs * -(-max_model_len // config.page_size)
    return 1 + min(useful, *(_kv_memory(config, device) // size for device, size in page_bytes.items()))


def _kv_memory(config: EngineConfig, device: torch.device) -> int:
    """Bytes of a device that the KV pool may take."""
    if device.type == "cuda":
        return int((torch.cuda.mem_get_info(device)[0] - (config.memory_budget or 0)) * 0.8)
    return psutil.virtual_memory().available // 4
