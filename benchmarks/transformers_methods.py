"""transformers' own ways to answer one request: plain, prompt lookup, a draft model, early exit."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteria
from transformers.utils import logging
from trial import Answer, Tokens

from parlay.engine.checkpoint import load, resolve
from parlay.engine.engine import Engine
from parlay.options import parse_drafter

PLAIN = "transformers"
LOOKED_UP = 10  # tokens that its prompt lookup guesses

Found = tuple[str, str, Callable[[Tokens, int], Answer]]


def load_methods(options: argparse.Namespace, off: Engine) -> tuple[list[Found], dict[str, str]]:
    """Names, what each is compared with, and how each answers; and why methods are left out.

    The same weights in the same type with its default attention, ending where Parlay's answers end. How many tokens an
    assistant guesses is transformers' own choice.

    Args:
        options: Of the benchmark.
        off: The engine without guesses.
    """
    model, _ = load(resolve(options.model), off.model.dtype, off.model.device, attn_implementation="sdpa")
    # Nothing else of the model's own, such as penalties, which Parlay does not apply unasked.
    model.generation_config = GenerationConfig(eos_token_id=list(off.eos), pad_token_id=off.eos[0] if off.eos else 0)
    logging.set_verbosity_error()  # it warns of its own calls
    settings: dict[str, dict[str, Any]] = {
        PLAIN: {},
        f"{PLAIN} lookup:{LOOKED_UP}": {"prompt_lookup_num_tokens": LOOKED_UP},
    }
    left_out: dict[str, str] = {}
    if options.assistant is not None:
        assistant, _ = load(resolve(str(options.assistant)), off.model.dtype, off.model.device, "sdpa")
        settings[f"{PLAIN} assistant"] = {"assistant_model": assistant}
    else:
        left_out[f"{PLAIN} assistant"] = "no draft model was named; write --assistant FOLDER"
    count = int(model.config.num_hidden_layers)
    source = dict(map(parse_drafter, options.drafter)).get("self", "")
    layers = int(source) if source.isdecimal() else max(1, count // 4)
    why = cannot_exit_early(model, layers)
    if why is None:
        settings[f"{PLAIN} exit:{layers}"] = {"assistant_early_exit": layers}
    else:
        left_out[f"{PLAIN} exit:{layers}"] = why
    chance = {"do_sample": False}
    if options.temperature:
        chance = {"do_sample": True, "temperature": options.temperature, "top_k": 0, "top_p": 1.0}
    return [(name, PLAIN, partial(answer, model, chance | own)) for name, own in settings.items()], left_out


@torch.inference_mode()
def cannot_exit_early(model: Any, layers: int) -> str | None:
    """Why its early exit would not exit early: it asks a model for fewer layers by its configuration's number."""
    inner = getattr(model, model.base_model_prefix)
    ids = torch.tensor([[0, 1]], device=model.device)
    whole, count = model(ids).logits, inner.config.num_hidden_layers
    inner.config.num_hidden_layers = layers
    try:
        part = model(ids, use_cache=False).logits
    except (RuntimeError, ValueError, IndexError, AttributeError) as error:
        return f"{type(model).__name__} does not run with {layers} of its layers ({error})"
    finally:
        inner.config.num_hidden_layers = count
    if torch.equal(whole, part):
        return f"{type(model).__name__} runs all of its layers whatever num_hidden_layers says"
    return None


class Clock(StoppingCriteria):
    """Is asked after every step whether to stop; notes when, and how many tokens there are."""

    def __init__(self) -> None:
        self.calls: list[tuple[float, int]] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:  # type: ignore[override]
        del scores, kwargs
        self.calls.append((time.perf_counter(), input_ids.shape[1]))
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


@torch.inference_mode()
def answer(model: Any, settings: dict[str, Any], prompt: Tokens, max_tokens: int) -> Answer:
    """Answers one prompt."""
    clock = Clock()
    began = time.perf_counter()
    ids = torch.tensor([prompt], device=model.device)
    made = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_tokens,
        stopping_criteria=[clock],
        **settings,
    )
    tokens = tuple(made[0, len(prompt) :].tolist())
    whole = time.perf_counter() - began
    at, length = clock.calls[0]
    return Answer(at - began, whole, min(length - len(prompt), len(tokens)), tokens, len(clock.calls))
