"""The device under test: its name, its clock, and its measured limits."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from .floor import HANDOFF_US, SHARED_US, Limits
from .problem import TORCH_DTYPE
from .providers import installed
from .timing import CpuTimer, CudaTimer, Timer


@dataclass(frozen=True)
class Device:
    """`memory_bytes` bounds what the float64 reference may take; `threads` is None on a GPU."""

    kind: str
    torch_device: torch.device
    name: str
    timer: Timer
    memory_bytes: int
    handoff_us: float = 0.0
    on_chip_bytes: int = 0
    cache_bytes: int = 0
    threads: int | None = None


def find(kind: str, handoff_us: float | None = None) -> Device:
    """The device that suite `kind` ("cpu" or "gpu") runs on. Raises RuntimeError where there is none."""
    if kind == "cpu":
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return Device(
            kind="cpu",
            torch_device=torch.device("cpu"),
            name=_cpu_name(),
            timer=CpuTimer(),
            memory_bytes=memory // 4,
            cache_bytes=_cpu_cache_bytes(),
            threads=torch.get_num_threads(),
        )
    if not torch.cuda.is_available():
        raise RuntimeError(
            f"--suite gpu needs a GPU that torch {torch.__version__} can use, and it finds none; "
            "--suite cpu fits this machine"
        )
    properties = torch.cuda.get_device_properties(0)
    device = torch.device("cuda", 0)
    # Twice the cache, so that nothing of the call before survives.
    flushed = torch.empty(2 * properties.L2_cache_size, dtype=torch.uint8, device=device)
    # 64 Ki registers of 4 bytes: every NVIDIA GPU since Kepler.
    on_chip = properties.shared_memory_per_multiprocessor + 4 * 65536
    return Device(
        kind="gpu",
        torch_device=device,
        name=properties.name,
        timer=CudaTimer(flushed.zero_),
        memory_bytes=properties.total_memory // 4,
        handoff_us=HANDOFF_US if handoff_us is None else handoff_us,
        on_chip_bytes=on_chip,
    )


def measure(device: Device, dtype: str) -> Limits:
    """Measure the bandwidth of a large copy (read and write counted) and the rate of a large matrix product.

    The best of several tries: a limit is what the device can do, not what it did on average. On a CPU the
    tries are short and many, so that one falls between two turns of whatever else runs on the machine.
    """
    gpu = device.kind == "gpu"
    size = min(2 << 30, device.memory_bytes // 4) if gpu else 128 << 20
    source = torch.ones(size // 4, device=device.torch_device)
    target = torch.empty_like(source)
    copy_ms = min(device.timer.sample(lambda _: target.copy_(source), 16)[1:])

    n, tries = (8192, 8) if gpu else (512, 400)
    # Operands of TF32 have no more bits than those of fp16, which an implementation may take instead.
    tf32 = gpu and dtype == "fp32" and torch.backends.cuda.matmul.allow_tf32
    factors = TORCH_DTYPE["fp16" if tf32 else dtype]
    a, b = (torch.randn(n, n, device=device.torch_device).to(factors) for _ in range(2))
    product = torch.empty_like(a)
    device.timer.sample(lambda _: torch.mm(a, b, out=product), 2)
    product_ms = min(device.timer.sample(lambda _: torch.mm(a, b, out=product), tries))
    return Limits(
        bandwidth=2 * 4 * source.numel() / (copy_ms / 1e3),
        rate=2 * n**3 / (product_ms / 1e3),
        handoff_us=device.handoff_us,
        shared_us=SHARED_US if gpu else 0.0,
        on_chip_bytes=device.on_chip_bytes,
        cache_bytes=device.cache_bytes,
    )


def versions() -> dict[str, str]:
    """Versions of everything that has a part in a figure."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("tritlstm", "triton", "flashrnn", "torchrl"):
        if (version := installed(package)) is not None:
            found[package] = version
    if torch.version.cuda is not None:
        found["cuda"] = torch.version.cuda
    if torch.backends.cudnn.is_available():
        found["cudnn"] = str(torch.backends.cudnn.version())
    return found


def alive(device: Device) -> bool:
    """Whether the device still answers: after an illegal access every CUDA call of the process fails."""
    if device.kind == "cpu":
        return True
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def busy(device: Device) -> str | None:
    """On a CPU that has other work: what that does to the figures, and what helps."""
    cores = os.cpu_count() or 1
    load = os.getloadavg()[0]
    if device.kind == "gpu" or device.threads == 1 or load + (device.threads or 1) < cores + 1:
        return None
    return (
        f"Note: the load average is {load:.1f} on {cores} cores. Threads that wait for each other by "
        "spinning become many times slower then; OMP_WAIT_POLICY=passive, or --threads 1, is steadier."
    )


@contextmanager
def settings(device: Device) -> Iterator[None]:
    """Let matrix products use TF32 on a GPU, as cuDNN's LSTM does by default, so that all fp32 rows agree."""
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        if device.kind == "gpu":
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def _cpu_cache_bytes() -> int:
    """Size of the last-level cache; 64 MiB where the system does not tell, too much being the safe side."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text(encoding="ascii").strip()
        if text.endswith("K"):
            sizes.append(int(text[:-1]) << 10)
    return max(sizes, default=64 << 20)


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as info:
            for line in info:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
