"""Tiny drafters with weights, for the tiny random models, and engines that use them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from parlay.bets import Bet, Tree
from parlay.config import EngineConfig
from parlay.drafters.eagle_files import save_head
from parlay.drafters.eagle_head import EagleHead, HeadShape
from parlay.drafters.exit_part import ExitPart, ExitShape, save_exit
from parlay.drafters.medusa_files import save_heads
from parlay.drafters.medusa_heads import MedusaHeads, MedusaShape
from parlay.engine.engine import Engine
from parlay.policy.trees import kary
from tests.architectures import make_model
from tests.tiny import VOCAB_SIZE

HIDDEN = 32


def tiny_head(
    seed: int = 0,
    vocab: int = 100,
    hidden: int = HIDDEN,
    taps: tuple[int, ...] = (0, 1, 2),
    target_vocab: int = VOCAB_SIZE,
    joined: bool = False,
) -> EagleHead:
    """A random head for the tiny models, which can guess some of their tokens."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        head = EagleHead(HeadShape(hidden, hidden, 48, 4, 2, 8, vocab, taps, joined=joined))
        for weight in head.parameters():
            if weight.ndim == 2:
                torch.nn.init.normal_(weight, std=0.3)
        head.ids = torch.randperm(target_vocab)[:vocab].sort().values
    return head


def tiny_exit(exit: int = 1, layers: int = 2, hidden: int = HIDDEN) -> ExitPart:
    """A random part behind an exit of the tiny models."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        part = ExitPart(ExitShape(exit, layers, hidden, 24))
        for weight in part.parameters():
            torch.nn.init.normal_(weight, std=0.3)
    return part


def tiny_medusa(
    seed: int = 0,
    vocab: int = 100,
    hidden: int = HIDDEN,
    heads: int = 4,
    layers: int = 1,
    shared: bool = True,
    target_vocab: int = VOCAB_SIZE,
) -> MedusaHeads:
    """Random Medusa heads for the tiny models, which can guess some of their tokens."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        found = MedusaHeads(MedusaShape(hidden, heads, layers, vocab, shared))
        for weight in found.parameters():
            torch.nn.init.normal_(weight, std=0.3)
        found.ids = torch.randperm(target_vocab)[:vocab].sort().values
    return found


def sources(folder: Path) -> dict[str, str]:
    """Every drafter with weights or layers of the target, and where they are; the draft model is the target itself."""
    head = folder / "head"
    if not head.is_dir():
        save_head(tiny_head(joined=True), head, int8=False)
    heads = folder / "heads"
    if not heads.is_dir():
        save_heads(tiny_medusa(), heads, int8=False)
    other = folder / "other"
    if not other.is_dir():
        make_model(other, "llama")
    exit = folder / "exit"
    if not exit.is_dir():
        save_exit(tiny_exit(), exit, "tiny", int8=False)
    return {
        "eagle": str(head), "medusa": str(heads), "draft_model": str(other), "self": "1", "trained self": str(exit)
    }  # fmt: skip


def method_of(which: str) -> str:
    """The method's name of one of those."""
    return which.split()[-1]


def engine_with(folder: Path, which: str, tree: Tree | None = None, **options: Any) -> Engine:
    """An engine that bets on one of them."""
    source, method = sources(folder)[which], method_of(which)
    settings: dict[str, Any] = {"dtype": "float64", "seed": 0, "self_check": False} | options
    bet = Bet(method, tree or kary(2, 3))
    return Engine(EngineConfig(str(folder), speculation=bet, drafters={method: source}, **settings))
