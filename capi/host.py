"""The Python side of ``libtritlstm_python``: runs `tritlstm.LSTM` on a C caller's memory.

The C library has validated every argument (``src/front.c``); ``src/python_engine.c`` calls the methods of
`Host`, one for each function of ``src/engine.h``, and turns what they raise into a status and a message.
Importing this loads neither torch nor triton; the first ``create`` does.
"""

from __future__ import annotations

import itertools
import math
import os
import sys
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from tritlstm._version import __version__

if TYPE_CHECKING:
    from torch import Tensor

    from .network import Network, State

ARGUMENT, UNSUPPORTED, MEMORY, BUFFER, STATE, UNAVAILABLE, DEVICE, INTERNAL = 1, 2, 4, 8, 9, 10, 11, 13
SUCCESS = 0x600D  # what the C side takes for success: cffi returns 0 where Python never came up
CPU, CUDA = 1, 2
UNIFORM = 1

# The mark of network.py, and room to let it grow.
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


class Host:
    """The functions of ``src/engine.h``; they raise instead of returning a status."""

    def __init__(self, ffi: Any, lib: Any) -> None:
        self.ffi = ffi
        self.lib = lib
        self.identities = itertools.count(1)
        self.networks: dict[int, Network] = {}
        self.states: dict[int, State] = {}

    def failed(self, kind: type[BaseException], error: BaseException | None, trace: TracebackType | None) -> int:
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
        from .network import Network

        null = self.ffi.NULL
        number = next(self.identities)
        network = Network(self.ffi, number, options)
        if weights == null or any(weights[k] == null for k in range(len(network.weights))):
            self._initialise(network, options)
        if weights != null:
            self._load(network, weights, dtypes)
        self.networks[number] = network
        identity[0] = number

    def describe(self, options: Any, capacity: int, weights: Any, count: Any) -> None:
        import torch

        from .network import module_of, more_of

        module = module_of(options, more_of(self.ffi, options), torch.device("meta"))
        named = list(module.named_parameters())
        count[0] = len(named)
        for k, (name, parameter) in enumerate(named[:capacity]):
            weights[k].name = name.encode()
            weights[k].rows, weights[k].columns = (*parameter.shape, 0)[:2]

    def _initialise(self, network: Network, options: Any) -> None:
        import torch

        if options.initial_weights != UNIFORM:
            for weight in network.weights:
                weight.zero_()
            return
        generator = torch.Generator().manual_seed(options.seed)
        bound = 1 / math.sqrt(network.module.hidden_size)  # as torch.nn.LSTM writes it
        for weight in network.weights:
            # Drawn on the CPU in the order of torch.nn.LSTM: the same weights on every device.
            drawn = torch.empty(weight.shape, dtype=network.dtype)
            weight.copy_(drawn.uniform_(-bound, bound, generator=generator))
        network.module._fill_constants()

    def _load(self, network: Network, weights: Any, dtypes: Any) -> None:
        from .network import DTYPES

        for k, weight in enumerate(network.weights):
            if weights[k] == self.ffi.NULL:
                continue
            dtype = network.dtype if dtypes == self.ffi.NULL else DTYPES[dtypes[k]]
            weight.copy_(network.view(weights[k], *weight.shape, dtype=dtype, device=network.side(CPU)))

    def destroy(self, identity: int) -> None:
        self.networks.pop(identity, None)

    def get_weights(self, identity: int, weights: Any, device: int, stream: Any) -> None:
        self._copy_weights(identity, weights, device, stream, out=True)

    def set_weights(self, identity: int, weights: Any, device: int, stream: Any) -> None:
        self._copy_weights(identity, weights, device, stream, out=False)

    def _copy_weights(self, identity: int, weights: Any, device: int, stream: Any, out: bool) -> None:
        network = self.network(identity)
        with network.on(stream):
            for k, weight in enumerate(network.weights):
                if weights[k] == self.ffi.NULL:
                    continue
                theirs = network.view(weights[k], *weight.shape, device=network.side(device))
                target, source = (theirs, weight) if out else (weight, theirs)
                target.copy_(source)

    def sizes(self, identity: int, steps: int, batch: int, training: int, workspace: Any, reserve: Any) -> None:
        self.network(identity)
        workspace[0] = 0
        reserve[0] = RESERVE_BYTES if training else 0

    def forward(self, identity: int, a: Any) -> None:
        network = self.network(identity)
        null = self.ffi.NULL
        reserve, h_n, c_n = a.reserve, a.h_n, a.c_n
        if reserve != null:
            self._check_reserve(a)
        with network.on(a.stream):
            seed = None if reserve == null else network.draw()
            results = network.run(*network.inputs(a), seed)
            for pointer, result in zip((a.out, h_n, c_n), results, strict=True):
                if pointer != null:
                    network.kept(pointer, *result.shape).copy_(result)
            if seed is not None:
                network.write_mark(a, network.mark(a, seed))

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
        null = self.ffi.NULL
        with torch.enable_grad(), network.on(a.stream):
            seed = network.read_seed(a)
            if seed is None:
                raise HostError(
                    STATE,
                    "the reserve was not filled by a forward of this handle with the same steps, batch and "
                    "use of lengths and resets: pass reserve to tritlstm_forward first",
                )
            *leaves, lengths, resets = network.inputs(a)
            x, h0, c0 = (leaf.detach().requires_grad_() for leaf in leaves)
            targets = [(a.grad_x, x), (a.grad_h0, h0), (a.grad_c0, c0)]
            if a.grad_weights != null:
                targets += [(a.grad_weights[k], weight) for k, weight in enumerate(network.parameters)]
            targets = [(pointer, tensor) for pointer, tensor in targets if pointer != null]
            results = network.run(x, h0, c0, lengths, resets, seed, recorded=True)
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
        from .network import State

        number = next(self.identities)
        self.states[number] = State(self.network(identity), batch)
        state[0] = number

    def state_destroy(self, state: int) -> None:
        self.states.pop(state, None)

    def state_reset(self, state: int, rows: Any, stream: Any) -> None:
        import torch

        s = self.state(state)
        with s.network.on(stream):
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
        s = self.state(state)
        with s.network.on(stream):
            for pointer, ours in ((h, s.h), (c, s.c)):
                if pointer == self.ffi.NULL:
                    continue
                theirs = s.network.view(pointer, *ours.shape, device=s.network.side(device))
                target, source = (theirs, ours) if out else (ours, theirs)
                target.copy_(source)

    def step(self, state: int, x: Any, out: Any, workspace: Any, workspace_bytes: int, stream: Any) -> None:
        self.state(state).step(x, out, stream)

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
        if network.more:
            lines.insert(2, f"options: {network.module.extra_repr()}")
        if training and network.random:
            lines.append("random bits: of a seed for each forward with a reserve, which the reserve keeps")
        if network.steps_are_cells:
            lines.append("tritlstm_step: torch.lstm_cell, layer by layer")
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
    "describe",
)
