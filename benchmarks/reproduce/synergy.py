"""Synergy (arXiv 2310.18813): the best speculation length by batch size, and what adapting to it is worth.

First the model: accepted lengths are drawn for requests of two kinds, times from a profile with noise; both forms of
accepted length and a line per batch size are fitted to them, and the lengths that the fits choose are compared with the
measured best. Then serving: Gamma arrivals whose intensity alternates, adaptive lengths against fixed ones.
"""

from __future__ import annotations

import argparse

import numpy as np
from common import IMAGES, keep, latency, over_best_fixed

from parlay.bench import environment
from parlay.bench.figures import draw_guesses, legend_below, look, new_figure, save, title
from parlay.bench.report import console, table
from parlay.bench.simulating import Load, Outcome, Settings, compare
from parlay.policy.profiles import read_profile
from parlay.policy.synergy import best_length, fit_independent, fit_lines, fit_power_law, regret
from parlay.policy.workload import Phase

PROFILE = "h100-llama-8b"
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)
LONGEST = 8
CONTEXT = 512
KINDS = (0.85, 0.55)  # acceptance of a guess of each, half of the requests each
CVS = (0.5, 1.0, 2.0, 5.0)
BUSY, SPARSE = 60.0, 4.0  # requests per second, in phases of 20 s
POLICIES = ("off", "fixed:2", "fixed:4", "synergy", "goodput", "oracle")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="loads drawn of each form (default: %(default)s)")
    options = parser.parse_args()
    captured = environment.capture()
    model = characterise(np.random.default_rng(0))
    outcomes: list[Outcome] = []
    for cv in CVS:
        outcomes += serve(cv, options.seeds)
    serving = [
        {"cv": cv, "policy": policy, "latency": latency(outcomes, load(cv), policy),
         "over_best_fixed": over_best_fixed(outcomes, load(cv), policy)}
        for cv in CVS for policy in POLICIES
    ]  # fmt: skip
    keep("synergy", captured, {"model": model, "serving": serving, "seeds": options.seeds})
    draw(model, outcomes)
    show(model, serving)


def characterise(rng: np.random.Generator) -> dict:
    """Measures accepted lengths and times, fits the model to them, and compares its choices with the best."""
    profile = read_profile(PROFILE)
    (cost,) = profile.drafts.values()
    lengths = np.arange(LONGEST + 1.0)
    p = np.repeat(KINDS, 2000)
    hits = rng.random((len(p), LONGEST)) < p[:, None]
    runs = np.cumprod(hits, axis=1).cumsum(axis=1).mean(axis=0)  # accepted, by length from 1 on
    fits = {"power law": fit_power_law(lengths[1:], runs), "independent": fit_independent(lengths[1:], runs)}
    accepted = np.concatenate([[0.0], runs])
    seconds = {
        batch: profile.verify(batch * (1 + lengths), batch, batch * CONTEXT) * np.exp(0.02 * rng.standard_normal(9))
        for batch in BATCHES
    }
    lines = fit_lines(lengths, seconds)
    found = []
    for batch in BATCHES:
        draft = np.array([cost(s, batch, batch * s, batch * CONTEXT) if s else 0.0 for s in lengths])
        measured = (seconds[batch] + draft) / (accepted + 1)
        per_level = float(draft[-1] / LONGEST)
        entry: dict = {"batch": batch, "best": int(np.argmin(measured)), "r2": lines[batch][2],
                       "speedup": float(measured[0] / measured.min()), "per_token": measured.tolist()}  # fmt: skip
        for name, fit in fits.items():
            chosen = best_length(batch, LONGEST, fit, lambda b, s: lines[b][1] + lines[b][0] * s, per_level)
            entry[name] = {"length": chosen, "regret": regret(measured, chosen)}
        found.append(entry)
    forms = {name: {"parameters": fit.parameters, "rms": fit.error, "worst": fit.worst} for name, fit in fits.items()}
    return {"accepted": runs.tolist(), "fits": forms, "batches": found}


def load(cv: float) -> str:
    return f"CV {cv:g}"


def serve(cv: float, seeds: int) -> tuple[Outcome, ...]:
    phases = tuple(Phase(20.0, rate) for _ in range(3) for rate in (BUSY, SPARSE))
    settings = Settings(POLICIES, PROFILE, "0.7", cv=cv, seeds=seeds)
    return compare(settings, [Load(load(cv), None, phases)]).outcomes


def draw(model: dict, outcomes: list[Outcome]) -> None:
    figure, (accepted, lengths, over_time, bars) = new_figure(4, width=4.0)
    x = np.arange(1.0, LONGEST + 1)
    accepted.plot(x, model["accepted"], "o", color="#111827", label="measured")
    for (name, fit), style in zip(model["fits"].items(), ("-", "--"), strict=True):
        curve = fit_power_law if name == "power law" else fit_independent
        accepted.plot(x, curve(x, np.array(model["accepted"]))(x), style, label=f"{name}, rms {fit['rms']:.3f}")
    accepted.set_ylim(bottom=0)
    title(accepted, "accepted guesses, two kinds of requests", "guesses", "")
    for name, style in (("best", "o-"), ("power law", "--"), ("independent", ":")):
        some = [entry[name]["length"] if name != "best" else entry["best"] for entry in model["batches"]]
        lengths.plot(BATCHES, some, style, label="measured best" if name == "best" else name)
    lengths.set_xscale("log", base=2)
    lengths.set_xticks(BATCHES, [str(batch) for batch in BATCHES])
    title(lengths, "best length by batch size", "batch size", "guesses")
    draw_guesses(over_time, [outcome for outcome in outcomes if outcome.load == load(1.0)])
    styles = look(POLICIES)
    for place, policy in enumerate(POLICIES):
        heights = [latency(outcomes, load(cv), policy) for cv in CVS]
        bars.bar(np.arange(len(CVS)) + 0.14 * (place - 2.5), heights, 0.13, color=styles[policy]["color"], label=policy)
    bars.set_xticks(range(len(CVS)), [load(cv) for cv in CVS])
    title(bars, "mean latency, intense and sparse phases", "spread of the gaps", "seconds")
    for axes in (accepted, lengths):
        axes.legend(frameon=False, fontsize=7)
    legend_below(figure, [bars])
    save(figure, IMAGES / "reproduce_synergy.svg")


def show(model: dict, serving: list[dict]) -> None:
    out = console()
    for name, fit in model["fits"].items():
        written = ", ".join(f"{value:.3f}" for value in fit["parameters"])
        out.print(f"accepted length, {name}: {written}; rms {fit['rms']:.3f}, worst {fit['worst']:.3f} guesses")
    lines = [
        (e["batch"], e["best"], f"{e['speedup']:.2f}x", f"{e['r2']:.3f}", e["power law"]["length"],
         f"{e['power law']['regret']:.1%}", e["independent"]["length"], f"{e['independent']['regret']:.1%}")
        for e in model["batches"]
    ]  # fmt: skip
    columns = ("batch", "best length", "over none", "R2 of line", "power law", "regret", "independent", "regret")
    out.print(table("speculation length by batch size", columns, lines))
    lines = [
        (policy, *(f"{e['latency']:.3f} ({e['over_best_fixed']:.3f})" for e in serving if e["policy"] == policy))
        for policy in POLICIES
    ]
    out.print(table("mean latency in seconds (over the best fixed)", ("policy", *(load(cv) for cv in CVS)), lines))


if __name__ == "__main__":
    main()
