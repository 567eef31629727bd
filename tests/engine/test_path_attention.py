"""The C++ attention against plain formulas, on ragged trees over shuffled pages."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from parlay.bets import Tree
from parlay.engine.attention import AttentionCall
from parlay.engine.batch import Draft, ForwardBatch, pack
from parlay.engine.kv import KVShape, PagedKV
from parlay.engine.path_attention import PathAttention, Paths
from parlay.types import Request, Row, SamplingParams
from tests.operators import needs_operators

pytestmark = needs_operators

Shape = tuple[int, int, Tree]  # tokens in KV before, known tokens of the step, guesses
CPU = torch.device("cpu")
HARD: list[Shape] = [
    (0, 1, Tree(())), (200, 1, Tree(())), (63, 3, Tree((-1, 0, 0, 1, -1))), (0, 150, Tree(())), (64, 1, Tree.chain(70)),
    (130, 1, Tree((-1, 0, 1, 2, 3, 4))), (62, 1, Tree((-1, 0, -1, 2))),
]  # fmt: skip


def trees(most: int) -> st.SearchStrategy[Tree]:
    parents = st.integers(0, most).flatmap(lambda n: st.tuples(*(st.integers(-1, node - 1) for node in range(n))))
    return parents.map(Tree)


SHAPES = st.tuples(st.integers(0, 140), st.integers(1, 70), trees(9))


def packed(shapes: Sequence[Shape], page_size: int, generator: torch.Generator) -> ForwardBatch:
    spans = [start + count + len(tree) for start, count, tree in shapes]
    needed = [-(-span // page_size) for span in spans]
    free = (1 + torch.randperm(sum(needed), generator=generator)).tolist()
    rows, drafts = [], []
    for (start, count, tree), pages in zip(shapes, needed, strict=True):
        known = start + count
        request = Request("r", (1,) * known, SamplingParams())
        own = [free.pop() for _ in range(pages)]
        rows.append(Row(0, request, 0, array("i", [1] * known), known, start, count, 0, len(tree), own))
        drafts.append(Draft("d", tree, (1,) * len(tree)) if tree else None)
    return pack(rows, drafts, page_size, CPU)


def expected(kv: PagedKV, paths: Paths, query: torch.Tensor, call: AttentionCall, page_size: int) -> torch.Tensor:
    """Token by token, in float64."""
    out = []
    for token, lines in enumerate(query.double()):
        index = torch.arange(int(paths.known[token]))
        slots = paths.pages[paths.row[token]][index // page_size] * page_size + index % page_size
        slots = torch.cat([slots, paths.ancestors[token][paths.ancestors[token] >= 0]])[-(call.window or 10**6) :]
        folds = lines.shape[0] // kv.keys[0].shape[1]
        keys = kv.keys[0][slots].double().repeat_interleave(folds, 1)
        values = kv.values[0][slots].double().repeat_interleave(folds, 1)
        scores = torch.einsum("hd,shd->hs", lines, keys) * call.scale
        if call.softcap:
            scores = torch.tanh(scores / call.softcap) * call.softcap
        out.append(torch.einsum("hs,shd->hd", scores.softmax(-1), values))
    return torch.stack(out)


@settings(max_examples=40, deadline=None)
@given(
    shapes=st.just(HARD)
    | st.lists(st.tuples(st.integers(0, 140), st.integers(1, 70), trees(9)), min_size=1, max_size=4),
    layout=st.sampled_from([(9, 3, 64, 64), (4, 2, 24, 40), (4, 4, 8, 8), (8, 1, 80, 80), (3, 1, 5, 7)]),
    page_size=st.sampled_from([1, 4, 16, 33]),
    window=st.sampled_from([None, 1, 7, 50, 64]),
    softcap=st.sampled_from([None, 3.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 1000),
)
def test_every_token_attends_to_its_path(
    shapes: list[Shape], layout: tuple[int, int, int, int], page_size: int, window: int | None, softcap: float | None,
    dtype: torch.dtype, seed: int,
) -> None:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    heads, kv_heads, key_size, value_size = layout
    batch = packed(shapes, page_size, generator)
    count, pages = len(batch.tokens), 2 + sum(len(row.pages) for row in batch.rows)
    kv = PagedKV([KVShape(kv_heads, key_size, value_size)], pages, page_size, dtype, CPU)
    kv.pools[0].normal_(generator=generator)
    query, key, value = (
        torch.randn(count, h, size, generator=generator).to(dtype)
        for h, size in ((heads, key_size), (kv_heads, key_size), (kv_heads, value_size))
    )
    call = AttentionCall(0, key_size**-0.5, window, softcap)
    attention = PathAttention(kv, batch)
    out = attention(call, query, key, value)
    assert torch.equal(kv.keys[0][batch.slots], key)
    assert torch.equal(kv.values[0][batch.slots], value)
    want = expected(kv, attention.paths, query, call, page_size)
    tolerance = 4e-6 if dtype is torch.float32 else 2e-2
    assert torch.allclose(out.double(), want, atol=tolerance)

    token = seed % count  # alone it gets the same bits
    one = slice(token, token + 1)
    p = attention.paths
    attention.paths = Paths(p.slots[one], p.pages, p.row[one], p.known[one], p.ancestors[one])
    assert torch.equal(attention(call, query[one], key[one], value[one])[0], out[token])


@settings(max_examples=40, deadline=None)
@given(
    start=st.integers(0, 140),
    guesses=st.integers(1, 12),
    layout=st.sampled_from([(9, 3, 64, 64), (4, 2, 24, 40), (8, 1, 80, 80)]),
    window=st.sampled_from([None, 7, 64]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 1000),
)
def test_a_guess_gets_the_bits_that_it_would_get_as_a_known_token(
    start: int, guesses: int, layout: tuple[int, int, int, int], window: int | None, dtype: torch.dtype, seed: int
) -> None:
    heads, kv_heads, key_size, value_size = layout
    generator = torch.Generator().manual_seed(seed)
    count, pages = 1 + guesses, 2 + -(-(start + 1 + guesses) // 4)
    before = torch.randn(pages, 4, kv_heads, key_size + value_size, generator=generator).to(dtype)
    query, key, value = (
        torch.randn(count, h, size, generator=generator).to(dtype)
        for h, size in ((heads, key_size), (kv_heads, key_size), (kv_heads, value_size))
    )
    call, found = AttentionCall(0, key_size**-0.5, window, None), []
    for shape in ((start, 1, Tree.chain(guesses)), (start, count, Tree(()))):
        batch = packed([shape], 4, torch.Generator().manual_seed(seed))
        kv = PagedKV([KVShape(kv_heads, key_size, value_size)], pages, 4, dtype, CPU)
        kv.pools[0].copy_(before)
        found.append(PathAttention(kv, batch)(call, query, key, value))
    assert torch.equal(*found)


def test_what_overflowed_spoils_nobody_else() -> None:
    generator = torch.Generator().manual_seed(0)
    batch = packed([(0, 3, Tree(())), (0, 3, Tree((-1, -1)))], 4, generator)
    kv = PagedKV([KVShape(1, 8, 8)], 4, 4, torch.float32, CPU)
    key, value = torch.randn(8, 1, 8), torch.randn(8, 1, 8)
    key[0], value[1], value[7, 0, 3] = float("inf"), float("nan"), -float("inf")
    out = PathAttention(kv, batch)(AttentionCall(0, 1.0, None, None), torch.randn(8, 2, 8), key, value)
    assert out[3:7].isfinite().all()
    assert kv.pools[0].isfinite().all()
