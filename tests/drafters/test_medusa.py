"""Medusa heads: each level is what its head says by hand, in one pass a step, and nothing that is served changes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from parlay.bets import Bet, Tree
from parlay.config import EngineConfig
from parlay.drafters.base import Drafters
from parlay.drafters.medusa import Medusa
from parlay.drafters.medusa_heads import MedusaHeads
from parlay.engine.batch import Draft
from parlay.engine.checkpoint import resolve
from parlay.engine.engine import Engine
from parlay.engine.model import load_model
from parlay.policy.trees import kary
from parlay.types import Request, SamplingParams, StepPlan
from tests.architectures import make_model, plain_model, prompts_of
from tests.drafting import engine_with, sources, tiny_medusa
from tests.gamblers import RandomPolicy

DEPTH = 3
GREEDY: dict[str, Any] = {"temperature": 0.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("llama"), "llama")


def drafter_of(engine: Engine) -> Medusa:
    (drafter,) = engine.drafters.by_name.values()
    assert isinstance(drafter, Medusa)
    return drafter


def run(engine: Engine, prompts: Sequence[tuple[int, ...]], **params: Any) -> dict[str, tuple[int, ...]]:
    for number, prompt in enumerate(prompts):
        engine.add(Request(str(number), prompt, SamplingParams(max_tokens=20, ignore_eos=True, **params)))
    found: dict[str, tuple[int, ...]] = {}
    while engine.has_work:
        for delta in engine.step():
            found[delta.request_id] = found.get(delta.request_id, ()) + delta.tokens
        engine.check_integrity()
    return found


def note_drafts(drafter: Medusa) -> list[tuple[tuple[int, ...], Draft]]:
    """Every draft that is made, and the text that it is for."""
    noted, draft = [], drafter.draft

    def noting(rows: Any, bets: Any, budget: int) -> Any:
        found = draft(rows, bets, budget)
        noted.extend((tuple(row.tokens[: row.length]), some) for row, some in zip(rows, found, strict=True) if some)
        return found

    drafter.draft = noting  # type: ignore[method-assign]
    return noted


def by_hand(folder: Path, heads: MedusaHeads, text: Sequence[int]) -> list[torch.Tensor]:
    """[V] logits of each head behind a text whose last token the model has not read."""
    plain = plain_model(folder)
    with torch.inference_mode():
        hidden = plain.model(input_ids=torch.tensor([text[:-1]])).last_hidden_state[0, -1]  # after the final norm
    found = []
    for head in range(heads.shape.heads):
        some = hidden
        weights = {
            name.removeprefix(f"heads.{head}."): weight.double()
            for name, weight in heads.state_dict().items()
            if name.startswith((f"heads.{head}.", "lm_head."))
        }
        for layer in range(heads.shape.layers):
            turned = weights[f"{layer}.linear.weight"] @ some + weights[f"{layer}.linear.bias"]
            some = some + turned / (1 + (-turned).exp())
        last = "lm_head.weight" if heads.shape.shared else f"{heads.shape.layers}.weight"
        found.append(weights[last] @ some)
    return found


@pytest.mark.parametrize("kind", [{}, {"layers": 2, "shared": False}], ids=["shared vocabulary", "two blocks"])
def test_every_level_is_what_its_head_says(folder: Path, kind: dict[str, Any]) -> None:
    """Ranks of siblings on every level, behind prompts, accepted guesses and rows of several lengths in a batch."""
    heads = tiny_medusa(**kind)
    plain = EngineConfig(str(folder), dtype="float64", speculation=None, self_check=False, page_size=4)
    engine = Engine(plain)
    loaded = load_model(resolve(str(folder)), plain)
    drafter = Medusa(tiny_medusa(**kind), kary(2, DEPTH), loaded)
    engine.drafters = Drafters([drafter])
    drafter.attach(engine.model)
    engine.policy = RandomPolicy(0, ["medusa"])
    drafts = note_drafts(drafter)
    run(engine, prompts_of(6), **GREEDY)
    assert len(drafts) > 40
    assert max(draft.tree.depth for _, draft in drafts) == heads.shape.heads
    for text, draft in drafts[::4]:
        guesses = [heads.ids[logits.argsort(descending=True)] for logits in by_hand(folder, heads, text)]
        for nodes in draft.tree.children().values():
            level = draft.tree.depths[nodes[0]] - 1
            assert [draft.tokens[node] for node in nodes] == guesses[level][: len(nodes)].tolist()


def test_sampled_guesses_bring_what_they_were_drawn_from(folder: Path) -> None:
    """One distribution per inner node, that of its level, at the request's temperature."""
    engine = engine_with(folder, "medusa", kary(2, DEPTH), page_size=4)
    drafter, heads = drafter_of(engine), tiny_medusa()
    drafts = note_drafts(drafter)
    run(engine, prompts_of(3), temperature=0.7, verification="optimal")
    assert drafts
    for text, draft in drafts[::5]:
        assert draft.ids is not None
        assert draft.probs is not None
        assert draft.ids.equal(heads.ids)
        expected = [(logits / 0.7).softmax(-1) for logits in by_hand(folder, heads, text)]
        for node, probs in zip(sorted(draft.tree.children()), draft.probs, strict=True):
            level = 0 if node < 0 else draft.tree.depths[node]
            torch.testing.assert_close(probs, expected[level], rtol=2e-2, atol=2e-3)  # saved in float16


@pytest.mark.parametrize("params", [GREEDY, {"seed": 3}, {"verification": "optimal"}], ids=["greedy", "coupled", "opt"])
def test_a_step_costs_one_pass_of_the_heads(folder: Path, params: dict[str, Any]) -> None:
    """For all rows and levels together, and of no more heads than there are levels; none for rows without bets."""
    engine = engine_with(folder, "medusa", kary(2, DEPTH), max_num_seqs=8)
    drafter = drafter_of(engine)
    passes: list[tuple[int, int]] = []
    forward = drafter.heads.forward

    def counting(hidden: torch.Tensor, count: int) -> torch.Tensor:
        passes.append((len(hidden), count))
        return forward(hidden, count)

    drafter.heads.forward = counting  # type: ignore[method-assign]
    for number, prompt in enumerate(prompts_of(8)):
        engine.add(Request(str(number), prompt, SamplingParams(max_tokens=20, ignore_eos=True, **params)))
    steps = 0
    while engine.has_work:
        engine.step()
        steps += 1
        assert len(passes) <= steps
    assert not engine.drafters.failed
    assert max(passes) == (8, DEPTH)
    assert any(count < DEPTH for _, count in passes), "where the output ends, fewer levels are guessed"


class Planned:
    """Makes one bet on every row, whatever is offered."""

    def __init__(self, tree: Tree) -> None:
        self._tree = tree

    def plan(self, rows: Sequence[Any], offers: Any, budget: int) -> StepPlan:
        return StepPlan(tuple(Bet("medusa", self._tree) if row.max_depth else None for row in rows))

    def observe(self, rows: Any, result: Any) -> None:
        pass


def test_what_is_deeper_than_there_are_heads_is_cut_off(folder: Path) -> None:
    engine = engine_with(folder, "medusa", Tree.chain(9))
    assert drafter_of(engine).tree == Tree.chain(4)
    engine.policy = Planned(Tree.chain(9))
    engine.add(Request("r", (5, 6, 7), SamplingParams(max_tokens=30, ignore_eos=True, **GREEDY)))
    drafted = [delta.stats.drafted for _ in range(8) for delta in engine.step()]
    assert not engine.drafters.failed
    assert max(drafted) == 4


def test_no_bet_where_the_feature_is_missing(folder: Path) -> None:
    """Behind a text of one token, and beside a prompt, also where the policy insists; every other row gets one."""
    engine = engine_with(folder, "medusa", Tree.chain(2), prefix_caching=False)
    drafter = drafter_of(engine)
    engine.policy = Planned(Tree.chain(2))
    offered, honest = [], drafter.offer

    def noting(rows: Any) -> Any:
        found = honest(rows)
        offered.extend((row.length, row.start, offer) for row, offer in zip(rows, found, strict=True))
        return found

    drafter.offer = noting  # type: ignore[method-assign]
    for number, prompt in enumerate([(5,), (6, 7, 8, 9)]):
        engine.add(Request(str(number), prompt, SamplingParams(max_tokens=9, ignore_eos=True, **GREEDY)))
    first = engine.step()
    assert [delta.stats.drafted for delta in first] == [0, 0]
    assert [offer for _, _, offer in offered] == [None, None]
    offered.clear()
    second = engine.step()
    assert [delta.stats.drafted for delta in second] == [2, 2]
    assert all(offer is not None and offer.catch_up == 0 for _, _, offer in offered)


def test_strict_parity_reads_the_same_features(folder: Path) -> None:
    """The tiles of the strict path hand out what the head reads as well."""
    prompts = prompts_of(4)
    found = {}
    for parity in ("fast", "strict"):
        engine = engine_with(folder, "medusa", Tree.chain(3), parity=parity)
        accepted = 0
        for number, prompt in enumerate(prompts):
            engine.add(Request(str(number), prompt, SamplingParams(max_tokens=20, ignore_eos=True, **GREEDY)))
        tokens: dict[str, tuple[int, ...]] = {}
        while engine.has_work:
            for delta in engine.step():
                tokens[delta.request_id] = tokens.get(delta.request_id, ()) + delta.tokens
                accepted += delta.stats.accepted
        found[parity] = tokens, accepted
    assert found["fast"] == found["strict"]


@pytest.mark.parametrize("kind", ["gpt2", "opt", "gemma2", "cohere"])
def test_other_architectures(kind: str, tmp_path: Path) -> None:
    """Whatever stands before the model's head, and however wide it is there, the output is that of plain decoding."""
    folder = make_model(tmp_path, kind)
    loaded = load_model(resolve(str(folder)), EngineConfig(str(folder), dtype="float64", self_check=False))
    width = int(loaded.model.get_output_embeddings().weight.shape[1])
    plain = Engine(EngineConfig(str(folder), dtype="float64", speculation=None, self_check=False))
    expected = run(plain, prompts_of(4), **GREEDY)
    engine = Engine(EngineConfig(str(folder), dtype="float64", speculation=None, self_check=False))
    drafter = Medusa(tiny_medusa(hidden=width), Tree.chain(3), loaded)
    engine.drafters = Drafters([drafter])
    drafter.attach(engine.model)
    engine.policy = Planned(kary(2, 3))
    assert run(engine, prompts_of(4), **GREEDY) == expected
    assert not engine.drafters.failed


def test_it_needs_to_be_told_where_its_weights_are(folder: Path) -> None:
    with pytest.raises(ValueError, match="name heads with --drafter medusa=FOLDER_OR_ID"):
        Engine(EngineConfig(str(folder), speculation=Bet("medusa", Tree.chain(2)), self_check=False))
    assert Path(sources(folder)["medusa"]).is_dir()
