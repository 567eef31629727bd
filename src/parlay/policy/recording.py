"""Recordings of a server, read back for the simulator; `parlay.engine.recording` writes them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from parlay.bets import Tree
from parlay.policy.acceptance import LEVELS, RANKS, acceptance
from parlay.policy.cost import Profile
from parlay.policy.trees import Floats
from parlay.policy.workload import Kind, Shown, Workload
from parlay.types import Offer

FORMAT = 2
WEIGHT = 4.0  # expected acceptances that all requests together weigh against one's own
PER_OCTAVE = 2  # factors of requests that are told apart
LIKELIEST = 0.98
ENOUGH = 20  # guesses of a method's first level that were made whatever the policy said, for it to be known by these


@dataclass(frozen=True, slots=True, eq=False)
class Recorded:
    """What a recording holds.

    Attributes:
        about: What the server was.
        workload: Its requests; prompts without what the prefix cache held of them.
        kinds: How well they could be guessed: those of about the same luck with each method are one kind.
            What is typical of a method follows from the steps that explored, if there were any: a policy's own bets
            are those that it expected to win.
        latency: [n] seconds from each request's arrival to its end, as measured.
        ttft: [n] and to its first token.
        profile: What steps cost; None if the server's policy did not know.
    """

    about: Mapping[str, Any]
    workload: Workload
    kinds: tuple[Kind, ...]
    latency: Floats
    ttft: Floats
    profile: Profile | None


def is_recording(path: Path) -> bool:
    """Whether a file looks like one."""
    with path.open("rb") as file:
        return file.read(20).startswith(b'{"parlay_recording"')


def read_recording(path: Path) -> Recorded:
    """Reads a recording; a last line that was cut off while it was written is left out.

    Raises:
        ValueError: naming the line that cannot be read.
    """
    entries: list[dict[str, Any]] = []
    lines = path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines, start=1):
        try:
            if line:
                entries.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):  # a whole line ends with a line break
                raise ValueError(f"{path}, line {number}: no JSON ({error})") from None
    try:
        about, choices = entries[0], sorted((e for e in entries if "arrival" in e), key=lambda e: e["arrival"])
        if about["parlay_recording"] != FORMAT:
            raise ValueError(f"its format is {about['parlay_recording']}, not {FORMAT}")
        if not choices:
            raise ValueError("no request ended in it")
        if not any(choice["outcomes"] for choice in choices):
            raise ValueError("nothing was bet in it; record with --speculation auto")
        profiles = [entry["profile"] for entry in entries if "profile" in entry]
        arrival, first, finish, prompt, cached, output = (
            np.array([choice[name] for choice in choices])
            for name in ("arrival", "first", "finish", "prompt", "cached", "output")
        )
        kinds, kind = _kinds([choice["outcomes"] for choice in choices], [choice["explored"] for choice in choices])
        trees = {method for choice in choices for method, some in choice["shown"].items() if some is None}
        methods = sorted({method for choice in choices for method in choice["shown"]} - trees)
        shown = {method: tuple(_shown(choice, method) for choice in choices) for method in methods}
        work = Workload(arrival - arrival[0], np.maximum(prompt - cached, 1), np.maximum(output, 1), kind, shown)
        profile = Profile.of(profiles[-1]) if profiles else None
        return Recorded(about, work, kinds, finish - arrival, first - arrival, profile)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no recording of parlay serve --record: {error!r}") from error


def _shown(choice: Mapping[str, Any], method: str) -> Shown:
    """What a method showed at every token of an answer.

    Tokens at which no step began came from guesses. What is shown there is taken for what is left of the guesses
    before, if they were right so far.
    """
    seen = {int(place): (int(size), int(hits), sure) for place, size, hits, *sure in choice["shown"].get(method, ())}
    starts = {*choice["starts"]}
    offers, found = [], []
    size, hits, sure = 0, 0, []
    for place in range(max(int(choice["output"]), 1)):
        if place in starts:
            size, hits, sure = seen.get(place, (0, 0, []))
        else:
            size, hits, sure = (size - 1, hits - 1, sure[1:]) if hits else (0, 0, [])
        offers.append(Offer(method, Tree.chain(size), None, tuple(sure) or None) if size else None)
        found.append(hits)
    return Shown(tuple(offers), tuple(found))


def _kinds(
    outcomes: Sequence[Mapping[str, Any]], explored: Sequence[Mapping[str, Any]]
) -> tuple[tuple[Kind, ...], np.ndarray]:
    """Kinds of requests, and which of them each request is."""
    methods = sorted({method for one in outcomes for method in one})
    luck: dict[str, Floats] = {}
    pools: dict[str, Floats] = {}
    for method in methods:
        tried, accepted = (np.stack([_filled(one, method, name) for one in outcomes]) for name in ("tried", "accepted"))
        pools[method] = _pool(tried.sum(axis=0), accepted.sum(axis=0))
        expected = (tried * pools[method]).sum(axis=(1, 2))
        luck[method] = (accepted.sum(axis=(1, 2)) + WEIGHT) / (expected + WEIGHT)
        tried, accepted = (np.stack([_filled(one, method, name) for one in explored]) for name in ("tried", "accepted"))
        if tried[:, 0, 0].sum() >= ENOUGH:  # so much better are the places where the policy bet
            expected = (tried * luck[method][:, None, None]).sum(axis=0) * pools[method]
            pools[method] = np.minimum(pools[method] * accepted.sum() / expected.sum(), LIKELIEST)
    steps = np.stack([np.round(PER_OCTAVE * np.log2(luck[method])) for method in methods], axis=1)
    different, kind = np.unique(steps, axis=0, return_inverse=True)
    kinds = []
    for number, factors in enumerate(different):
        matrices = {
            method: acceptance(np.minimum(pools[method] * 2.0 ** (factor / PER_OCTAVE), LIKELIEST))
            for method, factor in zip(methods, factors, strict=True)
        }
        kinds.append(Kind(f"{number}", float((kind == number).sum()), matrices))
    return tuple(kinds), kind


def _filled(one: Mapping[str, Any], method: str, name: str) -> Floats:
    """[LEVELS, RANKS] counts of one request."""
    found = np.zeros((LEVELS, RANKS))
    if method in one and one[method][name]:
        some = np.array(one[method][name], dtype=np.float64)
        found[: some.shape[0], : some.shape[1]] = some
    return found


def _pool(tried: Floats, accepted: Floats) -> Floats:
    """[LEVELS, RANKS] how likely a guess is accepted once it is tried; levels take after the one above, ranks too."""
    found, above = np.zeros_like(tried), 0.5 ** np.arange(1, RANKS + 1)
    for level in range(LEVELS):
        above = found[level] = (accepted[level] + 5 * above) / (tried[level] + 5)
    return found
