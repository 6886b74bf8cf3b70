"""The pages of docs/: every Python block runs, page by page from top to bottom, and every link leads somewhere.

The blocks assert what they show. Pages of the C library are tested in test_capi_hosts.py, commands in
test_distributed.py.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

DOCS = Path(__file__).resolve().parents[1] / "docs"
ELSEWHERE = {"c.md", "c-cuda.md"}
PAGES = [page for page in sorted(DOCS.glob("*.md")) if page.name not in ELSEWHERE]


def blocks(page: Path) -> list[tuple[str, str]]:
    return re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.S | re.M)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
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
        if language == "python":
            exec(compile(body, page.name, "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page):
    prose = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)
    links = re.findall(r"\]\(([^)#]+)", prose)
    assert [link for link in links if "://" not in link and not (DOCS / link).exists()] == []
