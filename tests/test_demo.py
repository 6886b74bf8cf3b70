"""The demo: its text, its baselines against counts by hand, its training, checkpoints and verification."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tritlstm import cli
from tritlstm import demo as demo_package
from tritlstm.demo import command, data, model, pictures, progress, train, verify

WORDS = ("alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa", "mu", "nu")
SIZES = ["--hidden=16", "--embedding=8", "--batch=8", "--sequence=16", "--lr=0.02", "--seed=3"]


def make_text(folder: Path, files: int = 120) -> Path:
    """Small Python files, the same every time; about one in twenty is held out."""
    for k in range(files):
        a, b, c = (WORDS[(k * m + 1) % len(WORDS)] for m in (1, 5, 7))
        lines = [
            f"def {a}_{k % 7}({b}, {c}=None):",
            f'    """Give {b} back, or {c}."""',
            f"    if {c} is None:  # the usual case",
            f"        return [{b}, ({k % 10}, '{a}')]",
            f"    return {{{c}: {b}}}",
            "",
        ]
        path = folder / f"part{k % 3}" / f"{a}{k}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines * 4))
    return folder


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory) -> Path:
    return make_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def corpus(text_folder) -> data.Corpus:
    return data.load(text_folder)


def settings_for(folder: Path, **changes) -> train.Settings:
    values = {
        "text": str(folder), "hidden": 16, "layers": 1, "embedding": 8, "batch": 8, "sequence": 16,
        "lr": 0.02, "dropout": 0.0, "seed": 3, "device": "cpu", "dtype": "float32", "steps": 40,
        "seconds": None,
    }  # fmt: skip
    return train.Settings(**{**values, **changes})


# ---- text --------------------------------------------------------------------------------------------


def test_the_split_of_the_standard_library():
    corpus = data.load(data.standard_library())
    assert set(corpus.train_files).isdisjoint(corpus.held_out_files)
    names = corpus.train_files + corpus.held_out_files
    assert "json/decoder.py" in names
    assert not [n for n in names if {"test", "tests", "site-packages", "encodings"} & set(n.split("/"))]
    assert len(corpus.train) > 3_000_000
    share = len(corpus.held_out_files) / len(names)
    assert 0.02 < share < 0.10  # one in twenty, give or take three standard deviations of 600 files


def test_the_split_is_by_a_hash_that_never_changes():
    """Expected: the first 16 digits that `printf NAME | sha256sum` prints."""
    expected = {"ast.py": 0xB4FA779C3F435060, "json/decoder.py": 0x3B2E3CB3D29D57A5}
    for name, number in expected.items():
        assert data.stable_hash(name) == number
        assert data.is_held_out(name) == (number % 20 == 0)


def test_the_order_does_not_depend_on_the_file_system(text_folder, monkeypatch):
    expected = data.list_files(text_folder)
    walk = os.walk

    def backwards(root):
        for folder, subfolders, files in walk(root):
            subfolders.sort(reverse=True)
            yield folder, subfolders, sorted(files, reverse=True)

    monkeypatch.setattr(os, "walk", backwards)
    assert data.list_files(text_folder) == expected
    assert expected != sorted(expected)


def test_a_new_file_moves_no_other_to_the_other_side(tmp_path, corpus):
    folder = make_text(tmp_path)
    (folder / "part0" / "one_more.py").write_text("x = 1\n" * 50)
    more = data.load(folder)
    assert set(more.train_files) >= set(corpus.train_files)
    assert set(more.held_out_files) >= set(corpus.held_out_files)
    assert more.fingerprint != corpus.fingerprint


def test_excluded_and_empty_files_leave_no_trace(tmp_path, corpus):
    folder = make_text(tmp_path)
    for name in ("test/a.py", "part1/tests/b.py", "site-packages/c/d.py", "_sysconfigdata_x.py", "notes.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("excluded = True\n")
    (folder / "part2" / "empty.py").write_text("\n")
    assert data.load(folder).fingerprint == corpus.fingerprint


def test_the_corpus_is_the_files_one_after_another(text_folder, corpus):
    for ids, names in ((corpus.train, corpus.train_files), (corpus.held_out, corpus.held_out_files)):
        text = b"".join((text_folder / name).read_bytes() for name in names)
        assert corpus.vocabulary[ids].tobytes() == text
    assert corpus.vocabulary[0] == data.UNKNOWN_BYTE


def test_rare_bytes_share_the_unknown_id():
    text = np.frombuffer(b"a" * 20 + b"b" * 10 + b"c" * 9 + bytes([data.UNKNOWN_BYTE]) * 30, np.uint8)
    vocabulary = data.find_vocabulary(text)
    assert vocabulary.tolist() == [data.UNKNOWN_BYTE, ord("a"), ord("b")]
    ids = data.encode(b"abcz\x1a\xff", vocabulary)
    assert ids.tolist() == [1, 2, 0, 0, 0, 0]
    assert data.decode(ids[:2], vocabulary) == "ab"


def test_streams_are_consecutive_pieces():
    cut = data.streams(np.arange(23), 3)
    assert cut.T.tolist() == [list(range(7)), list(range(7, 14)), list(range(14, 21))]


def test_too_little_text_is_refused(tmp_path):
    (tmp_path / "a.py").write_text("x = 1\n")
    with pytest.raises(data.TextError, match=r"gives 6 bytes of training text in 1 Python files"):
        data.load(tmp_path)
    with pytest.raises(data.TextError, match="no folder"):
        data.load(tmp_path / "none")


# ---- baselines ---------------------------------------------------------------------------------------


def test_baselines_against_counts_by_hand():
    """Of a b a b b, with V = 2: p(a) = 3/7, p(b) = 4/7; behind a: b twice; behind b: a once, b once."""
    counted = data.Bigrams(np.array([0, 1, 0, 1, 1], np.uint8), 2)
    np.testing.assert_allclose(counted.unigram, [3 / 7, 4 / 7], rtol=1e-15)
    expected = [[(0 + 3 / 7) / 3, (2 + 4 / 7) / 3], [(1 + 3 / 7) / 3, (1 + 4 / 7) / 3]]
    np.testing.assert_allclose(counted.bigram, expected, rtol=1e-15)
    unigram, bigram = counted.perplexity(np.array([0, 1]), np.array([1, 1]))
    assert unigram == pytest.approx(7 / 4, rel=1e-14)
    assert bigram == pytest.approx(((18 / 21) * (11 / 21)) ** -0.5, rel=1e-14)


def test_probabilities_of_the_baselines_sum_to_one(corpus):
    counted = data.Bigrams(corpus.train, len(corpus.vocabulary))
    assert counted.unigram.sum() == pytest.approx(1.0, abs=1e-12)
    np.testing.assert_allclose(counted.bigram.sum(1), 1.0, atol=1e-12)
    assert counted.bigram.min() > 0


# ---- model and training ------------------------------------------------------------------------------


def test_numpy_and_torch_models_agree(tmp_path, corpus):
    torch.manual_seed(0)
    original = model.CharacterModel(len(corpus.vocabulary), 8, 12, num_layers=2)
    path = tmp_path / "model.safetensors"
    model.save(original, corpus.vocabulary, path)
    weights = model.load_weights(path)
    ids = corpus.held_out[:60].reshape(20, 3)
    expected = model.torch_model(weights, torch.float64, torch.nn.LSTM)(torch.from_numpy(ids))[0].numpy()
    np.testing.assert_allclose(model.numpy_logits(weights, ids), expected, rtol=0, atol=1e-13)


def test_perplexity_is_that_of_the_numpy_model(tmp_path, text_folder, corpus):
    """Streams in pieces with carried states must give what one walk over each stream gives."""
    trainer = train.Trainer(settings_for(text_folder), corpus)
    for _ in range(5):
        trainer.step()
    path = tmp_path / "model.safetensors"
    model.save(trainer.model, corpus.vocabulary, path)
    ids = trainer.held_out_streams
    logits = model.numpy_logits(model.load_weights(path), ids[:-1])
    logits = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    nats = -np.take_along_axis(logits, ids[1:, :, None].astype(int), -1).mean()
    assert trainer.perplexity() == pytest.approx(math.exp(nats), rel=1e-5)  # float32 against float64
    assert len(ids) > train.EVALUATED_STEPS


def test_training_learns(tmp_path, text_folder, corpus):
    trainer = train.Trainer(settings_for(text_folder, steps=500), corpus)
    before = trainer.perplexity()
    assert before == pytest.approx(len(corpus.vocabulary), rel=0.2)  # untrained: as good as guessing
    assert trainer.run(tmp_path / "checkpoint.pt")
    after, counted = trainer.perplexity(), train.baselines(trainer)
    assert after < counted["bigram"] < counted["unigram"] < before
    history = trainer.counters.history
    assert len(history) == train.EVALUATIONS
    assert history[-1].step == trainer.counters.step == 500
    assert history[-1].loss < 0.6 * history[0].loss


def test_the_first_step_is_adam_on_the_clipped_gradient(text_folder, corpus):
    """Adam's first step moves every weight by lr times the gradient's sign, up to its epsilon."""
    settings = settings_for(text_folder)
    trainer = train.Trainer(settings, corpus)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.step()
    rate = settings.lr / train.WARM_UP_STEPS
    for name, p in trainer.model.named_parameters():
        large = p.grad.abs() > 1e-4
        moved = (before[name] - p.detach())[large]
        np.testing.assert_allclose(moved, rate * p.grad[large].sign(), rtol=2e-3, atol=1e-7)


def test_learning_rate_and_progress():
    settings = settings_for(Path("."), lr=1.0, steps=1000)
    assert settings.learning_rate(0, 0.0) == pytest.approx(1 / train.WARM_UP_STEPS)
    assert settings.learning_rate(500, 0.5) == pytest.approx(0.51)
    assert settings.learning_rate(999, 1.0) == pytest.approx(train.LAST_LR)
    assert settings.progress(250, 99.0) == 0.25
    assert replace(settings, steps=None, seconds=20.0).progress(7, 5.0) == 0.25


def test_divergence_is_said(tmp_path, text_folder, corpus):
    trainer = train.Trainer(settings_for(text_folder), corpus)
    with torch.no_grad():
        trainer.model.head.bias.fill_(math.nan)
    with pytest.raises(train.SettingsError, match=r"training diverged: the loss is nan after 2 steps"):
        trainer.run(tmp_path / "checkpoint.pt")


def test_bfloat16_trains_with_float32_weights(tmp_path, text_folder, corpus):
    trainer = train.Trainer(settings_for(text_folder, dtype="bfloat16", steps=120), corpus)
    before = trainer.perplexity()
    trainer.run(tmp_path / "checkpoint.pt")
    assert trainer.states[0].dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters())
    assert trainer.perplexity() < 0.5 * before


# ---- checkpoints -------------------------------------------------------------------------------------


def flat(value, name="") -> dict[str, object]:
    """All leaves of nested dictionaries, lists and tuples."""
    if isinstance(value, dict):
        return {k: v for key, part in value.items() for k, v in flat(part, f"{name}/{key}").items()}
    if isinstance(value, (list, tuple)):
        return {k: v for i, part in enumerate(value) for k, v in flat(part, f"{name}/{i}").items()}
    return {name: value}


def assert_same_bits(a: train.Trainer, b: train.Trainer) -> None:
    clock = re.compile(r"elapsed|seconds|characters_per_second|sessions")
    first, second = flat(a.state_dict()), flat(b.state_dict())
    assert first.keys() == second.keys()
    for name, value in first.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, second[name]), name
        elif not clock.search(name):
            assert value == second[name], name


def load(path: Path, corpus: data.Corpus, **asked) -> train.Trainer:
    state = train.read_checkpoint(path)
    trainer = train.Trainer(train.resumed_settings(train.Settings(**state["settings"]), asked), corpus)
    trainer.load_state_dict(state)
    return trainer


@pytest.mark.parametrize("stops", [(1,), (7, 30, 75)], ids=["once", "three-times"])
def test_an_interrupted_run_gives_the_same_bits(tmp_path, text_folder, corpus, stops):
    """Two layers with dropout, so that random numbers count, and past the text's end, where states reset."""
    settings = settings_for(text_folder, layers=2, dropout=0.25, batch=32, sequence=32, steps=80)
    whole = train.Trainer(settings, corpus)
    assert whole.segments < 80
    assert whole.run(tmp_path / "whole.pt")

    path = tmp_path / "parts.pt"
    trainer = train.Trainer(settings, corpus)
    for stop in stops:
        assert not trainer.run(path, stop=lambda trainer=trainer, stop=stop: trainer.counters.step >= stop)
        torch.manual_seed(999)  # another process would not have this generator's state
        trainer = load(path, corpus)
        assert trainer.counters.step == stop
    assert trainer.run(path)
    assert trainer.counters.sessions == len(stops) + 1
    assert_same_bits(whole, trainer)
    assert_same_bits(whole, load(path, corpus))


def test_a_time_budget_counts_on(tmp_path, text_folder, corpus):
    path = tmp_path / "checkpoint.pt"
    trainer = train.Trainer(settings_for(text_folder, steps=None, seconds=0.4), corpus)
    trainer.run(path, stop=lambda: trainer.counters.elapsed > 0.1)
    resumed = load(path, corpus)
    assert resumed.counters.elapsed == trainer.counters.elapsed > 0.1
    assert resumed.run(path)
    assert 0.4 <= resumed.counters.elapsed < 5.0
    longer = load(path, corpus, seconds=1000.0)
    assert longer.settings.progress(longer.counters.step, longer.counters.elapsed) < 0.01


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path, text_folder, corpus, monkeypatch):
    trainer = train.Trainer(settings_for(text_folder), corpus)
    path = tmp_path / "checkpoint.pt"
    trainer.save(path)
    before = path.read_bytes()

    def full_disk(state, file):
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    trainer.step()
    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="No space left"):
        trainer.save(path)
    assert path.read_bytes() == before


def test_what_may_not_change_on_resume(tmp_path, text_folder, corpus):
    saved = settings_for(text_folder)
    with pytest.raises(train.SettingsError, match=r"made with --hidden 16, and now --hidden 32 is asked for"):
        train.resumed_settings(saved, {"hidden": 32})
    changed = train.resumed_settings(saved, {"seconds": 5.0, "lr": 0.5, "hidden": 16, "seed": None})
    assert changed == replace(saved, seconds=5.0, steps=None, lr=0.5)

    path = tmp_path / "checkpoint.pt"
    train.Trainer(saved, corpus).save(path)
    with pytest.raises(train.SettingsError, match="is not the one that the checkpoint was trained on"):
        load(path, replace(corpus, fingerprint="another"))
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(train.SettingsError, match=r"cannot be read .* --fresh"):
        train.read_checkpoint(path)


def test_sizes_that_do_not_fit_the_text(text_folder, corpus):
    with pytest.raises(train.SettingsError, match="give a smaller --batch or --sequence"):
        train.Trainer(settings_for(text_folder, batch=512, sequence=512), corpus)


def test_the_first_signal_asks_and_the_second_acts():
    before = signal.getsignal(signal.SIGINT)
    with train.interruption() as stop:
        assert not stop()
        signal.raise_signal(signal.SIGINT)
        assert stop()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_in_a_process_loses_nothing(tmp_path, text_folder, corpus):
    output = tmp_path / "out put"
    arguments = ["demo", *SIZES, "--steps=1000000", "--text", str(text_folder), "--output", str(output)]
    with subprocess.Popen(
        [sys.executable, "-m", "tritlstm", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        lines = []
        while not (lines and lines[-1].startswith("training")):
            lines.append(process.stdout.readline())
            assert lines[-1], process.communicate()[1]
        time.sleep(1.5)
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(timeout=60)
    assert process.returncode == command.STOPPED
    assert errors == ""
    printed = "".join(lines) + rest
    assert "\x1b" not in printed
    assert "\r" not in printed
    path = output / "checkpoint.pt"
    resumed = load(path, corpus)
    stopped = resumed.counters.step
    assert stopped > 0
    assert f"Stopped after step {stopped}; everything is in {path}." in rest
    assert f"To go on: tritlstm demo --resume --output '{output}'" in rest

    whole = train.Trainer(resumed.settings, corpus)
    whole.run(tmp_path / "whole.pt", stop=lambda: whole.counters.step >= stopped)
    assert_same_bits(whole, resumed)


# ---- what is shown -----------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_bar_and_a_file_gets_lines(tmp_path, text_folder, corpus, monkeypatch):
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    shown = {}
    for kind in (Terminal, io.StringIO):
        stream = kind()
        trainer = train.Trainer(settings_for(text_folder), corpus)
        with progress.shown(trainer, stream) as report:
            trainer.run(tmp_path / "checkpoint.pt", report)
        shown[kind] = stream.getvalue()
        last = trainer.counters.history[-1]
        assert f"loss {last.loss:.3f}  val ppl {last.perplexity:.2f}" in shown[kind]
    assert "\x1b" in shown[Terminal]
    plain = shown[io.StringIO].splitlines()
    assert len(plain) == train.EVALUATIONS
    assert re.fullmatch(
        r"  100%  step 40     loss \d\.\d{3}  val ppl \d+\.\d\d  [\d.]+[kM]? chars/s", plain[-1]
    )


def test_counts():
    assert [progress.count(n) for n in (950, 12345, 4.56e6, 2e9)] == ["950", "12.3k", "4.56M", "2G"]


# ---- pictures ----------------------------------------------------------------------------------------


def test_properties_of_a_line():
    text = '  f("a)", [b])  # "c'
    found = pictures.properties(text)

    def where(name):
        return "".join("^" if value else " " for value in found[name]).rstrip()

    assert where("in a string") == "    ^^^"
    assert where("in a comment") == " " * 16 + "^^^^"
    assert where("in a word") == "  ^        ^"
    assert found["bracket depth"].astype(int).tolist() == [0] * 3 + [1] * 7 + [2, 2, 1] + [0] * 7
    assert found["position in line"].tolist() == list(range(1, 21))
    assert found["indentation"].tolist() == [1.0] + [2.0] * 19


def test_strings_and_brackets_over_lines():
    text = "x = '''a\n  (b'''\ny = (\n 'it\\'s')\n"
    found = pictures.properties(text)
    inside = "".join(c for c, value in zip(text, found["in a string"], strict=True) if value)
    assert inside == "'''a\n  (b''" + "'it\\'s"
    depth = "".join(str(int(value)) for value in found["bracket depth"])
    assert depth == "0" * 21 + "1" * 10 + "00"


def test_a_unit_that_counts_characters_is_found(corpus):
    """By construction: cell 2 adds 0.1 a character, and flushes at a line feed; the others do nothing."""
    V, H = len(corpus.vocabulary), 4
    line_feed = int(data.encode(b"\n", corpus.vocabulary)[0])
    embedding = np.zeros((V, 1), np.float32)
    embedding[line_feed] = 1.0
    bias = np.zeros(4 * H, np.float32)
    bias[[2, H + 2]] = 20.0  # input and forget gates of unit 2 open
    bias[2 * H + 2] = math.atanh(0.1)
    w_ih = np.zeros((4 * H, 1), np.float32)
    w_ih[[2, H + 2]] = -40.0
    weights = {
        "vocabulary": corpus.vocabulary,
        "embedding.weight": embedding,
        "lstm.weight_ih_l0": w_ih,
        "lstm.weight_hh_l0": np.zeros((4 * H, H), np.float32),
        "lstm.bias_ih_l0": bias,
        "lstm.bias_hh_l0": np.zeros(4 * H, np.float32),
        "head.weight": np.zeros((V, H), np.float32),
        "head.bias": np.zeros(V, np.float32),
    }
    units = pictures.choose_units(weights, corpus.held_out)
    assert (units[0].index, units[0].follows) == (2, "position in line")
    assert units[0].correlation > 0.95  # not 1: the picture's scale is logarithmic
    assert sorted(unit.index for unit in units) == [0, 1, 2, 3]


def png_size(path: Path) -> tuple[int, int]:
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", head[16:24])


# ---- verification, and the whole job -----------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory, text_folder) -> tuple[Path, str, int]:
    """A whole run of the command on a tiny model: its folder, its output, its exit status."""
    output = tmp_path_factory.mktemp("run")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        status = cli.main(
            ["demo", *SIZES, "--steps=500", "--text", str(text_folder), "--output", str(output)]
        )
    return output, printed.getvalue(), status


def test_the_whole_job(finished, corpus):
    output, printed, status = finished
    assert status == 0, printed
    assert png_size(output / "loss.png") > (600, 400)
    assert png_size(output / "gates.png") > (1000, 1000)
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["training"]["steps"] == 500
    assert metrics["text"]["sha256"] == corpus.fingerprint
    assert metrics["perplexity"]["lstm"] < metrics["perplexity"]["bigram"] < metrics["perplexity"]["unigram"]
    for name in ("unigram", "bigram", "lstm"):
        value = metrics["perplexity"][name]
        shown = name.upper() if name == "lstm" else name
        assert re.search(rf"{shown} model +{value:.2f} +{math.log2(value):.3f}", printed)
    sample = (output / "sample.txt").read_text()
    assert sample.startswith(command.SAMPLE_PROMPT)
    assert len(sample.encode()) == len(command.SAMPLE_PROMPT) + command.SAMPLE_LENGTH + 1
    assert not list(output.glob("*.part"))


def test_the_weights_file(finished, corpus):
    from safetensors import safe_open

    output, _, _ = finished
    V = len(corpus.vocabulary)
    with safe_open(output / "model.safetensors", "np") as file:
        names = list(file.keys())
        shapes = {
            name: (file.get_slice(name).get_dtype(), file.get_slice(name).get_shape()) for name in names
        }
        assert file.metadata() == {
            "format": "pt", "vocabulary_size": str(V), "embedding_size": "8", "hidden_size": "16",
            "num_layers": "1", "unknown_id": "0",
        }  # fmt: skip
        assert file.get_tensor("vocabulary").tolist() == corpus.vocabulary.tolist()
    assert shapes == {
        "vocabulary": ("U8", [V]),
        "embedding.weight": ("F32", [V, 8]),
        "lstm.weight_ih_l0": ("F32", [64, 8]),
        "lstm.weight_hh_l0": ("F32", [64, 16]),
        "lstm.bias_ih_l0": ("F32", [64]),
        "lstm.bias_hh_l0": ("F32", [64]),
        "head.weight": ("F32", [V, 16]),
        "head.bias": ("F32", [V]),
    }
    state = torch.load(output / "checkpoint.pt", weights_only=True)["model"]
    weights = model.load_weights(output / "model.safetensors")
    for name, value in state.items():
        assert np.array_equal(weights[name], value.numpy()), name


def test_the_three_ways_agree(finished):
    output, printed, _ = finished
    rows = json.loads((output / "metrics.json").read_text())["verification"]
    ways = [row["way"].partition(",")[0] for row in rows]
    kernels = 1 + torch.cuda.is_available()  # in the emulator, and on the GPU
    assert ways == ["NumPy reference", *["Triton kernels"] * kernels, "C host"]
    for row in rows:
        assert row["verdict"] == "pass", row
        assert 0 <= row["error"] <= row["budget"]
        assert f"{row['error']:.2e}" in printed
    assert rows[0]["budget"] < 1e-12
    assert max(row["budget"] for row in rows[1:]) < 1e-4


def test_a_finished_run_is_not_trained_again(finished, capsys, monkeypatch):
    """The same command again goes straight to the results; other sizes are refused, not mixed in."""
    output, _, _ = finished
    before = (output / "checkpoint.pt").read_bytes()
    parser = argparse.ArgumentParser()
    demo_package.add_arguments(parser)
    trainer = command.prepare(parser.parse_args(["--output", str(output)]), command.Files(output))
    assert trainer.counters.step == 500
    printed = capsys.readouterr().out
    assert re.search(r"trained already, .*checkpoint\.pt: step 500", printed)
    steps = []
    monkeypatch.setattr(trainer, "step", lambda: steps.append(1))
    assert command.trained(trainer, command.Files(output))
    assert capsys.readouterr().out == ""
    assert steps == []
    assert cli.main(["demo", "--hidden", "32", "--output", str(output)]) == 2
    assert "made with --hidden 16" in capsys.readouterr().err
    assert torch.equal(
        torch.load(output / "checkpoint.pt", weights_only=True)["model"]["head.bias"],
        torch.load(io.BytesIO(before), weights_only=True)["model"]["head.bias"],
    )


def test_wrong_logits_fail(finished, monkeypatch, tmp_path):
    output, _, _ = finished
    right = verify.reference_logits

    def slightly_wrong(weights, ids):
        logits = right(weights, ids)
        logits[3, 2] += 1e-9
        return logits

    def broken(weights, ids):
        raise RuntimeError("no luck\nat all")

    def nan(weights, ids):
        return np.full_like(right(weights, ids), math.nan)

    def short(weights, ids):
        return right(weights, ids)[:-1]

    ways = {
        slightly_wrong: "FAIL",
        broken: "FAIL RuntimeError: no luck",
        nan: "FAIL",
        short: "FAIL logits of shape (9,",
    }
    for way, text in ways.items():
        monkeypatch.setattr(verify, "reference_logits", way)
        (row,) = verify.verify(output / "model.safetensors", "x = 1  # y", tmp_path, ["reference"])
        assert row.failed
        assert row.verdict.startswith(text)
        assert text in verify.table([row])
        assert ("at all" in verify.table([row])) == (way is broken)
        assert "at all" not in row.verdict


def test_without_a_compiler_the_row_says_so(finished, monkeypatch, tmp_path):
    output, _, _ = finished
    monkeypatch.setenv("CC", "no-such-compiler")
    (row,) = verify.verify(output / "model.safetensors", "x = 1", tmp_path, ["c"])
    assert not row.failed
    assert not row.passed
    assert re.match(r"not run: no C compiler 'no-such-compiler': install one .*apt install gcc", row.verdict)
    assert "not run: no C compiler" in verify.table([row])
    monkeypatch.undo()
    monkeypatch.setattr("tritlstm.info.python_headers", lambda: None)
    (row,) = verify.verify(output / "model.safetensors", "x = 1", tmp_path, ["c"])
    assert re.match(r"not run: Python.h is missing; .*apt install python3\.\d+-dev", row.verdict)


def test_a_failed_verification_is_the_exit_status(finished, monkeypatch, capsys, tmp_path):
    shutil.copy(finished[0] / "checkpoint.pt", tmp_path)
    rows = {
        "pass": verify.Row("a", 1, 1e-9, 1e-8, 0.0),
        "fail": verify.Row("b", 1, 1e-7, 1e-8, 0.0),
        "not run": verify.Row("c", 1, None, None, 0.0, "no compiler", ran=False),
    }
    monkeypatch.setattr(pictures, "heat_map", lambda *_: [])
    monkeypatch.setattr(pictures, "loss_curve", lambda *_: None)
    for kinds, expected in ((("pass", "not run"), 0), (("pass", "fail"), 1)):
        monkeypatch.setattr(verify, "verify", lambda *_, kinds=kinds: [rows[kind] for kind in kinds])
        assert cli.main(["demo", "--resume", "--output", str(tmp_path)]) == expected
        captured = capsys.readouterr()
        assert ("a verification failed" in captured.err) == bool(expected)


def test_budgets():
    base = np.array([[1.0, -4.0]])
    own = base + np.array([[0.0, 1e-6]])
    assert verify.budget(base, own) == pytest.approx(2e-6 + 4 * 2.0**-24)
    assert verify.float64_budget(base, own) == pytest.approx(16e-6 * 2.0**-29 + 4 * 2.0**-53)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--resume"], r"no checkpoint in .* to resume"),
        (["--text", "/nonexistent"], r"no folder /nonexistent"),
        (["--device", "cpu", "--dtype", "float16"], "no LSTM in float16 on the CPU"),
        pytest.param(
            ["--device", "cuda"],
            "finds no CUDA device",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device"),
        ),
    ],
)
def test_options_that_cannot_be_met(tmp_path, capsys, arguments, message):
    assert cli.main(["demo", "--output", str(tmp_path / "out"), *arguments]) == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize(
    "option", [["--hidden", "0"], ["--lr", "nan"], ["--dropout", "1"], ["--steps", "two"]]
)
def test_options_out_of_range(capsys, option):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["demo", *option])
    assert option[0] in capsys.readouterr().err


def test_sampling_repeats_and_follows_the_weights(finished):
    output, _, _ = finished
    weights = model.load_weights(output / "model.safetensors")
    assert model.generate(weights, "def ", 40, seed=1) == model.generate(weights, "def ", 40, seed=1)
    assert model.generate(weights, "def ", 40, seed=1) != model.generate(weights, "def ", 40, seed=2)
    certain = dict(weights)
    letter = int(data.encode(b"e", weights["vocabulary"])[0])
    certain["head.bias"] = weights["head.bias"].copy()
    certain["head.bias"][[0, letter]] = 1000.0, 900.0  # the unknown id is never drawn
    assert model.generate(certain, "def ", 5, seed=1) == "def eeeee"
