"""The demo from end to end: options, training, table, sample, pictures, verification, files."""

from __future__ import annotations

import argparse
import json
import math
import platform
import shlex
import sys
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import matplotlib  # noqa: F401  (fail before the training, not after it)
import numpy as np
import torch

import tritlstm

from . import data, model, pictures, progress, train, verify

SAMPLE_PROMPT = "def "
SAMPLE_LENGTH = 600
STOPPED = 130

CPU_SIZES: dict[str, Any] = {"hidden": 128, "batch": 16, "sequence": 64, "lr": 0.008}
# Chosen by reasoning, not yet by measurement: wide enough that a GPU has something to do.
GPU_SIZES: dict[str, Any] = {"hidden": 512, "batch": 64, "sequence": 128, "lr": 0.002}
SIZES: dict[str, Any] = {"layers": 1, "embedding": 64, "dropout": 0.0, "seed": 0, "dtype": "float32"}
SECONDS = 60.0


@dataclass(frozen=True)
class Files:
    """What the output folder holds at the end."""

    folder: Path

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint.pt"

    @property
    def weights(self) -> Path:
        return self.folder / "model.safetensors"

    @property
    def loss(self) -> Path:
        return self.folder / "loss.png"

    @property
    def gates(self) -> Path:
        return self.folder / "gates.png"

    @property
    def sample(self) -> Path:
        return self.folder / "sample.txt"

    @property
    def metrics(self) -> Path:
        return self.folder / "metrics.json"

    @property
    def c(self) -> Path:
        return self.folder / "c"


def asked_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The options that were given, by the names of `train.Settings`."""
    names = (
        "steps",
        "seconds",
        "hidden",
        "layers",
        "embedding",
        "batch",
        "sequence",
        "lr",
        "dropout",
        "seed",
    )
    asked = {name: getattr(args, name) for name in (*names, "dtype", "text")}
    if asked["text"] is not None:
        asked["text"] = str(Path(asked["text"]).resolve())
    asked["device"] = None if args.device in (None, "auto") else args.device
    return asked


def new_settings(asked: dict[str, Any]) -> train.Settings:
    """Settings of a new run: what was asked for, and for the rest what suits the device."""
    device = asked["device"] or ("cuda" if torch.cuda.is_available() else "cpu")
    values = SIZES | (GPU_SIZES if device == "cuda" else CPU_SIZES)
    values |= {"text": str(data.standard_library()), "device": device, "steps": None, "seconds": None}
    values |= {name: value for name, value in asked.items() if value is not None}
    if values["steps"] is None and values["seconds"] is None:
        values["seconds"] = SECONDS
    return train.Settings(**values)


def check_machine(settings: train.Settings) -> None:
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise train.SettingsError("device cuda, but torch finds no CUDA device: give --device cpu")
    if settings.device == "cpu" and settings.dtype == "float16":
        raise train.SettingsError(
            "torch trains no LSTM in float16 on the CPU: give --dtype bfloat16 or float32"
        )


def run(args: argparse.Namespace) -> int:
    """See `tritlstm.demo.run`."""
    files = Files(Path(args.output))
    try:
        trainer = prepare(args, files)
        if not trained(trainer, files):
            return STOPPED
        return finish(trainer, files)
    except (train.SettingsError, data.TextError, OSError) as error:
        print(f"tritlstm demo: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nStopped.", file=sys.stderr)
        if files.checkpoint.exists():
            print(f"To go on: {again(files)}", file=sys.stderr)
        return STOPPED


def again(files: Files) -> str:
    return f"tritlstm demo --resume --output {shlex.quote(str(files.folder))}"


def prepare(args: argparse.Namespace, files: Files) -> train.Trainer:
    """The trainer, new or as the checkpoint left it."""
    files.folder.mkdir(parents=True, exist_ok=True)
    asked = asked_settings(args)
    found = files.checkpoint.exists()
    if args.resume and not found:
        raise train.SettingsError(
            f"there is no checkpoint in {files.folder} to resume: "
            "leave --resume out, or give the --output of that run"
        )
    state = train.read_checkpoint(files.checkpoint) if found and not args.fresh else None
    if state is None:
        settings = new_settings(asked)
    else:
        settings = train.resumed_settings(train.Settings(**state["settings"]), asked)
    check_machine(settings)
    corpus = data.load(Path(settings.text))
    trainer = train.Trainer(settings, corpus)
    if state is not None:
        trainer.load_state_dict(state)
    describe(trainer, files)
    return trainer


def describe(trainer: train.Trainer, files: Files) -> None:
    settings, corpus, counters = trainer.settings, trainer.corpus, trainer.counters
    parameters = sum(p.numel() for p in trainer.model.parameters())
    print(f"tritlstm {tritlstm.__version__}, torch {torch.__version__}, {path(settings.device)}")
    print(
        f"text   {settings.text}: {len(corpus.train) / 1e6:.2f} MB in {len(corpus.train_files)} files, "
        f"held out {len(corpus.held_out) / 1e6:.2f} MB in {len(corpus.held_out_files)} files, "
        f"{len(corpus.vocabulary)} characters"
    )
    print(
        f"model  embedding {settings.embedding}, {settings.layers} x LSTM {settings.hidden}, "
        f"{parameters:,} parameters; batch {settings.batch} x {settings.sequence} steps, {settings.dtype}"
    )
    if counters.step:
        so_far = f"{files.checkpoint}: step {counters.step}, {counters.elapsed:.0f} s of training"
        done = settings.progress(counters.step, counters.elapsed)
        if done < 1.0:
            print(f"going on from {so_far}, {done:.0%} of the budget (--fresh starts anew)")
        else:
            print(f"trained already, {so_far} (a larger --seconds or --steps goes on, --fresh starts anew)")
    sys.stdout.flush()


def path(device: str) -> str:
    """Where the LSTM runs, in words."""
    if device == "cuda":
        return f"Triton kernels on {torch.cuda.get_device_name()}"
    threads = torch.get_num_threads()
    return f"torch's own LSTM on the CPU, {threads} thread{'s' * (threads > 1)} (no GPU kernels in training)"


def trained(trainer: train.Trainer, files: Files) -> bool:
    """Train to the end of the budget; False where Ctrl-C came first, with everything in the checkpoint."""
    with train.interruption() as stop:
        if trainer.settings.progress(trainer.counters.step, trainer.counters.elapsed) < 1.0:
            print("training; Ctrl-C stops it, and nothing is lost", flush=True)
        with progress.shown(trainer) as report:
            done = trainer.run(files.checkpoint, report, stop)
    counters = trainer.counters
    if not done:
        print(f"\nStopped after step {counters.step}; everything is in {files.checkpoint}.")
        print(f"To go on: {again(files)}", flush=True)
    return done


def finish(trainer: train.Trainer, files: Files) -> int:
    """Everything behind the training; the exit status."""
    settings, counters, corpus = trainer.settings, trainer.counters, trainer.corpus
    model.save(trainer.model, corpus.vocabulary, files.weights)
    weights = model.load_weights(files.weights)

    perplexities = train.baselines(trainer)
    lstm = trainer.perplexity()
    rows = [("held-out perplexity per character", "perplexity", "bits")]
    for name, value in (*perplexities.items(), ("LSTM", lstm)):
        rows.append((f"{name} model", f"{value:.2f}", f"{math.log2(value):.3f}"))
    print(f"\n{verify.aligned(rows)}")
    if lstm < perplexities["bigram"]:
        print(
            f"  The LSTM is {perplexities['bigram'] / lstm:.1f} times less perplexed than the bigram model."
        )
    else:
        print(
            "  The LSTM is no better than counted pairs of characters: train it longer (--seconds, --steps)."
        )

    sample = model.generate(weights, SAMPLE_PROMPT, SAMPLE_LENGTH, settings.seed)
    files.sample.write_text(sample + "\n", encoding="utf-8")
    print(f"\nA sample, drawn after {SAMPLE_PROMPT!r}:\n")
    print("\n".join("    " + line for line in sample.splitlines()), flush=True)

    pictures.loss_curve(counters.history, perplexities, lstm, files.loss)
    units = pictures.heat_map(weights, corpus.held_out, files.gates)

    print("\nVerifying the trained weights (the C library is compiled for it) …", flush=True)
    verification = verify.verify(files.weights, pictures.CONTEXT + pictures.LINE, files.c)
    print(verify.table(verification))

    passed = not any(row.failed for row in verification)
    write_metrics(trainer, files, perplexities | {"lstm": lstm}, units, verification)
    print(f"\nIn {files.folder}:")
    for file, what in (
        (files.weights, "weights and vocabulary"),
        (files.loss, "loss curve"),
        (files.gates, "gates and cells over a line of code"),
        (files.sample, "the sample"),
        (files.metrics, "all figures"),
        (files.checkpoint, "to train on: --resume with a larger --seconds or --steps"),
    ):
        print(f"  {file.name:18s} {what}")
    print(f"  {files.c.name + '/':18s} the C library and the C host")
    if not passed:
        print("tritlstm demo: a verification failed, see the table above", file=sys.stderr)
    return 0 if passed else 1


def write_metrics(
    trainer: train.Trainer,
    files: Files,
    perplexities: dict[str, float],
    units: list[pictures.Unit],
    verification: list[verify.Row],
) -> None:
    counters, corpus = trainer.counters, trainer.corpus
    metrics = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {
            "tritlstm": tritlstm.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
        "machine": {"path": path(trainer.settings.device), "platform": platform.platform()},
        "settings": asdict(trainer.settings),
        "text": {
            "sha256": corpus.fingerprint,
            "train_bytes": len(corpus.train),
            "held_out_bytes": len(corpus.held_out),
            "train_files": len(corpus.train_files),
            "held_out_files": list(corpus.held_out_files),
            "vocabulary_size": len(corpus.vocabulary),
        },
        "training": {
            "steps": counters.step,
            "characters": trainer.characters,
            "seconds": counters.elapsed,
            "characters_per_second": trainer.characters / max(counters.elapsed, 1e-9),
            "sessions": counters.sessions,
            "history": [asdict(point) for point in counters.history],
        },
        "perplexity": perplexities,
        "units_shown": [asdict(unit) for unit in units],
        "verification": [asdict(row) | {"verdict": row.verdict} for row in verification],
    }
    part = files.metrics.with_name(files.metrics.name + ".part")
    part.write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")
    part.replace(files.metrics)
