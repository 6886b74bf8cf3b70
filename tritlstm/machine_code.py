"""What a compiled kernel really does: its machine code (SASS, AMDGCN) and Triton's GPU IR, read back.

The claims that the library makes of its kernels (weights read once, h never read through a stale cache) are claims
about instructions, so they are checked on instructions: :class:`Code` finds the loops of the control flow and follows
every kernel parameter through the registers into the addresses of the loads. Nothing here runs a GPU.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import struct
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

__all__ = ["Access", "Code", "Instruction", "Resources", "amdgcn", "amdgcn_resources", "sass", "ttgir_reads"]


@dataclasses.dataclass(frozen=True)
class Resources:
    """Registers a thread, and bytes a thread of memory that stands in for registers."""

    registers: int
    spill_bytes: int


@dataclasses.dataclass(frozen=True)
class Instruction:
    """``opcode`` as it is written (``LDG.E.128``), ``operands`` as text; ``guard``: a predicate (``!P0``), or empty."""

    opcode: str
    operands: str
    guard: str = ""

    @property
    def guarded(self) -> bool:
        """Whether it is executed under a predicate only."""
        return bool(self.guard)

    @property
    def mnemonic(self) -> str:
        """The opcode without its modifiers: ``LDG``."""
        return self.opcode.split(".")[0]


@dataclasses.dataclass(frozen=True)
class Access:
    """A read or write of global memory: its instruction, the parameters its address is made of, where it stands."""

    instruction: Instruction
    parameters: frozenset[str]
    in_loop: bool

    @property
    def is_store(self) -> bool:
        """Whether it only writes."""
        return bool(re.match(r"STG?\b|\w+_store", self.instruction.opcode))

    @property
    def width(self) -> int:
        """Bytes a thread."""
        opcode = self.instruction.opcode
        amd = re.search(r"_(?:load|store)_(?:lds_)?(dword(?:x(\d+))?|[us]?short|[us]byte|b(\d+)|[ui](\d+))", opcode)
        if amd:
            kind, words, *bits = amd.groups()
            if kind.startswith("dword"):
                return 4 * int(words or 1)
            bit = next((b for b in bits if b), None)
            return int(bit) // 8 if bit else 2 if "short" in kind else 1
        for text, width in ((".128", 16), (".64", 8), (".U16", 2), (".S16", 2), (".U8", 1), (".S8", 1)):
            if text in opcode:
                return width
        return 4

    @property
    def coherent(self) -> bool:
        """Whether it goes past the caches that the thread blocks of a launch do not share."""
        if re.search("_(load|store)", self.instruction.opcode):
            # gfx942: sc0 and sc1 make the scope of the whole device; before, glc bypasses the first cache.
            return bool(re.search(r"\b(sc1|glc)\b", self.instruction.operands))
        return "STRONG" in self.instruction.opcode


@dataclasses.dataclass(frozen=True)
class _Effect:
    """Registers written, each from which registers and parameters, and the registers of an address in memory."""

    writes: tuple[tuple[str, tuple[str, ...], int], ...]
    address: tuple[str, ...] | None = None


_State = dict[str, int]


class Code:
    """The instructions of one kernel, their loops, and the parameters that reach each load.

    ``parameters`` are byte offsets in the kernel's argument block by name.
    """

    def __init__(
        self, instructions: list[Instruction], labels: Mapping[str, int], parameters: Mapping[str, int]
    ) -> None:
        self.instructions = instructions
        self.labels = labels
        self.names = list(parameters)
        self._bits = {offset: 1 << n for n, offset in enumerate(parameters.values())}

    def counts(self) -> Counter[str]:
        """How often each mnemonic stands in the code."""
        return Counter(instruction.mnemonic for instruction in self.instructions)

    # The two instruction sets differ in these three.

    def _successors(self, at: int) -> tuple[int, ...]:
        raise NotImplementedError

    def _effect(self, instruction: Instruction) -> _Effect:
        raise NotImplementedError

    def _calls(self) -> Iterable[tuple[int, int]]:
        """(call, first instruction of what it calls); the successors of a call leave that out."""
        return ()

    def _label(self, operands: str) -> int:
        for name in reversed(re.findall(r"[$.\w]+", operands)):
            if name in self.labels:
                return self.labels[name]
        raise ValueError(f"a jump to an unknown place: {operands!r}")

    @functools.cached_property
    def _edges(self) -> list[tuple[int, ...]]:
        end = len(self.instructions)
        return [tuple(s for s in self._successors(at) if s < end) for at in range(end)]

    @functools.cached_property
    def _flow(self) -> list[tuple[int, ...]]:
        """The edges, and those from calls to what is called: ptxas moves parts of the time loop out of line."""
        flow = list(self._edges)
        for call, entry in self._calls():
            flow[call] = (*flow[call], entry)
        return flow

    @functools.cached_property
    def in_loop(self) -> list[bool]:
        """Of each instruction, whether control can come back to it."""
        result = _on_a_cycle(self._edges)
        for call, entry in self._calls():
            if result[call]:
                for at in _reachable(self._edges, entry):
                    result[at] = True
        return result

    @functools.cached_property
    def accesses(self) -> list[Access]:
        """Every read and write of global memory; a parameter is part of an address if any path carries it there."""
        effects = [self._effect(instruction) for instruction in self.instructions]
        begins = self._blocks()
        block_of = {begin: n for n, begin in enumerate(begins)}
        spans = list(zip(begins, [*begins[1:], len(self.instructions)], strict=True))
        before: list[_State | None] = [None] * len(begins)
        before[0] = {}
        waiting = [0]
        while waiting:
            n = waiting.pop()
            state = dict(before[n] or {})
            begin, end = spans[n]
            for at in range(begin, end):
                self._step(state, effects[at], self.instructions[at])
            state = {register: bits for register, bits in state.items() if "@" not in register}
            for successor in self._flow[end - 1]:
                m = block_of[successor]
                known = before[m]
                if known is None:
                    before[m] = dict(state)
                    waiting.append(m)
                elif any(bits & ~known.get(register, 0) for register, bits in state.items()):
                    for register, bits in state.items():
                        known[register] = known.get(register, 0) | bits
                    waiting.append(m)
        found = []
        for n, (begin, end) in enumerate(spans):
            if before[n] is None:
                continue  # never reached
            state = dict(before[n] or {})
            for at in range(begin, end):
                address = effects[at].address
                if address is not None:
                    bits = 0
                    for register in address:
                        bits |= _bits(state, register, self.instructions[at].guard)
                    names = frozenset(name for i, name in enumerate(self.names) if bits >> i & 1)
                    found.append(Access(self.instructions[at], names, self.in_loop[at]))
                self._step(state, effects[at], self.instructions[at])
        return found

    @property
    def loads(self) -> list[Access]:
        """Every read of global memory."""
        return [access for access in self.accesses if not access.is_store]

    def reads(self, parameter: str) -> list[Access]:
        """The loads through a pointer parameter."""
        return [load for load in self.loads if parameter in load.parameters]

    def writes(self, parameter: str) -> list[Access]:
        """The stores through a pointer parameter."""
        return [access for access in self.accesses if access.is_store and parameter in access.parameters]

    def _blocks(self) -> list[int]:
        begins = {0, *self.labels.values()}
        for at, successors in enumerate(self._flow):
            if successors != (at + 1,):
                begins.update((at + 1, *successors))
        return sorted(begin for begin in begins if begin < len(self.instructions))

    @staticmethod
    def _step(state: _State, effect: _Effect, instruction: Instruction) -> None:
        guard = instruction.guard
        new = []
        for register, sources, bits in effect.writes:
            for source in sources:
                bits |= _bits(state, source, guard)
            new.append((register, bits))
        # What is known under a predicate holds until the predicate may have changed, and within a block.
        guarded = [known for known in state if "@" in known]
        for known in guarded:
            if known.partition("@")[2].lstrip("!") in instruction.operands:
                del state[known]
        for register, bits in new:
            for known in guarded:
                if known.startswith(f"{register}@"):
                    state.pop(known, None)
            if guard:
                state[f"{register}@{guard}"] = bits
                bits |= state.get(register, 0)
            if bits:
                state[register] = bits
            else:
                state.pop(register, None)


def _bits(state: _State, register: str, guard: str) -> int:
    """What a register is made of, for an instruction under ``guard``: after a write under the same, only that."""
    if guard and f"{register}@{guard}" in state:
        return state[f"{register}@{guard}"]
    return state.get(register, 0)


def _reachable(edges: list[tuple[int, ...]], begin: int) -> set[int]:
    seen, waiting = {begin}, [begin]
    while waiting:
        for successor in edges[waiting.pop()]:
            if successor not in seen:
                seen.add(successor)
                waiting.append(successor)
    return seen


def _on_a_cycle(edges: list[tuple[int, ...]]) -> list[bool]:
    """Tarjan's strongly connected components, without recursion: whether a node lies on a cycle."""
    order = [0] * len(edges)  # 0: not seen
    low = [0] * len(edges)
    open_nodes: list[int] = []
    is_open = [False] * len(edges)
    result = [False] * len(edges)
    count = 0
    for root in range(len(edges)):
        if order[root]:
            continue
        path = [(root, iter(edges[root]))]
        count += 1
        order[root] = low[root] = count
        open_nodes.append(root)
        is_open[root] = True
        while path:
            node, rest = path[-1]
            for successor in rest:
                if not order[successor]:
                    count += 1
                    order[successor] = low[successor] = count
                    open_nodes.append(successor)
                    is_open[successor] = True
                    path.append((successor, iter(edges[successor])))
                    break
                if is_open[successor]:
                    low[node] = min(low[node], order[successor])
            else:
                path.pop()
                if path:
                    low[path[-1][0]] = min(low[path[-1][0]], low[node])
                if low[node] == order[node]:
                    members = []
                    while True:
                        members.append(open_nodes.pop())
                        is_open[members[-1]] = False
                        if members[-1] == node:
                            break
                    if len(members) > 1 or node in edges[node]:
                        for member in members:
                            result[member] = True
    return result


# NVIDIA

_SASS_LINE = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
_SASS_LABEL = re.compile(r"^([$.\w]+):")
_SASS_REGISTER = re.compile(r"\bU?R\d+\b")
_SASS_DESTINATION = re.compile(r"^(U?R\d+)(?:\.\w+)?$")
_SASS_CONSTANT = re.compile(r"c\[0x0\]\[0x([0-9a-f]+)\]")
_SASS_PREDICATE = re.compile(r"^!?U?P(\d+|T|R)$")
#: Reads of global memory that put it into registers, and those that put it into shared memory.
_SASS_READS = ("LDG", "LD", "ATOM", "ATOMG")
_SASS_COPIES = ("LDGSTS", "UBLKCP", "UTMALDG")
_SASS_STORES = ("STG", "ST")
_SASS_WRITE_NOTHING = ("BAR", "BRA", "BRX", "JMP", "JMX", "CALL", "RET", "EXIT", "BSSY", "BSYNC", "FCHK")


class _Sass(Code):
    def __init__(
        self, instructions: list[Instruction], labels: Mapping[str, int], parameters: Mapping[str, int], base: int
    ) -> None:
        super().__init__(instructions, labels, parameters)
        self._constants = {base + offset + half: bit for offset, bit in self._bits.items() for half in (0, 4)}
        # BSSY says where the threads of its barrier go on after their BSYNC; barriers are used again and again.
        self._reconverge: dict[int, int] = {}
        places: dict[str, int] = {}
        for at, instruction in enumerate(instructions):
            barrier = instruction.operands.split(",")[0]
            if instruction.mnemonic == "BSSY":
                places[barrier] = self._label(instruction.operands)
            elif instruction.mnemonic == "BSYNC" and barrier in places:
                self._reconverge[at] = places[barrier]

    def _calls(self) -> Iterable[tuple[int, int]]:
        for at, instruction in enumerate(self.instructions):
            if instruction.mnemonic == "CALL":
                yield at, self._label(instruction.operands)

    def _successors(self, at: int) -> tuple[int, ...]:
        instruction = self.instructions[at]
        name = instruction.mnemonic
        if name in ("BRX", "JMX", "BRXU"):
            raise ValueError(f"cannot follow the indirect jump {instruction.opcode} {instruction.operands}")
        if name in ("BRA", "JMP"):
            # A predicate stands before the opcode, or among the operands (BRA P5; BRA.U UP0; BRA.DIV UR4).
            always = not instruction.guarded and re.match(r"^`", instruction.operands)
            target = self._label(instruction.operands)
            return (target,) if always else (at + 1, target)
        if name == "BSYNC":
            return tuple({at + 1, self._reconverge.get(at, at + 1)})
        # A trap aborts the launch: what stands behind it is somebody else's code.
        if (name in ("EXIT", "RET") or instruction.opcode == "BPT.TRAP") and not instruction.guarded:
            return ()
        return (at + 1,)

    def _effect(self, instruction: Instruction) -> _Effect:
        operands = _split(instruction.operands)
        name = instruction.mnemonic
        address = None
        if name in _SASS_READS + _SASS_COPIES + _SASS_STORES:
            text = re.sub(r"desc\[[^]]*\]", "", instruction.operands)
            brackets = " ".join(re.findall(r"\[[^]]*\]", text))
            address = tuple(_SASS_REGISTER.findall(brackets))
        if name in ("STL", "LDL"):
            return self._spill(instruction, operands)
        destination = None
        if "SETP" not in name and name not in _SASS_WRITE_NOTHING:
            for operand in operands:
                if not _SASS_PREDICATE.match(operand) and operand not in ("UPR", "PR"):
                    found = _SASS_DESTINATION.match(operand)
                    destination = found and found.group(1)
                    break
        if not destination:
            return _Effect((), address)
        prefix, first = re.match(r"(U?R)(\d+)", destination).groups()  # type: ignore[union-attr]
        written = [f"{prefix}{int(first) + n}" for n in range(_sass_width(instruction))]
        if address is not None:
            return _Effect(tuple((register, (), 0) for register in written), address)
        offsets = [int(offset, 16) for offset in _SASS_CONSTANT.findall(instruction.operands)]
        if name in ("LDC", "ULDC", "LDCU"):
            parts = [offsets[0] + 4 * n if offsets else -1 for n in range(len(written))]
            return _Effect(
                tuple((r, (), self._constants.get(o, 0)) for r, o in zip(written, parts, strict=True))
            )
        bits = 0
        for offset in offsets:
            bits |= self._constants.get(offset, 0)
        after = operands[operands.index(next(o for o in operands if o.startswith(destination))) + 1 :]
        sources = tuple(_SASS_REGISTER.findall(" ".join(after)))
        return _Effect(tuple((register, sources, bits) for register in written))


    @staticmethod
    def _spill(instruction: Instruction, operands: list[str]) -> _Effect:
        """A register's way to the stack and back, by its place there."""
        slot, register = operands if instruction.mnemonic == "STL" else operands[::-1]
        place = re.search(r"\[\w+(?:\+(-?0x[0-9a-f]+))?\]", slot)
        found = _SASS_DESTINATION.match(register)
        if not place or not found:
            return _Effect(())
        offset = int(place.group(1) or "0", 16)
        prefix, first = re.match(r"(U?R)(\d+)", found.group(1)).groups()  # type: ignore[union-attr]
        writes = []
        for n in range(_sass_width(instruction)):
            pair = f"[{offset + 4 * n}]", f"{prefix}{int(first) + n}"
            to, source = pair if instruction.mnemonic == "STL" else pair[::-1]
            writes.append((to, (source,), 0))
        return _Effect(tuple(writes))


def _sass_width(instruction: Instruction) -> int:
    opcode = instruction.opcode
    if ".128" in opcode or instruction.mnemonic == "HMMA":
        return 4
    if ".64" in opcode or ".WIDE" in opcode or opcode == "CS2R" or instruction.mnemonic in ("FADD2", "FMUL2", "FFMA2"):
        return 2
    return 1


def _split(operands: str) -> list[str]:
    """At the commas outside of brackets."""
    return [part.strip() for part in re.split(r",(?![^\[]*\])", operands)] if operands else []


def nvidia_tool(name: str) -> str:
    """Path of a program of the CUDA toolkit that Triton's wheel carries."""
    import triton

    return os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", name)


def sass(cubin: bytes, kernel: str, parameters: Mapping[str, int]) -> tuple[Code, Resources]:
    """Disassembles a cubin. ``parameters`` are offsets by name, counted from the first parameter."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        usage = _output(nvidia_tool("cuobjdump"), "--dump-resource-usage", path)
        text = _output(nvidia_tool("nvdisasm"), "-c", path)
    code = parse_sass(text, parameters, _parameter_base(cubin, kernel))
    stack = max(int(size) for size in re.findall(r"(?:STACK|LOCAL):(\d+)", usage))
    if not stack and any(i.mnemonic in ("LDL", "STL") for i in code.instructions):
        stack = 4
    return code, Resources(int(re.findall(r"REG:(\d+)", usage)[-1]), stack)


def parse_sass(text: str, parameters: Mapping[str, int], base: int) -> Code:
    """``nvdisasm -c``'s text; ``base`` is where the parameters begin in the constant bank."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        found = _SASS_LINE.match(line)
        if found:
            guard, opcode, operands = found.groups()
            instructions.append(Instruction(opcode, operands, guard if guard not in (None, "PT", "UPT") else ""))
            continue
        label = _SASS_LABEL.match(line)
        if label:
            labels[label.group(1)] = len(instructions)
    if not instructions:
        raise ValueError("no instruction in the disassembly")
    return _Sass(instructions, labels, parameters, base)


def _output(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _parameter_base(cubin: bytes, kernel: str) -> int:
    """Where the parameters begin in constant bank 0: attribute PARAM_CBANK of the section .nv.info.KERNEL."""
    section = _elf_section(cubin, f".nv.info.{kernel}")
    at = 0
    while at + 4 <= len(section):
        form, attribute, value = struct.unpack_from("<BBH", section, at)
        at += 4
        if form == 4:  # a sized value follows; otherwise the two bytes are the value
            if attribute == 0x0A:
                return struct.unpack_from("<IHH", section, at)[1]
            at += value
    raise ValueError(f"the cubin does not say where the parameters of {kernel} lie")


def _elf_section(elf: bytes, name: str) -> bytes:
    (table,) = struct.unpack_from("<Q", elf, 0x28)
    entry, count, names = struct.unpack_from("<HHH", elf, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", elf, table + n * entry) for n in range(count)]
    strings = headers[names][4]
    for title, _, _, _, offset, size in headers:
        begin = strings + title
        if elf[begin : elf.index(b"\0", begin)].decode() == name:
            return elf[offset : offset + size]
    raise ValueError(f"no section {name} in the cubin")


# AMD

_AMD_LINE = re.compile(r"^\s+([a-z]\w+)(?:\s+(.*?))?\s*(?:;.*)?$")
_AMD_LABEL = re.compile(r"^([.$\w]+):")
_AMD_REGISTER = re.compile(r"\b([asv])(?:\[(\d+):(\d+)\]|(\d+)\b)")
_AMD_WRITE_NOTHING = re.compile(
    r"s_(cmp|bitcmp|cbranch|branch|waitcnt|barrier|nop|endpgm|setprio|sleep|setreg)|ds_write|buffer_(wb|inv)|\w+_store"
)
_AMD_READ = re.compile(r"(global|flat|buffer)_load|s_(buffer_)?load")
_AMD_STORE = re.compile(r"(global|flat|buffer)_store")
_AMD_CARRY = re.compile(r"v_(mad_[ui]64_[ui]32|(add|sub|subrev)[cb]?_co_u32|div_scale_)")
_AMD_SUM = re.compile(r"v_(mad_[ui]64_[ui]32|lshl_add_u64)")
#: An operation on instructions, not on numbers: needs a way to follow it that this reader has not.
_AMD_INDIRECT = ("s_setpc_b64", "s_swappc_b64")


class _Amdgcn(Code):
    def __init__(
        self, instructions: list[Instruction], labels: Mapping[str, int], parameters: Mapping[str, int]
    ) -> None:
        super().__init__(instructions, labels, parameters)
        first = next((i for i in instructions if i.opcode.startswith("s_load_")), None)
        self._arguments = _split(first.operands)[1] if first else ""  # the registers with the arguments' address

    def _successors(self, at: int) -> tuple[int, ...]:
        instruction = self.instructions[at]
        if instruction.opcode in _AMD_INDIRECT:
            raise ValueError(f"cannot follow the indirect jump {instruction.opcode} {instruction.operands}")
        if instruction.opcode == "s_endpgm":
            return ()
        if instruction.opcode == "s_branch":
            return (self._label(instruction.operands),)
        if instruction.opcode.startswith("s_cbranch"):
            return (at + 1, self._label(instruction.operands))
        return (at + 1,)

    def _effect(self, instruction: Instruction) -> _Effect:
        name = instruction.opcode
        operands = _split(instruction.operands)
        if name.startswith("s_load_") and operands[1] == self._arguments:
            offset = int(operands[2], 0)
            parts = enumerate(_amd_registers(operands[0]))
            return _Effect(tuple((r, (), self._argument(offset + 4 * n)) for n, r in parts))
        if name == "v_writelane_b32":
            lane = f"{operands[0]}.{operands[2]}"
            return _Effect(((lane, _amd_registers(operands[1]), 0),))
        if name == "v_readlane_b32":
            return _Effect(((operands[0], (f"{operands[1]}.{operands[2]}",), 0),))
        if _AMD_READ.match(name):
            to_shared = "_lds" in name or " lds" in instruction.operands
            rest = operands if to_shared else operands[1:]
            writes = () if to_shared else tuple((r, (), 0) for r in _amd_registers(operands[0]))
            return _Effect(writes, _amd_registers(" ".join(rest)))
        if _AMD_STORE.match(name):
            # A buffer store names its data first; of the others, an address of two registers or an offset.
            address = operands[1:] if name.startswith("buffer") else [operands[0], *operands[2:]]
            return _Effect((), _amd_registers(" ".join(address)))
        if _AMD_WRITE_NOTHING.match(name) or not operands:
            return _Effect(())
        # Some have a second result, a carry for each lane.
        results = 2 if _AMD_CARRY.match(name) else 1
        sources = _amd_registers(" ".join(operands[results:]))
        carries = tuple((register, (), 0) for register in _amd_registers(" ".join(operands[1:results])))
        written = _amd_registers(operands[0])
        if _AMD_SUM.match(name) and len(written) == 2:
            # The lower half of a sum is one of lower halves; an upper half that nobody uses may hold anything.
            lower = tuple(r for operand in operands[results:] for r in _amd_registers(operand)[:1])
            return _Effect(((written[0], lower, 0), (written[1], sources, 0), *carries))
        return _Effect(tuple((register, sources, 0) for register in written) + carries)

    def _argument(self, offset: int) -> int:
        return self._bits.get(offset, 0) | self._bits.get(offset - 4, 0) if offset % 8 in (0, 4) else 0


def _amd_registers(text: str) -> tuple[str, ...]:
    registers: list[str] = []
    for kind, begin, end, one in _AMD_REGISTER.findall(text):
        numbers = range(int(begin), int(end) + 1) if begin else (int(one),)
        registers.extend(f"{kind}{n}" for n in numbers)
    return tuple(registers)


def amdgcn(text: str, parameters: Mapping[str, int]) -> Code:
    """Reads a kernel's AMDGCN assembly, as LLVM prints it."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if line.startswith((".Lfunc_end", "\t.section")):
            break
        label = _AMD_LABEL.match(line)
        if label:
            labels[label.group(1)] = len(instructions)
            continue
        found = _AMD_LINE.match(line)
        if found:
            instructions.append(Instruction(found.group(1), found.group(2) or ""))
    if not instructions:
        raise ValueError("no instruction in the assembly")
    return _Amdgcn(instructions, labels, parameters)


def amdgcn_resources(text: str) -> Resources:
    """Vector registers, and bytes a lane of scratch memory; scalars parked in vector registers are no spill."""

    def field(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", text)
        return int(found.group(1)) if found else 0

    spilled = max(field("private_segment_fixed_size"), 4 * field("vgpr_spill_count"))
    return Resources(field("vgpr_count"), spilled)


# Triton's GPU IR

#: What a pointer may go through and stay one; any other operation on it is a use of the memory.
_POINTER_ARITHMETIC = re.compile(
    r"tt\.(splat|broadcast|addptr|expand_dims|reshape|trans|bitcast|int_to_ptr|ptr_to_int)$|ttg\.convert_layout$|"
    r"arith\.\w+$|scf\.\w+$|cf\.\w+$|ub\.\w+$|tt\.(return|assert|print)$"
)
_IR_OPERATION = re.compile(r"^\s*(?:([%\w:, ]+?)\s*=\s*)?\"?([a-z_]\w*\.[\w.]+)\"?(.*)")
_IR_CARRIED = re.compile(r"(%[\w]+) = (%[\w#]+)")


def ttgir_reads(ttgir: str, parameter: str) -> tuple[int, int]:
    """How many operations use the memory behind a pointer parameter: (outside of every loop, inside of one)."""
    lines = [line.split(" loc(")[0] for line in ttgir.splitlines()]
    derived = {f"%{parameter}"}
    while True:  # values carried from one turn of a loop to the next are known one pass later
        uses, grown = _pass_over(lines, set(derived))
        if grown == derived:
            return uses
        derived = grown


def _pass_over(lines: list[str], derived: set[str]) -> tuple[tuple[int, int], set[str]]:
    outside = inside = depth = 0
    loops: list[tuple[int, list[str]]] = []  # depth at which it began, what it defines
    regions: list[tuple[int, list[str]]] = []  # the same of every scf operation, for the values it yields
    for line in lines:
        found = _IR_OPERATION.match(line)
        if found:
            results, operation, rest = found.groups()
            named = [name.split(":")[0] for name in re.findall(r"%\w+(?::\d+)?", results or "")]
            used = {name.split("#")[0] for name in re.findall(r"%[\w#]+", rest)}
            if operation in ("scf.for", "scf.while"):
                loops.append((depth, named))
                for inner, outer in _IR_CARRIED.findall(rest):
                    if outer.split("#")[0] in derived:
                        derived.update((inner, *named))
            elif operation in ("scf.yield", "scf.condition"):
                if used & derived and regions:
                    derived.update(regions[-1][1])
            elif used & derived and operation != "tt.func":
                if _POINTER_ARITHMETIC.match(operation):
                    derived.update(named)
                elif loops:
                    inside += 1
                else:
                    outside += 1
            if operation in ("scf.for", "scf.while", "scf.if"):
                carried = [inner for inner, _ in _IR_CARRIED.findall(rest)]
                regions.append((depth, named + carried))
        depth += line.count("{") - line.count("}")
        while loops and depth <= loops[-1][0]:
            loops.pop()
        while regions and depth <= regions[-1][0]:
            regions.pop()
    return (outside, inside), derived


def ttgir_count(ttgir: str, operation: str, depth: int) -> int:
    """How often an operation stands inside at least ``depth`` loops."""
    count = braces = 0
    loops: list[int] = []
    for line in ttgir.splitlines():
        code = line.split(" loc(")[0]
        if len(loops) >= depth and re.search(rf"\b{re.escape(operation)}\b", code):
            count += 1
        if re.search(r"\bscf\.(for|while)\b", code):
            loops.append(braces)
        braces += code.count("{") - code.count("}")
        while loops and braces <= loops[-1]:
            loops.pop()
    return count


def ttgir_scattered(ttgir: str, mark: str, run: int) -> list[str]:
    """Layouts of the inline assembly that contains ``mark`` in which a thread does not hold runs of ``run`` elements.

    Such assembly is given several elements at a time, and relies on their being neighbours.
    """
    layouts = dict(re.findall(r"^(#\w+) = (#ttg\.\w+<.*>)$", ttgir, re.M))
    found = []
    for line in ttgir.splitlines():
        if "tt.elementwise_inline_asm" not in line or mark not in line:
            continue
        used = re.findall(r"tensor<[\dx]+\w+, (#\w+)>", line.split(" loc(")[0])
        layout = layouts.get(used[-1], "") if used else ""
        if not _has_runs(layout, run):
            found.append(layout or "none")
    return found


def _has_runs(layout: str, run: int) -> bool:
    blocked = re.match(r"#ttg\.blocked<\{sizePerThread = \[([\d, ]+)\].*order = \[(\d+)", layout)
    if blocked:
        sizes = [int(size) for size in blocked.group(1).split(",")]
        return int(blocked.group(2)) == len(sizes) - 1 and sizes[-1] % run == 0
    linear = re.match(r"#ttg\.linear<\{register = (\[.*?\]\])", layout)
    if linear:
        bases = [[int(n) for n in basis.split(",")] for basis in re.findall(r"\[([\d, ]+)\]", linear.group(1))]
        steps = [1 << bit for bit in range(run.bit_length() - 1)]
        return [b[-1] for b in bases[: len(steps)]] == steps and not any(any(b[:-1]) for b in bases[: len(steps)])
    return False
