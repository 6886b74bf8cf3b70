"""Training: truncated backpropagation through time, with checkpoints that lose nothing."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from . import data
from .data import Corpus
from .model import CharacterModel, States

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
WARM_UP_STEPS = 50
LAST_LR = 0.02  # of the highest
CLIP_NORM = 1.0
EVALUATIONS = 32  # in the course of one run
EVALUATED_STEPS = 256  # of each held-out stream, while training
HELD_OUT_STREAMS = 64
CHECKPOINT_SECONDS = 10.0
FORMAT = 1


class SettingsError(ValueError):
    """The options of the run do not fit each other, the text, the machine or the checkpoint."""


@dataclass(frozen=True)
class Settings:
    """What a run is. `budget` is in optimizer steps or in seconds of training."""

    text: str
    hidden: int
    layers: int
    embedding: int
    batch: int
    sequence: int
    lr: float
    dropout: float
    seed: int
    device: str
    dtype: str
    steps: int | None
    seconds: float | None

    def progress(self, step: int, elapsed: float) -> float:
        """How much of the budget is used, 0 to 1."""
        if self.steps is not None:
            return min(1.0, step / self.steps)
        assert self.seconds is not None
        return min(1.0, elapsed / self.seconds)

    def learning_rate(self, step: int, progress: float) -> float:
        """Linear warm-up over the first steps times half a cosine over the budget."""
        cosine = 0.5 * (1.0 + math.cos(math.pi * progress))
        return self.lr * min(1.0, (step + 1) / WARM_UP_STEPS) * (LAST_LR + (1.0 - LAST_LR) * cosine)


# May differ between an interrupted run and the one that takes it up.
FREE_ON_RESUME = frozenset({"steps", "seconds", "lr", "device", "dtype"})


@dataclass(frozen=True)
class Point:
    """One evaluation during training."""

    step: int
    characters: int
    seconds: float
    loss: float  # mean training loss since the point before, nats a character
    perplexity: float  # on the held-out text
    characters_per_second: float  # since the point before


@dataclass
class Counters:
    """What changes while training, apart from tensors."""

    step: int = 0
    elapsed: float = 0.0  # seconds of training over all sessions
    loss_steps: int = 0  # steps in the running loss
    loss_elapsed: float = 0.0  # `elapsed` when it began
    evaluations: int = 0
    sessions: int = 0
    history: list[Point] = field(default_factory=list)


class Trainer:
    """A model in training. Everything that the next step depends on is in `state_dict`."""

    def __init__(self, settings: Settings, corpus: Corpus) -> None:
        self.settings = settings
        self.corpus = corpus
        self.device = torch.device(settings.device)
        self.counters = Counters()
        streams = data.streams(corpus.train, settings.batch)  # [L, B]
        self.segments = (len(streams) - 1) // settings.sequence  # in one pass over the text
        if self.segments < 1:
            raise SettingsError(
                f"{len(corpus.train)} bytes of training text in {settings.batch} streams are {len(streams)} "
                f"each, too few for a sequence of {settings.sequence} and its successor: "
                "give a smaller --batch or --sequence"
            )
        columns = max(1, min(HELD_OUT_STREAMS, len(corpus.held_out) // EVALUATED_STEPS))
        self.held_out_streams = data.streams(corpus.held_out, columns)
        self.train_ids = torch.from_numpy(streams).to(self.device)
        self.held_out_ids = torch.from_numpy(self.held_out_streams).to(self.device)

        torch.manual_seed(settings.seed)
        self.model = CharacterModel(
            len(corpus.vocabulary), settings.embedding, settings.hidden, settings.layers, settings.dropout
        ).to(self.device)
        self.optimizer = torch.optim.Adam(self.model.parameters(), settings.lr)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=settings.dtype == "float16")
        self.states: States | None = None
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)

    @property
    def characters(self) -> int:
        """Characters read so far."""
        return self.counters.step * self.settings.batch * self.settings.sequence

    def _autocast(self) -> torch.autocast:
        dtype = DTYPES[self.settings.dtype]
        return torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32)

    def step(self) -> None:
        """One optimizer step on the next segment of every stream, from the states that the last one left."""
        settings, counters = self.settings, self.counters
        segment = counters.step % self.segments
        if segment == 0:  # a new pass over the text
            self.states = None
        begin = segment * settings.sequence
        ids = self.train_ids[begin : begin + settings.sequence + 1].long()  # [T + 1, B]
        rate = settings.learning_rate(counters.step, settings.progress(counters.step, counters.elapsed))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad()
        with self._autocast():
            logits, (h, c) = self.model(ids[:-1], self.states)
        loss = F.cross_entropy(logits.float().flatten(0, 1), ids[1:].flatten())
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP_NORM)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.states = (h.detach(), c.detach())
        self.loss_sum += loss.detach()
        counters.loss_steps += 1
        counters.step += 1

    @torch.no_grad()
    def perplexity(self, steps: int | None = None) -> float:
        """Perplexity on the held-out streams, over `steps` of each (default all), states carried."""
        self.model.eval()
        last = len(self.held_out_ids) - 1
        steps = last if steps is None else min(steps, last)
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        states = None
        for begin in range(0, steps, EVALUATED_STEPS):
            end = min(begin + EVALUATED_STEPS, steps)
            ids = self.held_out_ids[begin : end + 1].long()
            with self._autocast():
                logits, states = self.model(ids[:-1], states)
            total += F.cross_entropy(logits.float().flatten(0, 1), ids[1:].flatten(), reduction="sum")
        self.model.train()
        return math.exp(total.item() / (steps * self.held_out_ids.shape[1]))

    def _evaluate(self) -> None:
        counters = self.counters
        loss = self.loss_sum.item() / max(1, counters.loss_steps)
        characters = counters.loss_steps * self.settings.batch * self.settings.sequence
        rate = characters / max(1e-9, counters.elapsed - counters.loss_elapsed)
        if not math.isfinite(loss):
            raise SettingsError(
                f"training diverged: the loss is {loss} after {counters.step} steps with "
                f"--lr {self.settings.lr}; give a smaller --lr, with --fresh to start anew"
            )
        perplexity = self.perplexity(EVALUATED_STEPS)
        counters.history.append(
            Point(counters.step, self.characters, counters.elapsed, loss, perplexity, rate)
        )
        self.loss_sum.zero_()
        counters.loss_steps = 0

    def run(
        self,
        checkpoint: Path,
        report: Callable[[Trainer], None] = lambda trainer: None,
        stop: Callable[[], bool] = lambda: False,
    ) -> bool:
        """Train until the budget is used (True) or `stop()` (False); writes `checkpoint` now and then.

        `report` is called after every step; a new entry in `counters.history` is an evaluation.
        """
        settings, counters = self.settings, self.counters
        counters.sessions += 1
        self.model.train()
        before, clock, saved = counters.elapsed, time.perf_counter(), time.perf_counter()
        while not stop() and (progress := settings.progress(counters.step, counters.elapsed)) < 1.0:
            self.step()
            if self.device.type == "cuda" and settings.steps is None:
                torch.cuda.synchronize(self.device)  # the budget is time, not launches
            counters.elapsed = before + time.perf_counter() - clock
            progress = settings.progress(counters.step, counters.elapsed)
            if int(progress * EVALUATIONS) > counters.evaluations:
                counters.evaluations = int(progress * EVALUATIONS)
                self._evaluate()
                counters.elapsed = before + time.perf_counter() - clock
                counters.loss_elapsed = counters.elapsed
            report(self)
            if time.perf_counter() - saved > CHECKPOINT_SECONDS:
                self.save(checkpoint)
                saved = time.perf_counter()
        self.save(checkpoint)
        return settings.progress(counters.step, counters.elapsed) >= 1.0

    def state_dict(self) -> dict[str, Any]:
        counters = asdict(self.counters)
        return {
            "format": FORMAT,
            "settings": asdict(self.settings),
            "fingerprint": self.corpus.fingerprint,
            "counters": counters,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "states": self.states,
            "loss_sum": self.loss_sum,
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up where `state` was written; the settings have been checked by `resumed_settings`."""
        if state["fingerprint"] != self.corpus.fingerprint:
            raise SettingsError(
                f"the text in {self.settings.text} is not the one that the checkpoint was trained on: "
                "give the same folder with --text, or --fresh to start anew"
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scaler.is_enabled() and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        if state["states"] is not None:
            h, c = state["states"]
            self.states = (h.to(self.device), c.to(self.device))
        self.loss_sum.copy_(state["loss_sum"])
        counters = state["counters"]
        self.counters = Counters(**{**counters, "history": [Point(**point) for point in counters["history"]]})
        self.counters.evaluations = int(
            self.settings.progress(self.counters.step, self.counters.elapsed) * EVALUATIONS
        )
        torch.set_rng_state(state["rng"])
        if state["cuda_rng"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_rng"], self.device)

    def save(self, path: Path) -> None:
        """Write the checkpoint so that at every moment `path` holds a whole one."""
        part = path.with_name(path.name + ".part")
        with open(part, "wb") as file:
            torch.save(self.state_dict(), file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """What `Trainer.save` wrote, on the CPU; SettingsError where it cannot be used."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        version = state["format"]
        Settings(**state["settings"])
    except Exception as error:
        raise SettingsError(
            f"the checkpoint {path} cannot be read ({type(error).__name__}: {error}): "
            "give --fresh to start anew"
        ) from error
    if version != FORMAT:
        raise SettingsError(
            f"the checkpoint {path} has format {version}, this version of tritlstm reads {FORMAT}: "
            "give --fresh to start anew"
        )
    return state


def resumed_settings(saved: Settings, asked: dict[str, Any]) -> Settings:
    """The settings of a run taken up: the saved ones, with what was `asked` for (not None) in their place.

    Raises:
        SettingsError: what was asked for would make it another model or other data.
    """
    given = {name: value for name, value in asked.items() if value is not None}
    for f in fields(Settings):
        if f.name in given and f.name not in FREE_ON_RESUME and given[f.name] != getattr(saved, f.name):
            raise SettingsError(
                f"the checkpoint was made with --{f.name} {getattr(saved, f.name)}, "
                f"and now --{f.name} {given[f.name]} is asked for: "
                "leave the option out to go on, or give --fresh or another --output"
            )
    if "steps" in given:
        given["seconds"] = None
    elif "seconds" in given:
        given["steps"] = None
    return replace(saved, **given)


@contextlib.contextmanager
def interruption() -> Iterator[Callable[[], bool]]:
    """Turns the first SIGINT or SIGTERM into a request to stop; a second one acts as usual.

    Yields a function that says whether one came. Outside the main thread, where Python allows no handlers, it
    never does.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    came = threading.Event()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def handle(number: int, frame: object) -> None:
        came.set()
        restore()

    for number in before:
        signal.signal(number, handle)
    try:
        yield came.is_set
    finally:
        restore()


def baselines(trainer: Trainer) -> dict[str, float]:
    """Perplexities of the counted models on the characters that `Trainer.perplexity()` covers."""
    counted = data.Bigrams(trainer.corpus.train, len(trainer.corpus.vocabulary))
    streams = trainer.held_out_streams
    unigram, bigram = counted.perplexity(streams[:-1], streams[1:])
    return {"unigram": unigram, "bigram": bigram}
