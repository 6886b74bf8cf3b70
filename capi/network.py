"""A handle of the Python engine: the module behind it, and a caller's memory seen as tensors.

Autograd records nothing here but what `Network.run` is told to: otherwise weights are used through aliases
that need no gradient, so that a call need not switch torch's modes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

import tritlstm
from tritlstm.functional import Options, run_layers

from .host import CPU, DEVICE, HostError

DTYPES = {1: torch.float32, 2: torch.float16, 3: torch.bfloat16, 4: torch.float64}

# What forward leaves in a reserve: that it ran, on which handle and sizes. Backward runs the forward again
# under autograd, which knows every option and on the CPU was faster than keeping the gates and walking back
# over them (one core of an AMD EPYC, torch 2.13.0: 4.2 ms against 7.5 at T=32, B=8, H=64; 268 against 435 at
# T=100, B=32, H=256).
MARK = struct.Struct("<8sQqqq")
MAGIC = b"tritlstm"

#: Of these dtypes one step runs as `torch.lstm_cell`, in a fifth to a half of the time of torch's LSTM over one step
#: (one core of an Intel Xeon, torch 2.13.0, float32, H=128: 18 us against 71 at B=1, 46 against 102 at B=16). In the
#: 16-bit types it rounds between its operations: bfloat16 lost 2.5 times as much as torch's LSTM does.
CELL_DTYPES = (torch.float32, torch.float64)

#: Views of a caller's arrays that are kept; beyond, all are dropped.
VIEWS = 64


class Network:
    """One ``tritlstm`` handle: a module and how to see a caller's memory as its tensors."""

    def __init__(self, ffi: Any, identity: int, o: Any) -> None:
        self.ffi = ffi
        self.identity = identity
        self.batch_first = bool(o.batch_first)
        self.dtype = DTYPES[o.dtype]
        self.device = self._device(o.device, o.device_index)
        self.on_cpu = self.device.type == "cpu"
        self.module = torch.nn.utils.skip_init(
            tritlstm.LSTM,
            o.input_size,
            o.hidden_size,
            o.num_layers,
            bias=bool(o.bias),
            batch_first=self.batch_first,
            bidirectional=bool(o.bidirectional),
            proj_size=o.proj_size,
            device=self.device,
            dtype=self.dtype,
        )
        self.module.flatten_parameters()
        self.parameters: list[Tensor] = list(self.module.parameters())
        self.weights = [parameter.detach() for parameter in self.parameters]
        self.directions = 1 + o.bidirectional
        self.rows = o.num_layers * self.directions
        self.width = o.proj_size or o.hidden_size
        self.steps_are_cells = self.on_cpu and self.dtype in CELL_DTYPES and not (o.proj_size or o.bidirectional)
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
        integers = {2: "<i2", 4: "<i4", 8: "<i8"}[dtype.itemsize]
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

    def inputs(self, a: Any) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """x, h0, c0 and lengths of a forward's or backward's arguments."""
        x = self.kept(a.x, *self.x_shape(a.steps, a.batch, self.module.input_size))
        h0 = self.state(a.h0, a.batch, self.width)
        c0 = self.state(a.c0, a.batch, self.module.hidden_size)
        lengths = None
        if a.lengths != self.ffi.NULL:
            lengths = self.view(a.lengths, a.batch, dtype=torch.int32)
            if not self.on_cpu:
                lengths = lengths.clamp(0, a.steps)
        return x, h0, c0, lengths

    def run(
        self, x: Tensor, h0: Tensor, c0: Tensor, lengths: Tensor | None, recorded: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """out, h_n, c_n; ``recorded`` by autograd for the gradients of `parameters`."""
        m = self.module
        weights = self.parameters if recorded else self.weights
        with torch.set_grad_enabled(recorded):  # where that is on, torch's LSTM takes a slower path
            if lengths is None and self.on_cpu:  # what the module comes to, without its looking at everything again
                return torch._VF.lstm(
                    x, (h0, c0), weights, m.bias, m.num_layers, 0.0, recorded, m.bidirectional, self.batch_first
                )
            if lengths is None:
                out, (h_n, c_n) = m(x, (h0, c0))
                return out, h_n, c_n
            sizes = (m.input_size, m.hidden_size, m.proj_size, m.num_layers)
            options = Options(*sizes, m.bias, False, 0.0, False, m.bidirectional)
            if self.batch_first:
                x = x.transpose(0, 1)
            out, h_n, c_n = run_layers(x, lengths, (h0, c0), weights, options)
            return out.transpose(0, 1) if self.batch_first else out, h_n, c_n

    def mark(self, a: Any) -> bytes:
        return MARK.pack(MAGIC, self.identity, a.steps, a.batch, int(a.lengths != self.ffi.NULL))


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
            result, self.h, self.c = network.run(below.unsqueeze(time), self.h, self.c, None)
            target.copy_(result.squeeze(time))
