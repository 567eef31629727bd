"""Command-line options that several commands share, each written once."""

# No `from __future__ import annotations` here: typer reads these annotations as objects.

import functools
import inspect
import logging
import re
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

import typer

from parlay.bets import parse_bet
from parlay.config import Dtype, EngineConfig, Offload, Parity, TreeSampling
from parlay.types import SamplingParams

DEFAULT_MODEL = "smollm2-135m"

_ENGINE = EngineConfig(model=DEFAULT_MODEL)  # the defaults shown in the help are the engine's own
_SAMPLING = SamplingParams()
_UNITS = {"": 1, "B": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def takes(*builders: Callable[..., Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command the options of `builders`, and passes it what they build before its own arguments."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        shared = [list(inspect.signature(builder).parameters.values()) for builder in builders]
        own = list(inspect.signature(command).parameters.values())[len(builders) :]
        everything = [*own, *(option for options in shared for option in options)]

        @functools.wraps(command)
        def run(**values: Any) -> None:
            built = [
                builder(**{option.name: values.pop(option.name) for option in options})
                for builder, options in zip(builders, shared, strict=True)
            ]
            command(*built, **values)

        keyword_only = [option.replace(kind=inspect.Parameter.KEYWORD_ONLY) for option in everything]
        run.__signature__ = inspect.Signature(keyword_only)  # type: ignore[attr-defined]
        run.__annotations__ = {option.name: option.annotation for option in everything}
        return run

    return decorate


def parse_bytes(text: str) -> int:
    """Reads a size such as `2GiB`, `512MiB`, `1.5 GB` or a plain number of bytes."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].upper() not in _UNITS:
        raise typer.BadParameter(f"{text!r} is no size: write 2GiB, 512MiB or a number of bytes")
    size = int(float(match[1]) * _UNITS[match[2].upper()])
    if size < 1:
        raise typer.BadParameter("a size must be above 0")
    return size


def parse_drafter(text: str) -> tuple[str, str]:
    """Reads `METHOD=SOURCE`."""
    method, given, source = text.partition("=")
    if not (method and given and source):
        raise typer.BadParameter(f"--drafter {text!r}: write METHOD=SOURCE, as eagle=FOLDER_OR_ID")
    return method, source


def parse_drafters(texts: Sequence[str]) -> dict[str, str]:
    """Reads them all, each method's once."""
    found = dict(map(parse_drafter, texts))
    if len(found) < len(texts):
        raise typer.BadParameter("--drafter: name every method once")
    return found


def _option(help: str, *names: str, panel: str, **settings: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel, **settings)


_model = functools.partial(_option, panel="Model")
_capacity = functools.partial(_option, panel="Capacity")
_speculation = functools.partial(_option, panel="Speculation")
_sampling = functools.partial(_option, panel="Sampling")


def engine_config(
    model: Annotated[
        str, _model("A built-in name, a Hugging Face id, a local folder or a .gguf file.", "--model", "-m")
    ] = DEFAULT_MODEL,
    dtype: Annotated[
        Dtype,
        _model("Type of weights and activations; auto takes bfloat16 where the hardware is fast at it."),
    ] = _ENGINE.dtype,
    device: Annotated[
        str,
        _model(
            "cpu, cuda, cuda:N, or several that share the layers: cuda:0,cuda:1; auto takes CUDA where there is one."
        ),
    ] = _ENGINE.device,
    max_num_seqs: Annotated[
        int, _capacity("Sequences that run at a time; the others wait.", min=1)
    ] = _ENGINE.max_num_seqs,
    max_model_len: Annotated[
        int | None, _capacity("Context limit in tokens; by default the model's own.", min=2)
    ] = _ENGINE.max_model_len,
    max_num_batched_tokens: Annotated[
        int,
        _capacity(
            "Tokens in one step, guesses included; longer prompts are split over steps. 0 takes 512, or 1024 with "
            "--offload.",
            min=0,
        ),
    ] = 0,
    kv_cache_memory: Annotated[
        int | None,
        _capacity(
            "Memory for the KV cache, as 2GiB, 512MiB or bytes; by default a share of what is free.",
            parser=parse_bytes,
            metavar="SIZE",
        ),
    ] = _ENGINE.kv_cache_memory,
    page_size: Annotated[int, _capacity("Tokens per page of the KV cache.", min=1)] = _ENGINE.page_size,
    prefix_caching: Annotated[
        bool, _capacity("Do not reuse the KV of equal prompt beginnings.", " /--no-prefix-caching", show_default=False)
    ] = _ENGINE.prefix_caching,
    speculation: Annotated[
        str,
        _speculation(
            "What to bet: off, auto, METHOD or METHOD:DEPTH for a chain, METHOD:[-1,0,0] for a tree by its parents.",
            metavar="BET",
        ),
    ] = "auto",
    policy: Annotated[
        str | None,
        _speculation(
            "Who decides what is bet: off, fixed:LENGTH, synergy, smartspec or goodput; by default goodput for auto.",
            show_default=False,
        ),
    ] = None,
    drafter: Annotated[
        list[str] | None,
        _speculation(
            "Where a method's weights are, as eagle=FOLDER_OR_ID (or medusa, draft_model) or self=LAYERS_OR_FOLDER. "
            "May be repeated.",
            metavar="METHOD=SOURCE",
        ),
    ] = None,
    tree_sampling: Annotated[
        TreeSampling,
        _speculation("How siblings are drawn where chance decides; specinfer and topk are baselines."),
    ] = _ENGINE.tree_sampling,
    offload: Annotated[
        Offload | None,
        _capacity(
            "Stream the layers that do not fit into --memory-budget: from disk, or from memory to a CUDA device."
        ),
    ] = _ENGINE.offload,
    memory_budget: Annotated[
        int | None,
        _capacity(
            "Memory for the layers' weights, as 4GiB, beyond embedding and head.", parser=parse_bytes, metavar="SIZE"
        ),
    ] = _ENGINE.memory_budget,
    parity: Annotated[
        Parity,
        _speculation("strict makes greedy and seeded output equal to plain decoding to the last bit, at a price."),
    ] = _ENGINE.parity,
    seed: Annotated[int | None, _speculation("Seeds the randomness of requests that bring no seed.")] = _ENGINE.seed,
    self_check: Annotated[
        bool, _model("Do not compare a step with plain transformers at start.", " /--no-self-check", show_default=False)
    ] = _ENGINE.self_check,
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], _model("How much to log on standard error.")
    ] = "info",
) -> EngineConfig:
    """The options that describe an engine, written once for all commands that start one."""
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("parlay").setLevel(log_level.upper())
    return EngineConfig(
        model=model,
        dtype=dtype,
        device=device,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        max_model_len=max_model_len,
        kv_cache_memory=kv_cache_memory,
        page_size=page_size,
        prefix_caching=prefix_caching,
        speculation=parse_bet(speculation),
        policy=policy,
        drafters=parse_drafters(drafter or ()),
        tree_sampling=tree_sampling,
        offload=offload,
        memory_budget=memory_budget,
        parity=parity,
        seed=seed,
        self_check=self_check,
    )


def sampling_params(
    max_tokens: Annotated[int, _sampling("Output limit per prompt.", min=1)] = 256,
    temperature: Annotated[float, _sampling("0 takes the most likely token each time.", min=0)] = _SAMPLING.temperature,
    top_k: Annotated[int, _sampling("Keep the k most likely tokens; 0 keeps all.", min=-1)] = _SAMPLING.top_k,
    top_p: Annotated[float, _sampling("Keep the smallest set with this probability.")] = _SAMPLING.top_p,
    min_p: Annotated[
        float, _sampling("Keep tokens with this fraction of the best one's probability.")
    ] = _SAMPLING.min_p,
    repetition_penalty: Annotated[
        float, _sampling("Above 1 makes tokens seen before less likely.")
    ] = _SAMPLING.repetition_penalty,
    presence_penalty: Annotated[
        float, _sampling("Subtracted from tokens already in the output.")
    ] = _SAMPLING.presence_penalty,
    frequency_penalty: Annotated[
        float, _sampling("Subtracted once per occurrence in the output.")
    ] = _SAMPLING.frequency_penalty,
    request_seed: Annotated[
        int | None, _sampling("Fixes the output of every prompt, whatever is speculated.")
    ] = _SAMPLING.seed,
    stop: Annotated[list[str] | None, _sampling("End the output before this text; may be repeated.")] = None,
    ignore_eos: Annotated[bool, _sampling("Go on after the end-of-sequence token.", "--ignore-eos")] = False,
    n: Annotated[int, _sampling("Outputs per prompt.", "-n", min=1)] = _SAMPLING.n,
) -> SamplingParams:
    """The options that say how tokens are chosen."""
    return SamplingParams(
        n=n,
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        seed=request_seed,
        stop=tuple(stop or ()),
        ignore_eos=ignore_eos,
    )
