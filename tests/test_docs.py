"""The pages of docs/: every Python block runs, page by page from top to bottom, and every link leads somewhere.

The blocks assert what they show. Pages of the C library are tested in test_capi_hosts.py, commands in
test_distributed.py; a block too slow for a page begins with the test file that runs the same calls.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import tritlstm
from tritlstm import convert

DOCS = Path(__file__).resolve().parents[1] / "docs"
ELSEWHERE = {"c.md", "c-cuda.md"}
TABLES = {"features.md"}  # held to the README's by test_readme.py
RUN_ELSEWHERE = re.compile(r"# run by (tests/\w+\.py)\n")
PAGES = sorted(DOCS.glob("*.md"))


def blocks(page: Path) -> list[tuple[str, str]]:
    return re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.S | re.M)


@pytest.mark.parametrize("page", [p for p in PAGES if p.name not in ELSEWHERE | TABLES], ids=lambda page: page.name)
def test_every_python_block_runs(page, tmp_path, monkeypatch):
    languages = {language for language, _ in blocks(page)}
    assert languages <= {"python", "sh"}
    assert "python" in languages
    if "onnxruntime" in page.read_text(encoding="utf-8"):
        pytest.importorskip("onnxruntime", reason="pip install onnxruntime")
    monkeypatch.chdir(tmp_path)
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    for language, body in blocks(page):
        if language == "python" and (elsewhere := RUN_ELSEWHERE.match(body)):
            tests = (DOCS.parent / elsewhere[1]).read_text(encoding="utf-8")
            calls = set(re.findall(r"torch\.[\w.]+(?=\()", body)) - {"torch.testing.assert_close"}
            assert calls
            assert {call for call in calls if call not in tests} == set()
        elif language == "python":
            exec(compile(body, page.name, "exec"), names)


class TestWhatDiffersFromTorchsLSTM:
    """Statements of coming-from-nn-lstm.md that have no block."""

    @pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
    def test_script_is_refused_and_trace_works(self):
        torch.jit.script(nn.LSTM(3, 4))
        for module in (tritlstm.LSTM(3, 4), tritlstm.LSTMCell(3, 4)):
            with pytest.raises((RuntimeError, ValueError)):
                torch.jit.script(module)
        lstm = tritlstm.LSTM(3, 4)
        traced = torch.jit.trace(lstm, (torch.randn(5, 2, 3),))
        x = torch.randn(9, 4, 3)
        torch.testing.assert_close(traced(x), convert.to_torch(lstm)(x))

    @pytest.mark.filterwarnings("ignore:.*quantization is deprecated")
    def test_dynamic_quantization_takes_torchs_classes_alone(self):
        kinds = {nn.LSTM, nn.LSTMCell, nn.Linear}
        model = nn.ModuleDict({"lstm": tritlstm.LSTM(3, 4), "cell": tritlstm.LSTMCell(3, 4), "head": nn.Linear(4, 2)})
        quantized = torch.ao.quantization.quantize_dynamic(model, kinds)
        assert type(quantized["head"]) is not nn.Linear
        assert (type(quantized["lstm"]), type(quantized["cell"])) == (tritlstm.LSTM, tritlstm.LSTMCell)
        assert torch.equal(quantized["lstm"].weight_hh_l0, model["lstm"].weight_hh_l0)

        theirs = torch.ao.quantization.quantize_dynamic(nn.Sequential(convert.to_torch(model["lstm"])), kinds)
        assert type(theirs[0]) is torch.ao.nn.quantized.dynamic.LSTM
        x = torch.randn(5, 2, 3)
        # int8 rounds inputs and weights to about 1/255 of their range; some five such errors meet.
        torch.testing.assert_close(theirs(x)[0], model["lstm"](x)[0], rtol=0, atol=5 / 255)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page):
    prose = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)
    links = re.findall(r"\]\(([^)#]+)", prose)
    assert [link for link in links if "://" not in link and not (DOCS / link).exists()] == []
