"""Engine configuration: complete at construction, unknown keys refused."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, Self, get_args

from parlay.types import Bet, Tree

Dtype = Literal["auto", "bfloat16", "float16", "float32", "float64"]
Parity = Literal["fast", "strict"]
Compile = Literal["background", "wait", "cached", "off"]
TreeSampling = Literal["sequoia", "specinfer", "topk"]


def parse_bet(text: str) -> Bet | None:
    """Reads the command-line form of a fixed bet.

    It is `off`, `auto`, `METHOD` (a chain of 4), `METHOD:DEPTH` (a chain) or `METHOD:[-1,0,0,...]` (the parents of a
    tree, -1 being the last known token). Until a controller exists, `auto` is prompt lookup at a modest depth.

    Raises:
        ValueError: with the accepted forms, when `text` is none of them.
    """
    if text == "off":
        return None
    if text == "auto":
        return AUTO
    form = re.fullmatch(r"(?P<method>\w+)(:((?P<depth>\d{1,3})|(?P<parents>\[[-\d,\s]*\])))?", text)
    try:
        if form is None:
            raise ValueError("it is none of these")
        parents, depth = form["parents"], form["depth"]
        tree = Tree.chain(int(depth or 4)) if parents is None else Tree(tuple(json.loads(parents)))
    except ValueError as error:
        raise ValueError(
            f"speculation {text!r}: write off, auto, METHOD, METHOD:DEPTH or METHOD:[parents of a tree] ({error})"
        ) from error
    return Bet(form["method"], tree) if tree else None


AUTO = Bet("prompt_lookup", Tree.chain(4))


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Everything an engine is built from.

    Attributes:
        model: A built-in name, a Hugging Face id, a local folder or a `.gguf` file.
        dtype: `auto` takes bfloat16 where the hardware is fast at it, float32 elsewhere.
        device: `auto` takes CUDA where there is one.
        max_num_seqs: Rows that run at a time.
        max_num_batched_tokens: Tokens, known and guessed, in one step.
        max_model_len: Context limit; None takes the model's own.
        kv_cache_memory: Bytes for the KV pool; None takes a share of free memory, bounded by what the rows can use.
        page_size: Positions per KV page.
        prefix_caching: Reuse KV of equal prompt prefixes.
        speculation: What to bet on every row; None never bets. A text is read by `parse_bet`.
        drafters: By method, where a drafter's weights are: a Hugging Face id or a local folder.
        tree_sampling: How drafters with probabilities draw siblings where chance decides: `sequoia` without
            replacement; as baselines, `specinfer` independently, and `topk` the most likely ones, without chance.
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
    max_num_batched_tokens: int = 512
    max_model_len: int | None = None
    kv_cache_memory: int | None = None
    page_size: int = 16
    prefix_caching: bool = True
    speculation: Bet | None = AUTO
    drafters: Mapping[str, str] = field(default_factory=dict)
    tree_sampling: TreeSampling = "sequoia"
    parity: Parity = "fast"
    compile: Compile = "cached"
    seed: int | None = None
    self_check: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.speculation, str):
            object.__setattr__(self, "speculation", parse_bet(self.speculation))
        for name in ("max_num_seqs", "max_num_batched_tokens", "page_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: must be 1 or more")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError("max_num_batched_tokens: must be at least max_num_seqs, or rows would starve")
        if self.max_model_len is not None and self.max_model_len < 2:
            raise ValueError("max_model_len: must be 2 or more")
        for name, choices in (
            ("parity", get_args(Parity)),
            ("compile", get_args(Compile)),
            ("dtype", get_args(Dtype)),
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
