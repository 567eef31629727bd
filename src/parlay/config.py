"""Engine configuration: complete at construction, unknown keys refused."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, Self, get_args

from parlay.bets import Auto, Bet, parse_bet

Dtype = Literal["auto", "bfloat16", "float16", "float32", "float64"]
Parity = Literal["fast", "strict"]
Compile = Literal["background", "wait", "cached", "off"]
Calibrate = Literal["quick", "full", "skip"]
Offload = Literal["cpu", "disk"]
TreeSampling = Literal["sequoia", "specinfer", "topk"]


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Everything an engine is built from.

    Attributes:
        model: A built-in name, a Hugging Face id, a local folder or a `.gguf` file.
        dtype: `auto` takes bfloat16 where the hardware is fast at it, float32 elsewhere.
        device: `auto` takes CUDA where there is one. Several, as in `cuda:0,cuda:1`, share the layers.
        max_num_seqs: Rows that run at a time.
        max_num_batched_tokens: Tokens, known and guessed, in one step; 0 takes 512, or 1024 where layers stream, since
            large trees pay there.
        max_model_len: Context limit; None takes the model's own.
        kv_cache_memory: Bytes for the KV pool; None takes a share of free memory, bounded by what the rows can use.
        page_size: Positions per KV page.
        prefix_caching: Reuse KV of equal prompt prefixes.
        speculation: What to bet on every row; `auto` for all drafters there are; None never bets. A text is read by
            `parse_bet`.
        policy: Who decides what is bet; see `parlay.policy.named`. None takes `goodput` for `auto`, else the bet as
            it is.
        calibrate: How thoroughly to measure what steps cost where that was not done before and the policy asks.
        drafters: By method, where a drafter's weights are: a Hugging Face id or a local folder.
        tree_sampling: How drafters with probabilities draw siblings where chance decides: `sequoia` without
            replacement; as baselines, `specinfer` independently, and `topk` the most likely ones, without chance.
        offload: Where layers stream from that do not fit into `memory_budget`: `disk`, or for a CUDA device `cpu`.
        memory_budget: Bytes for the layers' weights, beyond embedding and head; needs `offload`.
        parity: `strict` makes every reduction independent of what else is in the step.
        compile: Compile the model's layers while serving (`background`) or before it (`wait`), which takes a minute
            once; `cached` only takes what earlier starts have compiled. On CPU, in float32 and bfloat16.
        seed: Seeds the randomness of unseeded requests.
        self_check: Compare a packed step with plain transformers at load.
    """

    model: str
    dtype: Dtype = "auto"
    device: str = "auto"
    max_num_seqs: int = 32
    max_num_batched_tokens: int = 0
    max_model_len: int | None = None
    kv_cache_memory: int | None = None
    page_size: int = 16
    prefix_caching: bool = True
    speculation: Bet | Auto | None = "auto"
    policy: str | None = None
    calibrate: Calibrate = "skip"
    drafters: Mapping[str, str] = field(default_factory=dict)
    tree_sampling: TreeSampling = "sequoia"
    offload: Offload | None = None
    memory_budget: int | None = None
    parity: Parity = "fast"
    compile: Compile = "cached"
    seed: int | None = None
    self_check: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.speculation, str) and self.speculation != "auto":
            object.__setattr__(self, "speculation", parse_bet(self.speculation))
        if self.max_num_batched_tokens == 0:
            object.__setattr__(self, "max_num_batched_tokens", 512 if self.offload is None else 1024)
        for name in ("max_num_seqs", "max_num_batched_tokens", "page_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: must be 1 or more")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError("max_num_batched_tokens: must be at least max_num_seqs, or rows would starve")
        if self.max_model_len is not None and self.max_model_len < 2:
            raise ValueError("max_model_len: must be 2 or more")
        if (self.offload is None) != (self.memory_budget is None):
            raise ValueError("offload, memory_budget: give both or neither")
        if self.offload not in (None, *get_args(Offload)):
            raise ValueError(f"offload: must be one of {', '.join(get_args(Offload))}")
        for name, choices in (
            ("parity", get_args(Parity)),
            ("compile", get_args(Compile)),
            ("dtype", get_args(Dtype)),
            ("calibrate", get_args(Calibrate)),
            ("tree_sampling", get_args(TreeSampling)),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}: must be one of {', '.join(choices)}")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Builds a configuration, refusing unknown keys with the nearest known name.

        Raises:
            ValueError: for an unknown key or a value out of range.
        """
        known = [entry.name for entry in fields(cls)]
        for key in values:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else f"; known keys: {', '.join(known)}"
                raise ValueError(f"unknown configuration key {key!r}{hint}")
        return cls(**values)
