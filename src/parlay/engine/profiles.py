"""Profiles of what steps cost, kept in the cache folder: one for every machine, model and set of drafters."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.progress import Progress

from parlay.bets import Bet
from parlay.config import Calibrate
from parlay.engine import native
from parlay.engine.calibration import SECONDS, SHORTEST, calibrate, hardware
from parlay.engine.checkpoint import cache_dir
from parlay.policy.cost import DraftCost, Profile, VerifyCost

if TYPE_CHECKING:
    from parlay.engine.engine import Engine

logger = logging.getLogger(__name__)

GUESS = Profile("unknown", "unknown", "unknown", VerifyCost.linear(0.02, 0.002), notes="never measured")
FORMAT = 2  # of what is measured; what was stored in another one is measured again
LEVEL = DraftCost(per_level=0.002)  # as rough a guess, of drafters that run a model


def profile_for(engine: Engine, how: Calibrate) -> Profile:
    """What steps of this engine cost: as it was measured before, or measured now.

    Args:
        engine: Idle and new.
        how: How thoroughly to measure where that was not done before; `skip` for a rough guess instead.
    """
    path = stored(engine)
    try:
        if path.exists():
            found = Profile.load(path)
            if found.hardware == hardware(engine.model.devices):
                return found
            logger.warning("%s was measured on %s, so it is measured again", path, found.hardware)
    except ValueError as error:
        logger.warning("%s, so it is measured again", error)
    if engine.max_model_len < SHORTEST:
        logger.warning("a context of %d leaves nothing to measure: what steps cost is guessed", engine.max_model_len)
        return _guessed(engine)
    if how == "skip":
        logger.info("what steps cost was never measured here (--calibrate quick does it); it is learned on the way")
        return _guessed(engine)
    logger.info("measuring what steps cost, once for this machine and model (about %.0f s)", SECONDS[how])
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("measuring what steps cost", total=1.0)
        calibration = calibrate(engine, how, lambda share: bar.update(task, completed=share))
    logger.info(
        "%d shapes in %.0f s; predictions are off by %.1f%% (median) and %.1f%% (worst) at shapes held out",
        calibration.shapes,
        calibration.seconds,
        100 * calibration.median_error,
        100 * calibration.worst_error,
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        calibration.profile.save(partial)
        partial.rename(path)
    except OSError as error:
        logger.warning("%s could not be written (%s), so the next start measures again", path, error.strerror)
    return calibration.profile


def _guessed(engine: Engine) -> Profile:
    for name in [name for name, drafter in engine.drafters.by_name.items() if drafter.begins_next]:
        logger.info("%s: until its steps are measured (--calibrate quick), auto begins no tokens with it", name)
    drafts = {name: LEVEL for name, drafter in engine.drafters.by_name.items() if not drafter.deterministic}
    return replace(GUESS, drafts=drafts)


def _begun(engine: Engine) -> int | None:
    """Candidates of the next token, where a drafter begins it: they are measured as many as they are."""
    bet = engine.config.speculation
    drafter = engine.drafters.by_name.get(bet.method) if isinstance(bet, Bet) else None
    return len(bet.tree) if isinstance(bet, Bet) and drafter is not None and drafter.begins_next else None


def stored(engine: Engine) -> Path:
    """Where the profile of such an engine is kept. What changes steps' costs changes the name."""
    model, config = engine.model, engine.config
    about = (
        hardware(model.devices), str(model.dtype), config.parity, engine.compiled, config.max_num_batched_tokens,
        config.max_num_seqs, config.offload, config.memory_budget, config.tree_sampling, FORMAT,
        sorted(engine.drafters.by_name), sorted(engine.drafters.sources.items()), _begun(engine), torch.__version__,
        native.key(),
    )  # fmt: skip
    name = re.sub(r"[^\w.-]+", "-", config.model).strip("-")
    digest = hashlib.sha256(json.dumps([config.model, *about], default=str).encode()).hexdigest()[:12]
    return cache_dir() / "profiles" / f"{name}-{digest}.json"
