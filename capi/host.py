"""The Python side of ``libtritlstm_python``: runs `tritlstm.LSTM` on a C caller's memory.

The C library has validated every argument (``src/front.c``); ``src/python_engine.c`` calls the methods of
`Host`, one for each function of ``src/engine.h``, and turns what they raise into a status and a message.
Importing this loads neither torch nor triton; the first ``create`` does.
"""

from __future__ import annotations

import itertools
import math
import os
import struct
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any

from tritlstm._version import __version__

if TYPE_CHECKING:
    from torch import Tensor

ARGUMENT, UNSUPPORTED, MEMORY, BUFFER, STATE, UNAVAILABLE, DEVICE, INTERNAL = 1, 2, 4, 8, 9, 10, 11, 13
SUCCESS = 0x600D  # what the C side takes for success: cffi returns 0 where Python never came up
CPU, CUDA = 1, 2
UNIFORM = 1

# What forward leaves in a reserve: that it ran, on which handle and sizes. Backward runs the forward again
# under autograd, which knows every option and on the CPU was faster than keeping the gates and walking back
# over them (one core of an AMD EPYC, torch 2.13.0: 4.2 ms against 7.5 at T=32, B=8, H=64; 268 against 435 at
# T=100, B=32, H=256).
MARK = struct.Struct("<8sQqqq")
MAGIC = b"tritlstm"
RESERVE_BYTES = 64


class HostError(Exception):
    """A failure with its C status."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def prepare(library: int, own: bool) -> None:
    """Called before `bind`. ``library``: its TRITLSTM_VERSION; ``own``: it started the interpreter.

    Raises:
        ImportError: the library was built for another version of this package.
    """
    major, minor, patch = (int(part) for part in __version__.split(".")[:3])
    if library != major * 10000 + minor * 100 + patch:
        built = f"{library // 10000}.{library // 100 % 100}.{library % 100}"
        raise ImportError(
            f"the C library was built by tritlstm {built}, but the environment has {__version__}: "
            "run `tritlstm build-c` again"
        )
    if own:
        # A library does not write to its host's terminal, whatever torch has to say.
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115


def bind(ffi: Any, lib: Any) -> None:
    """Puts the methods of a `Host` behind the C functions that cffi generated."""
    host = Host(ffi, lib)
    for name in CALLS:
        ffi.def_extern(name=f"tritlstm_py_{name}", error=INTERNAL, onerror=host.failed)(
            _succeeding(getattr(host, name))
        )


def _succeeding(method: Callable[..., None]) -> Callable[..., int]:
    def call(*args: Any) -> int:
        method(*args)
        return SUCCESS

    return call


def status_of(error: BaseException) -> int:
    """The C status for an exception."""
    if isinstance(error, HostError):
        return error.status
    text = str(error)
    names = {base.__name__ for base in type(error).__mro__}
    if "OutOfMemoryError" in names or "MemoryError" in names or "can't allocate memory" in text:
        return MEMORY
    if "AcceleratorError" in names or "CUDA error" in text:
        return DEVICE
    if isinstance(error, NotImplementedError):
        return UNSUPPORTED
    if isinstance(error, ImportError):
        return UNAVAILABLE
    return INTERNAL


class Network:
    """One ``tritlstm`` handle: a module and how to see a caller's memory as its tensors."""

    def __init__(self, ffi: Any, identity: int, o: Any) -> None:
        import torch

        import tritlstm

        self.ffi = ffi
        self.identity = identity
        self.batch_first = bool(o.batch_first)
        self.dtype = {1: torch.float32, 2: torch.float16, 3: torch.bfloat16, 4: torch.float64}[o.dtype]
        self.device = self._device(o.device, o.device_index)
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
        self.weights: list[Tensor] = list(self.module.parameters())
        self.rows = o.num_layers * (1 + o.bidirectional)
        self.width = o.proj_size or o.hidden_size

    @staticmethod
    def _device(kind: int, index: int) -> Any:
        import torch

        if kind == CPU:
            return torch.device("cpu")
        if not torch.cuda.is_available():
            reason = "without CUDA" if torch.version.cuda is None else "with CUDA, but no device is visible"
            raise HostError(DEVICE, f"no CUDA device: torch {torch.__version__} was built {reason}")
        if index >= torch.cuda.device_count():
            count = torch.cuda.device_count()
            raise HostError(DEVICE, f"device_index is {index}, but there are {count} CUDA devices")
        return torch.device("cuda", index)

    @contextmanager
    def on(self, stream: Any) -> Iterator[None]:
        """Work inside is enqueued on the caller's CUDA stream; NULL is the default stream."""
        if self.device.type == "cpu":
            yield
            return
        import torch

        address = int(self.ffi.cast("uintptr_t", stream))
        with torch.cuda.device(self.device):
            if address:
                chosen: Any = torch.cuda.ExternalStream(address, device=self.device)
            else:
                chosen = torch.cuda.default_stream(self.device)
            with torch.cuda.stream(chosen):
                yield

    def view(self, pointer: Any, *shape: int, dtype: Any = None, device: Any = None) -> Tensor:
        """The caller's memory at ``pointer`` as a dense tensor of ``shape``."""
        import torch

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

    def side(self, device: int) -> Any:
        """The torch device of a copy's other side."""
        import torch

        return torch.device("cpu") if device == CPU else self.device

    def x_view(self, pointer: Any, steps: int, batch: int, width: int) -> Tensor:
        shape = (batch, steps, width) if self.batch_first else (steps, batch, width)
        return self.view(pointer, *shape)

    def state(self, pointer: Any, batch: int, width: int) -> Tensor:
        """[L * P, B, width]: the caller's, or zeros where that is NULL."""
        import torch

        if pointer != self.ffi.NULL:
            return self.view(pointer, self.rows, batch, width)
        return torch.zeros(self.rows, batch, width, dtype=self.dtype, device=self.device)

    def inputs(self, a: Any) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """x, h0, c0 and lengths of a forward's or backward's arguments."""
        import torch

        x = self.x_view(a.x, a.steps, a.batch, self.module.input_size)
        h0 = self.state(a.h0, a.batch, self.width)
        c0 = self.state(a.c0, a.batch, self.module.hidden_size)
        lengths = None
        if a.lengths != self.ffi.NULL:
            lengths = self.view(a.lengths, a.batch, dtype=torch.int32)
            if self.device.type != "cpu":
                lengths = lengths.clamp(0, a.steps)
        return x, h0, c0, lengths

    def run(self, x: Tensor, h0: Tensor, c0: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """out, h_n, c_n; recorded by autograd where that is on."""
        if lengths is None:
            out, (h_n, c_n) = self.module(x, (h0, c0))
            return out, h_n, c_n
        from tritlstm.functional import Options, run_layers

        m = self.module
        sizes = (m.input_size, m.hidden_size, m.proj_size, m.num_layers)
        options = Options(*sizes, m.bias, False, 0.0, False, m.bidirectional)
        if self.batch_first:
            x = x.transpose(0, 1)
        out, h_n, c_n = run_layers(x, lengths, (h0, c0), self.weights, options)
        return out.transpose(0, 1) if self.batch_first else out, h_n, c_n

    def mark(self, a: Any) -> bytes:
        return MARK.pack(MAGIC, self.identity, a.steps, a.batch, int(a.lengths != self.ffi.NULL))


class _CudaArray:
    def __init__(self, interface: dict[str, Any]) -> None:
        self.__cuda_array_interface__ = interface


class State:
    """One ``tritlstm_state`` handle: h [L, B, R] and c [L, B, H]."""

    def __init__(self, network: Network, batch: int) -> None:
        self.network = network
        self.batch = batch
        self.h = network.state(network.ffi.NULL, batch, network.width)
        self.c = network.state(network.ffi.NULL, batch, network.module.hidden_size)


class Host:
    """The functions of ``src/engine.h``; they raise instead of returning a status."""

    def __init__(self, ffi: Any, lib: Any) -> None:
        self.ffi = ffi
        self.lib = lib
        self.identities = itertools.count(1)
        self.networks: dict[int, Network] = {}
        self.states: dict[int, State] = {}

    def failed(
        self, kind: type[BaseException], error: BaseException | None, trace: TracebackType | None
    ) -> int:
        """cffi calls this with whatever a method raised, SystemExit included."""
        try:
            error = kind() if error is None else error
            text = str(error) or repr(error)
            if not isinstance(error, HostError):
                text = f"{kind.__name__}: {text}"
            self.lib.tritlstm_py_report(text.encode("utf-8", "replace"))
            return status_of(error)
        except BaseException:
            self.lib.tritlstm_py_report(b"a failure could not be put into words")
            return INTERNAL

    def network(self, identity: int) -> Network:
        try:
            return self.networks[identity]
        except KeyError:
            raise HostError(ARGUMENT, "lstm is not a handle, or was destroyed") from None

    def state(self, identity: int) -> State:
        try:
            return self.states[identity]
        except KeyError:
            raise HostError(ARGUMENT, "state is not a handle, or was destroyed") from None

    def create(self, options: Any, weights: Any, dtypes: Any, identity: Any) -> None:
        import torch

        number = next(self.identities)
        network = Network(self.ffi, number, options)
        with torch.no_grad():
            if weights != self.ffi.NULL:
                self._load(network, weights, dtypes)
            elif options.initial_weights == UNIFORM:
                generator = torch.Generator().manual_seed(options.seed)
                bound = 1 / math.sqrt(network.module.hidden_size)  # as torch.nn.LSTM writes it
                for weight in network.weights:
                    # Drawn on the CPU in the order of torch.nn.LSTM: the same weights on every device.
                    drawn = torch.empty(weight.shape, dtype=network.dtype)
                    weight.copy_(drawn.uniform_(-bound, bound, generator=generator))
            else:
                for weight in network.weights:
                    weight.zero_()
        self.networks[number] = network
        identity[0] = number

    def _load(self, network: Network, weights: Any, dtypes: Any) -> None:
        import torch

        names = {1: torch.float32, 2: torch.float16, 3: torch.bfloat16, 4: torch.float64}
        for k, weight in enumerate(network.weights):
            dtype = network.dtype if dtypes == self.ffi.NULL else names[dtypes[k]]
            weight.copy_(network.view(weights[k], *weight.shape, dtype=dtype, device=network.side(CPU)))

    def destroy(self, identity: int) -> None:
        self.networks.pop(identity, None)

    def get_weights(self, identity: int, weights: Any, device: int, stream: Any) -> None:
        self._copy_weights(identity, weights, device, stream, out=True)

    def set_weights(self, identity: int, weights: Any, device: int, stream: Any) -> None:
        self._copy_weights(identity, weights, device, stream, out=False)

    def _copy_weights(self, identity: int, weights: Any, device: int, stream: Any, out: bool) -> None:
        import torch

        network = self.network(identity)
        with torch.no_grad(), network.on(stream):
            for k, weight in enumerate(network.weights):
                if weights[k] == self.ffi.NULL:
                    continue
                theirs = network.view(weights[k], *weight.shape, device=network.side(device))
                target, source = (theirs, weight) if out else (weight, theirs)
                target.copy_(source)

    def sizes(
        self, identity: int, steps: int, batch: int, training: int, workspace: Any, reserve: Any
    ) -> None:
        self.network(identity)
        workspace[0] = 0
        reserve[0] = RESERVE_BYTES if training else 0

    def forward(self, identity: int, a: Any) -> None:
        import torch

        network = self.network(identity)
        if a.reserve != self.ffi.NULL:
            self._check_reserve(a)
        with torch.no_grad(), network.on(a.stream):
            x, h0, c0, lengths = network.inputs(a)
            out, h_n, c_n = network.run(x, h0, c0, lengths)
            network.x_view(a.out, a.steps, a.batch, out.shape[2]).copy_(out)
            for pointer, result in ((a.h_n, h_n), (a.c_n, c_n)):
                if pointer != self.ffi.NULL:
                    network.view(pointer, *result.shape).copy_(result)
        if a.reserve != self.ffi.NULL and network.device.type == "cpu":
            self.ffi.buffer(self.ffi.cast("char *", a.reserve), MARK.size)[:] = network.mark(a)

    def _check_reserve(self, a: Any) -> None:
        if a.reserve_bytes < RESERVE_BYTES:
            raise HostError(
                BUFFER,
                f"reserve_bytes is {a.reserve_bytes}, but {RESERVE_BYTES} are needed: ask tritlstm_sizes",
            )

    def backward(self, identity: int, a: Any) -> None:
        import torch

        network = self.network(identity)
        self._check_reserve(a)
        if network.device.type == "cpu":
            found = bytes(self.ffi.buffer(self.ffi.cast("char *", a.reserve), MARK.size))
            if found != network.mark(a):
                raise HostError(
                    STATE,
                    "the reserve was not filled by a forward of this handle with the same steps, batch and "
                    "use of lengths: pass reserve to tritlstm_forward first",
                )
        null = self.ffi.NULL
        with torch.enable_grad(), network.on(a.stream):
            x, h0, c0, lengths = network.inputs(a)
            for leaf in (x, h0, c0):
                leaf.requires_grad_()
            targets = [(a.grad_x, x), (a.grad_h0, h0), (a.grad_c0, c0)]
            if a.grad_weights != null:
                targets += [(a.grad_weights[k], weight) for k, weight in enumerate(network.weights)]
            targets = [(pointer, tensor) for pointer, tensor in targets if pointer != null]
            results = network.run(x, h0, c0, lengths)
            given = zip((a.grad_out, a.grad_h_n, a.grad_c_n), results, strict=True)
            seeds = [(result, network.view(p, *result.shape)) for p, result in given if p != null]
            wanted = [tensor for _, tensor in targets]
            gradients: Sequence[Tensor | None] = [None] * len(wanted)
            if seeds and wanted:
                outputs, upstream = zip(*seeds, strict=True)
                gradients = torch.autograd.grad(outputs, wanted, upstream, allow_unused=True)
            with torch.no_grad():
                for (pointer, tensor), gradient in zip(targets, gradients, strict=True):
                    theirs = network.view(pointer, *tensor.shape)
                    theirs.zero_() if gradient is None else theirs.copy_(gradient)

    def state_create(self, identity: int, batch: int, state: Any) -> None:
        number = next(self.identities)
        self.states[number] = State(self.network(identity), batch)
        state[0] = number

    def state_destroy(self, state: int) -> None:
        self.states.pop(state, None)

    def state_reset(self, state: int, rows: Any, stream: Any) -> None:
        import torch

        s = self.state(state)
        with torch.no_grad(), s.network.on(stream):
            if rows == self.ffi.NULL:
                s.h.zero_()
                s.c.zero_()
                return
            chosen = torch.tensor([byte != 0 for byte in bytes(self.ffi.buffer(rows, s.batch))])
            mask = chosen.to(s.network.device)[None, :, None]
            s.h.masked_fill_(mask, 0)
            s.c.masked_fill_(mask, 0)

    def state_get(self, state: int, h: Any, c: Any, device: int, stream: Any) -> None:
        self._copy_state(state, h, c, device, stream, out=True)

    def state_set(self, state: int, h: Any, c: Any, device: int, stream: Any) -> None:
        self._copy_state(state, h, c, device, stream, out=False)

    def _copy_state(self, state: int, h: Any, c: Any, device: int, stream: Any, out: bool) -> None:
        import torch

        s = self.state(state)
        with torch.no_grad(), s.network.on(stream):
            for pointer, ours in ((h, s.h), (c, s.c)):
                if pointer == self.ffi.NULL:
                    continue
                theirs = s.network.view(pointer, *ours.shape, device=s.network.side(device))
                target, source = (theirs, ours) if out else (ours, theirs)
                target.copy_(source)

    def step(self, state: int, x: Any, out: Any, workspace: Any, workspace_bytes: int, stream: Any) -> None:
        import torch

        s = self.state(state)
        network = s.network
        with torch.no_grad(), network.on(stream):
            seen = network.x_view(x, 1, s.batch, network.module.input_size)
            result, s.h, s.c = network.run(seen, s.h, s.c, None)
            network.x_view(out, 1, s.batch, network.width).copy_(result)

    def explain(
        self, identity: int, steps: int, batch: int, training: int, text: Any, capacity: int, needed: Any
    ) -> None:
        import torch

        import tritlstm

        network = self.network(identity)
        shape = (batch, steps) if network.batch_first else (steps, batch)
        # One element, seen as the whole input: nothing of that size is allocated to be looked at.
        like = torch.zeros(1, dtype=network.dtype, device=network.device)
        x = like.expand(*shape, network.module.input_size)
        lines = [
            f"engine: python, tritlstm {__version__}, torch {torch.__version__}, Python "
            f"{sys.version.split()[0]} of {sys.prefix}",
            f"dtype: {str(network.dtype).removeprefix('torch.')}",
            str(tritlstm.explain(network.module, x)),
        ]
        if training:
            lines.append("backward: runs the forward again under autograd; the reserve holds only a mark")
        encoded = "\n".join(lines).encode() + b"\0"
        needed[0] = len(encoded)
        if capacity:
            cut = encoded[:capacity]
            self.ffi.buffer(text, capacity)[: len(cut)] = cut[:-1] + b"\0"


CALLS = (
    "create",
    "destroy",
    "get_weights",
    "set_weights",
    "sizes",
    "forward",
    "backward",
    "state_create",
    "state_destroy",
    "state_reset",
    "state_get",
    "state_set",
    "step",
    "explain",
)
