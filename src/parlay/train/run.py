"""From a target's name to a trained drafter in a folder: data, training, weights, card."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import platform
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from parlay.config import EngineConfig
from parlay.engine.checkpoint import resolve
from parlay.engine.model import LoadedModel, load_model
from parlay.train import draft_model, eagle, early_exit, medusa
from parlay.train.dataset import Dataset, Recipe, count_tokens
from parlay.train.loop import DEPTH, Evaluation, Objective, Schedule, Training, read_about
from parlay.train.on_policy import OnPolicy
from parlay.train.order import Kind, Order
from parlay.train.recording import Recorded, recording_engine

WORK = "training"  # the folder in which unfinished work is kept
RECORDING = 64  # conversations that run at a time
DATA_SHARE = 0.5  # of the time, at most, goes to recording


@dataclass(frozen=True, slots=True)
class Maker:
    """How a kind of drafter is made.

    Attributes:
        taps: The layers, of so many, whose states it reads.
        begin: What is trained, for a target, with texts whose tokens may be counted.
        sizes: Fields of an order that say how large it is; a drafter that is gone on from has its own.
        options: Other fields that are only for some kinds.
    """

    taps: Callable[[Order, int], tuple[int, ...]]
    begin: Callable[[Order, LoadedModel, Iterable[Recorded]], Objective]
    sizes: tuple[str, ...]
    options: tuple[str, ...] = ()


MAKERS: dict[Kind, Maker] = {
    "eagle": Maker(eagle.taps, eagle.begin, ("vocab", "intermediate", "taps"), ("turns",)),
    "medusa": Maker(medusa.taps, medusa.begin, ("vocab", "heads")),
    "self": Maker(early_exit.taps, early_exit.begin, ("intermediate", "exit")),
    "draft_model": Maker(draft_model.taps, draft_model.begin, ("layers",), ("on_policy",)),
}


@dataclass(frozen=True, slots=True)
class Card:
    """What a drafter is, and how good it was on texts that it was not trained on."""

    kind: Kind
    model: str
    made_with: dict[str, str]
    order: dict[str, object]
    conversations: str
    tokens: int
    parameters: int
    evaluations: tuple[Evaluation, ...]

    @property
    def markdown(self) -> str:
        last = self.evaluations[-1]
        what = (
            f"Kind: `{self.kind}`, {self.parameters / 1e6:.1f} million weights. Trained by `parlay train` on "
            f"{self.tokens:,} tokens, {self.conversations}, seed {self.order['seed']}."
        )
        how_good = (
            f"After {last.step} steps and {last.seconds / 60:.0f} minutes, on held-out greedy answers, a chain of "
            f"{DEPTH} guesses yields {last.tokens_per_step:.2f} tokens per step:"
        )
        lines = [
            f"# A drafter for {self.model}",
            "",
            what,
            "",
            how_good,
            "",
            "| step | minutes | " + " | ".join(f"guess {k + 1}" for k in range(DEPTH)) + " | tokens per step |",
            "|---|---|" + "---|" * (DEPTH + 1),
        ]
        for one in self.evaluations:
            shares = " | ".join(f"{share:.1%}" for share in one.accepted)
            lines.append(f"| {one.step} | {one.seconds / 60:.1f} | {shares} | {one.tokens_per_step:.2f} |")
        lines += ["", ", ".join(f"{name} {what}" for name, what in self.made_with.items()), ""]
        return "\n".join(lines)


def train(order: Order) -> Card:
    """Makes a drafter; called again with the same order it goes on where it was broken off.

    Raises:
        CheckpointError: when the target cannot be had.
        UnsupportedModel: when it could not be served.
        ValueError: naming what does not fit together.
    """
    began = time.monotonic()
    _check(order)
    if "," in order.device:
        raise ValueError(f"device: {order.device!r} names several, and training runs on one")
    target = load_model(resolve(order.model), EngineConfig(order.model, dtype="float32", device=order.device))
    taps = MAKERS[order.kind].taps(order, len(target.shapes))
    prints = hashlib.sha256("\n".join(order.prompts).encode()).hexdigest() if order.prompts else ""
    if not all(0 <= tap <= len(target.shapes) for tap in order.taps):
        raise ValueError(f"taps: must be layers from 0 to {len(target.shapes)}, not {', '.join(map(str, order.taps))}")
    data = Dataset(order.data, Recipe(order.model, taps, order.seed, prints))
    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True)) as bar:
        recording, training = bar.add_task("recording", total=order.tokens), bar.add_task("training", total=1.0)
        # What is being trained keeps its data.
        if read_about(order.out / WORK) is None and not data.has(order.tokens):
            _fill(order, data, began, lambda count: bar.advance(recording, count))
        bar.update(recording, completed=order.tokens)
        with target.device:
            evaluations, parameters = _train(
                order, began, target, data, lambda done, what: bar.update(training, completed=done, description=what)
            )
        bar.update(training, completed=1.0)
    card = Card(
        kind=order.kind,
        model=order.model,
        made_with=_versions(),
        order={name: value for name, value in asdict(order).items() if name not in ("prompts", "out", "data")},
        conversations="on prompts from a file"
        if order.prompts
        else "written by the model itself, user's turns included",
        tokens=sum(map(count_tokens, _files(order, data))),
        parameters=parameters,
        evaluations=tuple(evaluations),
    )
    (order.out / "card.json").write_text(json.dumps(asdict(card), indent=1) + "\n", encoding="utf-8")
    (order.out / "README.md").write_text(card.markdown, encoding="utf-8")
    return card


def _check(order: Order) -> None:
    """Refuses what would be ignored."""
    maker = MAKERS[order.kind]
    some = {name for one in MAKERS.values() for name in (*one.sizes, *one.options)}
    given = {
        field.name for field in fields(order) if field.name in some and getattr(order, field.name) != field.default
    }
    for name in sorted(given):
        option = f"--{name.replace('_', '-')}"
        if name not in (*maker.sizes, *maker.options):
            raise ValueError(f"{name}: means nothing for a drafter of kind {order.kind}; leave {option} out")
        if order.start and name in maker.sizes:
            raise ValueError(f"{name}: is that of the drafter that --start names; leave {option} out")


def _fill(order: Order, data: Dataset, began: float, advance: Callable[[int], None]) -> None:
    config = EngineConfig(
        order.model,
        dtype="auto",
        speculation=None,
        max_num_seqs=RECORDING,
        seed=order.seed + len(data.files),
        device=order.device,
        compile=order.compile,
    )
    engine = recording_engine(config, data.recipe.taps)
    deadline = began + 60 * order.minutes * DATA_SHARE
    data.fill(engine, order.prompts, order.tokens, order.disk, deadline, advance)
    del engine
    gc.collect()


def _train(
    order: Order, began: float, target: LoadedModel, data: Dataset, show: Callable[[float, str], None]
) -> tuple[Sequence[Evaluation], int]:
    torch.manual_seed(order.seed)
    maker = MAKERS[order.kind]
    work = order.out / WORK
    work.mkdir(parents=True, exist_ok=True)
    about = read_about(work)
    files = _files(order, data)
    taps = maker.taps(order, len(target.shapes))
    objective = maker.begin(order, target, (text for file in files for text in data.read(file, taps)))
    trained = about["state"]["seconds"] if about else 0.0
    left = max(1e-9, 60 * order.minutes - (time.monotonic() - began))
    schedule = Schedule(order.epochs, order.batch, order.rate, trained + left, order.seed)
    rewrite = OnPolicy(objective.module, target, order.on_policy, order.seed) if order.on_policy else None
    evaluations = Training(objective, data, schedule, files, _identity(order), work, show, rewrite).run()
    objective.save(order.out, order.int8)
    return evaluations, sum(weight.numel() for weight in objective.module.parameters() if weight.requires_grad)


def _files(order: Order, data: Dataset) -> list[Path]:
    """What is trained on: once begun, that and nothing else."""
    about = read_about(order.out / WORK)
    return data.files if about is None else [data.folder / name for name in about["files"]]


def _identity(order: Order) -> dict[str, object]:
    """What must be the same for a training to go on."""
    maker = MAKERS[order.kind]
    names = ("kind", "model", "start", "epochs", "batch", "rate", "divergence", "seed", *maker.sizes, *maker.options)
    return {name: getattr(order, name) for name in names}


def _versions() -> dict[str, str]:
    packages = {name: version(name) for name in ("torch", "transformers")}
    return packages | {"Python": platform.python_version(), "on": f"{os.cpu_count()} cores"}
