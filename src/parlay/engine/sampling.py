"""From logits to tokens: one order of processing, shared by target and drafters, and the sources of randomness.

The order is: bias (and tokens forbidden for now), penalties, temperature, top-k, top-p, min-p. Processing is a pure
function of a request's parameters and the tokens of the path it is applied to, so a penalty sees the guesses of its
own path and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, Self

import torch
from torch.nn.functional import pad

from parlay.engine import native
from parlay.types import Row, SamplingParams

NEVER = float("-inf")
BLOCK = 256  # tokens among which the last choice falls


@dataclass(frozen=True, slots=True)
class Path:
    """The tokens behind one distribution: a prompt, what was emitted, and guesses.

    `forbidden` are ids that may not come next (ends of sequence before `min_tokens`).
    """

    params: SamplingParams
    prompt: Sequence[int]
    output: Sequence[int]
    forbidden: tuple[int, ...] = ()

    @classmethod
    def behind(cls, row: Row, guesses: Sequence[int], eos: Sequence[int]) -> Self:
        """The path that ends in these guesses behind a row's known tokens, for target and drafters alike.

        Args:
            row: The row.
            guesses: In their order.
            eos: End-of-sequence ids of the model.
        """
        params, prompt = row.request.params, len(row.request.prompt)
        ends: tuple[int, ...] = ()
        if row.length - prompt + len(guesses) < params.min_tokens:
            ends = (*params.stop_token_ids, *(() if params.ignore_eos else eos))
        path = cls(params, (), (), ends)
        if not path.is_penalised:  # nothing else looks at the tokens
            return path
        return cls(params, row.tokens[:prompt], [*row.tokens[prompt : row.length], *guesses], ends)

    @property
    def is_plain(self) -> bool:
        """Whether processing would leave the order of the logits as it is."""
        params = self.params
        return not (self.forbidden or params.logit_bias or self.is_penalised)

    @property
    def is_penalised(self) -> bool:
        params = self.params
        return bool(params.repetition_penalty != 1 or params.presence_penalty or params.frequency_penalty)


def process(logits: torch.Tensor, paths: Sequence[Path]) -> torch.Tensor:
    """Applies every path's parameters to its logits.

    Args:
        logits: [A, vocab] in float32 or float64; not changed.
        paths: One per line.

    Returns:
        [A, vocab], -inf where a token may not be chosen. Temperature 0 leaves the scale alone.
    """
    if not all(path.is_plain for path in paths):
        logits = logits.clone()
        for line, path in enumerate(paths):
            _shift(logits[line], path)
    return _truncate(logits, [path.params for path in paths])


def argmax(logits: torch.Tensor) -> torch.Tensor:
    """[A, vocab] -> [A] the first of each line's largest."""
    if logits.device.type == "cpu" and logits.dtype in (torch.float32, torch.bfloat16) and native.load():
        return torch.ops.parlay.argmax(logits.contiguous())
    return logits.argmax(-1)


def _shift(logits: torch.Tensor, path: Path) -> None:
    """Bias, forbidden tokens and penalties. logits: [vocab], in place."""
    if path.params.logit_bias:
        ids = torch.tensor(list(path.params.logit_bias), device=logits.device)
        logits[ids] += torch.tensor(list(path.params.logit_bias.values()), device=logits.device)
    if path.forbidden:
        logits[torch.tensor(path.forbidden, device=logits.device)] = NEVER
    if path.is_penalised:
        _penalise(logits, path)


def _penalise(logits: torch.Tensor, path: Path) -> None:
    """Repetition over prompt and output, presence and frequency over the output. logits: [vocab], in place."""
    params, device = path.params, logits.device
    output = torch.tensor(path.output, dtype=torch.long, device=device)
    if params.repetition_penalty != 1:
        seen = torch.cat([torch.tensor(path.prompt, dtype=torch.long, device=device), output]).unique()
        scores = logits[seen]
        factor = params.repetition_penalty
        logits[seen] = torch.where(scores > 0, scores / factor, scores * factor)
    if params.presence_penalty or params.frequency_penalty:
        seen, counts = output.unique(return_counts=True)
        logits[seen] -= params.presence_penalty + params.frequency_penalty * counts.to(logits.dtype)


def _truncate(logits: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    """Temperature, then top-k, top-p and min-p of every line. logits: [A, vocab], not changed."""
    temperatures = [p.temperature or 1.0 for p in params]
    if logits.device.type == "cpu" and logits.dtype is torch.float32 and native.load():
        drawn = [p.temperature > 0 for p in params]  # the others only need their largest
        vocab = logits.shape[-1]
        top_k = torch.tensor([min(max(0, p.top_k), vocab) if s else 0 for p, s in zip(params, drawn, strict=True)])
        top_p = [p.top_p if some else 1.0 for p, some in zip(params, drawn, strict=True)]
        min_p = [p.min_p if some else 0.0 for p, some in zip(params, drawn, strict=True)]
        limits = (torch.tensor(limit, dtype=torch.float64) for limit in (top_p, min_p))
        return torch.ops.parlay.truncate(
            logits.contiguous(), torch.tensor(temperatures, dtype=torch.float64), top_k, *limits
        )
    logits = logits / logits.new_tensor(temperatures)[:, None]
    floor = logits.new_full((len(params), 1), NEVER)
    for limit, wanted in (
        (_top_k, [p.top_k > 0 and p.temperature > 0 for p in params]),
        (_top_p, [p.top_p < 1 and p.temperature > 0 for p in params]),
        (_min_p, [p.min_p > 0 and p.temperature > 0 for p in params]),
    ):
        lines = [line for line, wants in enumerate(wanted) if wants]
        if lines:
            index = torch.tensor(lines, device=logits.device)
            some = logits if len(lines) == len(params) else logits[index]
            floor[index] = torch.maximum(floor[index], limit(some, floor[index], [params[line] for line in lines]))
    return logits.masked_fill_(logits < floor, NEVER)


# Each of these keeps the most likely tokens down to some logit, which it returns ([A, 1]); tokens tied with the last
# one that is kept stay too. Of its logits [A, vocab] those below `floor` [A, 1] are already gone.


def _top_k(logits: torch.Tensor, floor: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    """Keeps the k most likely tokens."""
    ks = torch.tensor([min(p.top_k, logits.shape[-1]) for p in params], device=logits.device)
    best = logits.topk(int(ks.max()), dim=-1).values  # [A, k]
    return best.gather(1, ks[:, None] - 1)


def _top_p(logits: torch.Tensor, floor: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    """Keeps the smallest set of most likely tokens that holds the mass.

    Sorts only as many tokens as the mass needs: 64, then eight times more, up to the vocabulary.
    """
    mass = logits.new_tensor([p.top_p for p in params])[:, None]
    # Line by line: threads cut a rectangle elsewhere than a line, and a seed's output must not depend on the batch.
    totals = [line.logsumexp(-1) for line in logits.masked_fill(logits < floor, NEVER)]
    vocab, width = logits.shape[-1], 64
    while True:
        best = logits.topk(min(width, vocab), dim=-1).values
        held = torch.stack([(line - total).exp().cumsum(-1) for line, total in zip(best, totals, strict=True)])
        if width >= vocab or bool((held[:, -1:] >= mass).all()):
            break
        width *= 8
    last = (held < mass).sum(-1, keepdim=True).clamp(max=best.shape[-1] - 1)  # first index that reaches the mass
    return best.gather(1, last)


def _min_p(logits: torch.Tensor, floor: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    """Keeps tokens with at least this fraction of the top token's probability."""
    fraction = logits.new_tensor([p.min_p for p in params])[:, None]
    return logits.amax(-1, keepdim=True) + fraction.log()


class Draws(Protocol):
    """Where the acceptor's chance comes from. A test replaces it to explore every branch with its probability."""

    def accept(self, probability: torch.Tensor) -> torch.Tensor:
        """probability: [A] -> [A] bool, each True with its own probability, independently."""
        ...

    def categorical(self, probs: torch.Tensor) -> torch.Tensor:
        """probs: [A, vocab], rows summing to 1 -> [A] token ids."""
        ...

    def gumbel(self, keys: Sequence[tuple[int, int, int]], logits: torch.Tensor) -> torch.Tensor:
        """Noise for these logits [A, vocab], keyed by (seed, choice, output position) and token id."""
        ...


@dataclass(frozen=True, slots=True)
class FreshDraws:
    """Fresh randomness at every call, in at least float32; keyed noise is the same for the same key."""

    generator: torch.Generator

    def accept(self, probability: torch.Tensor) -> torch.Tensor:
        drawn = torch.rand(
            probability.shape, dtype=probability.dtype, device=probability.device, generator=self.generator
        )
        return drawn < probability

    def categorical(self, probs: torch.Tensor) -> torch.Tensor:
        """One number per line picks a block of the vocabulary by its mass, then a token in the block."""
        vocab = probs.shape[-1]
        drawn = torch.rand(len(probs), 1, dtype=torch.float64, device=probs.device, generator=self.generator)
        if probs.device.type == "cpu" and probs.dtype is torch.float32 and native.load():
            return torch.ops.parlay.draw(probs.contiguous(), drawn)
        blocks = pad(probs, (0, -vocab % BLOCK)).view(len(probs), -1, BLOCK)
        block, drawn = _look_up(blocks.sum(-1), drawn)
        token, _ = _look_up(blocks[torch.arange(len(probs), device=probs.device), block], drawn)
        return (block * BLOCK + token).clamp(max=vocab - 1)  # a model that overflows gives NaN, above every number

    def gumbel(self, keys: Sequence[tuple[int, int, int]], logits: torch.Tensor) -> torch.Tensor:
        return gumbel_noise(keys, logits.shape[-1], logits.device)


def _look_up(masses: torch.Tensor, drawn: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where a number falls among masses that are laid end to end, in float64.

    Args:
        masses: [A, N], not negative.
        drawn: [A, 1] in [0, 1), as a share of their sum.

    Returns:
        [A] which mass, and [A, 1] how far into it, as a share of it.
    """
    heights = masses.cumsum(-1, dtype=torch.float64)
    total = heights[:, -1:]
    at = torch.minimum(drawn * total, torch.nextafter(total, torch.zeros_like(total)))  # the product may round up
    found = torch.searchsorted(heights, at, right=True).clamp(max=masses.shape[-1] - 1)
    mass = masses.gather(1, found).to(torch.float64)
    into = (at - (heights.gather(1, found) - mass)) / mass
    return found[:, 0], into.clamp(0, 1 - 2**-53)


def draw_without_replacement(probs: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    """Children of one node in draw order: the first `count` exponential clocks to ring.

    Sequoia (Chen et al. 2024), section 4.2 and algorithm 2. Equivalent to drawing one, removing it, renormalising.

    Args:
        probs: [A, vocab] in at least float32.
        count: Children per node.
        generator: Used freshly at every call; reusing noise between steps would correlate a sequence's tokens.

    Returns:
        [A, count] ids; where a distribution has fewer possible tokens, the rest are uniform over the others, as the
        verification assumes.
    """
    clocks = torch.empty_like(probs).exponential_(generator=generator)
    return torch.where(probs > 0, probs / clocks, -clocks).topk(count, dim=-1).indices


_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)  # Philox 4x32-10: Salmon et al. 2011, table 2
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF


def philox(counter: tuple[torch.Tensor, ...], key: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Philox 4x32-10, a counter-based generator: equal inputs give equal words on every device.

    Args:
        counter: Four broadcastable int64 tensors of 32-bit words.
        key: Two of them.

    Returns:
        Four int64 tensors of 32-bit random words.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # int64 products wrap, which leaves both 32-bit halves right once the sign is masked off.
        first, second = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((second >> 32) & _LOW) ^ c1 ^ k0,
            second & _LOW,
            ((first >> 32) & _LOW) ^ c3 ^ k1,
            first & _LOW,
        )
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return c0, c1, c2, c3


def gumbel_noise(seeds: Sequence[tuple[int, int, int]], vocab: int, device: torch.device) -> torch.Tensor:
    """Gumbel noise that depends on (seed, choice, output position, token id) and on nothing else.

    Args:
        seeds: One (seed, choice, position) per line.
        vocab: Number of tokens.
        device: Where the noise is wanted.

    Returns:
        [A, vocab] float32.
    """
    blocks = torch.arange(-(-vocab // 4), device=device)[None, :]
    return _gumbel(torch.stack(_words(seeds, blocks), dim=-1).view(len(seeds), -1)[:, :vocab])


def gumbel_at(seeds: Sequence[tuple[int, int, int]], tokens: torch.Tensor) -> torch.Tensor:
    """The same noise for some tokens of each line only. tokens: [A, K] -> [A, K]."""
    drawn = torch.stack(_words(seeds, tokens // 4), dim=-1)
    return _gumbel(drawn.gather(2, (tokens % 4)[..., None])[..., 0])


def _words(seeds: Sequence[tuple[int, int, int]], blocks: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Four random words for every block of four tokens. blocks: [A or 1, N] -> each [A, N]."""
    words = torch.tensor(
        [[seed & _LOW, (seed >> 32) & _LOW, choice, position] for seed, choice, position in seeds],
        device=blocks.device,
    ).T[:, :, None]
    return philox((blocks, words[3], words[2], torch.zeros_like(blocks)), (words[0], words[1]))


def _gumbel(bits: torch.Tensor) -> torch.Tensor:
    """Drawn as -log(-log1p(-u)), which keeps the upper tail, the one that wins, accurate. bits: [A, N] of 32."""
    uniform = ((bits.to(torch.float32) + 0.5) * 2.0**-32).clamp_(max=1 - 2.0**-24)  # 1 would make the noise infinite
    # Line by line, as in `_top_p`.
    return torch.stack([-torch.log(-torch.log1p(-line)) for line in uniform])
