"""The target model behind one seam: `verify` scores known tokens and trees of any shape in one packed pass."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedConfig

from parlay.bets import Tree
from parlay.config import EngineConfig, Offload
from parlay.engine import attention, native
from parlay.engine.accept import Scores, token_logprobs
from parlay.engine.attention import AttentionCall, ProbeAttention, UnsupportedModel, forward_batch
from parlay.engine.batch import Draft, kept_slots, pack
from parlay.engine.checkpoint import ModelSource, cache_dir, fingerprint, load
from parlay.engine.compiled import EXAMPLE, CompiledLayers, Example
from parlay.engine.gathered import GatheredAttention
from parlay.engine.kv import KVShape, PagedKV
from parlay.engine.path_attention import DTYPES, PathAttention
from parlay.engine.pipelined import Pipeline
from parlay.engine.placement import devices, gathered_everywhere, spread, strict_everywhere
from parlay.engine.products import pack_products
from parlay.engine.segments import SegmentedModel, SegmentOutput
from parlay.engine.streaming import stream
from parlay.engine.strict import TILE, ParallelProducts, StrictAttention, tiles
from parlay.types import Request, Row, RowResult, SamplingParams, TokenLogprobs

HEAD_CHUNK = 64  # prompt positions whose logits exist at a time
_PLAIN_ATTENTION = {"full_attention", "sliding_attention"}
_EXPERTS = ("num_experts", "num_local_experts", "moe_num_experts", "n_routed_experts")


def refusal(config: PreTrainedConfig) -> str | None:
    """Why a model cannot be served exactly, in a sentence; None if nothing is known against it."""
    name = config.model_type
    if config.is_encoder_decoder:
        return f"{name} is an encoder-decoder model, and Parlay serves decoder-only language models"
    if config.get_text_config() is not config:
        return f"{name} is a multimodal model, and Parlay serves text; use its text-only variant where there is one"
    kinds = sorted(set(getattr(config, "layer_types", None) or ()) - _PLAIN_ATTENTION)
    if kinds:
        return f"{name} has {', '.join(kinds)} layers, whose state cannot be rolled back after a rejected guess"
    if getattr(config, "kv_lora_rank", None):
        return f"{name} compresses its KV cache (multi-head latent attention), which Parlay does not support yet"
    if not getattr(config, "num_attention_heads", None):
        return f"{name} has no attention layers, so its state cannot be rolled back after a rejected guess"
    return None


@dataclass(frozen=True, slots=True, eq=False)
class LoadedModel:
    """A checkpoint in memory, before it is given a KV pool."""

    model: Any  # transformers.PreTrainedModel
    tokenizer: Any
    config: PreTrainedConfig
    layers: nn.ModuleList
    shapes: tuple[KVShape, ...]
    calls: tuple[AttentionCall, ...]
    returns_tuple: bool
    device: torch.device  # of all but layers
    places: tuple[torch.device, ...]  # of each layer
    dtype: torch.dtype
    made_of: str  # changes when the files that it was loaded from do

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """All that it is on, the one first where a step begins and ends."""
        return tuple(dict.fromkeys((self.device, *self.places)))

    @property
    def context(self) -> int:
        """The model's own context limit.

        LongRoPE turns every position by other factors once one of them passes the original context; a packed step has
        but one set of factors, so such a model is served up to there, and a row's output never depends on another's.
        """
        longest = int(getattr(self.config, "max_position_embeddings", None) or 2048)
        rope = getattr(self.config, "rope_parameters", None) or {}
        if rope.get("rope_type") == "longrope":
            original = rope.get("original_max_position_embeddings") or self.config.original_max_position_embeddings
            return min(longest, int(original))
        return longest

    @property
    def eos(self) -> tuple[int, ...]:
        """Every id that ends an output: the generation configuration's and the tokenizer's own, if it is a token."""
        listed = getattr(self.model.generation_config, "eos_token_id", None)
        ids = listed if isinstance(listed, list) else [listed]
        known = range(self.config.vocab_size)
        return tuple(sorted({int(i) for i in (*ids, self.tokenizer.eos_token_id) if i is not None and i in known}))


def load_model(source: ModelSource, config: EngineConfig) -> LoadedModel:
    """Loads a checkpoint and learns from one small pass what its layers keep.

    Raises:
        UnsupportedModel: in a sentence, for an architecture that could not be served exactly.
        CheckpointError: when the checkpoint cannot be had or read.
    """
    over = devices(config.device)
    device = over[0]
    if config.offload and len(over) > 1:
        raise ValueError("offload: layers stream to one device; name one of them as device, or leave offload out")
    dtype = fastest_dtype(device) if config.dtype == "auto" else getattr(torch, config.dtype)
    if not source.gguf_file:
        _refuse_if(_config_refusal(source))
    # Layers that stream, or that several devices share, are never all on the device.
    home = torch.device("cpu") if config.offload or len(over) > 1 else device
    model, tokenizer = load(source, dtype, home, attn_implementation="eager")
    _refuse_if(refusal(model.config))
    if config.parity == "strict" and any(getattr(model.config, name, None) for name in _EXPERTS):
        _refuse_if("mixture-of-experts models regroup tokens by expert, so --parity strict cannot hold for them")
    if getattr(model, "_is_stateful", False):
        _refuse_if(
            f"{model.config.model_type} keeps a recurrent state, which cannot be rolled back after a rejected guess"
        )
    layers = _layer_list(model)
    returns_tuple: list[bool] = []
    hook = layers[0].register_forward_hook(lambda _m, _a, out: returns_tuple.append(isinstance(out, tuple)))
    probe = ProbeAttention({}, {})
    model.set_attn_implementation(attention.NAME)
    ids = torch.zeros(1, 2, dtype=torch.long, device=home)
    try:
        with torch.inference_mode(), forward_batch(probe):
            model(input_ids=ids, position_ids=torch.arange(2, device=home)[None], use_cache=False)
    except RuntimeError as error:  # such as a product that PyTorch lacks for a dtype
        reason = str(error).splitlines()[0]
        raise UnsupportedModel(f"{model.config.model_type} does not run in {dtype} on {home} ({reason})") from error
    hook.remove()
    model.set_attn_implementation("eager")
    if sorted(probe.shapes) != list(range(len(layers))):
        _refuse_if(
            f"{model.config.model_type} sends {len(probe.shapes)} of its {len(layers)} layers through transformers' "
            "attention interface, and Parlay needs all of them"
        )
    loaded = LoadedModel(
        model=model,
        tokenizer=tokenizer,
        config=model.config,
        layers=layers,
        shapes=tuple(probe.shapes[i] for i in range(len(layers))),
        calls=tuple(probe.calls[i] for i in range(len(layers))),
        returns_tuple=returns_tuple[0],
        device=device,
        places=spread(len(layers), over),
        dtype=dtype,
        made_of=fingerprint(source),
    )
    _refuse_if(_window_refusal(loaded))
    return loaded


def _refuse_if(reason: str | None) -> None:
    if reason:
        raise UnsupportedModel(reason)


def _config_refusal(source: ModelSource) -> str | None:
    """Looks at the configuration alone, before any weights are fetched; `load` explains what cannot be read."""
    try:
        return refusal(AutoConfig.from_pretrained(source.path, trust_remote_code=False))
    except (OSError, ValueError):
        return None


def _window_refusal(loaded: LoadedModel) -> str | None:
    window = getattr(loaded.config, "sliding_window", None)
    kinds = getattr(loaded.config, "layer_types", None)
    if window is None or window >= loaded.context or not getattr(loaded.config, "use_sliding_window", True):
        return None
    if (kinds is None or "sliding_attention" in kinds) and not any(call.window for call in loaded.calls):
        return f"{loaded.config.model_type} has a sliding window that it does not pass to its attention function"
    return None


def _layer_list(model: Any) -> nn.ModuleList:
    count = model.config.num_hidden_layers
    found = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if len(found) != 1:
        raise UnsupportedModel(f"{model.config.model_type} has no single list of {count} decoder layers")
    return found[0]


def fastest_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the hardware multiplies it natively, else the fastest type that is safe."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32


class TargetModel:
    """Scores a step and keeps its KV.

    Args:
        loaded: The checkpoint.
        num_pages: Pages of the KV pool, the null page included.
        page_size: Positions per page.
        strict: Run shape-invariantly; see `strict`.
        offload: Where layers stream from that do not fit into `memory_budget` bytes; None where all are resident.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        num_pages: int,
        page_size: int,
        strict: bool,
        offload: Offload | None = None,
        memory_budget: int = 0,
    ) -> None:
        self.device, self.devices, self.dtype = loaded.device, loaded.devices, loaded.dtype
        self.vocab_size, self.eos = int(loaded.config.vocab_size), loaded.eos
        packs = self.device.type == "cpu"
        self.streamed = None
        if offload is not None:
            prepare = pack_products if packs else (lambda layer: None)
            self.streamed = stream([*loaded.layers], offload, memory_budget, _folder(loaded), loaded.device, prepare)
        if packs:
            pack_products(loaded.model)
            native.give_back_memory()
        self.by_paths = self.device.type == "cpu" and self.dtype in DTYPES and native.load()
        self._spread = len(self.devices) > 1
        whole = PathAttention if self.by_paths else GatheredAttention
        self.attention = gathered_everywhere if self._spread else whole
        self.products = ParallelProducts(loaded.model) if strict else None
        self._shapes, self._calls, self._places = loaded.shapes, loaded.calls, loaded.places
        self._about = loaded.config.to_json_string(use_diff=False)
        self.kv = PagedKV(loaded.shapes, num_pages, page_size, loaded.dtype, loaded.places)
        loaded.model.set_attn_implementation(attention.NAME)
        self.pipeline: Pipeline | None = None  # how steps run that begin the next token
        self.segments = SegmentedModel(loaded.model, loaded.layers, loaded.returns_tuple)
        if self._spread:
            self.segments.place(loaded.places)
        if self.streamed is not None:
            self.segments.before_each(self.streamed.bring)

    @property
    def strict(self) -> bool:
        return self.products is not None

    def idle(self) -> None:
        """Nothing is left to do: gives cores back that another unit had."""
        if self.pipeline is not None:
            self.pipeline.drop()

    @contextmanager
    def borrowed_kv(self, num_pages: int, page_size: int) -> Iterator[None]:
        """A KV pool of its own for what must not touch the real one."""
        own, self.kv = self.kv, PagedKV(self._shapes, num_pages, page_size, self.dtype, self._places)
        try:
            yield
        finally:
            self.kv = own

    @torch.inference_mode()
    def verify(
        self,
        rows: Sequence[Row],
        drafts: Sequence[Draft | None],
        taps: Sequence[int] = (),
    ) -> Scores:
        """Runs every row's known tokens and guesses in one pass and writes their KV.

        Args:
            rows: The step's rows.
            drafts: A tree of guesses, or None, per row.
            taps: Layers after which hidden states are wanted.

        Returns:
            Logits of each sampling row's last known token and of every node, wanted prompt log-probabilities, and
            tapped hidden states of the whole packed step.
        """
        if self.pipeline is not None:
            ahead = [draft.ahead if draft else 0 for draft in drafts]
            if all(ahead) and self.pipeline.fits(rows):
                return self.pipeline.verify(rows, ahead, taps)
            self.pipeline.drop()
        batch = pack(rows, drafts, self.kv.page_size, self.device)
        with self.products or nullcontext():
            if self.strict:
                hidden, tapped = self._run_tiles(rows, drafts, taps)
                pieces = [*self.logits(hidden.index_select(0, batch.reads))]
                logits = torch.cat(pieces) if pieces else hidden[:0]
            else:
                with forward_batch(self.attention(self.kv, batch)):
                    out = self.segments(batch.tokens, batch.positions, taps=taps, reads=batch.reads)
                hidden, tapped, logits = out.hidden, out.taps, out.logits
            return Scores(logits, batch.first_read, self._prompt_logprobs(rows, drafts, hidden), tapped)

    def _run_tiles(
        self, rows: Sequence[Row], drafts: Sequence[Draft | None], taps: Sequence[int]
    ) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        """[T, hidden] before the norm, and after each tapped layer, from passes of one shape."""
        outs = []
        for tile in tiles(rows, drafts, self.kv.page_size, self.device):
            attend = strict_everywhere if self._spread else StrictAttention
            with forward_batch(attend(self.kv, tile)):
                outs.append(self.segments(tile.tokens, tile.positions, taps=taps))
        count = sum(row.count + (len(draft.tree) if draft else 0) for row, draft in zip(rows, drafts, strict=True))
        tapped = {tap: torch.cat([out.taps[tap] for out in outs])[:count] for tap in taps}
        return torch.cat([out.hidden for out in outs])[:count], tapped

    def head(
        self,
        hidden: torch.Tensor,
        then: Callable[[torch.Tensor], torch.Tensor] | None = None,
        taps: Sequence[int] = (),
    ) -> SegmentOutput:
        """Norm and head over [N, hidden] after any layer; see `SegmentedModel` for the rest."""
        blank = torch.zeros(len(hidden), dtype=torch.long, device=self.device)
        reads, none = torch.arange(len(hidden), device=self.device), range(self.segments.num_layers)[:0]
        return self.segments(blank, blank, layers=none, hidden=hidden, taps=taps, reads=reads, then=then)

    def logits(self, hidden: torch.Tensor) -> Iterator[torch.Tensor]:
        """Norm and head over [N, hidden] after the last layer, in chunks; in strict mode all of one shape."""
        size = TILE if self.strict else HEAD_CHUNK
        for chunk in hidden.split(size) if len(hidden) else ():
            count = len(chunk)
            if self.strict:
                chunk = torch.cat([chunk, chunk.new_zeros(size - count, chunk.shape[1])])
            yield self.head(chunk).logits[:count]

    def _prompt_logprobs(
        self, rows: Sequence[Row], drafts: Sequence[Draft | None], hidden: torch.Tensor
    ) -> tuple[tuple[TokenLogprobs, ...], ...]:
        found: list[tuple[TokenLogprobs, ...]] = []
        start = 0  # of the row in the packed step
        for row, draft in zip(rows, drafts, strict=True):
            wanted, count = row.prompt_reads, row.request.params.prompt_logprobs
            scored: list[TokenLogprobs] = []
            if wanted and count is not None:
                lines = [start + position - row.start for position in wanted]
                following = [row.tokens[position + 1] for position in wanted]
                for logits in self.logits(hidden[lines]):
                    scored += token_logprobs(logits, following[len(scored) : len(scored) + len(logits)], count)
            found.append(tuple(scored))
            start += row.count + (len(draft.tree) if draft else 0)
        return tuple(found)

    @torch.inference_mode()
    def compiled_layers(self) -> CompiledLayers:
        """Looks for this model's compiled layers, with a step of an odd size to see how layers are called."""
        size, tree = self.kv.page_size, Tree((-1, -1, 0, 0, 1, 2))
        counts = (EXAMPLE - len(tree) - 8, 8)
        rows = [_example_row(size, count, 4 * line + 1) for line, count in enumerate(counts)]
        with self.borrowed_kv(10, size):
            batch = pack(rows, [Draft("example", tree, (0,) * len(tree)), None], size, self.device)
            attention = PathAttention(self.kv, batch)
            with forward_batch(attention):
                hidden = self.segments(batch.tokens, batch.positions, taps=(0,)).taps[0]
        example = Example(hidden[None], self.segments.noted, attention)
        return CompiledLayers(self.segments.layers, self._calls, example, self._about)

    @torch.inference_mode()
    def compact(self, rows: Sequence[Row], results: Sequence[RowResult]) -> None:
        """Moves accepted guesses' KV to its place behind the known tokens."""
        moves = [
            move
            for row, result in zip(rows, results, strict=True)
            for move in kept_slots(row, result.accepted, self.kv.page_size)
        ]
        if moves:
            sources, destinations = zip(*moves, strict=True)
            self.kv.move(sources, destinations)


def _folder(loaded: LoadedModel) -> Path:
    """Where this model's layers are kept in the form in which they are multiplied."""
    form = loaded.device.type, str(loaded.dtype), native.key() if native.load() else ""
    about = loaded.config.to_json_string(use_diff=False), getattr(loaded.config, "_commit_hash", None), loaded.made_of
    return cache_dir() / "streamed" / hashlib.sha256(repr((*form, *about)).encode()).hexdigest()[:16]


def _example_row(page_size: int, count: int, first_page: int) -> Row:
    """A row with more than a page of known tokens in KV."""
    start = page_size + 1
    tokens = (0,) * (start + count)
    pages = [first_page + index // page_size % 4 for index in range(0, start + EXAMPLE, page_size)]
    request = Request("example", tokens, SamplingParams(temperature=0))
    return Row(0, request, 0, array("i", tokens), len(tokens), start, count, 0, 0, pages)
