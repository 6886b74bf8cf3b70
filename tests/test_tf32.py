"""TF32 in torch's own products of a backward pass, allowed for its time and as torch was told before."""

from __future__ import annotations

import threading
import types
from collections.abc import Callable, Iterator

import pytest
import torch

from tritlstm import chains, layer, normed, pipeline, plan, stack, tf32

MATMUL = torch.backends.cuda.matmul


def state() -> tuple[str, bool | None, str | None]:
    """fp32_precision, and what the older switches say; None where torch refuses to, since the two are at odds."""
    try:
        return MATMUL.fp32_precision, MATMUL.allow_tf32, torch.get_float32_matmul_precision()
    except RuntimeError:
        return MATMUL.fp32_precision, None, None


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    before = MATMUL.fp32_precision
    yield
    MATMUL.allow_tf32 = False
    MATMUL.fp32_precision = before


def untouched() -> None:
    pass


def forbidden() -> None:
    MATMUL.allow_tf32 = False


def allowed() -> None:
    MATMUL.allow_tf32 = True


def newly(precision: str) -> Callable[[], None]:
    return lambda: setattr(MATMUL, "fp32_precision", precision)


def test_what_was_inherited_is_inherited_afterwards():
    def everywhere(precision: str) -> None:  # not torch.backends.fp32_precision, which torch's own tests lock
        torch._C._set_fp32_precision_setter("generic", "all", precision)

    before = torch.backends.fp32_precision
    MATMUL.fp32_precision = "none"
    try:
        for first, then in (("ieee", "tf32"), ("tf32", "ieee")):
            everywhere(first)
            assert MATMUL.fp32_precision == first
            with tf32.allowed():
                assert MATMUL.fp32_precision == "tf32"
            assert MATMUL.fp32_precision == first
            everywhere(then)
            assert MATMUL.fp32_precision == then
    finally:
        everywhere(before)


@pytest.mark.parametrize(
    "told", [untouched, forbidden, allowed, newly("tf32"), newly("ieee"), newly("none")],
    ids=["untouched", "forbidden", "allowed", "new tf32", "new ieee", "new none"],
)  # fmt: skip
@pytest.mark.parametrize("fails", [False, True], ids=["", "fails"])
def test_torch_is_left_as_it_was_told(told, fails):
    told()
    before = state()
    try:
        with tf32.allowed():
            assert MATMUL.fp32_precision == "tf32"
            if told in (untouched, forbidden, allowed):  # else it is at odds with the older switches already
                assert MATMUL.allow_tf32
            with tf32.allowed():
                assert MATMUL.fp32_precision == "tf32"
            assert MATMUL.fp32_precision == "tf32"
            if fails:
                raise ZeroDivisionError
    except ZeroDivisionError:
        pass
    assert state() == before


def test_the_last_thread_restores():
    before, inside, leave = state(), threading.Event(), threading.Event()

    def other() -> None:
        with tf32.allowed():
            inside.set()
            leave.wait(30)

    thread = threading.Thread(target=other)
    with tf32.allowed():
        thread.start()
        assert inside.wait(30)
    assert MATMUL.fp32_precision == "tf32"
    leave.set()
    thread.join()
    assert state() == before


@pytest.mark.parametrize(
    ("is_cuda", "dtype", "precision", "expected"),
    [
        (True, torch.float32, "tf32", "tf32"),
        (True, torch.float32, "ieee", "none"),
        (False, torch.float32, "tf32", "none"),
        (True, torch.float16, "tf32", "none"),
    ],
)
def test_products_of_backward_are_as_those_of_the_kernels(monkeypatch, is_cuda, dtype, precision, expected):
    MATMUL.allow_tf32 = False
    MATMUL.fp32_precision = "none"
    monkeypatch.setattr(plan, "dot_precision", lambda x: precision)
    x = types.SimpleNamespace(is_cuda=is_cuda, dtype=dtype)
    seen = tf32.of_backward(lambda *args, needs: (MATMUL.fp32_precision, args, needs))
    assert seen(1, 2, 3, x, 4, needs=5) == (expected, (1, 2, 3, x, 4), 5)
    assert MATMUL.fp32_precision == "none"


@pytest.mark.parametrize("function", [
    layer.gradients, chains.backward, stack.backward, pipeline.backward, normed.backward,
], ids=lambda f: f.__module__)  # fmt: skip
def test_every_backward_pass_does_so(monkeypatch, function):
    """Not by its results, which a CPU makes without TF32: by what torch was told when it first looks at x."""

    class Looked(Exception):
        pass

    class X:
        is_cuda, dtype = True, torch.float32

        @property
        def shape(self):
            raise Looked(MATMUL.fp32_precision)

    monkeypatch.setattr(plan, "dot_precision", lambda x: "tf32")
    rest = [None] * (len(function.__wrapped__.__code__.co_varnames[: function.__wrapped__.__code__.co_argcount]) - 4)
    with pytest.raises(Looked, match="tf32"):
        function(None, None, None, X(), *rest)


@pytest.mark.cuda
def test_products_of_tf32_have_other_bits():
    torch.manual_seed(0)
    a = torch.randn(256, 256, device="cuda")
    MATMUL.allow_tf32 = False
    exact = a.double() @ a.double()
    with tf32.allowed():
        short = a @ a
    plain = a @ a
    errors = [(got.double() - exact).abs().max().item() for got in (plain, short)]
    assert errors[0] < 1e-4 < errors[1] < 1e-1
