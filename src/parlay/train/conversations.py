"""Conversations that a chat model makes up by itself, so that training a drafter needs no dataset.

A chat model that is given the beginning of a user's turn goes on with what users write (Magpie, Xu et al. 2024,
arXiv 2406.08464). Openings steer it to the kinds of tasks that speculation is measured on; most are a word or two.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from parlay.engine.engine import Engine
from parlay.types import InvalidRequest, Request, SamplingParams

OPENINGS = (
    "", "", "", "", "What is", "What are", "Who", "When did", "Where", "How", "How do I", "Why", "Can you", "Which",
    "Is it", "Tell me about", "Explain", "Describe", "Compare", "Define", "List", "Discuss", "Analyze", "Suggest",
    "Write a", "Write a short story about", "Write an email to", "Write a poem", "Compose", "Draft", "Create a",
    "Imagine you are", "Pretend to be", "Act as", "You are a", "Please", "I need", "I want to", "I'm", "My", "Help me",
    "Write a Python function", "Write a program", "Implement", "Fix this code:\n", "def ", "Given a list of",
    "Solve", "Calculate", "Find the", "If", "A train", "John has", "Mary", "There are", "In a", "Suppose",
    "Each", "Tom bought", "A store sells", "The sum of", "How many", "How much",
    "Translate the following sentence to English:", "Translate German to English:", "Translate to French:",
    "Summarize:", "Summarize:", "Summarize the following text:\n", "Summarize this article:", "Give a summary of",
    "Rewrite", "Paraphrase", "Correct the grammar:", "Edit the following paragraph:\n", "Extract", "Extract the names",
    "Read the following passage and answer the question.", "Given the following text, answer the question:\n",
    "Based on the passage below,", "Context:", "The following is", "Identify", "Classify", "Evaluate", "Convert",
)  # fmt: skip
MARK = "\N{OBJECT REPLACEMENT CHARACTER}"
QUESTION_TOKENS = 400
ANSWER_TOKENS = 320


@dataclass(frozen=True, slots=True)
class Turn:
    """A prompt to go on from, and how."""

    prompt: tuple[int, ...]
    params: SamplingParams


def turns(engine: Engine, questions: Sequence[str], count: int, chance: random.Random) -> list[Turn]:
    """Prompts for the target to answer.

    Half of the answers are greedy and half sampled, since a drafter serves both.

    Args:
        engine: Idle; runs the target.
        questions: Users' turns to draw from; none to have the model make them up.
        count: How many turns are wanted.
        chance: Decides everything that is random.
    """
    before, after = _around_user(engine)
    if questions:
        asked = [
            tuple(engine.tokenizer.encode(chance.choice(questions), add_special_tokens=False)) for _ in range(count)
        ]
        prompts = [(*before, *question, *after) for question in asked]
    else:
        prompts = [(*written, *after) for written in _made_up(engine, before, count, chance)]
    fitting = [prompt for prompt in prompts if prompt and len(prompt) + 8 < engine.max_model_len]
    temperatures = [chance.choice((0.0, chance.uniform(0.5, 1.0))) for _ in fitting]
    return [
        Turn(prompt, _params(engine, prompt, temperature, ANSWER_TOKENS, chance))
        for prompt, temperature in zip(fitting, temperatures, strict=True)
    ]


def _params(
    engine: Engine, prompt: Sequence[int], temperature: float, longest: int, chance: random.Random
) -> SamplingParams:
    room = engine.max_model_len - len(prompt)
    return SamplingParams(temperature=temperature, max_tokens=min(longest, room), seed=chance.getrandbits(62))


def _made_up(engine: Engine, before: tuple[int, ...], count: int, chance: random.Random) -> list[tuple[int, ...]]:
    """What the model writes in a user's place, with what comes before."""
    asked: list[Turn] = []
    for _ in range(count):
        opening = engine.tokenizer.encode(chance.choice(OPENINGS), add_special_tokens=False)
        prompt = (*before, *opening)
        asked.append(Turn(prompt, _params(engine, prompt, chance.uniform(0.7, 1.0), QUESTION_TOKENS, chance)))
    written = answers(engine, asked)
    ends = frozenset(engine.eos)
    return [
        (*turn.prompt, *(tokens[:-1] if tokens and tokens[-1] in ends else tokens))
        for turn, tokens in zip(asked, written, strict=True)
    ]


def _around_user(engine: Engine) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The tokens before a user's text, and those after it up to where the assistant answers."""
    tokenizer = engine.tokenizer
    try:
        whole = tokenizer.decode(
            tokenizer.apply_chat_template([{"role": "user", "content": MARK}]), skip_special_tokens=False
        )
        before, after = (tokenizer.encode(part, add_special_tokens=False) for part in whole.split(MARK))
        return tuple(before), tuple(after)
    except (InvalidRequest, ValueError):  # without a chat template a model goes on with the text
        return tuple(tokenizer.encode("")) or ((engine.eos[0],) if engine.eos else (0,)), ()


def answers(engine: Engine, asked: Sequence[Turn], done: Callable[[], None] = lambda: None) -> list[tuple[int, ...]]:
    """What the model goes on with, all of it at once."""
    found: list[tuple[int, ...]] = [()] * len(asked)
    for number, turn in enumerate(asked):
        engine.add(Request(str(number), turn.prompt, turn.params))
    while engine.has_work:
        for delta in engine.step():
            found[int(delta.request_id)] += delta.tokens
            if delta.finish_reason:
                done()
    return found
