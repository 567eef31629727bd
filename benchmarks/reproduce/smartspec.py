"""SmartSpec (arXiv 2406.14066): every policy under the published costs of Llama-8B and 70B, by rate and acceptance.

Stationary loads of Poisson arrivals with 256 tokens in and out, then two shifts: the rate changes from 1 to 16 to 48
requests per second (40 s each), and the texts from easy to hard to guess at 6 requests per second (60 s each).
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from common import IMAGES, fixed_policies, keep, latency, over_best_fixed

from parlay.bench import environment
from parlay.bench.figures import draw_guesses, draw_latency, legend_below, new_figure, save
from parlay.bench.report import console, table
from parlay.bench.simulating import Load, Outcome, Settings, compare
from parlay.policy.workload import Phase

PROFILES = {"h100-llama-8b": "two_kinds_eagle.json", "h100x4-llama-70b": "two_kinds_draft_model.json"}
ACCEPTANCES = ("0.5", "0.7", "0.9")
RATES = (0.5, 2.0, 8.0, 16.0, 32.0, 48.0)
POLICIES = (
    "off", "fixed:1", "fixed:2", "fixed:3", "fixed:5", "fixed:7", "synergy", "smartspec", "goodput", "oracle",
)  # fmt: skip
ADAPTIVE = ("synergy", "smartspec", "goodput", "oracle")
CLAIM = 3.2  # times lower mean latency than without speculation, at best: the paper's abstract


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2, help="loads drawn of each form (default: %(default)s)")
    parser.add_argument("--requests", type=int, default=300, help="at each rate (default: %(default)s)")
    options = parser.parse_args()
    captured, began = environment.capture(), time.perf_counter()
    stationary: dict[tuple[str, str], tuple[Outcome, ...]] = {}
    shifts: dict[str, tuple[Outcome, ...]] = {}
    for profile, kinds in PROFILES.items():
        for acceptance in ACCEPTANCES:
            rates = ",".join(f"{rate:g}" for rate in RATES)
            settings = Settings(
                POLICIES, profile, acceptance, rates=rates, requests=options.requests, seeds=options.seeds
            )
            stationary[profile, acceptance] = compare(settings).outcomes
        rate, data = (Settings(POLICIES, profile, some, seeds=options.seeds) for some in ("0.7", _beside(kinds)))
        shifts[profile] = compare(rate, [RATE_SHIFT]).outcomes + compare(data, [DATA_SHIFT]).outcomes
    lines = [
        line(profile, acceptance, name, outcomes)
        for (profile, acceptance), outcomes in stationary.items()
        for name in dict.fromkeys(outcome.load for outcome in outcomes)
    ] + [line(profile, "", name.name, shifts[profile]) for profile in PROFILES for name in (RATE_SHIFT, DATA_SHIFT)]
    results = {"lines": lines, "seconds": time.perf_counter() - began, "seeds": options.seeds}
    keep("smartspec", captured, results)
    draw(stationary, shifts)
    show(lines)


RATE_SHIFT = Load("rate shift", None, (Phase(40, 1), Phase(40, 16), Phase(40, 48)))
DATA_SHIFT = Load("data shift", None, (Phase(60, 6, (1.0, 0.0)), Phase(60, 6, (0.0, 1.0))))


def _beside(name: str) -> str:
    return str(Path(__file__).with_name(name))


def line(profile: str, acceptance: str, load: str, outcomes: tuple[Outcome, ...]) -> dict:
    """How every policy did under one load."""
    fixed = fixed_policies(outcomes)
    best = min(fixed, key=lambda policy: latency(outcomes, load, policy))
    return {
        "profile": profile,
        "acceptance": acceptance,
        "load": load,
        "best_fixed": best,
        "latency": {policy: latency(outcomes, load, policy) for policy in POLICIES},
        "over_off": {policy: latency(outcomes, load, "off") / latency(outcomes, load, policy) for policy in POLICIES},
        "over_best_fixed": {policy: over_best_fixed(outcomes, load, policy) for policy in POLICIES},
    }


def draw(stationary: dict[tuple[str, str], tuple[Outcome, ...]], shifts: dict[str, tuple[Outcome, ...]]) -> None:
    figure, every = new_figure(len(ACCEPTANCES) + 2, len(PROFILES), width=4.2)
    places = every
    for profile in PROFILES:
        for acceptance in ACCEPTANCES:
            axes, places = places[0], places[1:]
            draw_latency(axes, stationary[profile, acceptance])
            axes.set_title(f"{profile}, acceptance {acceptance}: mean latency", loc="left", fontsize=9)
        for load in (RATE_SHIFT, DATA_SHIFT):
            axes, places = places[0], places[1:]
            draw_guesses(axes, [o for o in shifts[profile] if o.load == load.name and o.policy in ADAPTIVE])
            axes.set_title(f"{profile}, {load.name}: guesses per row", loc="left", fontsize=9)
    legend_below(figure, every)
    save(figure, IMAGES / "reproduce_smartspec.svg")


def show(lines: list[dict]) -> None:
    out = console()
    columns = (
        "profile",
        "acceptance",
        "load",
        "off, s",
        "best fixed",
        *(f"{p} over best fixed" for p in ADAPTIVE),
        "goodput over off",
    )
    rows = [
        (e["profile"], e["acceptance"], e["load"], f"{e['latency']['off']:.2f}", e["best_fixed"],
         *(f"{e['over_best_fixed'][policy]:.3f}" for policy in ADAPTIVE), f"{e['over_off']['goodput']:.2f}x")
        for e in lines
    ]  # fmt: skip
    out.print(table("mean latency of a request", columns, rows, 3))
    most = max(e["over_off"]["smartspec"] for e in lines)
    out.print(f"smartspec has up to {most:.1f}x lower mean latency than off (the paper: up to {CLAIM}x)")
    stationary = [e for e in lines if e["acceptance"]]
    worst = min(e["over_best_fixed"]["goodput"] for e in stationary)
    off = min(e["over_off"]["goodput"] for e in lines)
    out.print(
        f"goodput against the best fixed in hindsight, stationary loads: worst {worst:.3f} (bar: 0.98, "
        f"{verdict(worst >= 0.98)})"
    )
    out.print(f"goodput against off, all loads: worst {off:.3f} (bar: 0.99, {verdict(off >= 0.99)})")
    shifting = min(e["over_best_fixed"]["goodput"] for e in lines if not e["acceptance"])
    out.print(
        f"goodput against the best single fixed one on shifting loads: worst {shifting:.3f} (bar: above 1, "
        f"{verdict(shifting > 1)})"
    )


def verdict(good: bool) -> str:
    return "met" if good else "missed"


if __name__ == "__main__":
    main()
