"""What tokens should have been: by a model run here, or by a server's own first tokens."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, Protocol

import torch

from parlay.engine.checkpoint import load, resolve
from parlay.engine.model import fastest_dtype
from parlay.verify.endpoint import Endpoint
from parlay.verify.martingale import Scores

KEPT = 256  # tokens by likelihood that are kept of a distribution


class Reference(Protocol):
    """Scores given tokens."""

    @property
    def ends(self) -> tuple[int, ...]:
        """Token ids that end an answer, of which the first stands for all; none where answers must not end."""
        ...

    async def encode(self, text: str) -> tuple[int, ...]:
        """The prompt that a text becomes."""
        ...

    async def score(self, prompt: Sequence[int], tokens: Sequence[int], temperature: float) -> list[Scores]:
        """The distribution of each token, given the prompt and the tokens before it, and one more of the next."""
        ...


class ModelReference:
    """The model itself, run by transformers, which speculates on nothing.

    Args:
        model: A built-in name, a Hugging Face id or a local folder.
        dtype: In which type; `auto` is what parlay serve would take.

    Raises:
        CheckpointError: when it cannot be had.
        ValueError: for an unknown type.
    """

    def __init__(self, model: str, dtype: str) -> None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        wanted = fastest_dtype(device) if dtype == "auto" else getattr(torch, dtype, None)
        if not isinstance(wanted, torch.dtype) or not wanted.is_floating_point:
            raise ValueError(f"dtype {dtype!r}: write auto, float32, bfloat16 or float16")
        self._model, self._tokenizer = load(resolve(model), wanted, device)
        self._one_at_a_time = asyncio.Lock()
        listed: Any = getattr(self._model.generation_config, "eos_token_id", None)
        ends = [*(listed if isinstance(listed, list) else [listed]), self._tokenizer.eos_token_id]
        self.ends = tuple(sorted({int(end) for end in ends if isinstance(end, int)}))

    async def encode(self, text: str) -> tuple[int, ...]:
        """See `Reference`; as a chat where the model has a template for that."""
        if self._tokenizer.chat_template is None:
            return tuple(self._tokenizer.encode(text))
        messages = [{"role": "user", "content": text}]
        found: Any = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        return tuple(found)

    async def score(self, prompt: Sequence[int], tokens: Sequence[int], temperature: float) -> list[Scores]:
        """See `Reference`."""
        async with self._one_at_a_time:
            return await asyncio.to_thread(self._score, prompt, tokens, temperature)

    @torch.inference_mode()
    def _score(self, prompt: Sequence[int], tokens: Sequence[int], temperature: float) -> list[Scores]:
        ids = torch.tensor([[*prompt, *tokens]], device=self._model.device)
        logits = self._model(ids, logits_to_keep=len(tokens) + 1).logits[0].double()  # [tokens + 1, vocabulary]
        whole = (logits / (temperature or 1.0)).softmax(-1)
        if self.ends:  # which of them ended an answer is not always returned, so they count as one
            whole[:, self.ends[0]] = whole[:, list(self.ends)].sum(-1)
            whole[:, list(self.ends[1:])] = 0.0
        chances, order = whole.topk(min(KEPT, logits.shape[-1]))
        return [Scores(*some) for some in zip(order.cpu().numpy(), chances.cpu().numpy(), strict=True)]


class EndpointReference:
    """A server that is asked for one token behind every prefix: in such a request there is nothing to guess ahead of.

    Args:
        endpoint: May be the server under test itself.
    """

    ends: tuple[int, ...] = ()

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint

    async def encode(self, text: str) -> tuple[int, ...]:
        """See `Reference`."""
        return await self._endpoint.encode(text)

    async def score(self, prompt: Sequence[int], tokens: Sequence[int], temperature: float) -> list[Scores]:
        """See `Reference`; servers score what comes before temperature, so other ones than 1 cannot be had."""
        if temperature not in (0.0, 1.0):
            raise ValueError("temperature: must be 1 where a server is the reference; give --reference-model")
        prefixes = ([*prompt, *tokens[:place]] for place in range(len(tokens) + 1))
        return list(await asyncio.gather(*map(self._endpoint.scores, prefixes)))
