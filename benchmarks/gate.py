"""The correctness gate: a timing counts only beside a green check of the same case, provider and pass.

Every tensor of a result (output, final states; in the pass with backward also each gradient) is compared with
torch.nn.LSTM in float64 on the same numbers. An error is the largest absolute difference divided by the
largest absolute value of the reference tensor. The budget is twice the error that torch makes in the same
dtype (`Provider.yardstick` says with what), plus one rounding of the result.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .problem import Inputs, Problem
from .providers import LoopRunner, Provider, Runner, TorchLSTM

# If torch itself were further off than this, twice its error would let anything pass.
LARGEST_BUDGET = 0.1


@dataclass(frozen=True)
class Check:
    """Error and budget of the tensor that comes closest to its budget, or exceeds it most."""

    error: float
    budget: float
    tensor: str
    steps: int

    @property
    def passed(self) -> bool:
        return self.error <= self.budget


def forward(runner: Runner, inputs: Inputs) -> tuple[Tensor, ...]:
    """The pass "fwd": inference, nothing kept for backward."""
    with torch.no_grad():
        return runner(inputs)


def forward_backward(runner: Runner, inputs: Inputs, grad_out: Tensor) -> tuple[Tensor, ...]:
    """The pass "fwdbwd": training, with the gradients of the input and of all parameters."""
    inputs.x.requires_grad_()
    out, h_n, c_n = runner(inputs)
    grads = torch.autograd.grad(out, [inputs.x, *runner.params.values()], grad_out)
    return out.detach(), h_n.detach(), c_n.detach(), *grads


def results(runner: Runner, problem: Problem, which: str) -> dict[str, Tensor]:
    """Run one pass and name what it returns; time first, whatever the runner's layout."""
    inputs = problem.inputs(batch_first=runner.batch_first)
    runner.prepare(inputs)
    runner.train(which == "fwdbwd")
    grad_out = problem.grad_out
    if runner.batch_first:
        grad_out = grad_out.transpose(0, 1).contiguous()
    names = ["out", "h_n", "c_n"]
    if which == "fwd":
        tensors = forward(runner, inputs)
    else:
        tensors = forward_backward(runner, inputs, grad_out)
        names += ["grad of x", *(f"grad of {name}" for name in runner.params)]
    named = dict(zip(names, tensors, strict=True))
    if runner.batch_first:
        for name in ("out", "grad of x"):
            if name in named:
                named[name] = named[name].transpose(0, 1)
    return named


def difference(got: Tensor, reference: Tensor) -> float:
    """Largest absolute difference over the largest absolute value of the reference; inf for NaN or shapes."""
    if got.shape != reference.shape:
        return math.inf
    if reference.numel() == 0:
        return 0.0
    error = (got.to(reference.dtype) - reference).abs().max().item()
    return error / max(reference.abs().max().item(), 1e-30) if math.isfinite(error) else math.inf


class Gate:
    """Reference and yardsticks of one problem.

    `memory_bytes` is what the float64 reference may use: beyond it, only the first steps are checked (with
    the whole batch and the same weights), and the rows say how many.
    """

    def __init__(self, problem: Problem, memory_bytes: int) -> None:
        case = problem.case
        kept = 12 * case.layers * case.directions * case.H + 4 * case.D  # float64 values a step, generous
        self.problem = problem.first_steps(max(1, memory_bytes // (8 * case.B * kept)))
        self.reference = self._torch(torch.float64, "fwdbwd")
        self._yardsticks: dict[tuple[str, str], dict[str, float]] = {}

    def _torch(self, dtype: torch.dtype, which: str) -> dict[str, Tensor]:
        problem = self.problem.to(dtype)
        return results(TorchLSTM().build(problem), problem, which)

    def _errors(self, named: dict[str, Tensor]) -> dict[str, float]:
        return {name: difference(value, self.reference[name]) for name, value in named.items()}

    def yardstick(self, which: str, kind: str = "module") -> dict[str, float]:
        """Error of torch in the case's dtype, tensor by tensor; `kind` as in `Provider.yardstick`."""
        if self.problem.dtype.itemsize > 2:
            kind = "module"
        if (which, kind) not in self._yardsticks:
            if kind == "module":
                errors = self._errors(self._torch(self.problem.dtype, which))
            else:
                state_dtype = self.problem.dtype if kind == "rounding loop" else None
                loop = LoopRunner(self.problem, state_dtype=state_dtype)
                module = self.yardstick(which)
                errors = self._errors(results(loop, self.problem, which))
                errors = {name: max(error, module[name]) for name, error in errors.items()}
            self._yardsticks[which, kind] = errors
        return self._yardsticks[which, kind]

    def check(self, provider: Provider, which: str) -> Check:
        """Build the provider for the checked problem, run it once and compare."""
        runner = provider.build(self.problem)
        named = results(runner, self.problem, which)
        yardstick = self.yardstick(which, provider.yardstick)
        missing = set(yardstick) - set(named) - {f"grad of {name}" for name in runner.folded}
        if missing:
            return Check(math.inf, 0.0, f"{min(missing)} is missing", self.problem.case.T)
        rounding = torch.finfo(self.problem.dtype).eps / 2
        worst: tuple[float, Check] | None = None
        for name, error in self._errors(named).items():
            budget = min(2 * yardstick[name] + rounding, LARGEST_BUDGET)
            check = Check(error, budget, name, self.problem.case.T)
            if worst is None or error / budget > worst[0]:
                worst = (error / budget, check)
        assert worst is not None
        return worst[1]
