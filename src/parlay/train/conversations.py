"""Conversations that a chat model makes up by itself, so that training a drafter needs no dataset.

A chat model that is given the beginning of a user's turn goes on with what users write (Magpie, Xu et al. 2024,
arXiv 2406.08464). Openings steer it to the kinds of tasks that speculation is measured on; most are a word or two.
Such users write little. So some questions, once enough was answered, consist of a task and earlier answers for it to be
about: that is where answers come from the text in front of them.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence

from parlay.engine.engine import Engine
from parlay.types import Delta, InvalidRequest, Request, SamplingParams

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
TASKS = (
    "Summarize the following text:\n\n", "Summarize this in three sentences.\n\n", "TL;DR of this article:\n\n",
    "Translate the following text to German:\n\n", "Translate to French:\n\n", "Translate to Spanish:\n\n",
    "List all names, dates and numbers in this text.\n\n", "What are the main points of this text?\n\n",
    "Extract the key facts from the passage below as JSON.\n\n", "Correct the mistakes in this text:\n\n",
    "Rewrite the following text so that a child understands it:\n\n", "Quote the most important sentence:\n\n",
    "Read the passages and answer: what are they about, and what follows from them?\n\n", "Go on with this:\n\n",
)  # fmt: skip
TASK_SHARE = 0.25
MATERIAL = 32  # answers, the latest, that tasks can be about
MARK = "\N{OBJECT REPLACEMENT CHARACTER}"
QUESTION_TOKENS = 400
ANSWER_TOKENS = 320
ROOM = 8  # tokens that an answer can have at least
ANSWER = "answer "  # what the ids of such requests begin with


class Conversations:
    """Questions and answers, so many at a time; where one ends the next begins.

    Half of the answers are greedy and half sampled, since a drafter serves both.

    Args:
        engine: Idle; runs the target. It reads a question only once if it has a prefix cache.
        questions: Users' turns to draw from; none to have the model make them up.
        seed: Decides what is asked and how; the engine's own decides what is sampled.
        count: How many there are in all; None for no end.

    Raises:
        ValueError: when no question fits.
    """

    def __init__(self, engine: Engine, questions: Sequence[str], seed: str, count: int | None = None) -> None:
        self._engine, self._seed, self._count = engine, seed, count
        self._before, self._after = _around_user(engine)
        encoded = (engine.tokenizer.encode(question, add_special_tokens=False) for question in questions)
        prompts = [(*self._before, *question, *self._after) for question in encoded]
        self._prompts = [prompt for prompt in prompts if 0 < len(prompt) <= engine.max_model_len - ROOM]
        if questions and not self._prompts:
            raise ValueError("prompts: none leaves room for an answer within the model's context; give shorter ones")
        self._begun = 0
        self._questions: dict[str, tuple[int, ...]] = {}  # those that the model is writing, with what came before
        self._answers: dict[str, tuple[int, ...]] = {}  # that it is writing, as far as they are
        self._material: deque[tuple[int, ...]] = deque(maxlen=MATERIAL)

    def run(self, answers: int) -> int:
        """Steps until so many more answers have ended or there are none left; returns how many have."""
        ended = 0
        while ended < answers:
            while len(self._questions) + len(self._answers) < self._engine.config.max_num_seqs and self._begin():
                pass
            if not self._engine.has_work:
                break
            for delta in self._engine.step():
                ended += self._go_on(delta)
        return ended

    def stop(self) -> None:
        """Drops what has not ended."""
        for request in (*self._questions, *self._answers):
            self._engine.abort(request)
        self._questions.clear()
        self._answers.clear()

    def _begin(self) -> bool:
        if self._begun == self._count:
            return False
        chance = random.Random(f"{self._seed} {self._begun}")
        name = f"{self._begun} {chance.getrandbits(32)}"
        self._begun += 1
        if self._prompts:
            self._answer(name, chance.choice(self._prompts))
            return True
        if len(self._material) == MATERIAL and chance.random() < TASK_SHARE:
            self._answer(name, self._task(chance))
            return True
        opening = self._engine.tokenizer.encode(chance.choice(OPENINGS), add_special_tokens=False)
        self._questions[name] = (*self._before, *opening)
        self._add(name, self._questions[name], chance.uniform(0.7, 1.0), QUESTION_TOKENS, len(self._after) + ROOM)
        return True

    def _task(self, chance: random.Random) -> tuple[int, ...]:
        """A question about one to three of the latest answers."""
        encode = self._engine.tokenizer.encode
        question = [*encode(chance.choice(TASKS), add_special_tokens=False)]
        for text in chance.sample(self._material, chance.randint(1, 3)):
            question += (*text, *encode("\n\n", add_special_tokens=False))
        room = self._engine.max_model_len - len(self._before) - len(self._after) - ROOM
        return (*self._before, *question[: max(0, room)], *self._after)

    def _answer(self, name: str, prompt: tuple[int, ...]) -> None:
        chance = random.Random(f"answer {name}")
        name = ANSWER + name
        self._answers[name] = ()
        self._add(name, prompt, chance.choice((0.0, chance.uniform(0.5, 1.0))), ANSWER_TOKENS, 0)

    def _add(self, name: str, prompt: tuple[int, ...], temperature: float, longest: int, after: int) -> None:
        room = self._engine.max_model_len - len(prompt) - after
        self._engine.add(Request(name, prompt, SamplingParams(temperature=temperature, max_tokens=min(longest, room))))

    def _go_on(self, delta: Delta) -> bool:
        """Whether an answer has ended."""
        name = delta.request_id
        if name in self._answers:
            self._answers[name] += delta.tokens
            if delta.finish_reason:
                self._material.append(self._without_end(self._answers.pop(name)))
            return delta.finish_reason is not None
        self._questions[name] += delta.tokens
        if delta.finish_reason:
            question = self._questions.pop(name)
            self._answer(name, (*self._without_end(question), *self._after))
        return False

    def _without_end(self, text: tuple[int, ...]) -> tuple[int, ...]:
        return text[:-1] if text and text[-1] in self._engine.eos else text


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
