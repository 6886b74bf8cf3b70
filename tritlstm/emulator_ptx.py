"""The emulator's PTX: runs the inline assembly of the kernels, of which Triton's interpreter knows nothing.

Every lane has its own place in the program, and at each turn those at the lowest place go on together: lanes that wait
in a loop do not keep the others from leaving it. It knows the instructions that the kernels use, no others.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Protocol

import numpy as np

__all__ = ["Cluster", "Instruction", "parse", "run"]

#: ``(addresses, mask, size)`` to the words of 4 or 8 bytes there; where the mask is false, anything.
Load = Callable[[np.ndarray, np.ndarray, int], np.ndarray]
#: ``(addresses, words, mask)``
Store = Callable[[np.ndarray, np.ndarray, np.ndarray], None]

_MAX = {"max.u32": np.maximum}
_COMPARE: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "ge": np.greater_equal
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Instruction:
    """``guard`` is a predicate's name with ``!`` before it if negated, or empty; ``target`` the place of a jump."""

    opcode: str
    operands: tuple[str, ...]
    guard: str = ""
    target: int = -1


@functools.lru_cache(maxsize=256)
def parse(text: str) -> tuple[Instruction, ...]:
    """The instructions of a block of PTX, one statement a semicolon; raises ValueError for a jump to nowhere."""
    statements: list[tuple[str, str, tuple[str, ...]]] = []
    labels: dict[str, int] = {}
    body = text.strip()
    if body.startswith("{"):
        body = body[1 : body.rindex("}")]
    for part in re.split(r";\s*", body):
        statement = part.strip()
        while found := re.match(r"(\w+):\s*", statement):
            labels[found.group(1)] = len(statements)
            statement = statement[found.end() :]
        if not statement or statement.startswith(".reg"):
            continue
        found = re.fullmatch(r"(?:@(!?\w+)\s+)?([\w.:]+)\s*(.*)", statement, re.S)
        if not found:
            raise ValueError(f"not a PTX statement: {statement!r}")
        guard, opcode, rest = found.groups()
        operands = tuple(operand.strip() for operand in re.split(r",(?![^{]*\})", rest) if operand.strip())
        statements.append((guard or "", opcode, operands))
    program = []
    for guard, opcode, operands in statements:
        target = -1
        if opcode == "bra":
            if operands[0] not in labels:
                raise ValueError(f"a jump to the unknown place {operands[0]!r}")
            target = labels[operands[0]]
        program.append(Instruction(opcode, operands, guard, target))
    return tuple(program)


class Cluster(Protocol):
    """The thread-block cluster that a program belongs to: ``memory`` and ``size`` are where its own shared memory lies,
    and its bytes; those of the others lie side by side with it, in the order of their ranks."""

    memory: int
    size: int
    rank: int

    def arrive(self) -> None: ...

    def wait(self) -> None: ...


class _Lanes:
    """Registers of all lanes: words as uint32 or uint64, addresses as uint64, predicates as bool."""

    def __init__(
        self, lanes: int, given: dict[str, np.ndarray], block: tuple[int, int], cluster: Cluster | None
    ) -> None:
        self.lanes = lanes
        self.registers = given
        self.block = block
        self.given_cluster = cluster

    @property
    def cluster(self) -> Cluster:
        if self.given_cluster is None:
            raise RuntimeError("PTX for a cluster in a launch without")
        return self.given_cluster

    def read(self, operand: str) -> np.ndarray:
        if operand in self.registers:
            return self.registers[operand]
        if operand.startswith("%ctaid."):
            return np.full(self.lanes, self.block["xy".index(operand[-1])], np.uint32)
        if operand == "global_smem":  # as Triton calls a block's shared memory
            return np.full(self.lanes, self.cluster.memory, np.uint64)
        if operand == "%dynamic_smem_size":
            return np.full(self.lanes, self.cluster.size, np.uint32)
        if re.fullmatch(r"-?\d+|0x[0-9A-Fa-f]+", operand):
            return np.full(self.lanes, int(operand, 0) & 0xFFFFFFFF, np.uint32)
        raise ValueError(f"PTX reads {operand}, which nothing has set")

    def write(self, name: str, value: np.ndarray, mask: np.ndarray) -> None:
        if mask.all():
            self.registers[name] = value
            return
        old = self.registers.get(name)
        if old is None or old.dtype != value.dtype:
            old = np.zeros(self.lanes, value.dtype)
        self.registers[name] = np.where(mask, value, old)

    def address(self, operand: str) -> np.ndarray:
        register, _, offset = operand[1:-1].partition("+")
        return self.read(register).astype(np.uint64) + np.uint64(int(offset or 0))


def run(
    program: tuple[Instruction, ...],
    registers: dict[str, np.ndarray],
    lanes: int,
    block: tuple[int, int],
    load: Load,
    store: Store,
    cluster: Cluster | None = None,
) -> dict[str, np.ndarray]:
    """Runs all lanes to the end. ``registers`` are the operands ``$n`` that the program reads; returns all registers.

    Raises RuntimeError where a lane traps, NotImplementedError for an instruction that is not known here.
    """
    state = _Lanes(lanes, dict(registers), block, cluster)
    place = np.zeros(lanes, np.int64)
    end = len(program)
    while (at := int(place.min())) < end:
        here = place == at
        instruction = program[at]
        active = here
        if instruction.guard:
            predicate = state.read(instruction.guard.lstrip("!"))
            active = here & (~predicate if instruction.guard.startswith("!") else predicate)
        place[here] += 1
        if not active.any():
            continue
        if instruction.opcode == "bra":
            place[active] = instruction.target
        elif instruction.opcode == "trap":
            raise RuntimeError("a lane of the inline PTX trapped")
        else:
            _execute(state, instruction, active, load, store)
    return state.registers


def _execute(state: _Lanes, instruction: Instruction, mask: np.ndarray, load: Load, store: Store) -> None:
    opcode, operands = instruction.opcode, instruction.operands
    kind = opcode.split(".")
    size = 8 if kind[-1] == "b64" else 4
    if kind[0] == "ld":
        address = state.address(operands[1])
        for n, name in enumerate(_names(operands[0])):
            state.write(name, load(address + np.uint64(size * n), mask, size), mask)
        return
    if kind[0] == "st":
        address = state.address(operands[0])
        for n, name in enumerate(_names(operands[1])):
            store(address + np.uint64(size * n), state.read(name), mask)
        return
    if opcode == "mov.b64" and operands[0].startswith("{"):
        low, high = _names(operands[0])
        word = state.read(operands[1])
        state.write(low, word.astype(np.uint32), mask)
        state.write(high, (word >> np.uint64(32)).astype(np.uint32), mask)
        return
    if opcode == "mov.b64" and operands[1].startswith("{"):
        halves = [state.read(name).astype(np.uint64) for name in _names(operands[1])]
        state.write(operands[0], halves[0] | halves[1] << np.uint64(32), mask)
        return
    if kind[0] == "prefetch":
        state.address(operands[0])
        return
    if kind[:2] == ["barrier", "cluster"]:
        if not mask.all():
            raise RuntimeError("not all lanes come to a barrier of the cluster together")
        (state.cluster.arrive if kind[2] == "arrive" else state.cluster.wait)()
        return
    if opcode == "mapa.shared::cluster.u64":
        ranks = state.read(operands[2]).astype(np.int64) - state.cluster.rank
        away = (ranks * state.cluster.size).astype(np.uint64)  # of ranks below, around 2^64
        state.write(operands[0], state.read(operands[1]) + away, mask)
        return
    sources = [state.read(operand) for operand in operands[1:]]
    state.write(operands[0], _value(opcode, kind, sources), mask)


def _names(vector: str) -> list[str]:
    return [name.strip() for name in vector.strip("{} ").split(",")]


def _value(opcode: str, kind: list[str], sources: list[np.ndarray]) -> np.ndarray:
    if kind[0] == "mov":
        return sources[0]
    if opcode in _MAX:
        return _MAX[opcode](*sources)
    if opcode in ("add.u32", "add.u64"):
        return sources[0] + sources[1]
    if opcode in ("sub.u32", "sub.u64"):
        return sources[0] - sources[1]
    if opcode == "cvt.u64.u32":
        return sources[0].astype(np.uint64)
    if opcode == "cvt.u32.u64":
        return sources[0].astype(np.uint32)
    if opcode in ("and.b32", "or.pred"):
        return sources[0] & sources[1] if kind[0] == "and" else sources[0] | sources[1]
    if opcode in ("selp.b32", "selp.b64"):
        return np.where(sources[2], sources[0], sources[1])
    if kind[0] == "setp":
        signed = {"s32": np.int32, "u32": np.uint32}[kind[-1]]
        left, right = (source.view(signed) for source in sources[:2])
        result = _COMPARE[kind[1]](left, right)
        return result & sources[2] if kind[2] == "and" else result
    if opcode == "cvt.rna.tf32.f32":  # to nearest, ties away from zero; no NaN, which might become infinite
        return (sources[0].view(np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
    if opcode == "ex2.approx.ftz.f32":
        with np.errstate(over="ignore"):
            return np.exp2(sources[0])
    if opcode == "rcp.approx.ftz.f32":
        with np.errstate(divide="ignore"):
            return np.float32(1.0) / sources[0]
    raise NotImplementedError(f"the emulator does not know the PTX instruction {opcode}")
