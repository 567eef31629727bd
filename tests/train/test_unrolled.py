"""What a head learns on is what it computes when it guesses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from parlay.bets import Tree
from parlay.drafters.eagle import Eagle
from parlay.drafters.eagle_files import save_head
from parlay.engine.batch import join, pack_row
from parlay.train.unrolled import turns
from tests.architectures import make_model
from tests.drafting import HIDDEN, engine_with, tiny_head

LENGTH, TURNS = 12, 4


@pytest.mark.parametrize("joined", [False, True], ids=["published", "joined"])
@torch.no_grad()
def test_turns_are_the_passes_of_drafting(tmp_path: Path, joined: bool) -> None:
    """Turn k at t equals the drafter's k-th pass after it has read up to t - k, on the production attention."""
    save_head(tiny_head(joined=joined), tmp_path / "head", int8=False)
    engine = engine_with(make_model(tmp_path, "llama"), "eagle", page_size=4)
    drafter = engine.drafters.by_name["eagle"]
    assert isinstance(drafter, Eagle)
    torch.manual_seed(0)
    tokens = torch.randint(0, 250, (2, LENGTH))
    taps = torch.randn(2, LENGTH, 3 * HIDDEN, dtype=torch.float64)
    embedded = drafter._embed(tokens)
    found = turns(drafter.head, embedded, taps, TURNS)
    pages = [1, 2, 3, 4]
    slots = torch.tensor([pages[at // 4] * 4 + at % 4 for at in range(LENGTH)])
    drafter._features[slots] = drafter.head.fuse(taps[1])
    text = tokens[1].tolist()
    for start in range(LENGTH - TURNS):
        known = pack_row(text[: start + 1], start + 1, pages, 4)
        drafter.forward(join([known], [True], drafter.device), None)
        torch.testing.assert_close(drafter._outputs[0], found[0][1, start])
        for turn in range(1, TURNS):
            chain = pack_row((), start + 1, pages, 4, Tree.chain(turn), text[start + turn : start + turn + 1])
            drafter.forward(join([chain], [True], drafter.device), [0])
            torch.testing.assert_close(drafter._outputs[0], found[turn][1, start + turn])
