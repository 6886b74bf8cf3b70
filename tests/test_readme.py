"""The README: every block and command in it runs, every link leads somewhere, every figure is a kept one."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tritlstm import cli, plan
from tritlstm.capi import build
from tritlstm.demo import verify

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", TEXT, re.S | re.M)
PROSE = re.sub(r"^```.*?^```$", "", TEXT, flags=re.S | re.M)
STRICT = ["-std=c99", "-Wall", "-Wextra", "-Wshadow", "-pedantic", "-Werror"]


def blocks(language: str) -> list[str]:
    return [body for kind, body in BLOCKS if kind == language]


def run(*command: Any, **options: Any) -> str:
    words = [str(word) for word in command]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def host_script() -> str:
    (script,) = (body for body in blocks("sh") if "host.c" in body)
    return script


def commands() -> list[str]:
    """Every command of the page but those of the C host, which run together."""
    lines = [line for body in blocks("sh") if body != host_script() for line in body.splitlines()]
    spans = re.findall(r"`([^`\n]+)`", PROSE)
    return lines + [span for span in spans if re.match(r"(make|tritlstm|pip|pytest)\s", span)]


@pytest.fixture(scope="module")
def executed(tmp_path_factory) -> tuple[dict[str, Any], Path]:
    """The names that the Python blocks leave behind, run one after another, and the folder they ran in."""
    folder, before = tmp_path_factory.mktemp("readme"), Path.cwd()
    names: dict[str, Any] = {}
    torch.manual_seed(0)
    os.chdir(folder)
    try:
        for body in blocks("python"):
            exec(compile(body, "README.md", "exec"), names)
    finally:
        os.chdir(before)
    return names, folder


def in_float64(module: nn.Module, D: int, H: int) -> nn.LSTM:
    theirs = nn.LSTM(D, H, dtype=torch.float64)
    theirs.load_state_dict(module.state_dict())
    return theirs


def assert_close(got: torch.Tensor, exact: torch.Tensor) -> None:
    """float32: sums of some 60 products of order one, over ten steps."""
    torch.testing.assert_close(got.detach().double(), exact.detach().double(), rtol=1e-5, atol=1e-5)


def test_every_block_has_a_language_that_is_tested():
    assert {language for language, _ in BLOCKS} == {"sh", "python", "c", "text"}
    assert TEXT.count("```") == 2 * len(BLOCKS)


def test_the_lines_of_pytorch(executed):
    names, _ = executed
    lstm, x = names["lstm"], names["x"]
    theirs = in_float64(lstm, 28, 32)
    out, (h_n, c_n) = theirs(x.double())
    for got, exact in zip((names["out"], names["h_n"], names["c_n"]), (out, h_n, c_n), strict=True):
        assert_close(got, exact)
    out.sum().backward()
    for mine, other in zip(lstm.parameters(), theirs.parameters(), strict=True):
        assert_close(mine.grad, other.grad)
    assert [type(module).__module__ for module in names["model"]] == ["torch.nn.modules.linear", "tritlstm.module"]


def test_what_nn_lstm_does_not_have(executed):
    names, _ = executed
    lstm, trace = names["lstm"], names["trace"]
    np.testing.assert_allclose(trace.h, names["out"].detach().numpy(), atol=1e-5)
    np.testing.assert_allclose(names["gradients"].w_hh, lstm.weight_hh_l0.grad.numpy(), rtol=1e-4, atol=1e-4)
    assert names["emulated"].shape == (5, 3, 16)
    assert torch.isfinite(names["emulated"]).all()
    theirs = in_float64(lstm, 28, 32)
    for row, length in enumerate(names["lengths"].tolist()):
        assert not names["out3"][length:, row].any()
        if length:
            assert_close(names["out3"][:length, row], theirs(names["x3"][:length, row].double())[0])
        else:
            assert not names["h3"][row].any()
    assert names["gates"].shape == (10, 3, 4 * 32)
    assert names["cells"].shape == (10, 3, 32)


def test_explain_tells_both_paths(executed, capsys):
    names, _ = executed
    if torch.cuda.is_available():
        pytest.skip("the page is about a machine without a GPU")
    (body,) = (body for body in blocks("python") if "explain" in body)
    exec(compile(body, "README.md", "exec"), dict(names))
    assert re.findall(r"^path: (\w+)", capsys.readouterr().out, re.M) == ["torch", "kernels"]


@pytest.mark.skipif(shutil.which("pkg-config") is None, reason="pkg-config is not installed")
def test_the_host_in_c_builds_as_written_and_gives_pytorchs_numbers(executed, tmp_path):
    _, folder = executed
    (source,) = blocks("c")
    (tmp_path / "host.c").write_text(source)
    shutil.copy(folder / "model.safetensors", tmp_path)
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "tritlstm").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m tritlstm "$@"\n')
    (programs / "tritlstm").chmod(0o755)
    environment = {**os.environ, "HOME": str(tmp_path), "PATH": f"{programs}:{os.environ['PATH']}"}
    printed = run("sh", "-e", "-c", host_script(), cwd=tmp_path, env=environment)
    theirs = nn.LSTM(28, 32, dtype=torch.float64)
    theirs.load_state_dict(load_file(tmp_path / "model.safetensors"))
    exact = theirs(torch.zeros(10, 1, 28, dtype=torch.float64))[0][-1, 0, -1].item()
    assert float(printed.splitlines()[-1]) == pytest.approx(exact, abs=1e-6)
    # -pedantic and all warnings: the page is what people copy from.
    include = f"-I{tmp_path / 'tritlstm/include'}"
    run(*build.compiler(), *STRICT, include, "-fsyntax-only", tmp_path / "host.c")
    (tmp_path / "model.safetensors").unlink()
    refused = subprocess.run([tmp_path / "host"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "model.safetensors" in refused.stderr


@pytest.mark.parametrize("command", commands())
def test_every_command_exists(command):
    words = shlex.split(command, comments=True)
    if words[0] == "make":
        if shutil.which("make") is None:
            pytest.skip("make is not installed")
        run("make", "-n", *words[1:], cwd=ROOT)
        for word in words[1:]:
            for path in re.findall(r"tests/\w+\.py", word):
                assert (ROOT / path).is_file()
    elif words[0] == "tritlstm":
        parser = cli.make_parser(words[1])
        if words[-1] == "--help":
            with pytest.raises(SystemExit) as end:
                parser.parse_args(words[1:])
            assert end.value.code == 0
        else:
            assert parser.parse_args(words[1:]).command == words[1]
    else:
        assert words == ["pip", "install", "-e", "."]
        assert (ROOT / "pyproject.toml").is_file()


def test_the_sample_of_kernels_compiles(capsys):
    (line,) = (line for body in blocks("sh") for line in body.splitlines() if line.startswith("tritlstm kernels"))
    assert cli.main([*shlex.split(line)[1:], "--jobs", "1"]) == 0
    said = capsys.readouterr().out
    for words in ("forward training", "backward", "HGMMA"):
        assert words in said


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)]+)\)", PROSE):
        if target.startswith("#"):
            assert re.search(rf"^#+ {target[1:]}$", TEXT, re.M | re.I), target
        elif not target.startswith("https://"):
            assert (ROOT / target).is_file(), target


def test_pictures_are_small():
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", PROSE)
    assert len(pictures) == 2
    for picture in pictures:
        assert (ROOT / picture).stat().st_size < 300_000


def test_the_status_table_names_tests_that_exist():
    named = re.findall(r"tests/\w+\.py", PROSE)
    assert len(named) >= 12
    for path in named:
        assert (ROOT / path).is_file(), path


def test_the_feature_table_says_what_the_whole_one_says():
    """A peer is named where docs/features.md says yes in some way, and only there."""
    page = (ROOT / "docs/features.md").read_text(encoding="utf-8")
    cells = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in page.splitlines() if line[:1] == "|"]
    whole = {row[0]: row[1:] for row in cells if len(row) == 9}
    assert len(whole) >= 30
    heads = ["GPU", "CPU", "Keras", "ONNX", "Haste", "FlashRNN", "TorchRL"]
    short = re.findall(r"^\| ([^|]+) \| ([^|]+) \| ([^|]+) \|$", TEXT[TEXT.index("who else has it") :], re.M)
    assert len(short) >= 25
    for feature, mine, others in short:
        if feature == "---":
            continue
        own, *peers = whole[feature]
        assert re.sub(r"\[(.*?)\]\(.*?\)", r"\1", own) == mine, feature
        named = {head for head in heads if re.search(rf"\b{head}\b", others)}
        if "nn.LSTM" in others and not named & {"GPU", "CPU"}:
            named |= {"GPU", "CPU"}
        assert named == {h for h, cell in zip(heads, peers, strict=True) if cell not in ("no", "?", "–")}, feature


def test_the_architectures_are_those_of_the_planner():
    assert set(re.findall(r"\b(?:sm_|gfx)\w+", PROSE)) == set(plan.DEVICES)


def test_the_versions_are_those_that_make_sets_up():
    setup = (ROOT / ".ci/setup").read_text()
    for name, version in re.findall(r"(torch|triton) (\d+\.\d+\.\d+)", PROSE):
        assert re.search(rf"^{name}=.*\b{re.escape(version)}\b", setup, re.M | re.I), (name, version)


def test_the_figures_of_the_speed_are_those_that_were_kept():
    kept = (ROOT / "benchmarks/results/intel-xeon-2026-11-25-cpu-1-thread.md").read_text()
    forward, backward, cases = re.search(
        r"geometric mean ([\d.]+)× forward, ([\d.]+)×\s+with backward, (\d+) cases", PROSE
    ).groups()
    assert f"| **all cases** | {forward}× ({cases}) | {backward}× ({cases}) |" in kept


def test_the_verification_table_is_the_demos():
    (table,) = (body for body in blocks("text") if "max error" in body)
    source = Path(verify.__file__).read_text() + (ROOT / "tritlstm/demo/command.py").read_text()
    for words in ("logits against torch in float64", "max error", "budget", "parallel emulator", "C host"):
        assert words in table
        assert words in source
    for error, budget in re.findall(r"(\d\.\d\de-\d+)\s+(\d\.\d\de-\d+)", table):
        assert float(error) <= float(budget)
