"""transformers as a worker: `generate` on a rectangle of left-padded prompts, with PyTorch's own attention."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM
from worker import Loaded, Options, Tokens, serve, versions

PRECISIONS = {
    "float32": "float32 weights, arithmetic and KV",
    "bfloat16": "bfloat16 weights, activations and KV",
}


def load(options: Options) -> Loaded:
    torch.set_num_threads(options.threads)
    attention = "sdpa"
    model = AutoModelForCausalLM.from_pretrained(
        options.models, dtype=getattr(torch, options.variant), attn_implementation=attention, use_safetensors=True
    ).eval()
    model.generation_config.eos_token_id = None

    @torch.inference_mode()
    def decode(prompts: list[Tokens], max_tokens: int) -> list[Tokens]:
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        made = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=max_tokens, do_sample=False, pad_token_id=0
        )
        return made[:, longest:].tolist()

    settings = {"attn_implementation": attention, "cache": "dynamic", "padding": "left"}
    return Loaded(decode, PRECISIONS[options.variant], versions(("torch", "transformers")), settings)


if __name__ == "__main__":
    serve(load)
