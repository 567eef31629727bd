"""Predictive pipelined decoding (Yang et al., arXiv 2307.05908): what early guesses on other compute units are worth.

While the target computes a token's last layers, the k most likely tokens by its state after an exit layer start on k
other units. If the true token is among them (a match), the next token begins where that unit has come to. Times are in
layers: 1 is what one decoder layer takes with all units busy. The exit layer lies in the upper half, so that no unit
reaches it before it is known whether its token is wanted.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Pipeline:
    """A model of D layers with candidates from layer e, and what follows from how often they match.

    Attributes:
        layers: D.
        exit_layer: e, with D / 2 <= e < D.
        candidates: k, which is also the number of extra units.
        p_correct: How often the next token is among the candidates.
        fork: Time that the main unit loses for every token at the exit layer: the exit head, handing out candidates.
        handoff: Time to adopt a unit's work after a match.
        reached: Layers that a unit has done when the main one ends, on average, at most e; None for D - e.
    """

    layers: int
    exit_layer: int
    candidates: int
    p_correct: float
    fork: float = 0.0
    handoff: float = 0.0
    reached: float | None = None

    def __post_init__(self) -> None:
        if not self.layers / 2 <= self.exit_layer < self.layers:
            raise ValueError(f"exit_layer: must be from {self.layers / 2:g} (half the layers) to below {self.layers}")
        if self.candidates < 1:
            raise ValueError("candidates: must be 1 or more")
        if not 0 <= self.p_correct <= 1:
            raise ValueError("p_correct: must be from 0 to 1")
        if self.fork < 0 or self.handoff < 0:
            raise ValueError("fork, handoff: must not be negative")
        if self.reached is not None and not 0 <= self.reached <= self.exit_layer:
            raise ValueError("reached: must be from 0 to exit_layer, beyond which candidates would need their own")

    @property
    def saved(self) -> float:
        """Layers that a match saves: a unit starts when the main one has e of D behind it, and keeps its pace."""
        return self.layers - self.exit_layer if self.reached is None else self.reached

    @property
    def token_time(self) -> float:
        """Mean time per token, the first one aside.

        A token takes D layers after a miss. After a match D - e of them are done, which leaves e, and the hand-off.
        Every token pays for its fork. With matches of probability p: D + f - p (D - e - h). Only the mean enters, so it
        holds for matches that depend on each other, too.
        """
        return self.layers + self.fork - self.p_correct * (self.saved - self.handoff)

    def latency(self, tokens: int) -> float:
        """Mean time of so many tokens; the first of them has nothing to take over."""
        return tokens and self.layers + self.fork + (tokens - 1) * self.token_time

    @property
    def speedup(self) -> float:
        """Of a long text over plain decoding: D / (D + f - p (D - e - h))."""
        return self.layers / self.token_time

    @property
    def speedup_bound(self) -> float:
        """If every candidate matched and nothing else took time: D / e, at most 2."""
        return self.layers / self.exit_layer

    @property
    def busy_units(self) -> float:
        """Mean number of units at work: the main one always, each of k for D - e layers of every token."""
        return 1 + self.candidates * self.saved / self.token_time

    @property
    def compute(self) -> float:
        """Layers computed per token: D + (k - p) (D - e), as a match spares the main unit what another has done."""
        return self.layers + self.wasted

    @property
    def wasted(self) -> float:
        """Of these, layers computed in vain: all k candidates' after a miss, those of k - 1 after a match."""
        return (self.candidates - self.p_correct) * self.saved

    @property
    def break_even_fork(self) -> float:
        """The fork time at which nothing is gained: p (D - e - h)."""
        return max(0.0, self.p_correct * (self.saved - self.handoff))

    @property
    def break_even_handoff(self) -> float:
        """The hand-off time at which nothing is gained: D - e - f / p; 0 where no hand-off is cheap enough."""
        return max(0.0, self.saved - self.fork / self.p_correct) if self.p_correct else 0.0


@dataclass(frozen=True, slots=True)
class Simulated:
    """Means over a simulated text, with the half-width of their 95% confidence interval."""

    token_time: float
    token_time_error: float
    busy_units: float
    compute: float
    matches: float


def simulate(pipeline: Pipeline, tokens: int, seed: int, autocorrelation: float = 0.0) -> Simulated:
    """Runs the pipeline event by event: when each unit starts, how far it gets, what is adopted.

    Args:
        pipeline: What to run.
        tokens: How many tokens to decode after the first.
        seed: Of the matches.
        autocorrelation: Of one match with the next: 0 draws them independently, towards 1 they come in runs.
    """
    p, chance = pipeline.p_correct, random.Random(seed)
    now, done, matched = 0.0, 0, False  # the main unit's clock, layers of its token that are done, the last outcome
    durations, computed, outside, matches = np.empty(tokens), 0, 0, 0
    for token in range(-1, tokens):
        began = now
        now += pipeline.exit_layer - done  # the main unit reaches the exit layer
        now += pipeline.fork
        started = now
        now += pipeline.layers - pipeline.exit_layer  # and the end, where the token is known
        reached = round(now - started)  # layers of the next token that every other unit has done by then
        if token >= 0:
            durations[token] = now - began + (pipeline.handoff if done else 0.0)
            computed += pipeline.layers - done + pipeline.candidates * reached
            outside += pipeline.candidates * reached
            matches += done > 0
        likely = p + autocorrelation * ((1 - p) if matched else -p) if token >= 0 else p
        matched = chance.random() < likely
        done = reached if matched else 0
    time = durations.sum()
    return Simulated(
        token_time=float(durations.mean()),
        token_time_error=1.96 * _standard_error(durations),
        busy_units=float(1 + outside / time),
        compute=computed / tokens,
        matches=matches / tokens,
    )


def _standard_error(values: np.ndarray, batches: int = 50) -> float:
    """Of the mean of values that may depend on each other: from means over batches longer than their memory."""
    usable = values[: len(values) // batches * batches]
    return float(usable.reshape(batches, -1).mean(axis=1).std(ddof=1) / math.sqrt(batches))
