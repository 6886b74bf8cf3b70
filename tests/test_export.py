"""torch.compile, torch.export, AOTInductor and CUDA graphs around the modules. Values against the module itself in
eager mode, which other tests hold to torch.nn.LSTM in float64; compilations are counted.
"""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from cuda_graphs import capture
from torch import Tensor, nn
from torch._dynamo.utils import counters

import tritlstm
from tritlstm import functional

D, H = 4, 6
SHAPES = ((5, 3), (7, 6), (9, 11), (12, 2), (3, 4))  # T, B
KINDS: dict[str, dict[str, Any]] = {
    "two layers, both directions": {"num_layers": 2, "bidirectional": True},
    "batch_first, projection": {"batch_first": True, "proj_size": 3},
    "float64": {"dtype": torch.float64},
    "layer_norm": {"layer_norm": True, "bidirectional": True},
}
with_lengths = pytest.mark.parametrize("with_lengths", [False, True], ids=["", "lengths"])


@pytest.fixture(params=["torch", "operators"])
def path(request, monkeypatch):
    if request.param == "operators":
        monkeypatch.setattr(functional, "runs_kernels", lambda x: True)
    torch._dynamo.reset()
    counters.clear()
    return request.param


def module_of(kind: dict[str, Any]) -> tritlstm.LSTM:
    torch.manual_seed(0)
    return tritlstm.LSTM(D, H, **kind)


def inputs(module: nn.RNNBase, T: int, B: int, with_lengths: bool) -> tuple[Tensor, dict[str, Tensor]]:
    shape = (B, T, D) if module.batch_first else (T, B, D)
    x = torch.randn(shape, dtype=module.weight_ih_l0.dtype)
    return x, {"lengths": torch.arange(B) * 5 % (T + 1)} if with_lengths else {}


def close(got: Any, expected: Any) -> None:
    # float32, the same formula with its sums in another order.
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


class TestCompile:
    # Every kind, mode and form once each, not their product: a compilation takes a second.
    @pytest.mark.parametrize(
        ("name", "training", "with_lengths"),
        [
            ("two layers, both directions", True, False),
            ("batch_first, projection", True, True),
            ("float64", True, False),
            ("two layers, both directions", False, False),
            ("two layers, both directions", False, True),
            ("batch_first, projection", False, False),
            ("float64", False, False),
            ("layer_norm", True, True),
            ("layer_norm", False, False),
        ],
    )
    def test_new_lengths_and_batches_recompile_nothing(self, name, training, with_lengths, path):
        module = module_of(KINDS[name])
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        for T, B in SHAPES:
            x, more = inputs(module, T, B, with_lengths)
            results = []
            for run in (compiled, module):
                module.zero_grad()
                with torch.set_grad_enabled(training):
                    out, (h_n, c_n) = run(x, **more)
                    if training:
                        (out.square().sum() + c_n.sum()).backward()
                results.append(
                    [out.detach(), h_n.detach(), c_n.detach(), *(p.grad for p in module.parameters() if training)]
                )
            close(*results)
        # torch takes the first shape as fixed and the second as the proof that none is: two graphs for any number.
        assert counters["stats"]["unique_graphs"] == 2

    def test_with_dynamic_true_there_is_one_graph(self, path):
        module = module_of({})
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
        for T, B in SHAPES:
            x, _ = inputs(module, T, B, False)
            close(compiled(x)[0], module(x)[0])
        assert counters["stats"]["unique_graphs"] == 1

    def test_lengths_as_a_list(self, path):
        module = module_of(KINDS["two layers, both directions"])
        x, _ = inputs(module, 5, 3, False)
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        close(compiled(x, lengths=[3, 0, 5])[0], module(x, lengths=[3, 0, 5])[0])

    def test_under_autocast(self, path):
        module = module_of({"bidirectional": True})
        x, _ = inputs(module, 5, 3, False)
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        with torch.autocast("cpu", torch.bfloat16):
            out, expected = compiled(x)[0], module(x)[0]
        assert out.dtype == expected.dtype == torch.bfloat16
        torch.testing.assert_close(out, expected, rtol=0.03, atol=0.01)  # roundings to bfloat16, 2^-8
        out.float().sum().backward()
        assert {p.grad.dtype for p in module.parameters()} == {torch.float32}

    def test_compiled_with_inductor(self):
        """The default backend, once: the others above differ from it in what stands around the layer."""
        torch._dynamo.reset()
        module, head = module_of({}), nn.Linear(H, 2)
        model = lambda x: head(module(x.sin())[0]).relu()  # noqa: E731
        compiled = torch.compile(model, fullgraph=True, dynamic=True)
        for T, B in SHAPES[:2]:
            x, _ = inputs(module, T, B, False)
            gradients = []
            for run in (compiled, model):
                module.zero_grad()
                out = run(x)
                out.square().sum().backward()
                gradients.append([out.detach(), *(p.grad for p in module.parameters())])
            close(*gradients)

    def test_vmap_compiles_and_func_grad_refuses(self, path):
        module = module_of({})
        x = torch.randn(3, 5, 2, D)
        mapped = torch.compile(torch.func.vmap(lambda x: module(x)[0]), fullgraph=True, backend="aot_eager")
        close(mapped(x), torch.stack([module(sample)[0] for sample in x]))
        with pytest.raises(Exception, match=r"GradTrackingTensor|functorch|NotImplementedError"):
            torch.compile(torch.func.grad(lambda x: module(x)[0].sum()), fullgraph=True, backend="aot_eager")(x[0])


def exported(module: nn.Module, with_lengths: bool) -> torch.export.ExportedProgram:
    x, more = inputs(module, 5, 3, with_lengths)
    T, B = torch.export.Dim("T", min=1, max=4096), torch.export.Dim("B", min=1, max=512)
    time, batch = (1, 0) if module.batch_first else (0, 1)
    sizes: dict[str, Any] = {"input": {time: T, batch: B}, **({"lengths": {0: B}} if with_lengths else {})}
    return torch.export.export(module.eval(), (x,), more, dynamic_shapes=sizes)


class TestExport:
    @with_lengths
    @pytest.mark.parametrize("name", ["two layers, both directions", "batch_first, projection", "layer_norm"])
    def test_any_t_and_b_through_a_file(self, name, with_lengths, path, tmp_path):
        module = module_of(KINDS[name])
        torch.export.save(exported(module, with_lengths), tmp_path / "lstm.pt2")
        loaded = torch.export.load(tmp_path / "lstm.pt2").module()
        for T, B in SHAPES:
            x, more = inputs(module, T, B, with_lengths)
            close(loaded(x, **more), module(x, **more))

    def test_a_variant_with_resets_and_lengths(self):
        module = tritlstm.LSTM(D, H, bidirectional=True, peephole=True, coupled=True).eval()
        T, B = torch.export.Dim("T", min=1, max=64), torch.export.Dim("B", min=1, max=64)

        def case(steps: int, batch: int) -> tuple[Tensor, dict[str, Tensor]]:
            x, more = inputs(module, steps, batch, True)
            return x, {**more, "resets": torch.arange(steps * batch).view(steps, batch) % 3 == 0}

        sizes: dict[str, Any] = {"input": {0: T, 1: B}, "lengths": {0: B}, "resets": {0: T, 1: B}}
        x, more = case(5, 3)
        run = torch.export.export(module, (x,), more, dynamic_shapes=sizes).module()
        for shape in SHAPES[1:3]:
            x, more = case(*shape)
            close(run(x, **more), module(x, **more))

    def test_a_file_runs_in_a_process_that_has_only_the_operators(self, tmp_path):
        module = module_of(KINDS["two layers, both directions"])
        torch.export.save(exported(module, True), tmp_path / "lstm.pt2")
        x, more = inputs(module, 9, 4, True)
        torch.save((x, more["lengths"], module(x, **more)[0].detach()), tmp_path / "case.pt")
        code = """
import torch, tritlstm.ops
run = torch.export.load("lstm.pt2").module()
x, lengths, expected = torch.load("case.pt")
print((run(x, lengths=lengths)[0] - expected).abs().max().item())
"""
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, done.stderr
        assert float(done.stdout) < 1e-5

    def test_fixed_sizes_on_the_cpu_need_nothing_of_this_library(self):
        module = module_of({}).eval()
        program = torch.export.export(module, (torch.zeros(5, 3, D),))
        assert not [node for node in program.graph.nodes if "tritlstm" in str(node.target)]
        x = torch.randn(5, 3, D)
        close(program.module()(x), module(x))

    @pytest.mark.slow
    @pytest.mark.timeout(600)
    def test_aot_inductor_package(self, tmp_path):
        module = module_of(KINDS["two layers, both directions"])
        with torch.no_grad():
            package = torch._inductor.aoti_compile_and_package(
                exported(module, True), package_path=str(tmp_path / "lstm.pt2")
            )
            run = torch._inductor.aoti_load_package(package)
            for T, B in SHAPES[:3]:
                x, more = inputs(module, T, B, True)
                close(run(x, **more), module(x, **more))


@pytest.mark.cuda
class TestCudaGraph:
    def test_training_with_dropout_and_lengths_is_captured(self):
        """Replays draw new masks and follow new contents; a replay from the same seed equals the eager run."""
        module = tritlstm.LSTM(D, H, 2, dropout=0.5, bidirectional=True, device="cuda")
        x, lengths = torch.randn(5, 3, D, device="cuda"), torch.tensor([5, 0, 2], device="cuda")

        def step() -> Tensor:
            module.zero_grad(set_to_none=False)
            out = module(x, lengths=lengths)[0]
            out.square().sum().backward()
            return out

        graph, out = capture(step)
        graph.replay()
        first = out.clone()
        graph.replay()
        assert not torch.equal(out, first)
        module.eval()
        expected = module(x, lengths=lengths)[0]
        module.train()
        torch.manual_seed(1)
        graph.replay()
        captured = [out.clone(), *(p.grad.clone() for p in module.parameters())]
        torch.manual_seed(1)
        eager = [step(), *(p.grad for p in module.parameters())]
        for a, b in zip(captured, eager, strict=True):
            torch.testing.assert_close(a, b.detach(), rtol=1e-5, atol=1e-6)
        assert not torch.allclose(captured[0], expected)
        lengths.copy_(torch.tensor([1, 5, 0]))
        graph.replay()
        assert out[1:, 0].abs().sum() == 0
        assert out[:, 2].abs().sum() == 0
        assert out[:, 1].abs().sum() > 0
