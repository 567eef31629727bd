"""Names for parts that can be exchanged, imported only when used. Third parties add entry points.

A package offers a drafter by an entry point in the group `parlay.drafters`, named as users will write it and pointing
at a class (see `parlay.drafters.base.Drafter`), and a policy by one in the group `parlay.policies` that points at what
makes it (see `parlay.policy.named.named`).
"""

from __future__ import annotations

import difflib
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any


class Registry:
    """Maps names to "module:attribute", loading on use.

    Args:
        kind: What is registered, for messages and as the entry-point group `parlay.KIND`.
        builtin: Parlay's own.
    """

    def __init__(self, kind: str, builtin: dict[str, str]) -> None:
        self.kind = kind
        self._targets: dict[str, Any] = dict(builtin)

    def register(self, name: str, factory: Any) -> None:
        """Adds a class or function directly, as tests and notebooks do."""
        self._targets[name] = factory

    def find(self, name: str) -> Any:
        """The class or function of this name.

        Raises:
            ValueError: for an unknown name, with the nearest known one.
        """
        target = self._targets.get(name)
        if target is None:
            found = {point.name: point for point in entry_points(group=f"parlay.{self.kind}")}
            if name not in found:
                known = sorted(self._targets.keys() | found.keys())
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
                raise ValueError(f"unknown name {name!r} among {self.kind}; {hint}")
            target = found[name].load()
        if isinstance(target, str):
            module, attribute = target.split(":")
            target = getattr(import_module(module), attribute)
        return target

    def create(self, name: str, **options: Any) -> Any:
        """Builds the part of this name.

        Raises:
            ValueError: for an unknown name, with the nearest known one.
        """
        return self.find(name)(**options)


drafters = Registry(
    "drafters",
    {
        "draft_model": "parlay.drafters.draft_model:DraftModel",
        "eagle": "parlay.drafters.eagle:Eagle",
        "medusa": "parlay.drafters.medusa:Medusa",
        "prompt_lookup": "parlay.drafters.prompt_lookup:PromptLookup",
        "self": "parlay.drafters.early_exit:EarlyExit",
        "ppd": "parlay.drafters.pipelined:Pipelined",
        "suffix": "parlay.drafters.suffix:Suffix",
    },
)
policies = Registry(
    "policies", {name: f"parlay.policy.named:{name}" for name in ("off", "fixed", "synergy", "smartspec", "goodput")}
)
