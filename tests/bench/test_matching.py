"""Match rates of early exits are those of plain transformers, and what follows from them is arithmetic."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer
from typer.testing import CliRunner

from parlay.bench.matching import Exit, counts, match_of
from parlay.bench.planning_ppd import predict
from parlay.cli import app
from tests.architectures import greedy, plain_model
from tests.tiny import END, make_tiny_llama

TEXTS = ["one two three", "to be or not to be", "and so on and so on"]
TOKENS = 12
AHEAD = [  # a layer takes 1 s before the exit and 1.5 s behind it, and the vocabulary 4 s
    {"candidates": 2, "exit_layer": 15, "exit": 15.0, "rest": 26.5, "handoff": 0.25, "reached": 11.0},
    {"candidates": 1, "exit_layer": 20, "exit": 0.0, "rest": 0.0, "handoff": 0.0, "reached": 0.0},
    {"candidates": 2, "exit_layer": 25, "exit": 25.0, "rest": 11.5, "handoff": 0.25, "reached": 1.0},
]
TIMES = {"layers": 30, "layer": 1.0, "plain": 20.0, "plain_half": 34.0, "host": 0.5, "ahead": AHEAD}


def test_rates_are_those_of_plain_transformers(tmp_path: Path) -> None:
    folder = make_tiny_llama(tmp_path / "model")
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "matches.json"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in TEXTS))
    command = [
        "measure", "--ppd", "--model", str(folder), "--dtype", "float64", "--compile", "off", "--dataset", str(prompts),
        "--max-tokens", str(TOKENS), "--candidates", "1,4,40", "--out", str(out), "--json", "--concurrency", "2",
    ]  # fmt: skip
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["matches"] == json.loads(out.read_text())["matches"]
    model, theirs = plain_model(folder), AutoTokenizer.from_pretrained(folder)

    hits: dict[tuple[int, int], list[bool]] = {}
    for text in TEXTS:
        chat = theirs.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)
        prompt = list(chat["input_ids"] if not isinstance(chat, list) else chat)
        said = greedy(model, prompt, TOKENS)
        said = said[: said.index(END) + 1] if END in said else said
        for place in range(1, len(said)):
            ids = torch.tensor([[*prompt, *said[:place]]])
            with torch.inference_mode():
                states = model(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states
                order = model.lm_head(model.model.norm(states[1][0, -1])).argsort(descending=True).tolist()
            for k in (1, 4, 40):
                hits.setdefault((1, k), []).append(said[place] in order[:k])
    found = {(m["exit_layer"], m["candidates"]): m["p_correct"] for m in json.loads(out.read_text())["matches"]}
    assert found == {key: pytest.approx(np.mean(values)) for key, values in hits.items()}


def test_intervals_and_autocorrelation() -> None:
    chance = np.random.default_rng(1)
    exit = Exit(20, "20", None)
    alone = match_of(exit, 1, [(chance.random(200) > 0.6).astype(int) for _ in range(40)])
    assert alone.low < 0.6 < alone.high
    assert abs(alone.autocorrelation) < 0.05
    runs = match_of(exit, 1, [np.repeat((chance.random(50) > 0.6).astype(int), 4) for _ in range(40)])
    assert runs.autocorrelation > 0.6
    assert runs.high - runs.low > 1.5 * (alone.high - alone.low)


def test_what_is_predicted_is_arithmetic() -> None:
    match = {"exit_layer": 20, "source": "20", "trained": False, "candidates": 2, "p_correct": 0.5}
    line = predict(match, TIMES)
    assert line.reached == 6
    assert line.milliseconds == pytest.approx(1000 * (20 + 10 * 1.5 + 4 + 0.25 + 0.5 - 0.5 * 6))
    assert line.over_plain == pytest.approx(20_000 / line.milliseconds)
    assert line.compute == pytest.approx((30 + (2 - 0.5) * 6) / 30)
    assert line.break_even_handoff == 0
    assert predict({**match, "p_correct": 1.0}, TIMES).break_even_handoff == pytest.approx(1000 * (34 - 33.5))


def test_the_plan_says_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "matches.json"
    match = {"exit_layer": 20, "source": "exits/20", "trained": True, "candidates": 2, "p_correct": 0.9}
    path.write_text(json.dumps({"model": "m", "matches": [match], "times": {**TIMES, "plain": 40.0}}))
    assert "--speculation ppd:2 --drafter ppd=exits/20" in CliRunner().invoke(app, ["plan", "--ppd", str(path)]).output
    path.write_text(json.dumps({"model": "m", "matches": [match], "times": TIMES}))
    assert "Plain decoding with all cores is faster" in CliRunner().invoke(app, ["plan", "--ppd", str(path)]).output
    found = json.loads(CliRunner().invoke(app, ["plan", "--ppd", str(path), "--json", "-"]).stdout)
    assert found["best"] is None
    assert found["lines"][0]["reached"] == 6
    for wrong in ("{}", "no JSON", json.dumps({"model": "m", "matches": [match], "times": None})):
        path.write_text(wrong)
        result = CliRunner().invoke(app, ["plan", "--ppd", str(path)])
        assert result.exit_code != 0
    with pytest.raises(ValueError, match="from 1 to 64"):
        counts("0,3")
