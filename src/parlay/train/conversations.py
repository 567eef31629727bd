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
    """A prompt that ends where the assistant answers, and how to draw the answer."""

    prompt: tuple[int, ...]
    params: SamplingParams


def turns(engine: Engine, questions: Sequence[str], count: int, chance: random.Random) -> list[Turn]:
    """Prompts for the target to answer.

    Half of the answers are greedy and half sampled, since a drafter serves both. Questions that are given are drawn
    from in random order; without any, the model makes them up.

    Args:
        engine: Idle; runs the target.
        questions: Texts of users' turns.
        count: How many turns are wanted.
        chance: Decides everything that is random.
    """
    asked = [chance.choice(questions) for _ in range(count)] if questions else _made_up(engine, count, chance)
    found: list[Turn] = []
    for question in asked:
        try:
            prompt = tuple(engine.tokenizer.apply_chat_template([{"role": "user", "content": question}]))
        except InvalidRequest:  # a model without a chat template goes on with the text
            prompt = tuple(engine.tokenizer.encode(question))
        room = engine.max_model_len - len(prompt)
        if prompt and room > 8:
            found.append(
                Turn(prompt, _params(chance.choice((0.0, chance.uniform(0.5, 1.0))), ANSWER_TOKENS, room, chance))
            )
    return found


def _params(temperature: float, longest: int, room: int, chance: random.Random) -> SamplingParams:
    return SamplingParams(temperature=temperature, max_tokens=min(longest, room), seed=chance.getrandbits(62))


def _made_up(engine: Engine, count: int, chance: random.Random) -> list[str]:
    """What the model writes in a user's place."""
    before = _before_user(engine)
    asked = [Turn((), SamplingParams())] * 0
    openings: list[str] = []
    for _ in range(count):
        opening = chance.choice(OPENINGS)
        prompt = (*before, *engine.tokenizer.encode(opening, add_special_tokens=False))
        openings.append(opening)
        asked.append(
            Turn(prompt, _params(chance.uniform(0.7, 1.0), QUESTION_TOKENS, engine.max_model_len - len(prompt), chance))
        )
    return [opening + text for opening, text in zip(openings, answers(engine, asked), strict=True)]


def _before_user(engine: Engine) -> tuple[int, ...]:
    """The tokens up to where a user's text begins."""
    tokenizer = engine.tokenizer
    try:
        whole = tokenizer.decode(
            tokenizer.apply_chat_template([{"role": "user", "content": MARK}]), skip_special_tokens=False
        )
        return tuple(tokenizer.encode(whole[: whole.index(MARK)], add_special_tokens=False))
    except (InvalidRequest, ValueError):
        return tuple(tokenizer.encode("")) or ((engine.eos[0],) if engine.eos else (0,))


def answers(engine: Engine, asked: Sequence[Turn], done: Callable[[], None] = lambda: None) -> list[str]:
    """What the model answers, all of it at once."""
    texts = [""] * len(asked)
    for number, turn in enumerate(asked):
        engine.add(Request(str(number), turn.prompt, turn.params))
    while engine.has_work:
        for delta in engine.step():
            texts[int(delta.request_id)] += delta.text
            if delta.finish_reason:
                done()
    return texts
