"""What the tests of the C library share: its functions in Python, and problems with answers by torch."""

from __future__ import annotations

import atexit
import functools
import math
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cffi import FFI
from torch import Tensor, nn

from tritlstm.capi import build

OK, ARGUMENT, UNSUPPORTED, OVERFLOW, MEMORY, FILE, FORMAT, WEIGHTS = range(8)
BUFFER, STATE, UNAVAILABLE, DEVICE, FORKED, INTERNAL = range(8, 14)
DTYPES = {"float32": 1, "float16": 2, "bfloat16": 3, "float64": 4}
CPU, CUDA = 1, 2
T, B, D, H = 5, 3, 4, 6
BIG = 2**62


ffi = FFI()
ffi.cdef(build.declarations())
NULL = ffi.NULL


@functools.cache
def shared_build(engine: str) -> build.Built:
    """The library of an engine, built once for all tests of this process; they change nothing in it."""
    folder = tempfile.mkdtemp(prefix="tritlstm-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return build.build(folder, engine=engine)


def pointer(value: Tensor | None) -> Any:
    return NULL if value is None else ffi.cast("void *", value.data_ptr())


def pointers(values: list[Tensor | None]) -> Any:
    return ffi.new("void *[]", [pointer(value) for value in values])


class Failed(Exception):
    def __init__(self, status: int, message: str):
        super().__init__(f"{status}: {message}")
        self.status = status


GUARD = 64  # bytes on both sides of scratch memory that no call may touch


class Scratch:
    """Memory of exactly so many bytes, aligned to 16 bytes and no more, full of NaNs, between guards."""

    def __init__(self, size: int):
        self.size = size
        self.memory = torch.full((size + 2 * GUARD + 64,), 0xFF, dtype=torch.uint8)
        self.start = GUARD + (16 - (self.memory.data_ptr() + GUARD)) % 64  # 16 beyond a multiple of 64
        self.pointer = ffi.cast("void *", self.memory.data_ptr() + self.start)

    def check(self) -> None:
        assert (self.memory[: self.start] == 0xFF).all()
        assert (self.memory[self.start + self.size :] == 0xFF).all()


class Library:
    """The functions, with a failure as an exception; a call that names no workspace gets one of the size asked for."""

    def __init__(self, lib: Any):
        self.lib = lib
        self.engine = ffi.string(lib.tritlstm_engine()).decode()

    def scratch(self, lstm: Any, steps: int, batch: int, training: bool) -> tuple[Scratch, Scratch]:
        """Workspace and reserve."""
        sizes = ffi.new("size_t[2]")
        self.sizes(lstm, steps, batch, training, sizes, sizes + 1)
        return Scratch(sizes[0]), Scratch(sizes[1])

    def forward(self, lstm: Any, args: Any) -> None:
        self.with_workspace("forward", lstm, args)

    def backward(self, lstm: Any, args: Any) -> None:
        self.with_workspace("backward", lstm, args)

    def with_workspace(self, name: str, lstm: Any, args: Any) -> None:
        sizes = ffi.new("size_t *")
        training = args != NULL and args.reserve != NULL
        given = args == NULL or args.workspace_bytes
        if given or self.lib.tritlstm_sizes(lstm, args.steps, args.batch, training, sizes, NULL) or not sizes[0]:
            self.__getattr__(name)(lstm, args)
            return
        workspace = Scratch(sizes[0])
        args.workspace, args.workspace_bytes = workspace.pointer, sizes[0]
        self.__getattr__(name)(lstm, args)
        args.workspace, args.workspace_bytes = NULL, 0
        workspace.check()

    def error(self) -> str:
        return ffi.string(self.lib.tritlstm_last_error()).decode()

    def struct(self, type_: str, **members: Any) -> Any:
        value = ffi.new(f"tritlstm_{type_} *")
        assert getattr(self.lib, f"tritlstm_{type_}_init")(value, ffi.sizeof(value[0])) == OK
        for name, member in members.items():
            setattr(value, name, member)
        return value

    def __getattr__(self, name: str) -> Any:
        function = getattr(self.lib, f"tritlstm_{name}")

        def call(*args: Any) -> None:
            status = function(*args)
            if status != OK:
                raise Failed(status, self.error())

        return call

    def create(self, weights: Any = NULL, **members: Any) -> Any:
        handle = ffi.new("tritlstm **")
        options = self.struct("options", **{"input_size": D, "hidden_size": H, **members})
        self.__getattr__("create")(options, weights, handle)
        return ffi.gc(handle[0], self.lib.tritlstm_destroy)

    def load(self, path: Path, **members: Any) -> Any:
        handle = ffi.new("tritlstm **")
        options = self.struct("load_options", **members)
        self.create_from_safetensors(str(path).encode(), options, handle)
        return ffi.gc(handle[0], self.lib.tritlstm_destroy)


CASES = [  # layers, bidirectional, bias, proj_size, batch_first, dtype, lengths
    (1, False, True, 0, False, "float32", False),
    (1, False, False, 0, True, "float64", False),
    (2, True, True, 0, False, "float64", False),
    (2, True, True, 3, True, "float32", False),
    (3, False, True, 2, False, "float64", False),
    (1, True, False, 0, False, "float16", False),
    (2, False, True, 0, True, "bfloat16", False),
    (1, False, True, 0, False, "float64", True),
    (2, True, True, 0, True, "float32", True),
    (2, True, False, 3, False, "float64", True),
    (1, True, True, 2, True, "float32", True),
]


def case_id(case: tuple[Any, ...]) -> str:
    layers, bidirectional, bias, proj, batch_first, dtype, lengths = case
    flags = ["both"] * bidirectional + ["no-bias"] * (not bias) + [f"proj{proj}"] * (proj > 0)
    return "-".join([f"{layers}layer", *flags, *["batch-first"] * batch_first, dtype, *["lengths"] * lengths])


class Problem:
    """Inputs, gradients of the outputs and the weights of a random LSTM, rounded to a dtype."""

    def __init__(self, case: tuple[Any, ...], steps: int = T, batch: int = B, sizes: tuple[int, int] = (D, H)):
        self.layers, self.bidirectional, self.bias, self.proj, self.batch_first, name, lengths = case
        self.name, self.dtype = name, getattr(torch, name)
        self.batch, (self.D, self.H) = batch, sizes
        self.rows, self.width = self.layers * (1 + self.bidirectional), self.proj or self.H
        generator = torch.Generator().manual_seed(case_id(case).__len__() + steps)
        self.module = self.make(self.dtype)
        for weight in self.module.parameters():
            drawn = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
            weight.data.copy_(0.5 * min(1, (8 / weight.shape[-1]) ** 0.5) * drawn)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(self.dtype)

        self.x = draw(steps, batch, self.D)
        self.h0, self.c0 = draw(self.rows, batch, self.width), draw(self.rows, batch, self.H)
        out_width = self.width * (1 + self.bidirectional)
        self.grads = [draw(steps, batch, out_width), draw(self.rows, batch, self.width), draw(self.rows, batch, self.H)]
        self.lengths = None
        if lengths:
            some = torch.tensor([steps, 0, 2][:batch])
            rest = torch.randint(steps + 1, (batch - len(some),), generator=generator)
            self.lengths = torch.cat([some, rest]).clamp(max=steps).to(torch.int32)
        self.names = [
            "out",
            "h_n",
            "c_n",
            "x",
            "h0",
            "c0",
            *(name for name, _ in self.module.named_parameters()),
        ]

    def make(self, dtype: torch.dtype) -> nn.LSTM:
        options = (self.layers, self.bias, False, 0.0, self.bidirectional, self.proj)
        return nn.LSTM(self.D, self.H, *options).to(dtype)

    def options(self) -> dict[str, Any]:
        return {
            "input_size": self.D,
            "hidden_size": self.H,
            "num_layers": self.layers,
            "bidirectional": self.bidirectional,
            "bias": self.bias,
            "proj_size": self.proj,
            "batch_first": self.batch_first,
            "dtype": DTYPES[self.name],
        }

    def torch(self, dtype: torch.dtype) -> dict[str, np.ndarray]:
        """Outputs and gradients by torch.nn.LSTM, every sequence cut to its length and run alone."""
        module = self.make(dtype)
        module.load_state_dict(self.module.state_dict())
        x, h0, c0 = (value.to(dtype).requires_grad_() for value in (self.x, self.h0, self.c0))
        lengths = [len(self.x)] * self.batch if self.lengths is None else self.lengths.tolist()
        outs, h_ns, c_ns = [], [], []
        for b, length in enumerate(lengths):
            out = x.new_zeros(len(self.x), 1, self.grads[0].shape[2])
            h_n, c_n = h0[:, b : b + 1], c0[:, b : b + 1]
            if length:
                run, (h_n, c_n) = module(x[:length, b : b + 1], (h_n.contiguous(), c_n.contiguous()))
                out = torch.cat([run, out[length:]])
            outs.append(out)
            h_ns.append(h_n)
            c_ns.append(c_n)
        outputs = [torch.cat(parts, 1) for parts in (outs, h_ns, c_ns)]
        upstream = [grad.to(dtype) for grad in self.grads]
        found = torch.autograd.grad(outputs, [x, h0, c0, *module.parameters()], upstream)
        values = [value.detach().double().numpy() for value in (*outputs, *found)]
        return dict(zip(self.names, values, strict=True))

    def flip(self, value: Tensor) -> Tensor:
        return value.transpose(0, 1).contiguous() if self.batch_first else value

    def c(self, c: Library) -> dict[str, np.ndarray]:
        """The same by the C library: inference, training, backward; the two forwards must agree."""
        lstm = c.create(pointers(list(self.module.parameters())), **self.options())
        x, grad_out = self.flip(self.x), self.flip(self.grads[0])
        _, reserve = c.scratch(lstm, len(self.x), self.batch, True)
        outputs = []
        for training in (False, True):
            out, h_n, c_n = (torch.full_like(value, math.nan) for value in (grad_out, *self.grads[1:]))
            args = c.struct("forward_args", steps=len(self.x), batch=self.batch, x=pointer(x))
            args.h0, args.c0, args.out = pointer(self.h0), pointer(self.c0), pointer(out)
            args.h_n, args.c_n = pointer(h_n), pointer(c_n)
            args.lengths = ffi.cast("int32_t *", pointer(self.lengths))
            if training:
                args.reserve, args.reserve_bytes = reserve.pointer, reserve.size
            c.forward(lstm, args)
            outputs.append([out, h_n, c_n])
        for inference, training_ in zip(*outputs, strict=True):
            assert torch.equal(inference, training_)
        out, h_n, c_n = outputs[1]

        results = [torch.full_like(value, math.nan) for value in (x, self.h0, self.c0)]
        weights = [torch.full_like(value, math.nan) for value in self.module.parameters()]
        args = c.struct("backward_args", steps=len(self.x), batch=self.batch, x=pointer(x))
        args.lengths = ffi.cast("int32_t *", pointer(self.lengths))
        args.h0, args.c0, args.out = pointer(self.h0), pointer(self.c0), pointer(out)
        args.grad_out, args.grad_h_n, args.grad_c_n = (pointer(g) for g in (grad_out, *self.grads[1:]))
        args.grad_x, args.grad_h0, args.grad_c0 = (pointer(g) for g in results)
        array = pointers(weights)
        args.grad_weights = array
        args.reserve, args.reserve_bytes = reserve.pointer, reserve.size
        c.backward(lstm, args)
        reserve.check()
        values = [self.flip(out), h_n, c_n, self.flip(results[0]), *results[1:], *weights]
        return {name: v.detach().double().numpy() for name, v in zip(self.names, values, strict=True)}


def assert_within_budget(
    found: dict[str, np.ndarray],
    base: dict[str, np.ndarray],
    own: dict[str, np.ndarray],
    dtype: torch.dtype,
    terms: int = 200,
) -> None:
    """At most twice torch's own error in the same dtype, plus one rounding; all against float64."""
    eps = torch.finfo(dtype).eps
    for name, value in base.items():
        # In float64 torch's own error is not known: allow what sums of so many rounded terms can lose.
        allowed = (
            terms * eps if dtype == torch.float64 else 2 * np.abs(own[name] - value).max() / scale(value) + eps
        )
        error = np.abs(found[name] - value).max() / scale(value)
        assert error <= allowed, f"{name}: error {error:.2e}, budget {allowed:.2e}"  # NaN fails, too


def scale(value: np.ndarray) -> float:
    return max(float(np.abs(value).max()), 1e-30)


def assert_same(c: Library, found: Tensor, expected: Tensor) -> None:
    """The Python engine runs torch itself; the other sums in another order (float32, terms of order one)."""
    if c.engine == "python":
        assert torch.equal(found, expected)
    else:
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def make_forward(c: Library, x: Tensor, out: Tensor, **members: Any) -> Any:
    args = c.struct("forward_args", steps=x.shape[0], batch=x.shape[1], x=pointer(x), out=pointer(out))
    for name, value in members.items():
        setattr(args, name, pointer(value) if isinstance(value, Tensor) else value)
    return args


@contextmanager
def refuses(status: int, words: str) -> Iterator[None]:
    with pytest.raises(Failed, match=re.escape(words)) as caught:
        yield
    assert caught.value.status == status, caught.value
