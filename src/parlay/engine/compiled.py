"""Decoder layers compiled ahead of time: one program per kind of layer, which takes the layer's weights as inputs.

Layers that differ in nothing but their weights share a program, so that a model of any depth compiles in the time of
one layer, no weight is copied, and layers can still be run range by range and tapped. Programs are kept in the cache
folder; another process makes them while this one serves.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import nn
from torch.utils import _pytree as pytree

from parlay.engine import native
from parlay.engine.attention import AttentionCall, current_step, forward_batch
from parlay.engine.checkpoint import cache_dir
from parlay.engine.path_attention import PathAttention, attend

Noted = tuple[tuple[Any, ...], dict[str, Any]]  # how a model calls its layer, after the hidden state
Run = Callable[[list[torch.Tensor]], Sequence[torch.Tensor]]
EXAMPLE = 23  # tokens of the traced step: a number that no other dimension has by chance


@dataclass(frozen=True, slots=True)
class CallForm:
    """What stays the same in a layer's arguments from step to step; tensors are passed anew.

    Attributes:
        spec: How the flattened arguments fit together.
        constants: Flattened arguments, None in the place of tensors.
    """

    spec: pytree.TreeSpec
    constants: tuple[Any, ...]
    tensors: tuple[int, ...]  # places of tensors among the flattened arguments

    @classmethod
    def of(cls, noted: Noted) -> tuple[CallForm, list[torch.Tensor]]:
        flat, spec = pytree.tree_flatten(noted)
        places = tuple(i for i, value in enumerate(flat) if isinstance(value, torch.Tensor))
        constants = tuple(None if isinstance(value, torch.Tensor) else value for value in flat)
        return cls(spec, constants, places), [flat[i] for i in places]

    def arguments(self, tensors: Sequence[torch.Tensor]) -> Noted:
        flat = list(self.constants)
        for place, tensor in zip(self.tensors, tensors, strict=True):
            flat[place] = tensor
        return pytree.tree_unflatten(flat, self.spec)


class _TracedAttention:
    """Attends to tensors that the program gets as inputs."""

    def __init__(self, paths: Sequence[torch.Tensor], pool: torch.Tensor) -> None:
        self.paths, self.pool = paths, pool

    def __call__(
        self, call: AttentionCall, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        return attend(call, query, key, value, self.pool, self.paths)


class _Traced(nn.Module):
    """A layer as a function of everything that it reads."""

    def __init__(self, layer: nn.Module, form: CallForm, names: Sequence[str]) -> None:
        super().__init__()
        self._layer = (layer,)  # not a child: its weights are inputs
        self._form, self._names = form, tuple(names)

    def forward(
        self,
        hidden: torch.Tensor,
        tensors: list[torch.Tensor],
        paths: list[torch.Tensor],
        pool: torch.Tensor,
        state: list[torch.Tensor],
    ) -> torch.Tensor:
        args, kwargs = self._form.arguments(tensors)
        with forward_batch(_TracedAttention(paths, pool)):
            out = torch.func.functional_call(
                self._layer[0], dict(zip(self._names, state, strict=True)), (hidden, *args), kwargs
            )
        return out[0] if isinstance(out, tuple) else out


def _state(layer: nn.Module) -> dict[str, torch.Tensor]:
    return dict(layer.named_parameters()) | dict(layer.named_buffers())


def _about(layer: nn.Module, call: AttentionCall, form: CallForm) -> str:
    """Everything but weights that could make two layers' programs differ."""

    def plain(value: Any) -> bool:
        return value is None or isinstance(value, bool | int | float | str)

    def settings(module: nn.Module) -> list[tuple[str, Any]]:
        return sorted((name, value) for name, value in vars(module).items() if plain(value) and name != "layer_idx")

    modules = [(name, type(module).__qualname__, settings(module)) for name, module in layer.named_modules()]
    shapes = [(name, tuple(tensor.shape), str(tensor.dtype)) for name, tensor in _state(layer).items()]
    return repr((modules, shapes, call.scale, call.window, call.softcap, form.spec, form.constants))


class _Known(threading.local):
    """The last call of each thread, and its tensors."""

    values: tuple[Any, ...] = ()
    tensors: list[torch.Tensor] | None = None


class Arguments:
    """Reads the tensors out of a layer's arguments; layers of one step are called with the same objects.

    Two threads may run layers at a time, each for a step of its own.
    """

    def __init__(self, form: CallForm) -> None:
        self.form, self._known = form, _Known()

    def tensors(self, noted: Noted) -> list[torch.Tensor] | None:
        """None when the call has another form."""
        values, known = (*noted[0], *noted[1].values()), self._known
        if len(values) != len(known.values) or any(a is not b for a, b in zip(values, known.values, strict=True)):
            form, tensors = CallForm.of(noted)
            known.values, known.tensors = values, tensors if form == self.form else None
        return known.tensors


class Package:
    """A program as it was loaded, with each layer's tensors for inputs.

    Attributes:
        run: Runs it. Python's other threads stand still meanwhile.

    Raises:
        CompilationFailed: when it cannot be loaded; the next start makes it anew.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            loader = torch._C._aoti.AOTIModelPackageLoader(str(path), "model", False, 1, -1)  # type: ignore[attr-defined]
        except RuntimeError as error:
            with suppress(OSError):
                path.unlink()
            raise CompilationFailed(f"{path} cannot be loaded ({str(error).splitlines()[0]})") from error
        self.run: Run = loader.run

    @cached_property
    def freely(self) -> Run:
        """The same while other threads go on, where that can be had; a call takes some 20 microseconds longer."""
        if not native.load_programs():
            return self.run
        program, run = torch.classes.parlay.Program(str(self._path)), torch.ops.parlay.run.default
        return lambda inputs: (run(program, inputs),)


class LayerProgram:
    """One layer, run by its kind's program.

    Args:
        package: Its kind's.
        layer: Whose weights to use.
        index: Its number, which is that of its KV pool.
        arguments: Shared by the layers of this kind.
    """

    def __init__(self, package: Package, layer: nn.Module, index: int, arguments: Arguments) -> None:
        self._package, self._index, self._arguments = package, index, arguments
        self._state = [tensor.detach() for tensor in _state(layer).values()]

    def __call__(self, hidden: torch.Tensor, noted: Noted, *, freely: bool = False) -> torch.Tensor | None:
        """[1, T, hidden] after the layer; None where the program does not fit the call. See `Package.freely`."""
        step, tensors = current_step(), self._arguments.tensors(noted)
        if tensors is None or not isinstance(step, PathAttention):
            return None
        return self.run(hidden, tensors, step, freely=freely)

    def run(
        self, hidden: torch.Tensor, tensors: Sequence[torch.Tensor], step: PathAttention, *, freely: bool = False
    ) -> torch.Tensor:
        """The same for one who knows which tensors are the layer's other arguments."""
        run = self._package.freely if freely else self._package.run
        return run([hidden, *tensors, *step.paths.tensors, step.kv.pools[self._index], *self._state])[0]


@dataclass(frozen=True, slots=True)
class LayerKind:
    """Layers that share a program, and where it is kept."""

    indices: tuple[int, ...]
    form: CallForm
    package: Path


@dataclass(frozen=True, slots=True)
class Example:
    """A step of `EXAMPLE` tokens, for tracing.

    It has a tree, and more than one row, page and ancestor: a size of 1 would be taken for a constant.
    """

    hidden: torch.Tensor  # [1, T, hidden] before the first layer
    noted: Sequence[Noted]  # how the model called each layer
    attention: PathAttention


class CompiledLayers:
    """A model's layers in the cache folder, or on their way there.

    Args:
        layers: The decoder layers.
        calls: What each asks of the attention function.
        example: How they are called.
        about: What else the programs depend on.
    """

    def __init__(
        self, layers: Sequence[nn.Module], calls: Sequence[AttentionCall], example: Example, about: str
    ) -> None:
        self._layers, self._example = layers, example
        self._jobs: list[tuple[subprocess.Popen[bytes], Path]] = []  # with their logs
        page_size = example.attention.kv.page_size
        versions = repr((about, page_size, torch.__version__, sys.version, native.key()))
        kinds: dict[str, list[int]] = {}
        for index, (layer, call) in enumerate(zip(layers, calls, strict=True)):
            kinds.setdefault(_about(layer, call, CallForm.of(example.noted[index])[0]), []).append(index)
        self.kinds = tuple(
            LayerKind(tuple(indices), CallForm.of(example.noted[indices[0]])[0], _package(text + versions))
            for text, indices in kinds.items()
        )

    @property
    def missing(self) -> list[LayerKind]:
        """Kinds that nobody has compiled yet."""
        return [kind for kind in self.kinds if not kind.package.exists()]

    def start(self) -> None:
        """Has what is missing compiled by other processes, which finish even if this one ends first."""
        for kind in self.missing:
            exported = _export(self._layers[kind.indices[0]], self._example, kind.indices[0])
            kind.package.parent.mkdir(parents=True, exist_ok=True)
            saved, log = (kind.package.with_suffix(f".{os.getpid()}{suffix}") for suffix in (".exported.pt2", ".log"))
            try:
                torch.export.save(exported, saved)
            except BaseException:
                saved.unlink(missing_ok=True)
                raise
            command = [sys.executable, "-m", "parlay.engine.compiled", str(saved), str(kind.package)]
            with log.open("wb") as said:
                job = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=said, stderr=said, start_new_session=True
                )
            self._jobs.append((job, log))

    def wait(self) -> None:
        for job, _ in self._jobs:
            job.wait()

    @property
    def is_done(self) -> bool:
        return all(job.poll() is not None for job, _ in self._jobs)

    def programs(self) -> list[LayerProgram]:
        """One per layer, once compilation is done.

        Raises:
            CompilationFailed: with what the compiler said last.
        """
        for job, log in self._jobs:
            said = log.read_text(errors="replace").strip().splitlines()
            if job.returncode:
                raise CompilationFailed(f"{said[-1] if said else 'the compiler said nothing'} (all of it is in {log})")
            log.unlink()
        found: dict[int, LayerProgram] = {}
        for kind in self.kinds:
            package, arguments = Package(kind.package), Arguments(kind.form)
            for index in kind.indices:
                found[index] = LayerProgram(package, self._layers[index], index, arguments)
        return [found[index] for index in range(len(self._layers))]


class CompilationFailed(RuntimeError):
    """The layers run as they are; the message says why."""


def _package(about: str) -> Path:
    return cache_dir() / "compiled" / f"layer-{hashlib.sha256(about.encode()).hexdigest()[:16]}.pt2"


@torch.no_grad()
def _export(layer: nn.Module, example: Example, index: int) -> torch.export.ExportedProgram:
    form, tensors = CallForm.of(example.noted[index])
    hidden, pool = example.hidden, example.attention.kv.pools[index]
    state = _state(layer)
    any_size = torch.export.Dim.AUTO

    def sizes(tensor: torch.Tensor) -> dict[int, Any]:
        return {axis: any_size for axis, size in enumerate(tensor.shape) if size == EXAMPLE}

    def copies(found: Sequence[torch.Tensor]) -> list[torch.Tensor]:  # export refuses tensors of inference mode
        return [tensor.clone() for tensor in found]

    paths = copies(example.attention.paths.tensors)
    return torch.export.export(
        _Traced(layer, form, tuple(state)),
        (hidden.clone(), copies(tensors), paths, pool.clone(), copies(list(state.values()))),
        dynamic_shapes=(
            sizes(hidden),
            [sizes(tensor) for tensor in tensors],
            [dict.fromkeys(range(path.ndim), any_size) for path in paths],
            {0: any_size},
            [None] * len(state),
        ),
        strict=False,
    )


def compile_to(saved: Path, package: Path) -> None:
    """Compiles a saved program, which appears in the cache all at once or not at all."""
    assert native.load(), "the operators that the program calls are missing"
    options = {"cpp.dynamic_threads": True}
    with FileLock(package.with_suffix(".lock")), tempfile.TemporaryDirectory(dir=package.parent) as scratch:
        if not package.exists():
            built = Path(scratch) / package.name
            exported = torch.export.load(saved)
            torch._inductor.aoti_compile_and_package(exported, package_path=str(built), inductor_configs=options)
            built.rename(package)


if __name__ == "__main__":
    os.nice(19)  # serving goes first
    try:
        compile_to(Path(sys.argv[1]), Path(sys.argv[2]))
    finally:
        Path(sys.argv[1]).unlink()
