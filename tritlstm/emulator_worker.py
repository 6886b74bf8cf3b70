"""The emulator's worker: Triton in interpreter mode, and a forked process for each program of a launch."""

from __future__ import annotations

import ctypes
import inspect
import itertools
import mmap
import os
import random
import signal
import sys
import time
import traceback
import types
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

from tritlstm import emulator_ptx
from tritlstm.kernels import exchange
from tritlstm.kernels.launch import KERNELS, kernel_function

DTYPES = {
    "float32": tl.float32,
    "float16": tl.float16,
    "bfloat16": tl.bfloat16,
    "int32": tl.int32,
    "int64": tl.int64,
}


#: Words of the inline PTX by their size in bytes.
WORDS = {4: tl.int32, 8: tl.int64}
#: For the arguments of a store after self, pointers, value and mask.
NO_POLICY = (None,) * (len(inspect.signature(interpreter.InterpreterBuilder.create_masked_store).parameters) - 4)
#: Between two looks of a poll.
POLL_S = 200e-6
#: For one look of a poll.
NO_TIME = interpreter.TensorHandle(np.zeros(1, np.uint64), tl.uint64)


def boolean(mask):
    """Triton 3.9's interpreter gives comparisons integers, and its loads refuse them."""
    return mask if mask.data.dtype == np.bool_ else interpreter.TensorHandle(mask.data.astype(np.bool_), tl.int1)


def bf16_to_float32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def float32_to_bf16(values: np.ndarray) -> np.ndarray:
    """To nearest, ties to even, as the GPU converts; every NaN becomes the canonical one."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FFF, rounded).astype(np.uint16)


class Cluster:
    """Programs next to each other in the grid's first dimension, with shared memory of their own in the arena.

    ``meetings`` points to a word for each of them: how often it has arrived at the barrier.
    """

    def __init__(self, memory: int, size: int, rank: int, meetings: int, blocks: int, patience_s: float) -> None:
        self.memory, self.size, self.rank = memory, size, rank
        self.arrived = np.ctypeslib.as_array((ctypes.c_uint32 * blocks).from_address(meetings))
        self.patience_s = patience_s

    @classmethod
    def of(cls, request: dict[str, Any], program: tuple[int, ...], address: int) -> Cluster | None:
        blocks, size, memory, meetings = request["cluster"]
        if blocks == 1:
            return None
        (x, y, z), (columns, rows, _) = _whole(program), _whole(request["grid"], 1)
        place = (z * rows + y) * columns + x
        # On a GPU a block that has ended no longer has to arrive.
        patience_s = 1e9 if request["emulation"]["fault"] is None else 1.0
        first = place - x % blocks
        own = address + memory + place * size
        return cls(own, size, x % blocks, address + meetings + 4 * first, blocks, patience_s)

    def arrive(self) -> None:
        self.arrived[self.rank] += 1

    def wait(self) -> None:
        begin = time.monotonic()
        while (self.arrived < self.arrived[self.rank]).any() and time.monotonic() - begin < self.patience_s:
            time.sleep(POLL_S)


class Builder(interpreter.InterpreterBuilder):
    """The interpreter's builder with a right bf16 dot and rounding, fair spinning, delays and faults."""

    def configure(self, emulation: dict[str, Any], program: tuple[int, ...], cluster: Cluster | None = None) -> None:
        self.cluster = cluster
        self.delays = emulation["delays"]
        self.random = random.Random(f"{emulation['seed']}-{program}")
        self.block = program[0], program[1]
        fault = emulation["fault"]
        mine = fault is not None and _whole(fault["program"]) == _whole(program)
        self.fault = fault if mine else None
        self.stores = 0

    def _pause(self) -> bool:
        if self.delays is None or self.random.random() >= self.delays["probability"]:
            return False
        time.sleep(self.random.random() * self.delays["longest_s"])
        return True

    def cast_impl(self, src, dst_type):
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
            # The interpreter cuts the low bits off.
            return interpreter.TensorHandle(float32_to_bf16(src.data), tl.bfloat16)
        return super().cast_impl(src, dst_type)

    def create_fp_to_fp(self, src, dst_type, rounding_mode):
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
            return self.cast_impl(src, dst_type)
        return super().create_fp_to_fp(src, dst_type, rounding_mode)

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        operands = []
        for operand in (a, b):
            is_bf16 = operand.dtype.scalar == tl.bfloat16
            values = bf16_to_float32(operand.data) if is_bf16 else operand.data.astype(np.float32)
            if str(input_precision).endswith("TF32"):
                # As the matrix unit reads it: the low bits are cut off. It leaves those of other types alone.
                values = (values.view(np.uint32) & ~np.uint32(0x1FFF)).view(np.float32)
            operands.append(values)
        product = np.matmul(*operands) + d.data
        return interpreter.TensorHandle(product.astype(d.data.dtype), d.dtype.scalar)

    # `policy`: how the caches are used, in one argument or two as Triton's versions have it.

    def create_masked_load(self, ptrs, mask, other, *policy_and_volatile):
        if policy_and_volatile[-1]:
            # A spinning program must not keep the one it waits for off the processor.
            os.sched_yield()
            self._pause()
        return super().create_masked_load(ptrs, boolean(mask), other, *policy_and_volatile)

    def create_masked_store(self, ptrs, value, mask, *policy):
        if self.fault is not None and self.stores >= self.fault["store"]:
            if self.fault["kind"] == "kill":
                os._exit(77)
            os.kill(os.getpid(), signal.SIGSTOP)
        self.stores += 1
        mask = boolean(mask)
        if self.delays is not None and mask.data.size > 1:
            first = np.random.default_rng(self.random.getrandbits(32)).random(mask.data.shape) < 0.5
            part = interpreter.TensorHandle(mask.data & first, mask.dtype)
            super().create_masked_store(ptrs, value, part, *policy)
            self._pause()
            mask = interpreter.TensorHandle(mask.data & ~first, mask.dtype)
        return super().create_masked_store(ptrs, value, mask, *policy)

    def create_inline_asm(self, asm, constraints, values, kinds, is_pure, pack):
        """Each lane runs the assembly once, on ``pack`` elements that lie side by side in the last dimension."""
        shape = values[0].data.shape
        lanes = values[0].data.size // pack
        registers: dict[str, np.ndarray] = {}
        position = len(kinds) * pack
        for value in values:
            numbers = np.ascontiguousarray(value.data).reshape(lanes, pack)
            if numbers.dtype.kind in "iu":
                numbers = numbers.view(f"u{numbers.dtype.itemsize}")
            for n in range(pack):
                registers[f"${position + n}"] = numbers[:, n]
            position += pack
        program = emulator_ptx.parse(asm)
        after = emulator_ptx.run(
            program, registers, lanes, self.block, self._load_words, self._store_words, self.cluster
        )
        results = []
        for n, kind in enumerate(kinds):
            columns = [after[f"${n * pack + part}"] for part in range(pack)]
            data = np.stack(columns, axis=-1).reshape(shape)
            element = kind.scalar
            if element in (tl.int32, tl.int64):
                data = data.view(f"i{data.dtype.itemsize}")
            elif element == tl.float32:
                data = data.view(np.float32)
            results.append(interpreter.TensorHandle(data, element))
        return types.SimpleNamespace(get_result=lambda n: results[n])

    def _load_words(self, addresses, mask, size):
        pointers = interpreter.TensorHandle(addresses, tl.pointer_type(WORDS[size]))
        mask = interpreter.TensorHandle(mask, tl.int1)
        return self.create_masked_load(pointers, mask, None, *NO_POLICY, True).data.view(f"u{size}")

    def _store_words(self, addresses, words, mask):
        size = words.dtype.itemsize
        pointers = interpreter.TensorHandle(addresses, tl.pointer_type(WORDS[size]))
        value = interpreter.TensorHandle(words.view(f"i{size}"), WORDS[size])
        self.create_masked_store(pointers, value, interpreter.TensorHandle(mask, tl.int1), *NO_POLICY)

    def create_atomic_rmw(self, rmwOp, ptr, val, mask, sem, scope):
        os.sched_yield()
        self._pause()
        return super().create_atomic_rmw(rmwOp, ptr, val, mask, sem, scope)

    def create_atomic_poll(self, ptr, expected, timeout_ns, sem, scope):
        # The limit in turns: this machine's time is not the GPU's. A turn is no shorter than those of other spins.
        matched = super().create_atomic_poll(ptr, expected, NO_TIME, sem, scope)
        for _ in range(int(timeout_ns.data.item()) // exchange.TURN_NS.value):
            if matched.data.all():
                break
            time.sleep(POLL_S)
            self._pause()
            matched = super().create_atomic_poll(ptr, expected, NO_TIME, sem, scope)
        return matched


builder = Builder()
interpreter.interpreter_builder.__class__ = Builder


def protect(address: int, guards: list[int]) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    for guard in guards:
        if libc.mprotect(ctypes.c_void_p(address + guard), ctypes.c_size_t(mmap.PAGESIZE), 0) != 0:
            raise OSError(ctypes.get_errno(), "mprotect of an emulator guard page")


def to_interpreter(value: Any, address: int) -> Any:
    if value[0] == "tensor":
        pointer = tl.pointer_type(DTYPES[value[2]])
        handle = interpreter.TensorHandle(np.array([address + value[1]], dtype=np.uint64), pointer)
        return tl.tensor(handle, pointer)
    if isinstance(value[1], int):
        # The interpreter's own conversion asks the driver for the type, which imports torch in every child.
        kind = tl.int32 if -(2**31) <= value[1] < 2**31 else tl.int64
        numpy_kind = np.int32 if kind == tl.int32 else np.int64
        return tl.tensor(interpreter.TensorHandle(np.array([value[1]], dtype=numpy_kind), kind), kind)
    return value[1]


def prepare() -> None:
    """Patches Triton's language once and rewrites every device function, so that the children inherit it.

    The interpreter does both at every call of a device function, which is most of its time.
    """

    def both_languages() -> None: ...

    both_languages = types.FunctionType(both_languages.__code__, {"tl": tl, "core": tl.core})
    interpreter._patch_lang(both_languages)
    # Triton 3.6 takes int() of an array of one element, which NumPy refuses since 2.4.
    tl.core.tensor.__index__ = lambda self: int(self.handle.data.item())
    modules = [sys.modules[name] for name in list(sys.modules) if name.startswith("tritlstm.kernels.")]
    for module in [*modules, tl.standard]:
        for value in list(vars(module).values()):
            if isinstance(value, interpreter.InterpretedFunction):
                value.rewrite()
    interpreter.InterpretedFunction.__call__ = lambda self, *args, **kwargs: self.rewrite()(*args, **kwargs)


def _whole(place: Sequence[int], missing: int = 0) -> tuple[int, ...]:
    """A grid or a place in one with all three dimensions."""
    return (*place, missing, missing)[:3]


def run_program(request: dict[str, Any], program: tuple[int, ...], address: int) -> None:
    function = kernel_function(request["kernel"])
    current = interpreter.interpreter_builder
    current.configure(request["emulation"], program, Cluster.of(request, program, address))
    current.set_grid_dim(*_whole(request["grid"], 1))
    current.set_grid_idx(*_whole(program))
    arguments = {name: to_interpreter(value, address) for name, value in request["arguments"].items()}
    arguments.update(request["constants"])
    function.rewrite()(**arguments)


def child(request: dict[str, Any], programs: Sequence[tuple[int, ...]], address: int, errors: int) -> None:
    try:
        for program in programs:
            run_program(request, program, address)
    except BaseException:
        os.write(errors, traceback.format_exc(limit=-4).encode()[-2000:])
        os._exit(1)
    os._exit(0)


def wait(children: dict[int, tuple], deadline: float, fault: Any) -> list[str]:
    """Waits for all children; after a failure or the deadline, kills the rest."""
    errors: list[str] = []
    stalled: set[int] = set()
    while children:
        pid, status = os.waitpid(-1, os.WNOHANG | os.WUNTRACED)
        if pid and os.WIFSTOPPED(status):
            stalled.add(pid)
            continue
        if pid == 0:
            only_stalled = stalled.issuperset(children)
            if only_stalled or time.monotonic() > deadline:
                for other, (program, _) in children.items():
                    os.kill(other, signal.SIGKILL)
                    os.waitpid(other, 0)
                    if other not in stalled:
                        errors.append(f"program {program} was still running at the time-out")
                break
            time.sleep(0.0005)
            continue
        program, pipe = children.pop(pid)
        code = os.waitstatus_to_exitcode(status)
        excused = fault is not None and _whole(fault["program"]) == _whole(program)
        if code == 0 or excused:
            continue
        if code == -signal.SIGSEGV:
            errors.append(f"program {program} accessed memory outside its buffers")
        else:
            text = os.read(pipe, 4000).decode(errors="replace")
            errors.append(f"program {program} ended with {code}: {text}")
        deadline = min(deadline, time.monotonic() + 0.2)
    return errors


def serve(request: dict[str, Any]) -> dict[str, Any]:
    with open(request["arena"], "r+b") as file:
        arena = mmap.mmap(file.fileno(), request["size"])
    address = ctypes.addressof(ctypes.c_char.from_buffer(arena))
    protect(address, request["guards"])
    grid = request["grid"]
    programs = list(itertools.product(*map(range, grid if len(grid) > 1 else (*grid, 1))))
    children: dict[int, tuple] = {}
    # Programs that wait for nobody may run one after another, which saves processes.
    shares = [programs] if request.get("serial") else [[program] for program in programs]
    for share in shares:
        receiving, sending = os.pipe()
        pid = os.fork()
        if pid == 0:
            child(request, share, address, sending)
        os.close(sending)
        children[pid] = (share[0], receiving)
    pipes = [pipe for _, pipe in children.values()]
    try:
        errors = wait(children, time.monotonic() + request["emulation"]["timeout_s"], request["emulation"]["fault"])
    finally:
        for pipe in pipes:
            os.close(pipe)
    return {"errors": errors}


def main() -> None:
    connection = Connection(int(sys.argv[1]))
    for kernel in KERNELS:
        kernel_function(kernel)
    prepare()
    while True:
        try:
            request = connection.recv()
        except EOFError:
            return
        try:
            answer = serve(request)
        except Exception:
            answer = {"errors": [traceback.format_exc(limit=-4)]}
        connection.send(answer)


if __name__ == "__main__":
    main()
