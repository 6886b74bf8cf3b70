"""A handle of the Python engine: the module behind it, and a caller's memory seen as tensors.

Autograd records nothing here but what `Network.run` is told to: otherwise weights are used through aliases
that need no gradient, so that a call need not switch torch's modes.
"""

from __future__ import annotations

import ast
import copy
import inspect
import random
import struct
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

import tritlstm
from tritlstm.functional import Options, run_layers

from .host import ARGUMENT, CPU, DEVICE, HostError

DTYPES = {1: torch.float32, 2: torch.float16, 3: torch.bfloat16, 4: torch.float64}

# What forward leaves in a reserve: that it ran, on which handle and sizes. Backward runs the forward again
# under autograd, which knows every option and on the CPU was faster than keeping the gates and walking back
# over them (one core of an AMD EPYC, torch 2.13.0: 4.2 ms against 7.5 at T=32, B=8, H=64; 268 against 435 at
# T=100, B=32, H=256).
# Where random bits were drawn, it also has their seed.
MARK = struct.Struct("<8sQqqqq")
MAGIC = b"tritlstm"

#: Arguments of `tritlstm.LSTM` that members of the C structs, or a file, give.
MEMBERS = (
    *("input_size", "hidden_size", "num_layers", "bias", "batch_first"),
    *("bidirectional", "proj_size", "device", "dtype"),
)

#: Of these dtypes one step runs as `torch.lstm_cell`, in a fifth to a half of the time of torch's LSTM over one step
#: (one core of an Intel Xeon, torch 2.13.0, float32, H=128: 18 us against 71 at B=1, 46 against 102 at B=16). In the
#: 16-bit types it rounds between its operations: bfloat16 lost 2.5 times as much as torch's LSTM does.
CELL_DTYPES = (torch.float32, torch.float64)

#: Views of a caller's arrays that are kept; beyond, all are dropped.
VIEWS = 64


def _short(text: str) -> str:
    """In quotes, and so that a message has room for more."""
    return repr(text if len(text) <= 200 else f"{text[:200]}...")


def further_options(text: str) -> dict[str, Any]:
    """Of ``options.more``, by name. Nothing in it is run: values are literals."""

    def refuse(reason: str) -> HostError:
        return HostError(ARGUMENT, f"more is {_short(text)}: {reason}")

    known = [name for name in inspect.signature(tritlstm.LSTM).parameters if name not in MEMBERS]
    example = "write name=value, separated by commas, such as peephole=True, cell_clip=3.0"
    source = f"f({text}\n)"  # the line's end closes a comment
    try:
        call = ast.parse(source, mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        raise refuse(f"{error}; {example}") from None
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
        raise refuse(f"something in it has no name; {example}")
    found: dict[str, Any] = {}
    for keyword in call.keywords:
        name = keyword.arg
        if name is None:
            raise refuse(f"** is not read; {example}")
        if name in MEMBERS:
            lists = "; a list of sizes is for Python alone" if name == "hidden_size" else ""
            raise refuse(f"{name} is a member of the struct, or the file's: set it there and leave it out here{lists}")
        if name not in known:
            raise refuse(f"tritlstm.LSTM has no {_short(name)}; known are {', '.join(known)}")
        if name in found:
            raise refuse(f"{name} stands twice: leave one out")
        try:
            found[name] = ast.literal_eval(keyword.value)
        except (ValueError, TypeError, MemoryError, RecursionError):
            value = _short(ast.get_source_segment(source, keyword.value) or "")
            raise refuse(
                f"the value of {name}, {value}, is no literal; write a number, True, None, a 'string' or a (tuple)"
            ) from None
    return found


def more_of(ffi: Any, o: Any) -> str:
    if o.more == ffi.NULL:
        return ""
    try:
        return bytes(ffi.string(o.more)).decode()
    except UnicodeDecodeError as error:
        raise HostError(ARGUMENT, f"more is not UTF-8: {error}") from None


def module_of(o: Any, more: str, device: torch.device) -> tritlstm.LSTM:
    """As the C options describe it, with weights that have no values yet."""
    further = further_options(more)
    try:
        return torch.nn.utils.skip_init(
            tritlstm.LSTM,
            o.input_size,
            o.hidden_size,
            o.num_layers,
            bias=bool(o.bias),
            batch_first=bool(o.batch_first),
            bidirectional=bool(o.bidirectional),
            proj_size=o.proj_size,
            device=device,
            dtype=DTYPES[o.dtype],
            **further,
        )
    except Exception as error:
        # A module without memory lacks nothing else than right options; `describe` makes such a one first.
        if not further or device.type != "meta":
            raise
        raise HostError(ARGUMENT, f"more is {_short(more)}: {error}") from None


class Network:
    """One ``tritlstm`` handle: a module and how to see a caller's memory as its tensors."""

    def __init__(self, ffi: Any, identity: int, o: Any) -> None:
        self.ffi = ffi
        self.identity = identity
        self.batch_first = bool(o.batch_first)
        self.dtype = DTYPES[o.dtype]
        self.device = self._device(o.device, o.device_index)
        self.on_cpu = self.device.type == "cpu"
        self.more = more_of(ffi, o)
        # Training and evaluation are two modules of the same weights: calls that run at once switch nothing.
        self.module = module_of(o, self.more, self.device)
        self.module.flatten_parameters()
        self.evaluation = copy.copy(self.module).eval()
        #: Whether torch's own LSTM computes it, apart from dropout between layers.
        self.plain = not self.module.cell_options.changed
        self.dropout = self.module.dropout > 0 and o.num_layers > 1
        self.random = self.dropout or self.module.cell_options.random
        self.seeds = random.Random(o.seed)
        self.parameters: list[Tensor] = list(self.module.parameters())
        self.weights = [parameter.detach() for parameter in self.parameters]
        self.directions = 1 + o.bidirectional
        self.rows = o.num_layers * self.directions
        self.width = o.proj_size or o.hidden_size
        own_step = self.plain and not (o.proj_size or o.bidirectional)
        self.steps_are_cells = own_step and self.on_cpu and self.dtype in CELL_DTYPES
        self.views: dict[Any, Tensor] = {}

    @staticmethod
    def _device(kind: int, index: int) -> Any:
        if kind == CPU:
            return torch.device("cpu")
        if not torch.cuda.is_available():
            reason = "without CUDA" if torch.version.cuda is None else "with CUDA, but no device is visible"
            raise HostError(DEVICE, f"no CUDA device: torch {torch.__version__} was built {reason}")
        if index >= torch.cuda.device_count():
            count = torch.cuda.device_count()
            raise HostError(DEVICE, f"device_index is {index}, but there are {count} CUDA devices")
        return torch.device("cuda", index)

    def on(self, stream: Any) -> AbstractContextManager[None]:
        """Work inside is enqueued on the caller's CUDA stream; NULL is the default stream."""
        return _HERE if self.on_cpu else self._on_stream(int(self.ffi.cast("uintptr_t", stream)))

    @contextmanager
    def _on_stream(self, address: int) -> Iterator[None]:
        with torch.cuda.device(self.device):
            if address:
                chosen: Any = torch.cuda.ExternalStream(address, device=self.device)
            else:
                chosen = torch.cuda.default_stream(self.device)
            with torch.cuda.stream(chosen):
                yield

    def view(self, pointer: Any, *shape: int, dtype: Any = None, device: Any = None) -> Tensor:
        """The caller's memory at ``pointer`` as a dense tensor of ``shape``."""
        dtype = dtype or self.dtype
        device = device or self.device
        elements = 1
        for extent in shape:
            elements *= extent
        if device.type == "cpu":
            memory = self.ffi.buffer(self.ffi.cast("char *", pointer), elements * dtype.itemsize)
            return torch.frombuffer(memory, dtype=dtype).view(shape)
        # The array interface knows no bfloat16: pass the bits as integers and look at them as what they are.
        integers = {1: "|i1", 2: "<i2", 4: "<i4", 8: "<i8"}[dtype.itemsize]
        address = int(self.ffi.cast("uintptr_t", pointer))
        interface = {"shape": (elements,), "typestr": integers, "data": (address, False), "version": 3}
        return torch.as_tensor(_CudaArray(interface), device=device).view(dtype).view(shape)

    def kept(self, pointer: Any, *shape: int) -> Tensor:
        """As `view`, but the same tensor as long as a host passes the same array. It owns and touches no memory."""
        if not self.on_cpu:
            return self.view(pointer, *shape)
        found = self.views.get((pointer, shape))
        if found is None:
            if len(self.views) >= VIEWS:
                self.views.clear()
            found = self.views[pointer, shape] = self.view(pointer, *shape)
        return found

    def side(self, device: int) -> torch.device:
        """The torch device of a copy's other side."""
        return torch.device("cpu") if device == CPU else self.device

    def x_shape(self, steps: int, batch: int, width: int) -> tuple[int, int, int]:
        return (batch, steps, width) if self.batch_first else (steps, batch, width)

    def zeros(self, batch: int, width: int) -> Tensor:
        return torch.zeros(self.rows, batch, width, dtype=self.dtype, device=self.device)

    def state(self, pointer: Any, batch: int, width: int) -> Tensor:
        """[L * P, B, width]: the caller's, or zeros where that is NULL."""
        if pointer != self.ffi.NULL:
            return self.kept(pointer, self.rows, batch, width)
        return self.zeros(batch, width)

    def inputs(self, a: Any) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """x, h0, c0, lengths and resets of a forward's or backward's arguments."""
        x = self.kept(a.x, *self.x_shape(a.steps, a.batch, self.module.input_size))
        h0 = self.state(a.h0, a.batch, self.width)
        c0 = self.state(a.c0, a.batch, self.module.hidden_size)
        lengths = resets = None
        if a.lengths != self.ffi.NULL:
            lengths = self.view(a.lengths, a.batch, dtype=torch.int32)
            if not self.on_cpu:
                lengths = lengths.clamp(0, a.steps)
        if a.resets != self.ffi.NULL:
            resets = self.view(a.resets, *self.x_shape(a.steps, a.batch, 1)[:2], dtype=torch.uint8) != 0
        return x, h0, c0, lengths, resets

    def run(
        self,
        x: Tensor,
        h0: Tensor,
        c0: Tensor,
        lengths: Tensor | None = None,
        resets: Tensor | None = None,
        seed: int | None = None,
        recorded: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """out, h_n, c_n; of training with the random bits of ``seed``, otherwise of evaluation; ``recorded`` by
        autograd for the gradients of `parameters`."""
        m = self.module
        weights = self.parameters if recorded else self.weights
        own = not self.plain or resets is not None or (self.dropout and seed is not None)
        with torch.set_grad_enabled(recorded):  # where that is on, torch's LSTM takes a slower path
            if own:
                return self._run_module(x, h0, c0, lengths, resets, seed)
            if lengths is None and self.on_cpu:  # what the module comes to, without its looking at everything again
                return torch._VF.lstm(
                    x, (h0, c0), weights, m.bias, m.num_layers, 0.0, recorded, m.bidirectional, self.batch_first
                )
            if lengths is None:
                out, (h_n, c_n) = (self.evaluation if seed is None else m)(x, (h0, c0))
                return out, h_n, c_n
            sizes = (m.input_size, m.hidden_size, m.proj_size, m.num_layers)
            options = Options(*sizes, m.bias, False, 0.0, False, m.bidirectional)
            if self.batch_first:
                x = x.transpose(0, 1)
            out, h_n, c_n = run_layers(x, lengths, (h0, c0), weights, options)
            return out.transpose(0, 1) if self.batch_first else out, h_n, c_n

    def _run_module(
        self, x: Tensor, h0: Tensor, c0: Tensor, lengths: Tensor | None, resets: Tensor | None, seed: int | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        noise = None
        if seed is not None and self.module.cell_options.random:
            noise = torch.tensor([seed, 0], device=self.device)
        with self._dropout_of(seed) if self.dropout and seed is not None else _HERE:
            module = self.evaluation if seed is None else self.module
            out, (h_n, c_n) = module(x, (h0, c0), lengths=lengths, resets=resets, noise=noise)
        return out, h_n, c_n

    @contextmanager
    def _dropout_of(self, seed: int) -> Iterator[None]:
        """Dropout draws from torch's generator: it is seeded here, by one thread at a time, and put back."""
        with _GENERATOR, torch.random.fork_rng([] if self.on_cpu else [self.device]):
            # Not torch.manual_seed: it seeds the generators of all devices, those of the host's own work too.
            own = torch.default_generator if self.on_cpu else torch.cuda.default_generators[self.device.index]
            own.manual_seed(seed)
            yield

    def draw(self) -> int:
        """The seed of a training forward."""
        return self.seeds.getrandbits(63) if self.random else 0

    def mark(self, a: Any, seed: int = 0) -> bytes:
        used = int(a.lengths != self.ffi.NULL) + 2 * int(a.resets != self.ffi.NULL)
        return MARK.pack(MAGIC, self.identity, a.steps, a.batch, used, seed)

    def write_mark(self, a: Any, mark: bytes) -> None:
        if self.on_cpu:
            self.ffi.buffer(self.ffi.cast("char *", a.reserve), len(mark))[:] = mark
        elif self.random:
            theirs = self.view(a.reserve, len(mark), dtype=torch.uint8)
            theirs.copy_(torch.frombuffer(bytearray(mark), dtype=torch.uint8))

    def read_seed(self, a: Any) -> int | None:
        """That of the reserve's forward; None where there was none such. Elsewhere than on the CPU a reserve is read
        only where random bits were drawn: that waits for the device."""
        size = MARK.size
        if self.on_cpu:
            found = bytes(self.ffi.buffer(self.ffi.cast("char *", a.reserve), size))
        elif self.random:
            found = self.view(a.reserve, size, dtype=torch.uint8).cpu().numpy().tobytes()
        else:
            return 0
        seed: int = MARK.unpack(found)[-1]
        return seed if found == self.mark(a, seed) else None


_GENERATOR = threading.Lock()
_HERE: AbstractContextManager[None] = nullcontext()


class _CudaArray:
    def __init__(self, interface: dict[str, Any]) -> None:
        self.__cuda_array_interface__ = interface


class State:
    """One ``tritlstm_state`` handle: h [L, B, R] and c [L, B, H]."""

    def __init__(self, network: Network, batch: int) -> None:
        self.network = network
        self.batch = batch
        self.h = network.zeros(batch, network.width)
        self.c = network.zeros(batch, network.module.hidden_size)
        #: Of each layer h, c [B, H] and its weights, where a step is a cell a layer.
        self.cells: list[tuple[Tensor, Tensor, list[Tensor]]] = []
        if network.steps_are_cells:
            each = len(network.weights) // network.rows
            self.cells = [
                (self.h[k], self.c[k], network.weights[k * each : (k + 1) * each]) for k in range(network.rows)
            ]

    def step(self, x: Any, out: Any, stream: Any) -> None:
        """The next step of all sequences, from the caller's x [B, D] to its out [B, R]."""
        network = self.network
        below = network.kept(x, self.batch, network.module.input_size)
        target = network.kept(out, self.batch, network.width)
        if self.cells:
            for h, c, weights in self.cells:
                below, cell = torch.lstm_cell(below, (h, c), *weights)
                h.copy_(below)
                c.copy_(cell)
            target.copy_(below)
            return
        time = 1 if network.batch_first else 0
        with network.on(stream):
            result, self.h, self.c = network.run(below.unsqueeze(time), self.h, self.c)
            target.copy_(result.squeeze(time))
