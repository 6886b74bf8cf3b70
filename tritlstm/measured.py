"""The numbers of the planner's cost model, and the files that correct them by measurement.

A file holds what was fitted on one GPU (`tritlstm bench --calibrate` writes it)::

    {"device": "NVIDIA H100 80GB HBM3", "arch": "sm_90", "date": "2026-11-25",
     "versions": {"torch": "...", "triton": "...", "driver": "..."},
     "constants": {"flag_us": ..., ...},
     "fit": {"timings": ..., "median_error": ..., "largest_error": ...}}

`constants` has fields of :class:`Constants` and of `RATES`; what it leaves out keeps the value of the data sheet. `fit`
says how well the predictions then agree with the timings, and may be left out. The first file that there is counts:

1. `TRITLSTM_MEASURED`: a file, a folder of such files, or `none` for the data sheet;
2. the user's folder, `$XDG_CONFIG_HOME/tritlstm` or `~/.config/tritlstm`;
3. the folder `measurements` of this package.

In a folder the file is named after the device: lower case, other characters than letters and digits as one hyphen.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from datetime import date
from pathlib import Path
from typing import Any

__all__ = ["DATA_SHEET", "RATES", "VARIABLE", "Constants", "MeasuredError", "Measurement", "file_name", "find", "read"]

VARIABLE = "TRITLSTM_MEASURED"
PACKAGED = Path(__file__).parent / "measurements"


# Compared by identity: a plan is looked up by its device in every call, and a device has one such object.
@dataclasses.dataclass(frozen=True, eq=False)
class Constants:
    """Times in µs and rates of the cost model. Where no source is named: an estimate that waits for a measurement."""

    flag_us: float = 0.14  # data that carries its own flag, two blocks on one GPU; see kernels/README.md
    counter_us: float = 1.00  # counter barrier of 132 blocks on an H100
    l2_latency_us: float = 0.17  # intercept of "8, 16, 24 KB from L2 to shared memory in 0.30, 0.50, 0.58 µs" (H100)
    sm_l2_bytes_per_us: float = 57e3  # slope of the same
    cell_us: float = 0.15  # forward: gates, cell, stores
    grad_us: float = 0.15  # backward: the same
    parts_us: float = 0.15  # backward: what the second hand-off takes longer than the first
    cluster_us: float = 0.20  # backward: the second hand-off where a team is a cluster, but for its bytes
    cluster_bytes_per_us: float = 24.8e3  # of them; 3.27 TB/s in clusters of two (arXiv 2402.13499) over 132 SMs
    turn_us: float = 0.05  # a single block: a product's operand to shared memory and its result back
    fence_us: float = 0.04  # between the products of two chunks: the wait for the first and a fence
    launch_us: float = 5.0
    source: str = "data-sheet rates and estimates"
    #: Where measured values came from; None: none of these is measured on this device.
    measurement: Measurement | None = None

    def __str__(self) -> str:
        if self.measurement is None:
            return f"{self.source}; nothing measured on this device"
        return str(self.measurement)


#: Fields of `plan.Device` that a file may correct.
RATES = ("clock_ghz", "l2_bytes_per_us", "memory_bytes_per_us")
NAMES = (*(f.name for f in dataclasses.fields(Constants) if f.name not in ("source", "measurement")), *RATES)
DATA_SHEET = Constants()
#: Of the SMs of an H100 and an H200: fitted to 181 kernels on an H200 (kernels/README.md, section 4).
HOPPER = Constants(flag_us=0.40, l2_latency_us=0.108, sm_l2_bytes_per_us=46.7e3, cell_us=0.524, grad_us=0.266,
                   parts_us=0.764, turn_us=0.25, fence_us=0.0037,
                   source="data-sheet rates and constants fitted to an H200 on 2026-11-27")  # fmt: skip


class MeasuredError(ValueError):
    """A file of measured constants can't be used."""


@dataclasses.dataclass(frozen=True)
class Measurement:
    """What a file says."""

    device: str
    arch: str
    date: str
    versions: dict[str, str]
    constants: dict[str, float]
    path: str = ""
    fit: dict[str, float] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        return (
            f"measured on {self.device} on {self.date} ({versions}): {', '.join(self.constants)}; "
            f"the rest from the data sheet ({self.path})"
        )

    def apply(self, device: Any) -> Any:
        """A `plan.Device` with the measured values in the place of the data sheet's."""
        own: Any = {name: value for name, value in self.constants.items() if name not in RATES}
        rates: Any = {name: value for name, value in self.constants.items() if name in RATES}
        constants: Any = dataclasses.replace(device.constants, **own, measurement=self)
        return dataclasses.replace(device, constants=constants, **rates)

    def write(self, path: Path) -> None:
        content = {k: v for k, v in dataclasses.asdict(self).items() if k != "path" and (k != "fit" or v)}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def file_name(device: str) -> str:
    """Name of a device's file in a folder."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + ".json"


def user_folder() -> Path:
    """Where `tritlstm bench --calibrate` writes to."""
    base = os.environ.get("XDG_CONFIG_HOME")
    return (Path(base) if base else Path.home() / ".config") / "tritlstm"


def find(device: Any) -> Measurement | None:
    """What was measured on this `plan.Device`; None: the data sheet counts. Raises MeasuredError."""
    asked, name = os.environ.get(VARIABLE, ""), file_name(device.name)
    if asked == "none":
        return None
    if asked:
        path = Path(asked)
        if not path.exists():
            raise MeasuredError(f"{VARIABLE}={asked} does not exist; name a file, a folder, or none")
        folders = [path] if path.is_dir() else []
        paths = [folder / name for folder in folders] or [path]
    else:
        paths = [user_folder() / name, PACKAGED / name]
    for path in paths:
        if path.exists():
            found = read(path)
            if (found.device, found.arch) != (device.name, device.arch):
                raise MeasuredError(
                    f"{path} was measured on {found.device} ({found.arch}), but this device is {device.name} "
                    f"({device.arch}); {_REMEDY}"
                )
            return found
    return None


_REMEDY = f"measure it anew by tritlstm bench --calibrate, or set {VARIABLE}=none"


def read(path: Path) -> Measurement:
    """Read and check a file. Raises MeasuredError with what is wrong in it."""

    def refuse(words: str) -> MeasuredError:
        return MeasuredError(f"{path}: {words}; {_REMEDY}")

    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise refuse(f"can't be read as JSON ({error})") from error
    if not isinstance(content, dict):
        raise refuse(f"must hold an object, got {type(content).__name__}")
    kinds = {"device": str, "arch": str, "date": str, "versions": dict, "constants": dict, "fit": dict}
    if unknown := sorted(content.keys() - kinds.keys()):
        raise refuse(f"unknown key {unknown[0]!r}; there are {', '.join(kinds)}")
    for key, kind in kinds.items():
        if key not in content and key != "fit":
            raise refuse(f"{key!r} is missing")
        if not isinstance(content.get(key, {} if key == "fit" else None), kind):
            raise refuse(f"{key!r} must be {_KINDS[kind]}, got {content[key]!r}")
    try:
        date.fromisoformat(content["date"])
    except ValueError as error:
        raise refuse(f"'date' must be a date such as 2026-11-25, got {content['date']!r}") from error
    for name, version in content["versions"].items():
        if not isinstance(version, str):
            raise refuse(f"version of {name!r} must be a string, got {version!r}")
    if missing := [name for name in ("torch", "triton", "driver") if name not in content["versions"]]:
        raise refuse(f"'versions' lacks {missing[0]!r}")
    for name, value in content["constants"].items():
        if name not in NAMES:
            raise refuse(f"unknown constant {name!r}; there are {', '.join(NAMES)}")
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or value <= 0:
            raise refuse(f"constant {name!r} must be a positive number, got {value!r}")
    for name, value in content.get("fit", {}).items():
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise refuse(f"{name!r} of 'fit' must be a number, got {value!r}")
    constants = {name: float(value) for name, value in content["constants"].items()}
    return Measurement(**{**content, "constants": constants}, path=str(path))


_KINDS = {str: "a string", dict: "an object"}
