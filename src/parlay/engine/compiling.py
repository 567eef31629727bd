"""When layers are compiled, and when they are taken: while serving, before it, or only from the cache."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from parlay.config import Compile
from parlay.engine import self_check
from parlay.engine.compiled import CompiledLayers, LayerProgram
from parlay.engine.model import TargetModel

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Compilable:
    """Layers that can be compiled.

    Attributes:
        name: For messages.
        find: Looks for them in the cache.
        adopt: Takes them from now on; raises UnsupportedModel where they do not compute what the layers compute.
    """

    name: str
    find: Callable[[], CompiledLayers]
    adopt: Callable[[Sequence[LayerProgram]], None]


def whole_model(model: TargetModel, name: str = "the model") -> Compilable:
    """A model's decoder layers."""

    def adopt(programs: Sequence[LayerProgram]) -> None:
        self_check.check_compiled(model, programs)
        model.segments.use(programs)

    return Compilable(name, model.compiled_layers, adopt)


class Compiling:
    """Layers on their way from the cache or the compiler into use.

    Args:
        what: The layers.
        mode: Whether to compile what is not in the cache, and to wait for it.
    """

    def __init__(self, what: Compilable, mode: Compile) -> None:
        self._what = what
        self._found: CompiledLayers | None = None
        if mode == "off":
            return
        try:
            found = what.find()
            if found.missing and mode == "cached":
                return
            if found.missing:
                how = "waiting" if mode == "wait" else "serving without them until then"
                logger.info("compiling the layers of %s, once for this machine (about a minute); %s", what.name, how)
                found.start()
        except Exception as error:  # the exporter raises whatever the model's code makes it stumble over
            logger.warning(
                "the layers of %s cannot be compiled, and run as they are: %s", what.name, _first_line(error)
            )
            return
        if mode == "wait":
            found.wait()
        self._found = found

    def is_over(self) -> bool:
        """Takes what is ready; True when there is nothing left to wait for."""
        if self._found is None:
            return True
        if not self._found.is_done:
            return False
        found, self._found = self._found, None
        try:
            self._what.adopt(found.programs())
            logger.info("the compiled layers of %s are in use", self._what.name)
        except Exception as error:  # the compiler, its files and its programs raise what they like
            logger.warning("the layers of %s run as they are: %s", self._what.name, _first_line(error))
        return True


def _first_line(error: Exception) -> str:
    """What an error says in short; its name where it says nothing."""
    return next(iter(str(error).splitlines()), type(error).__name__)
