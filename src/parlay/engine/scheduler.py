"""Who runs in a step, on which pages. Host only, no torch.

There are no phases: a sequence is known tokens, of which the first `computed` are in KV. Prefill, decode and
recomputation after preemption differ only in how many are not.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from parlay.bets import Bet
from parlay.config import EngineConfig
from parlay.engine.blocks import Blocks, page_digest
from parlay.types import InvalidRequest, Request, Row, RowResult, StepPlan

OLDEST_SHARE = 4  # one part in so many of a step's tokens is kept for the row that has run longest


@dataclass(eq=False, slots=True)
class Sequence:
    """One choice of one request: the scheduler's own mutable record, never seen outside the engine."""

    seq: int
    request: Request
    choice: int
    tokens: array[int]
    computed: int = 0
    scored: int = 0  # prompt positions whose log-probabilities have been delivered
    pages: list[int] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)  # names of the full pages of tokens[:computed]
    looked_up: bool = False  # whether `computed` began as what published pages held, not as another choice's prompt
    siblings: list[Sequence] = field(default_factory=list)  # choices that will share this one's prompt pages

    @property
    def remaining(self) -> int:
        return len(self.tokens) - self.computed

    @property
    def scores_prompt(self) -> bool:
        return self.request.params.prompt_logprobs is not None and self.choice == 0


class Scheduler:
    """Continuous batching with chunked prefill, prefix reuse, copy-on-write and preemption by recomputation.

    Invariants: `running` is in order of admission; a sequence is in exactly one of `running`, `waiting` or its first
    choice's `siblings`; no position that a scheduled row writes lies in a page that is shared or published.
    """

    def __init__(self, config: EngineConfig, blocks: Blocks, max_model_len: int) -> None:
        self.config = config
        self.blocks = blocks
        self.max_model_len = max_model_len
        self.running: list[Sequence] = []
        self.waiting: deque[Sequence] = deque()
        self.page_copies: list[tuple[int, int]] = []  # (source, destination), to be copied before the next pass
        self.budget = 0  # tokens left for guesses in the step just scheduled
        self.preemptions = 0
        self.prefix_queries = 0  # tokens that were looked up among published pages, counted at admission
        self.prefix_hits = 0  # and found there
        self._next = 0

    # ---- requests come and go -------------------------------------------------------------------------------

    def check(self, request: Request) -> None:
        """Refuses an id that is in use, and what could not finish even if it ran alone.

        Raises:
            InvalidRequest: naming the field and the remedy.
        """
        if any(seq.request.id == request.id for seq in self.sequences()):
            raise InvalidRequest(f"request id {request.id!r} is in use; choose another", "id")
        limit = self.max_model_len
        if len(request.prompt) >= limit:
            raise InvalidRequest(
                f"prompt: has {len(request.prompt)} tokens, and the context of {limit} must also hold the output; "
                "shorten the prompt",
                "prompt",
                "context_length_exceeded",
            )
        longest = limit if request.params.max_tokens is None else len(request.prompt) + request.params.max_tokens
        if longest > limit:
            raise InvalidRequest(
                f"max_tokens: {request.params.max_tokens} on top of a prompt of {len(request.prompt)} tokens exceeds "
                f"the context of {limit}; lower max_tokens to at most {limit - len(request.prompt)}",
                "max_tokens",
                "context_length_exceeded",
            )
        # A copied page for the prompt's last token, when choices share the prompt.
        needed = self.blocks.pages_for(longest) + (request.params.n > 1)
        if needed > self.blocks.num_pages:
            raise InvalidRequest(
                f"max_tokens: prompt and output may take {longest} positions, and the whole KV cache holds "
                f"{self.blocks.num_pages * self.blocks.page_size}; lower max_tokens or raise --kv-cache-memory",
                "max_tokens",
            )

    def add(self, request: Request) -> list[Sequence]:
        """Queues every choice of a checked request."""
        choices = [self._sequence(request, choice) for choice in range(request.params.n)]
        choices[0].siblings = choices[1:]
        self.waiting.append(choices[0])
        return choices

    def _sequence(self, request: Request, choice: int) -> Sequence:
        self._next += 1
        return Sequence(self._next, request, choice, array("i", request.prompt))

    def abort(self, request_id: str) -> list[Sequence]:
        """Forgets a request and frees its pages at once; returns what was live of it."""
        gone = [seq for seq in self.sequences() if seq.request.id == request_id]
        for seq in gone:
            seq.siblings = []
            self.remove(seq)
        return gone

    def remove(self, seq: Sequence) -> None:
        """Takes one sequence out and frees its pages."""
        assert not seq.siblings, "choices that wait for this one's prompt would be lost"
        self.blocks.release(seq.pages)
        seq.pages = []
        if seq in self.running:
            self.running.remove(seq)
        elif seq in self.waiting:
            self.waiting.remove(seq)

    def sequences(self) -> Iterator[Sequence]:
        """All live sequences."""
        for seq in (*self.running, *self.waiting):
            yield seq
            yield from seq.siblings

    @property
    def has_work(self) -> bool:
        return bool(self.running or self.waiting)

    # ---- a step ---------------------------------------------------------------------------------------------

    def schedule(self) -> list[Row]:
        """Chooses known tokens for this step; known tokens come before any guess.

        Rows with few known tokens left go first, so that no long prompt delays the others' next token, but the row
        that has run longest is always given a share, so that no stream of short prompts starves it.
        """
        while self._admit():
            pass
        budget = self.config.max_num_batched_tokens
        counts: dict[Sequence, int] = {}
        oldest = self.running[:1]
        shares = {seq: min(seq.remaining, max(1, budget // OLDEST_SHARE)) for seq in oldest}
        for seq in sorted(self.running, key=lambda seq: seq.remaining):
            others = sum(share for other, share in shares.items() if other is not seq and other not in counts)
            count = min(seq.remaining, budget - others)
            if count <= 0 or seq not in self.running:
                continue  # out of budget, or preempted to make room a moment ago
            for victim in self._make_room(seq, seq.computed + count):
                budget += counts.pop(victim, 0)
            if seq in self.running:
                self._extend(seq, seq.computed + count)
                counts[seq] = count
                budget -= count
        self.budget = budget
        return [self._row(seq, counts[seq]) for seq in self.running if seq in counts]

    def _admit(self) -> bool:
        """Moves the first waiting sequence to `running` if everyone's known tokens then still fit."""
        if not self.waiting or len(self.running) >= self.config.max_num_seqs:
            return False
        seq = self.waiting[0]
        if not seq.pages:
            self._reuse_prefix(seq)
        if self.running:
            wanted = sum(self._pages_wanted(some, len(some.tokens) + 1) for some in (seq, *self.running))
            if wanted > self.blocks.num_free:
                return False
        else:
            self._make_room(seq, len(seq.tokens))
        self.waiting.remove(seq)
        self.running.append(seq)
        if seq.looked_up:
            self.prefix_queries += len(seq.tokens)
            self.prefix_hits += seq.computed
        return True

    def _may_reuse(self, seq: Sequence) -> bool:
        scores = seq.scores_prompt and seq.scored < len(seq.request.prompt) - 1
        return self.config.prefix_caching and not scores

    def _reuse_prefix(self, seq: Sequence) -> None:
        """Takes the published pages that hold the beginning of these tokens; at least one token stays to be run."""
        if not self._may_reuse(seq):
            return
        seq.looked_up = True
        size, name = self.blocks.page_size, b""
        for end in range(size, len(seq.tokens), size):
            name = page_digest(name, seq.tokens[end - size : end])
            page = self.blocks.lookup(name)
            if page is None:
                break
            self.blocks.share([page])
            seq.pages.append(page)
            seq.digests.append(name)
            seq.computed = end

    def _row(self, seq: Sequence, count: int) -> Row:
        params = seq.request.params
        made = len(seq.tokens) - len(seq.request.prompt)
        room = self.max_model_len - len(seq.tokens)
        if params.max_tokens is not None:
            room = min(room, params.max_tokens - made)
        guesses = seq.computed + count == len(seq.tokens) and params.speculation != "off"
        return Row(
            seq=seq.seq,
            request=seq.request,
            choice=seq.choice,
            tokens=seq.tokens,
            length=len(seq.tokens),
            start=seq.computed,
            count=count,
            scored=seq.scored,
            max_depth=max(0, room - 1) if guesses else 0,
            pages=seq.pages,
        )

    def reserve(self, rows: list[Row], plan: StepPlan) -> StepPlan:
        """Finds pages for the planned guesses, shrinking bets that do not fit; preempts nobody for them."""
        bets: list[Bet | None] = []
        size, budget = self.blocks.page_size, self.budget
        for row, bet in zip(rows, plan.bets, strict=True):
            if bet is not None:
                fits = (len(row.pages) + self.blocks.num_free) * size - len(row.tokens)
                tree = bet.tree.trim(min(fits, budget), row.max_depth)
                bet = replace(bet, tree=tree) if tree else None
            if bet is not None:
                budget -= len(bet.tree)
                while len(row.pages) * size < len(row.tokens) + len(bet.tree):
                    row.pages.append(self.blocks.take())
            bets.append(bet)
        return replace(plan, bets=tuple(bets))

    def commit(self, rows: list[Row], results: tuple[RowResult, ...]) -> None:
        """Appends what was emitted, keeps the pages of accepted tokens, publishes full ones and frees the rest."""
        live = {seq.seq: seq for seq in self.running}
        for row, got in zip(rows, results, strict=True):
            seq = live[row.seq]
            known = row.start + row.count
            seq.tokens.extend(got.emitted)
            # The last emitted token is never in KV; a stop may have cut off some that are.
            seq.computed = min(known + len(got.accepted), max(known, len(seq.tokens) - 1))
            seq.scored = max(seq.scored, min(known, len(seq.request.prompt) - 1))
            keep = self.blocks.pages_for(seq.computed + 1)  # the next token's too: it may be there already
            self.blocks.release(seq.pages[keep:])
            del seq.pages[keep:]
            self._publish(seq)
            if seq.siblings and seq.computed >= len(seq.request.prompt):
                self._fork(seq)

    def _publish(self, seq: Sequence) -> None:
        size = self.blocks.page_size
        for index in range(len(seq.digests), seq.computed // size):
            previous = seq.digests[-1] if seq.digests else b""
            seq.digests.append(page_digest(previous, seq.tokens[index * size : (index + 1) * size]))
            if self.config.prefix_caching:
                self.blocks.publish(seq.pages[index], seq.digests[-1])

    def _fork(self, seq: Sequence) -> None:
        """Hands the finished prompt to the other choices, which re-run only its last token on their own page."""
        last = len(seq.request.prompt) - 1
        shared = seq.pages[: self.blocks.pages_for(last)]
        for sibling in seq.siblings:
            self.blocks.share(shared)
            sibling.pages = list(shared)
            sibling.computed = last
            sibling.digests = seq.digests[: last // self.blocks.page_size]
        self.waiting.extendleft(reversed(seq.siblings))
        seq.siblings = []

    # ---- pages ----------------------------------------------------------------------------------------------

    def _pages_wanted(self, seq: Sequence, end: int) -> int:
        """Free pages needed before positions computed..end can be written, copies of shared pages included."""
        fresh = self.blocks.pages_for(end) - len(seq.pages)
        return fresh + sum(1 for _ in self._shared_pages(seq, end))

    def _shared_pages(self, seq: Sequence, end: int) -> Iterator[int]:
        first = seq.computed // self.blocks.page_size
        for index in range(first, min(self.blocks.pages_for(end), len(seq.pages))):
            if self.blocks.is_shared(seq.pages[index]):
                yield index

    def _make_room(self, seq: Sequence, end: int) -> list[Sequence]:
        """Preempts until positions up to `end` fit: forks in the queue first, then the youngest running row.

        Returns:
            The preempted, among whom may be `seq` itself.
        """
        victims: list[Sequence] = []
        while seq not in victims and self._pages_wanted(seq, end) > self.blocks.num_free:
            forks = (other for other in reversed(self.waiting) if other.pages and other is not seq)
            victim = next(forks, None) or self.running[-1]
            self._preempt(victim)
            victims.append(victim)
        return victims

    def _preempt(self, seq: Sequence) -> None:
        self.blocks.release(seq.pages)
        seq.pages, seq.digests, seq.computed = [], [], 0
        if seq in self.running:
            self.preemptions += 1
            self.running.remove(seq)
            self.waiting.appendleft(seq)

    def _extend(self, seq: Sequence, end: int) -> None:
        """Gives `seq` private, unnamed pages for positions computed..end."""
        for index in self._shared_pages(seq, end):
            copy = self.blocks.take()
            self.page_copies.append((seq.pages[index], copy))
            self.blocks.release([seq.pages[index]])
            seq.pages[index] = copy
        for page in seq.pages[seq.computed // self.blocks.page_size :]:
            self.blocks.unpublish(page)  # another choice may have published it with what it wrote there
        while len(seq.pages) < self.blocks.pages_for(end):
            seq.pages.append(self.blocks.take())

    def take_page_copies(self) -> list[tuple[int, int]]:
        copies, self.page_copies = self.page_copies, []
        return copies

    def check_integrity(self) -> None:
        """Checks pages and sequences against each other.

        Raises:
            AssertionError: naming the first broken invariant.
        """
        everyone = list(self.sequences())
        assert len(everyone) == len({seq.seq for seq in everyone}), "a sequence is in two places"
        self.blocks.check_integrity(seq.pages for seq in everyone)
        for seq in everyone:
            assert 0 <= seq.computed < len(seq.tokens), f"{seq.seq}: {seq.computed} computed of {len(seq.tokens)}"
            assert len(seq.pages) * self.blocks.page_size >= seq.computed, f"{seq.seq}: KV without a page"
            full = seq.computed // self.blocks.page_size
            assert len(seq.digests) == full, f"{seq.seq}: unnamed full pages"
            for page, digest in zip(seq.pages, seq.digests, strict=False):
                assert self.blocks.name_of(page) in (None, digest), f"{seq.seq}: page {page} has another's name"
        for seq in self.running:
            for page in seq.pages[len(seq.digests) :]:
                fresh = seq.computed < len(seq.request.prompt) and self.blocks.is_shared(page)
                assert fresh or self.blocks.name_of(page) is None, f"{seq.seq}: page {page} is named before it is full"
