"""OpenVINO GenAI as a worker: its continuous batching, on a GGUF file in float16.

Its KV cache would be of 8-bit integers by default, which none of the others has; here it is of floats.
"""

from __future__ import annotations

import numpy as np
import openvino as ov
import openvino_genai as genai
from worker import Loaded, Options, Tokens, serve, versions

PRECISIONS = {
    "kv-f32": "float16 weights, float32 arithmetic and KV",
    "kv-f16": "float16 weights and KV, float32 arithmetic",
}
KV_GIB = 1


def load(options: Options) -> Loaded:
    scheduler = genai.SchedulerConfig()
    settings = {
        "cache_size": KV_GIB,
        "dynamic_split_fuse": True,
        "enable_prefix_caching": False,
        "max_num_batched_tokens": options.budget,
        "max_num_seqs": options.rows,
    }
    for name, value in settings.items():
        setattr(scheduler, name, value)
    properties = {
        "INFERENCE_NUM_THREADS": options.threads,
        "INFERENCE_PRECISION_HINT": "f32",
        "KV_CACHE_PRECISION": options.variant.removeprefix("kv-"),
        "PERFORMANCE_HINT": "LATENCY",
    }
    path = str(options.models / "smollm2-135m.F16.gguf")
    pipeline = genai.ContinuousBatchingPipeline(path, scheduler, "CPU", properties)

    def decode(prompts: list[Tokens], max_tokens: int) -> list[Tokens]:
        config = genai.GenerationConfig(max_new_tokens=max_tokens, do_sample=False, ignore_eos=True)
        inputs = [ov.Tensor(np.array([prompt], np.int64)) for prompt in prompts]
        found = pipeline.generate(inputs, [config] * len(prompts))
        return [list(result.m_generation_ids[0]) for result in found]

    packages = versions(("openvino-genai", "openvino", "numpy"))
    return Loaded(decode, PRECISIONS[options.variant], packages, settings | properties)


if __name__ == "__main__":
    serve(load)
