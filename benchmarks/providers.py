"""The implementations that are measured, each behind the same small interface.

A provider says whether it can run here at all (`available`), whether it can run a case (`supports`), and
builds a runner: a callable from `Inputs` to (out, h_n, c_n) that owns its parameters.
"""

from __future__ import annotations

import inspect
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable
from importlib import metadata
from importlib.util import find_spec
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from .cases import Case
from .problem import Inputs, Problem

Result = tuple[Tensor, Tensor, Tensor]


class Runner(ABC):
    """One provider, ready for one problem. `params` are named as in torch.nn.LSTM's state_dict."""

    batch_first = False
    # Parameters of nn.LSTM that the provider folds into another one, whose gradient is the same.
    folded: ClassVar[dict[str, str]] = {}

    def __init__(self, problem: Problem) -> None:
        self.case = problem.case
        self.params = self.parameters(problem)

    def parameters(self, problem: Problem) -> dict[str, Tensor]:
        return {name: weight.clone().requires_grad_() for name, weight in problem.weights.items()}

    def prepare(self, inputs: Inputs) -> None:  # noqa: B027 - most have nothing to do
        """Bring the inputs into the form that a user of this provider would hold them in. Not timed."""

    def train(self, mode: bool) -> None:  # noqa: B027
        """Switch between inference and training."""

    @abstractmethod
    def __call__(self, inputs: Inputs) -> Result:
        """Run: out (in the layout of `inputs.x`), h_n and c_n [layers * directions, B, H]."""


class Provider(ABC):
    """`included` says what a timing contains; `yardstick` is what the gate allows errors twice as large as:

    "module": torch.nn.LSTM in the same dtype. The others count in 16-bit types only, for implementations that
    keep in the input's dtype what nn.LSTM keeps in fp32, and take in what torch itself then loses. "loop": a
    loop in eager torch, where autograd adds the gradient of w_hh up over the steps in that dtype. "rounding
    loop": the same with the cell state in that dtype too.
    """

    name: ClassVar[str]
    label: ClassVar[str]
    included: ClassVar[str]
    by_default: ClassVar[bool] = True
    yardstick: ClassVar[str] = "module"

    def available(self, device: torch.device) -> str | None:
        """None, or why this provider cannot run on this machine."""
        return None

    def supports(self, case: Case, device: torch.device) -> str | None:
        """None, or why this provider cannot run this case."""
        return None

    @abstractmethod
    def build(self, problem: Problem) -> Runner: ...


def installed(package: str) -> str | None:
    """Version of an installed package, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


class _ModuleRunner(Runner):
    """A module with nn.LSTM's interface: padded batches go in and come out as PackedSequence."""

    def __init__(self, problem: Problem, module_class: Callable[..., nn.Module]) -> None:
        case = problem.case
        self.module = module_class(case.D, case.H, case.layers, bidirectional=case.bidirectional)
        self.module.to(problem.device, problem.dtype)
        self.module.load_state_dict(problem.weights)
        super().__init__(problem)

    def parameters(self, problem: Problem) -> dict[str, Tensor]:
        return dict(self.module.named_parameters())

    def train(self, mode: bool) -> None:
        self.module.train(mode)

    def __call__(self, inputs: Inputs) -> Result:
        states = (inputs.h0, inputs.c0)
        if inputs.resets is not None:
            return self.with_resets(inputs)
        if inputs.lengths is None:
            out, (h_n, c_n) = self.module(inputs.x, states)
        else:
            packed = pack_padded_sequence(inputs.x, inputs.lengths, enforce_sorted=False)
            packed_out, (h_n, c_n) = self.module(packed, states)
            out, _ = pad_packed_sequence(packed_out, total_length=self.case.T)
        return out, h_n, c_n

    def with_resets(self, inputs: Inputs) -> Result:
        raise NotImplementedError


class _TorchRunner(_ModuleRunner):
    def with_resets(self, inputs: Inputs) -> Result:
        assert inputs.resets is not None
        keep = (~inputs.resets).to(inputs.x.dtype)[:, None, :, None]
        h, c = inputs.h0, inputs.c0
        outs = []
        for t in range(self.case.T):
            out, (h, c) = self.module(inputs.x[t : t + 1], (h * keep[t], c * keep[t]))
            outs.append(out)
        return torch.cat(outs), h, c


class TorchLSTM(Provider):
    name = "torch"
    label = "torch.nn.LSTM"
    included = (
        "input product, biases, final states; lengths: packing and unpacking; resets: one call a step with "
        "the state masked before it; fwdbwd: gradients of input, weights and biases"
    )

    def build(self, problem: Problem) -> Runner:
        return _TorchRunner(problem, nn.LSTM)


class _TritlstmRunner(_ModuleRunner):
    def __init__(self, problem: Problem) -> None:
        import tritlstm

        super().__init__(problem, tritlstm.LSTM)

    def with_resets(self, inputs: Inputs) -> Result:
        out, (h_n, c_n) = self.module(inputs.x, (inputs.h0, inputs.c0), resets=inputs.resets)
        return out, h_n, c_n


class Tritlstm(Provider):
    name = "tritlstm"
    label = "tritlstm.LSTM"
    included = (
        "input product, biases, final states; lengths: packing and unpacking; "
        "fwdbwd: gradients of input, weights and biases"
    )

    def supports(self, case: Case, device: torch.device) -> str | None:
        import tritlstm

        if case.resets and "resets" not in inspect.signature(tritlstm.LSTM.forward).parameters:
            return "this version of tritlstm.LSTM takes no resets"
        return None

    def build(self, problem: Problem) -> Runner:
        return _TritlstmRunner(problem)


class _ExplicitRunner(_TritlstmRunner):
    def __call__(self, inputs: Inputs) -> Result:
        if inputs.resets is not None:
            return self.with_resets(inputs)
        from tritlstm import functional

        lengths = None if inputs.lengths is None else inputs.lengths.to(torch.int32)
        module: Any = self.module
        states, weights = (inputs.h0, inputs.c0), list(self.params.values())
        return functional.run_layers(inputs.x, lengths, states, weights, module._options())


class Explicit(Provider):
    name = "explicit"
    label = "explicit backward"
    included = (
        "what tritlstm.LSTM would run on a CPU if it never ran torch's own LSTM (tritlstm.cpu): input product, biases, "
        "final states; lengths as they are; fwdbwd: gradients of input, weights and biases"
    )

    def available(self, device: torch.device) -> str | None:
        return None if device.type == "cpu" else "for a CPU; on a GPU tritlstm.LSTM runs the kernels, always"

    def build(self, problem: Problem) -> Runner:
        return _ExplicitRunner(problem)


def cell_step(gates_x: Tensor, h: Tensor, c: Tensor, w_hh_t: Tensor) -> tuple[Tensor, Tensor]:
    """One step as anyone would write it, with the gate algebra in the dtype of c. `gates_x` [B, 4H]."""
    gates = torch.addmm(gates_x, h, w_hh_t).to(c.dtype)
    i, f, g, o = gates.chunk(4, dim=1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return (torch.sigmoid(o) * torch.tanh(c)).to(h.dtype), c


class LoopRunner(Runner):
    """A loop over time in Python; `state_dtype` is what the cell state is kept in."""

    def __init__(
        self,
        problem: Problem,
        step: Callable[..., tuple[Tensor, Tensor]] = cell_step,
        state_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(problem)
        self.step = step
        self.state_dtype = state_dtype or torch.promote_types(problem.dtype, torch.float32)

    def prepare(self, inputs: Inputs) -> None:
        if inputs.lengths is not None:
            steps = torch.arange(self.case.T, device=inputs.x.device)
            lengths = inputs.lengths.to(inputs.x.device)
            inputs.extra["live"] = (steps[:, None] < lengths)[..., None]  # [T, B, 1]
        if inputs.resets is not None:
            inputs.extra["keep"] = (~inputs.resets)[..., None]  # [T, B, 1]

    def __call__(self, inputs: Inputs) -> Result:
        layer_in = inputs.x
        h_n, c_n = [], []
        for layer in range(self.case.layers):
            outs = []
            for direction in range(self.case.directions):
                out, h, c = self.walk(inputs, layer_in, layer, direction)
                outs.append(out)
                h_n.append(h)
                c_n.append(c)
            layer_in = outs[0] if len(outs) == 1 else torch.cat(outs, dim=2)
        return layer_in, torch.stack(h_n), torch.stack(c_n).to(inputs.c0.dtype)

    def walk(self, inputs: Inputs, x: Tensor, layer: int, direction: int) -> Result:
        suffix = f"l{layer}" + ("_reverse" if direction else "")
        w_ih, w_hh, b_ih, b_hh = (
            self.params[f"{kind}_{suffix}"] for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        )
        state = layer * self.case.directions + direction
        h, c = inputs.h0[state], inputs.c0[state].to(self.state_dtype)
        gates_x = F.linear(x, w_ih, b_ih + b_hh).unbind(0)
        w_hh_t = w_hh.t()
        live, keep = inputs.extra.get("live"), inputs.extra.get("keep")
        outs: list[Tensor] = [h] * self.case.T
        for t in reversed(range(self.case.T)) if direction else range(self.case.T):
            if keep is not None:
                h, c = h * keep[t], c * keep[t]
            h_next, c_next = self.step(gates_x[t], h, c, w_hh_t)
            if live is None:
                outs[t] = h_next
            else:
                outs[t] = h_next * live[t]
                h_next = torch.where(live[t], h_next, h)
                c_next = torch.where(live[t], c_next, c)
            h, c = h_next, c_next
        return torch.stack(outs), h, c


_LOOP_INCLUDED = (
    "input product (one product over all steps), biases, final states; cell state in fp32; lengths and "
    "resets by masks made beforehand; fwdbwd: gradients of input, weights and biases"
)


class EagerLoop(Provider):
    name = "eager-loop"
    label = "eager cell loop"
    included = _LOOP_INCLUDED
    yardstick = "loop"

    def build(self, problem: Problem) -> Runner:
        return LoopRunner(problem)


class CompiledLoop(Provider):
    name = "compiled-loop"
    label = "compiled cell loop"
    included = "torch.compile of one step (dynamic sizes, fullgraph), loop in Python; " + _LOOP_INCLUDED
    yardstick = "loop"

    def build(self, problem: Problem) -> Runner:
        import torch._dynamo

        # Above the limit Dynamo would run the step uncompiled; fullgraph makes that an error, this avoids it.
        torch._dynamo.config.recompile_limit = 64
        return LoopRunner(problem, torch.compile(cell_step, dynamic=True, fullgraph=True))


class _FlashRunner(Runner):
    batch_first = True
    folded: ClassVar[dict[str, str]] = {"bias_hh_l0": "bias_ih_l0"}

    def __init__(self, problem: Problem, backend: str) -> None:
        from flashrnn import flashrnn

        super().__init__(problem)
        self.function = flashrnn
        self.options = {
            "function": "lstm",
            "backend": backend,
            "dtype": {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}[problem.case.dtype],
        }

    def parameters(self, problem: Problem) -> dict[str, Tensor]:
        params = super().parameters(problem)
        bias = params["bias_ih_l0"].detach() + params.pop("bias_hh_l0").detach()
        return {**params, "bias_ih_l0": bias.requires_grad_()}

    def prepare(self, inputs: Inputs) -> None:
        states = torch.stack((inputs.h0[0], inputs.c0[0]))
        inputs.extra["states"] = states[:, :, None, None, :]  # [2, B, 1, 1 head, H]

    def __call__(self, inputs: Inputs) -> Result:
        H = self.case.H
        gates_x = F.linear(inputs.x, self.params["weight_ih_l0"]).unflatten(2, (4, 1, H))  # [B, T, 4, 1, H]
        recurrent = self.params["weight_hh_l0"].view(4, 1, H, H)
        bias = self.params["bias_ih_l0"].view(4, 1, H)
        states, last = self.function(gates_x, recurrent, bias, states=inputs.extra["states"], **self.options)
        last = last.flatten(1, -2)  # [2, B, H]
        return states[0].flatten(2), last[0][None], last[1][None]


class FlashRNN(Provider):
    name = "flashrnn"
    label = "FlashRNN fused"
    included = (
        "input product (torch), one bias, final states, all cell states; batch-first input; "
        "fwdbwd: gradients of input, weights and bias"
    )
    yardstick = "rounding loop"
    backend: ClassVar[str] = "cuda_fused"
    needs_nvcc: ClassVar[bool] = True

    def available(self, device: torch.device) -> str | None:
        if device.type != "cuda":
            return "needs an NVIDIA GPU"
        if find_spec("flashrnn") is None:
            return "not installed (pip install flashrnn)"
        if self.needs_nvcc and shutil.which("nvcc") is None and "CUDA_HOME" not in os.environ:
            return "builds its kernels with nvcc when it runs, and there is none on PATH or in CUDA_HOME"
        return None

    def supports(self, case: Case, device: torch.device) -> str | None:
        if case.layers > 1 or case.bidirectional:
            return "one layer and one direction only"
        if case.lengths is not None:
            return "takes no lengths"
        if case.resets:
            return "takes no resets"
        if case.H % 16:
            return f"hidden size must be a multiple of 16, not {case.H}"
        return None

    def build(self, problem: Problem) -> Runner:
        return _FlashRunner(problem, self.backend)


class FlashRNNAlternating(FlashRNN):
    name = "flashrnn-alternating"
    label = "FlashRNN alternating"
    by_default = False
    backend = "cuda"


class FlashRNNTriton(FlashRNN):
    name = "flashrnn-triton"
    label = "FlashRNN Triton"
    by_default = False
    backend = "triton_fused"
    needs_nvcc = False

    def supports(self, case: Case, device: torch.device) -> str | None:
        if case.H > 128:
            return f"one block holds a head: hidden size up to 128, not {case.H}"
        return super().supports(case, device)


class _TorchRLRunner(Runner):
    batch_first = True

    def __init__(self, problem: Problem) -> None:
        from torchrl.modules.tensordict_module._rnn_triton import lstm_triton

        super().__init__(problem)
        self.function = lstm_triton
        self.options: dict[str, Any] = {"compute_dtype": torch.float32, "input_precision": "tf32"}
        if problem.device.type == "cuda" and not torch.backends.cudnn.allow_tf32:
            self.options["input_precision"] = "ieee"

    def prepare(self, inputs: Inputs) -> None:
        B, T, H = self.case.B, self.case.T, self.case.H
        starts = inputs.x.new_zeros(2, self.case.layers, B, T, H)
        starts[0, :, :, 0], starts[1, :, :, 0] = inputs.h0, inputs.c0
        resets = inputs.resets
        inputs.extra["starts"] = starts
        inputs.extra["is_init"] = (
            torch.zeros(B, T, dtype=torch.bool, device=inputs.x.device)
            if resets is None
            else resets.t().contiguous()
        )

    def __call__(self, inputs: Inputs) -> Result:
        out = inputs.x
        h_n, c_n = [], []
        for layer in range(self.case.layers):
            params = [
                self.params[f"{kind}_l{layer}"] for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            ]
            hidden, cell = inputs.extra["starts"][:, layer]
            out, _, h, c = self.function(out, hidden, cell, *params, inputs.extra["is_init"], **self.options)
            h_n.append(h)
            c_n.append(c)
        return out, torch.stack(h_n), torch.stack(c_n)


class TorchRL(Provider):
    name = "torchrl"
    label = "TorchRL Triton"
    included = (
        "input product (torch), biases, final states, all cell states; batch-first input, states of each "
        "step and reset mask made beforehand; fwdbwd: gradients of input, weights and biases"
    )

    def available(self, device: torch.device) -> str | None:
        if device.type != "cuda":
            return "needs a GPU"
        if find_spec("torchrl") is None:
            return "not installed (pip install torchrl)"
        return None

    def supports(self, case: Case, device: torch.device) -> str | None:
        if case.bidirectional:
            return "its Triton kernels walk one direction only"
        if case.lengths is not None:
            return "takes no lengths"
        if case.dtype != "fp32":
            return f"its kernels are written for fp32 tensors, not {case.dtype}"
        return None

    def build(self, problem: Problem) -> Runner:
        return _TorchRLRunner(problem)


PROVIDERS: dict[str, Provider] = {
    provider.name: provider
    for provider in (
        Tritlstm(),
        TorchLSTM(),
        Explicit(),
        CompiledLoop(),
        EagerLoop(),
        FlashRNN(),
        FlashRNNAlternating(),
        FlashRNNTriton(),
        TorchRL(),
    )
}


def choose(names: list[str] | None) -> list[Provider]:
    """Providers by name, or those of a default run. Raises ValueError for a name that is none of them."""
    if not names:
        return [provider for provider in PROVIDERS.values() if provider.by_default]
    unknown = [name for name in names if name not in PROVIDERS]
    if unknown:
        raise ValueError(f"no provider {', '.join(map(repr, unknown))}; there are {', '.join(PROVIDERS)}")
    return [provider for name, provider in PROVIDERS.items() if name in names]
