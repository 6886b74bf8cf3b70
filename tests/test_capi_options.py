"""Any option of the Python library from C: the Python engine beside the module itself, and every refusal."""

from __future__ import annotations

import inspect
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from capi_harness import (
    ARGUMENT,
    CPU,
    CUDA,
    DTYPES,
    NULL,
    STATE,
    UNSUPPORTED,
    WEIGHTS,
    B,
    D,
    Failed,
    Library,
    T,
    ffi,
    make_forward,
    pointer,
    pointers,
    refuses,
    shared_build,
)
from safetensors.torch import save_file
from torch import Tensor

import tritlstm
from tritlstm.capi import build
from tritlstm.capi.network import MARK, MEMBERS, Network

H = 8


@pytest.fixture(scope="module")
def c() -> Library:
    return Library(ffi.dlopen(str(shared_build("python").library)))


def text(words: str) -> Any:
    return ffi.new("char[]", words.encode())


FEW = {"num_layers": 2, "bidirectional": True, "dtype": "float64"}
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("peephole=True, coupled=True, cell_clip=0.2", {**FEW, "batch_first": True}),
    ("peephole=True", {"proj_size": 3, "dtype": "float64"}),
    ("layer_norm=True, peephole=True, activations=('hard_sigmoid', 'tanh', 'relu')", FEW),
    ("layer_norm=True", {"num_layers": 3, "bias": False}),
    ("num_heads=4", FEW),
    ("num_heads=2, zoneout=(0.1, 0.3)", {"dtype": "float64"}),
    ("zoneout=0.4, recurrent_dropout=0.2, weight_dropout=0.1", FEW),
    ("dropout=0.5", FEW),
    ("dropout=0.5, zoneout=0.25, forget_bias=1.5, recompute=True", {"num_layers": 3}),
    ("forget_bias=2", {"dtype": "bfloat16"}),
    ("", {"batch_first": True, "num_layers": 2}),
]


class Pair:
    """A handle and the module that it should be, with the same weights, x and upstream gradients."""

    def __init__(self, c: Library, more: str, options: dict[str, Any], seed: int = 3):
        self.c, self.more = c, more
        given = {"num_layers": 1, "bias": True, "batch_first": False, "bidirectional": False, "proj_size": 0, **options}
        dtype = given.pop("dtype", "float32")
        self.dtype = getattr(torch, dtype)
        further = eval(f"dict({more})")  # the tests' own text
        self.module = tritlstm.LSTM(D, H, **given, **further, dtype=self.dtype)
        generator = torch.Generator().manual_seed(11)
        for weight in self.module.parameters():
            weight.data.copy_(0.4 * torch.randn(weight.shape, generator=generator, dtype=torch.float64))
        self.options = {**given, "input_size": D, "hidden_size": H, "dtype": DTYPES[dtype], "seed": seed}
        self.keep = text(more)
        self.lstm = c.create(**self.options, more=self.keep)
        c.set_weights(self.lstm, pointers(list(self.module.parameters())), CPU, NULL)
        self.first = given["batch_first"]
        width, directions = given["proj_size"] or H, 1 + given["bidirectional"]
        self.rows = given["num_layers"] * directions

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(self.dtype)

        order = (B, T) if self.first else (T, B)
        self.x, self.h0, self.c0 = draw(*order, D), draw(self.rows, B, width), draw(self.rows, B, H)
        self.grads = [draw(*order, width * directions), draw(self.rows, B, width), draw(self.rows, B, H)]
        self.resets = torch.rand(order, generator=generator) < 0.3
        self.lengths = torch.tensor([T, 2, 0][:B], dtype=torch.int32)
        self.reserve = c.scratch(self.lstm, T, B, True)[1]

    def struct(self, type_: str, resets: bool, lengths: bool) -> Any:
        args = self.c.struct(type_, steps=T, batch=B, x=pointer(self.x), h0=pointer(self.h0), c0=pointer(self.c0))
        self.bytes = (self.resets * torch.tensor(7)).to(torch.uint8)  # any byte but 0 resets
        args.resets = ffi.cast("uint8_t *", pointer(self.bytes)) if resets else NULL
        args.lengths = ffi.cast("int32_t *", pointer(self.lengths)) if lengths else NULL
        return args

    def forward(self, training: bool, resets: bool = False, lengths: bool = False) -> list[Tensor]:
        outputs = [torch.full_like(grad, torch.nan) for grad in self.grads]
        args = self.struct("forward_args", resets, lengths)
        args.out, args.h_n, args.c_n = map(pointer, outputs)
        if training:
            args.reserve, args.reserve_bytes = self.reserve.pointer, self.reserve.size
        self.c.forward(self.lstm, args)
        self.out = outputs[0]
        return outputs

    def backward(self, resets: bool = False, lengths: bool = False) -> list[Tensor]:
        parameters = list(self.module.parameters())
        found = [torch.full_like(value, torch.nan) for value in (self.x, self.h0, self.c0, *parameters)]
        args = self.struct("backward_args", resets, lengths)
        args.out, (args.grad_out, args.grad_h_n, args.grad_c_n) = pointer(self.out), map(pointer, self.grads)
        args.grad_x, args.grad_h0, args.grad_c0 = map(pointer, found[:3])
        array = pointers(found[3:])
        args.grad_weights, args.reserve, args.reserve_bytes = array, self.reserve.pointer, self.reserve.size
        self.c.backward(self.lstm, args)
        return found

    def seed(self) -> int:
        mark = bytes(ffi.buffer(ffi.cast("char *", self.reserve.pointer), MARK.size))
        return MARK.unpack(mark)[-1]

    def python(
        self, seed: int | None, resets: bool = False, lengths: bool = False
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The module's outputs and, in training, all gradients."""
        x, h0, c0 = (value.clone().requires_grad_() for value in (self.x, self.h0, self.c0))
        self.module.train(seed is not None)
        noise = None
        if seed is not None:
            torch.manual_seed(seed)
            noise = torch.tensor([seed, 0])
        out, (h_n, c_n) = self.module(
            x,
            (h0, c0),
            lengths=self.lengths if lengths else None,
            resets=self.resets if resets else None,
            noise=noise,
        )
        outputs, wanted = [out, h_n, c_n], [x, h0, c0, *self.module.parameters()]
        gradients = torch.autograd.grad(outputs, wanted, self.grads, allow_unused=True)
        dense = [torch.zeros_like(w) if g is None else g for w, g in zip(wanted, gradients, strict=True)]
        return [output.detach() for output in outputs], dense


def assert_all_close(found: list[Tensor], expected: list[Tensor]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        if theirs.dtype == torch.bfloat16:
            torch.testing.assert_close(ours, theirs, rtol=2**-7, atol=2**-7)
        else:
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("lengths", [False, True], ids=["whole", "lengths"])
@pytest.mark.parametrize("resets", [False, True], ids=["", "resets"])
@pytest.mark.parametrize(("more", "options"), VARIANTS, ids=[more[:30] or "plain" for more, _ in VARIANTS])
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_outputs_and_every_gradient_are_the_modules(c, more, options, resets, lengths):
    pair = Pair(c, more, options)
    assert_all_close(pair.forward(False, resets, lengths), pair.python(None, resets, lengths)[0])
    before = torch.random.get_rng_state()
    outputs = pair.forward(True, resets, lengths)
    gradients = pair.backward(resets, lengths)
    assert torch.equal(torch.random.get_rng_state(), before)  # the host's own
    expected = pair.python(pair.seed(), resets, lengths)
    assert_all_close(outputs, expected[0])
    assert_all_close(gradients, expected[1])
    pair.reserve.check()


def test_resets_and_lengths_do_something(c):
    """So that the comparison above compares them."""
    pair = Pair(c, "peephole=True", {})
    assert pair.resets[1:].any()
    plain, parted = pair.forward(False)[0], pair.forward(False, resets=True)[0]
    assert not torch.equal(plain, parted)
    assert not torch.equal(plain, pair.forward(False, lengths=True)[0])


@pytest.mark.parametrize(
    "more", ["dropout=0.5", "zoneout=0.5", "recurrent_dropout=0.5", "weight_dropout=0.5", "dropout=0.5, zoneout=0.5"]
)
def test_each_training_forward_draws_other_bits_of_the_seed(c, more):
    def outputs(seed: int) -> list[Tensor]:
        pair = Pair(c, more, {"num_layers": 2}, seed)
        made = [pair.forward(True)[0] for _ in range(3)]
        assert torch.equal(pair.forward(False)[0], pair.forward(False)[0])
        return made

    one, again, other = outputs(1), outputs(1), outputs(2)
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    for a, b in [(one[0], one[1]), (one[1], one[2]), (one[0], other[0])]:
        assert not torch.equal(a, b)


def test_backward_uses_the_bits_of_its_reserve_whatever_ran_since(c):
    pair = Pair(c, "dropout=0.5, zoneout=0.3", {"num_layers": 2, "dtype": "float64"})
    pair.forward(True)
    first, (out, kept) = pair.backward(), (pair.out, pair.reserve)
    pair.reserve = c.scratch(pair.lstm, T, B, True)[1]
    pair.forward(True)
    assert not torch.equal(pair.backward()[0], first[0])
    pair.out, pair.reserve = out, kept
    for ours, theirs in zip(pair.backward(), first, strict=True):
        assert torch.equal(ours, theirs)
    # Against finite differences on these bits.
    seed, step = pair.seed(), 1e-6

    def loss() -> Tensor:
        return sum((grad * value).sum() for grad, value in zip(pair.grads, pair.python(seed)[0], strict=True))

    for place in ((0, 0, 0), (2, 1, 3)):
        values = []
        for side in (1, -1):
            pair.x[place] += side * step
            values.append(loss())
            pair.x[place] -= side * step
        torch.testing.assert_close((values[0] - values[1]) / (2 * step), first[0][place], rtol=1e-5, atol=1e-7)


def test_threads_draw_dropout_at_once_without_mixing_their_bits(c):
    pairs = [Pair(c, "dropout=0.5", {"num_layers": 2, "dtype": "float64"}, seed) for seed in range(4)]
    before = torch.random.get_rng_state()
    gradients: dict[int, list[Tensor]] = {}

    def work(k: int) -> None:
        for _ in range(10):
            pairs[k].forward(True)
            gradients[k] = pairs[k].backward()

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(torch.random.get_rng_state(), before)
    for k, pair in enumerate(pairs):
        outputs, expected = pair.python(pair.seed())
        assert_all_close([pair.out], outputs[:1])
        assert_all_close(gradients[k], expected)


def test_the_reserve_knows_whether_resets_were_used(c):
    pair = Pair(c, "peephole=True", {})
    pair.forward(True, resets=True)
    with refuses(STATE, "use of lengths and resets"):
        pair.backward()
    pair.backward(resets=True)


@pytest.mark.parametrize("more", ["peephole=True, zoneout=0.2", "layer_norm=True", "num_heads=4", "dropout=0.9", ""])
def test_steps_are_the_sequence_in_evaluation(c, more):
    pair = Pair(c, more, {"num_layers": 2, "dtype": "float64"})
    handle = ffi.new("tritlstm_state **")
    c.state_create(pair.lstm, B, handle)
    state = ffi.gc(handle[0], c.lib.tritlstm_state_destroy)
    c.state_set(state, pointer(pair.h0), pointer(pair.c0), CPU, NULL)
    outs = []
    for t in range(T):
        rows = pair.resets[t].to(torch.uint8)
        c.state_reset(state, ffi.cast("uint8_t *", pointer(rows)), NULL)
        out = torch.empty(B, H, dtype=pair.dtype)
        x = pair.x[t].contiguous()
        c.step(state, pointer(x), pointer(out), NULL, 0, NULL)
        outs.append(out)
    h, cell = torch.empty_like(pair.h0), torch.empty_like(pair.c0)
    c.state_get(state, pointer(h), pointer(cell), CPU, NULL)
    assert_all_close([torch.stack(outs), h, cell], pair.forward(False, resets=True))


def test_a_mark_in_a_devices_memory_is_written_and_read_there(c):
    """What a CUDA device's network does with it, on memory of this machine."""
    words = text("zoneout=0.5")
    net = Network(ffi, 7, c.struct("options", input_size=D, hidden_size=H, more=words))
    net.on_cpu = False
    memory = torch.full((64,), 0xAB, dtype=torch.uint8)
    args = c.struct("forward_args", steps=T, batch=B, reserve=pointer(memory), reserve_bytes=64)
    seed = net.draw()
    net.write_mark(args, net.mark(args, seed))
    assert net.read_seed(args) == seed
    assert (memory[MARK.size :] == 0xAB).all()
    args.steps = T + 1
    assert net.read_seed(args) is None


@pytest.mark.cuda
@pytest.mark.parametrize("more", ["dropout=0.5", "zoneout=0.3, peephole=True", "layer_norm=True"])
def test_a_cuda_device_draws_the_bits_of_the_reserve(c, more):
    pair = Pair(c, more, {"num_layers": 2})
    weights, module = list(pair.module.parameters()), pair.module.cuda().train()
    lstm = c.create(**pair.options, more=pair.keep, device=CUDA)
    c.set_weights(lstm, pointers([weight.data for weight in weights]), CUDA, NULL)
    x, resets = pair.x.cuda(), pair.resets.cuda()
    flags = resets.to(torch.uint8)
    out, gradient = torch.empty(T, B, H, device="cuda"), torch.empty_like(x)
    reserve = torch.zeros(64, dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    kinds = ("forward_args", "backward_args")
    structs = [c.struct(kind, steps=T, batch=B, x=pointer(x), out=pointer(out)) for kind in kinds]
    for args in structs:
        args.resets = ffi.cast("uint8_t *", pointer(flags))
        args.reserve, args.reserve_bytes = pointer(reserve), 64
    c.forward(lstm, structs[0])
    upstream = torch.ones_like(out)
    structs[1].grad_out, structs[1].grad_x = pointer(upstream), pointer(gradient)
    c.backward(lstm, structs[1])
    torch.cuda.synchronize()
    seed = MARK.unpack(reserve.cpu().numpy().tobytes()[: MARK.size])[-1]
    torch.cuda.manual_seed(seed)
    leaf = x.clone().requires_grad_()
    expected = module(leaf, resets=resets, noise=torch.tensor([seed, 0], device="cuda"))[0]
    torch.testing.assert_close(out, expected.detach(), rtol=1e-3, atol=1e-4)
    (theirs,) = torch.autograd.grad(expected, leaf, upstream)
    torch.testing.assert_close(gradient, theirs, rtol=1e-3, atol=1e-4)


# -- weights ------------------------------------------------------------------------------------------------


def infos(c: Library, lstm: Any) -> list[tuple[str, int, int]]:
    count = ffi.new("int64_t *")
    c.num_weights(lstm, count)
    found = []
    for k in range(count[0]):
        info = ffi.new("tritlstm_weight *", {"size": ffi.sizeof("tritlstm_weight")})
        c.weight_info(lstm, k, info)
        assert info.bytes == 4 * info.rows * max(info.columns, 1)
        found.append((ffi.string(info.name).decode(), info.rows, info.columns))
    return found


def got(c: Library, pair: Pair, lstm: Any) -> list[Tensor]:
    found = [torch.full_like(weight, torch.nan) for weight in pair.module.parameters()]
    c.get_weights(lstm, pointers(found), CPU, NULL)
    return [value.detach() for value in found]


@pytest.mark.parametrize("more", ["peephole=True, layer_norm=True, forget_bias=1.0", "num_heads=2", "forget_bias=-1"])
def test_further_weights_come_after_the_plain_ones(c, more):
    pair = Pair(c, more, {"num_layers": 2, "bidirectional": True})
    named = dict(pair.module.named_parameters())
    found = infos(c, pair.lstm)
    assert found == [(name, *(*w.shape, 0)[:2]) for name, w in named.items()]
    plain_names = dict(torch.nn.LSTM(D, H, 2, bidirectional=True).named_parameters())
    assert [name for name, *_ in found[:16]] == list(plain_names)
    for ours, theirs in zip(got(c, pair, pair.lstm), named.values(), strict=True):
        assert torch.equal(ours, theirs)
    # As tritlstm.LSTM initialises them, from the seed; zeros; and the plain ones given.
    torch.manual_seed(3)
    pair.module.reset_parameters()
    fresh = [weight.detach().clone() for weight in pair.module.parameters()]
    for ours, theirs in zip(got(c, pair, c.create(**pair.options, more=pair.keep)), fresh, strict=True):
        assert torch.equal(ours, theirs)
    zeros = c.create(**pair.options, more=pair.keep, initial_weights=2)
    assert not any(weight.any() for weight in got(c, pair, zeros))
    plain = [torch.full_like(weight, 5) for weight in fresh[:16]]
    given = c.create(pointers(plain), **pair.options, more=pair.keep)
    for k, (ours, theirs) in enumerate(zip(got(c, pair, given), fresh, strict=True)):
        assert torch.equal(ours, torch.full_like(ours, 5) if k < 16 else theirs)
    with refuses(ARGUMENT, f"weight {len(found)} of {len(found)}"):
        c.weight_info(pair.lstm, len(found), ffi.new("tritlstm_weight *", {"size": ffi.sizeof("tritlstm_weight")}))


@pytest.mark.parametrize("stored", ["float32", "float64"])
def test_files_have_the_further_weights(c, tmp_path, stored):
    pair = Pair(c, "layer_norm=True, peephole=True, zoneout=0.1", {"num_layers": 2, "batch_first": True})
    dtype = getattr(torch, stored)
    weights = {f"rnn.{name}": value.to(dtype) for name, value in pair.module.state_dict().items()}
    save_file(weights, tmp_path / "m")
    members = {"prefix": text("rnn."), "batch_first": 1, "dtype": DTYPES["float32"], "more": pair.keep}
    loaded = c.load(tmp_path / "m", **members)
    for ours, theirs in zip(got(c, pair, loaded), pair.module.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    expected = pair.forward(False)
    pair.lstm = loaded
    assert_all_close(pair.forward(False), expected)

    def refused(words: str, more: str = pair.more) -> None:
        members["more"] = text(more)
        save_file(weights, tmp_path / "m")
        with refuses(WEIGHTS, words):
            c.load(tmp_path / "m", **members)

    refused("the file has 'rnn.weight_ch_l0': it is of an LSTM with peepholes", "layer_norm=True")
    refused("the file has 'rnn.norm_ih_l0': it is of an LSTM with layer normalisation", "peephole=True")
    refused("'rnn.weight_hh_l0' has shape [32, 8] instead of [32, 2]", pair.more + ", num_heads=4")
    gain = weights.pop("rnn.norm_c_l1")
    refused("the file has no 'rnn.norm_c_l1'")
    weights["rnn.norm_c_l1"] = gain[1:].clone()
    refused("'rnn.norm_c_l1' has shape [7] instead of [8]")


def test_the_handle_keeps_a_copy_of_the_text(c):
    words = text("zoneout=0.5, peephole=True")
    lstm = c.create(more=words)
    words[0:7] = b"nothing"
    options = c.struct("options")
    c.get_options(lstm, options)
    assert ffi.string(options.more) == b"zoneout=0.5, peephole=True"
    again = ffi.new("tritlstm **")
    c.__getattr__("create")(options, NULL, again)
    assert infos(c, again[0]) == infos(c, lstm)
    c.lib.tritlstm_destroy(again[0])
    c.get_options(c.create(more=text("")), options)
    assert options.more == NULL


def test_explain_shows_the_options(c):
    lstm = c.create(more=text("zoneout=0.25, dropout=0.5"), num_layers=2)
    buffer = ffi.new("char[]", 4096)
    c.explain(lstm, T, B, 1, buffer, 4096, NULL)
    words = ffi.string(buffer).decode()
    assert "options: 4, 6, num_layers=2, dropout=0.5, zoneout=(0.25, 0.25)\n" in words
    assert "random bits: of a seed for each forward with a reserve" in words
    assert "tritlstm_step: torch.lstm_cell" not in words


# -- refusals -----------------------------------------------------------------------------------------------


REFUSED = [
    ("hidden_size=[3, 4]", "hidden_size is a member of the struct, or the file's: set it there and leave it out"),
    ("proj_size=2", "proj_size is a member of the struct"),
    ("device='cpu'", "device is a member of the struct"),
    ("dropuot=0.1", "tritlstm.LSTM has no 'dropuot'; known are dropout, peephole, coupled"),
    ("zoneout=2", "zoneout must be a probability in [0, 1), or one of h and one of c, got 2"),
    ("num_heads=4", "num_heads must divide hidden_size, got num_heads=4 and hidden_size=6"),
    ("activations=('hardsigmoid', 'tanh', 'tanh')", "known are sigmoid, tanh, relu, hard_sigmoid"),
    ("cell_clip='3'", "more is \"cell_clip='3'\""),
    ("cell_clip=1" + "0" * 400, "int too large to convert to float"),
    ("dropout=1.5", "dropout should be a number in range [0, 1]"),
    ("forget_bias=(1, 2)", "more is 'forget_bias=(1, 2)': "),
    ("forget_bias=[1.0, 2.0]", "more is 'forget_bias=[1.0, 2.0]': "),
    ("peephole=True, peephole=False", "peephole stands twice: leave one out"),
    ("peephole", "something in it has no name; write name=value, separated by commas, such as peephole=True"),
    ("__import__('os').abort()", "something in it has no name"),
    ("dropout=__import__('os').abort()", "the value of dropout, \"__import__('os').abort()\", is no literal"),
    ("dropout=x", "the value of dropout, 'x', is no literal; write a number, True, None, a 'string' or a (tuple)"),
    ("dropout={[]: 1}", "the value of dropout, '{[]: 1}', is no literal"),
    ("**{'peephole': True}", "** is not read"),
    ("peephole=True) + f(", "something in it has no name"),
    ("peephole=True)(coupled=True", "something in it has no name"),
    ("peephole=", "invalid syntax"),
    ("peephole=True, 'x", "unterminated string literal"),
    ("(" * 3000, "write name=value"),
    ("dropout=" + "-" * 4000 + "1", "more is 'dropout=---"),
    ("x" * 4097, 'more is longer than 4096 bytes: it begins "xxxx'),
]


@pytest.mark.parametrize(("more", "words"), REFUSED, ids=[more[:30] for more, _ in REFUSED])
def test_bad_texts_are_refused(c, capfd, tmp_path, more, words):
    with refuses(ARGUMENT, words):
        c.create(more=text(more))
    save_file(torch.nn.LSTM(D, 6).state_dict(), tmp_path / "m")
    with refuses(ARGUMENT, words):
        c.load(tmp_path / "m", more=text(more))
    assert capfd.readouterr() == ("", "")


def test_bytes_that_are_no_text_are_refused(c):
    with refuses(ARGUMENT, "more is not UTF-8"):
        c.create(more=ffi.new("char[]", b"\xff"))


def test_a_projection_refuses_what_it_can_not_have(c):
    with refuses(ARGUMENT, "layer_norm can't be had with a projection (proj_size=2)"):
        c.create(more=text("layer_norm=True"), proj_size=2)


def test_spaces_comments_and_trailing_commas_are_python(c):
    lstm = c.create(more=text(" peephole = True , # as in 2000\n coupled=True, "))
    assert len(infos(c, lstm)) == 5


def test_the_engine_without_python_refuses_with_the_remedy(tmp_path: Path):
    c = Library(ffi.dlopen(str(shared_build("aot").library)))
    words = 'more is "peephole=True", but the engine "aot" runs the plain LSTM alone: leave it NULL, or link libtrit'
    with refuses(UNSUPPORTED, words):
        c.create(more=text("peephole=True"))
    save_file(torch.nn.LSTM(D, 6).state_dict(), tmp_path / "m")
    with refuses(UNSUPPORTED, words):
        c.load(tmp_path / "m", more=text("peephole=True"))
    lstm = c.create(more=text(""))
    x, out, resets = torch.zeros(T, B, D), torch.zeros(T, B, 6), torch.zeros(T, B, dtype=torch.uint8)
    args = make_forward(c, x, out, resets=ffi.cast("uint8_t *", pointer(resets)))
    words = 'resets is given, but the engine "aot" has none: leave it NULL and call once for each stretch'
    with refuses(UNSUPPORTED, words):
        c.forward(lstm, args)
    back = c.struct("backward_args", steps=T, batch=B, x=pointer(x), out=pointer(out), resets=args.resets)
    with refuses(UNSUPPORTED, words):
        c.backward(lstm, back)


def test_resets_that_are_written_over_are_refused(c):
    out = torch.zeros(T, B, 6)
    args = make_forward(c, torch.zeros(T, B, D), out, resets=ffi.cast("uint8_t *", pointer(out)))
    with refuses(ARGUMENT, "resets and out overlap in memory"):
        c.forward(c.create(), args)


def test_overlapping_further_weights_are_refused(c):
    pair = Pair(c, "peephole=True", {})
    weights = list(pair.module.parameters())
    with refuses(ARGUMENT, "weights and weights overlap"):
        c.get_weights(pair.lstm, pointers([None] * 3 + [weights[4].data, weights[4].data]), CPU, NULL)


def test_many_handles_and_refusals_keep_no_memory(c):
    """Resident memory after the first hundreds of handles with texts of 4 kB and further weights stays."""

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    good, bad = text("peephole=True" + " " * 4000), text("dropuot=1" + " " * 4000)
    before = 0
    for k in range(900):
        c.create(more=good)
        with pytest.raises(Failed):
            c.create(more=bad)
        if k == 300:
            before = resident()
    assert resident() - before < 2_000_000  # the texts alone are 600 * 2 * 4 kB


def test_the_names_in_the_header_are_all_there_are():
    header = (build.SOURCE / "include/tritlstm.h").read_text()
    names = header.split("The names are ")[1].split("; what they do")[0]
    found = names.replace("*", " ").replace(" and ", ", ").split(",")
    known = [name for name in inspect.signature(tritlstm.LSTM).parameters if name not in MEMBERS]
    assert [name.strip() for name in found] == known
