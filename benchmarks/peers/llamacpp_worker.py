"""llama.cpp as a worker: its C interface, called from Python once a step.

The loop is that of its own batched benchmark: all rows in one `llama_decode`, each with a KV stream of its own. The
most likely token is picked by numpy, which takes less time than llama.cpp's greedy sampler.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import llama_cpp as llama
import numpy as np
from worker import Loaded, Options, Tokens, serve, versions

PRECISIONS = {
    "F16": "float16 weights and KV, activations rounded to float16 for products",
    "BF16": "bfloat16 weights, float16 KV, activations rounded to bfloat16 for products",
    "F32": "float32 weights and activations, float16 KV",
}


@dataclass(frozen=True, slots=True)
class Entry:
    """One token of a batch."""

    token: int
    position: int
    row: int
    read: bool  # whether its logits are wanted


class Context:
    """A model with room for some rows."""

    def __init__(self, options: Options) -> None:
        llama.llama_backend_init()
        path = options.models / f"smollm2-135m.{options.variant}.gguf"
        self._model = llama.llama_load_model_from_file(bytes(path), llama.llama_model_default_params())
        params = llama.llama_context_default_params()
        params.n_ctx = options.context * options.rows
        params.n_batch = options.budget
        params.n_seq_max = options.rows
        params.n_threads = params.n_threads_batch = options.threads
        params.kv_unified = False
        params.no_perf = True
        self.settings = {
            "n_ctx": params.n_ctx,
            "n_batch": params.n_batch,
            "n_ubatch": params.n_ubatch,
            "flash_attn_type": params.flash_attn_type,
            "kv_unified": params.kv_unified,
            "system": llama.llama_print_system_info().decode(),
        }
        self._context = llama.llama_new_context_with_model(self._model, params)
        self._vocab_size = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self._model))
        self._batch = llama.llama_batch_init(options.budget, 0, 1)

    def forget(self) -> None:
        """Empties the KV cache."""
        llama.llama_memory_clear(llama.llama_get_memory(self._context), False)

    def step(self, entries: Sequence[Entry]) -> Tokens:
        """Runs the tokens and returns the most likely next one after each that is read."""
        batch = self._batch
        batch.n_tokens = len(entries)
        for index, entry in enumerate(entries):
            batch.token[index] = entry.token
            batch.pos[index] = entry.position
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = entry.row
            batch.logits[index] = entry.read
        status = llama.llama_decode(self._context, batch)
        if status != 0:
            raise RuntimeError(f"llama_decode returned {status}")
        return [self._likeliest(index) for index, entry in enumerate(entries) if entry.read]

    def _likeliest(self, index: int) -> int:
        found = llama.llama_get_logits_ith(self._context, index)
        values = ctypes.cast(found, ctypes.POINTER(ctypes.c_float * self._vocab_size)).contents
        return int(np.frombuffer(values, np.float32).argmax())


def load(options: Options) -> Loaded:
    context = Context(options)

    def decode(prompts: list[Tokens], max_tokens: int) -> list[Tokens]:
        context.forget()
        latest = context.step(
            [
                Entry(token, position, row, position == len(prompt) - 1)
                for row, prompt in enumerate(prompts)
                for position, token in enumerate(prompt)
            ]
        )
        made = [[token] for token in latest]
        for done in range(max_tokens - 1):
            latest = context.step(
                [
                    Entry(token, len(prompt) + done, row, True)
                    for row, (token, prompt) in enumerate(zip(latest, prompts, strict=True))
                ]
            )
            for tokens, token in zip(made, latest, strict=True):
                tokens.append(token)
        return made

    packages = {"ggml": ggml_version(), **versions(("llama-cpp-python", "numpy"))}
    return Loaded(decode, PRECISIONS[options.variant], packages, context.settings)


def ggml_version() -> str:
    """Of llama.cpp's tensor library, which tells more than the version of the Python package around it."""
    library = ctypes.CDLL(str(Path(llama.__file__).parent / "lib" / "libggml-base.so"))
    library.ggml_version.restype = ctypes.c_char_p
    return library.ggml_version().decode()


if __name__ == "__main__":
    serve(load)
