"""examples/distributed.py on two processes of a CPU: losses and weights of one rank, by DDP and by FSDP2."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[1]
COPIES, PARTS = re.findall(r"^torchrun .*", (ROOT / "docs" / "distributed.md").read_text(encoding="utf-8"), re.M)
EXAMPLE = ROOT / "examples" / "distributed.py"
# float64, so that Adam's division by small numbers does not magnify sums in another order.
SIZES = ["--batch", "4", "--sequence", "8", "--hidden", "10", "--dtype", "float64"]


def torchrun(command: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A command of the page, on small sizes."""
    launcher, *words = command.split()
    assert launcher == "torchrun"
    words[words.index("examples/distributed.py")] = str(EXAMPLE)
    full = [sys.executable, "-m", "torch.distributed.run", "--standalone", *words, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(full, cwd=folder, env=environment, capture_output=True, text=True, timeout=170, check=False)


@pytest.fixture(scope="module")
def example() -> Any:
    spec = importlib.util.spec_from_file_location("distributed_example", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Arguments for small sizes, and for a text of which every step reads the same: so the loss falls at once.

    Each stream reads another file. Of the project's own files each change of theirs would be another text.
    """
    folder = tmp_path_factory.mktemp("text")
    for k in range(40):
        (folder / f"part_{k}.py").write_text(f"ab = {k:02}\n" * 100)  # 8 bytes, as a sequence
    return [*SIZES, "--text", str(folder)]


@pytest.fixture
def alone() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def assert_same(got: dict[str, Any], losses: list[float], weights: dict[str, torch.Tensor]) -> None:
    assert got["losses"] == pytest.approx(losses, rel=1e-9)
    assert got["weights"].keys() == weights.keys()
    for name, value in weights.items():
        torch.testing.assert_close(got["weights"][name], value, rtol=1e-7, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_two_ranks_give_the_losses_and_weights_of_one(example, alone, small, tmp_path):
    losses, weights = example.train(example.parse([*small, "--steps", "6"]), torch.device("cpu"))
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]
    copies = torchrun(COPIES, tmp_path, *small, "--steps", "6", "--result", "copies.pt")
    assert copies.returncode == 0, copies.stderr
    assert f"step 6  loss {losses[-1]:.6f}" in copies.stdout
    assert_same(torch.load(tmp_path / "copies.pt"), losses, weights)

    # The parts of two ranks saved half way, and taken up by one.
    folder = tmp_path / "runs" / "model"
    half = torchrun(PARTS, tmp_path, *small, "--steps", "3", "--result", "half.pt")
    assert half.returncode == 0, half.stderr
    assert torch.load(tmp_path / "half.pt")["losses"] == pytest.approx(losses[:3], rel=1e-9)
    assert len(list(folder.glob("*.distcp"))) == 2
    for k, more in enumerate(([], ["--shard"])):
        taken = shutil.copytree(folder, tmp_path / f"taken up {k}")  # a run saves to where it goes on from
        options = example.parse([*small, "--steps", "6", "--checkpoint", str(taken), *more])
        rest, resumed = example.train(options, torch.device("cpu"))
        assert_same({"losses": rest, "weights": resumed}, losses[3:], weights)


def test_a_batch_that_does_not_divide_is_refused(example, alone, small, monkeypatch):
    monkeypatch.setattr(example, "init_device_mesh", lambda *_: _ThreeRanks())
    with pytest.raises(SystemExit, match=r"--batch must be a multiple of the 3 ranks, got 4"):
        example.train(example.parse(small), torch.device("cpu"))


class _ThreeRanks:
    def get_rank(self) -> int:
        return 0

    def size(self) -> int:
        return 3


def test_it_says_how_to_start_it(example, monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(sys, "argv", ["distributed.py"])
    with pytest.raises(SystemExit, match=r"start this with torchrun --nproc-per-node N examples/distributed\.py"):
        example.main()
