"""Parlay as a worker: the engine without a server, plain decoding, layers compiled before the first request."""

from __future__ import annotations

import torch
from worker import Loaded, Options, Tokens, serve, versions

from parlay.bench.offline import drive
from parlay.config import EngineConfig
from parlay.engine.engine import Engine
from parlay.types import SamplingParams

PRECISIONS = {
    "float32": "bfloat16 weights, float32 arithmetic and KV",
    "bfloat16": "bfloat16 weights, activations and KV, float32 sums",
}


def load(options: Options) -> Loaded:
    torch.set_num_threads(options.threads)
    settings = {
        "compile": "wait",
        "max_num_batched_tokens": options.budget,
        "max_num_seqs": options.rows,
        "prefix_caching": False,
        "speculation": None,
    }
    config = {"model": str(options.models), "dtype": options.variant, "max_model_len": options.context, **settings}
    engine = Engine(EngineConfig.from_dict(config))
    settings["compiled"] = any(engine.model.segments.programs)  # a check at load may have refused the compiled layers

    def decode(prompts: list[Tokens], max_tokens: int) -> list[Tokens]:
        params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
        run = drive(engine, [tuple(prompt) for prompt in prompts], params, options.rows)
        return [list(output.tokens) for output in run.outputs]

    return Loaded(decode, PRECISIONS[options.variant], versions(("parlay", "torch", "transformers")), settings)


if __name__ == "__main__":
    serve(load)
