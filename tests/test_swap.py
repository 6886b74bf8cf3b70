"""tritlstm.swap: which modules it turns, and what it leaves as it was."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import tritlstm
from tritlstm import functional


class Tagger(nn.Module):
    """Two names for one LSTM, a cell in a list, and layers around them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 4)
        self.rnn = nn.LSTM(4, 6, num_layers=2, bidirectional=True, dropout=0.5)
        self.cells = nn.ModuleList([nn.LSTMCell(12, 5)])
        self.same = self.rnn
        self.head = nn.Linear(5, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        out, _ = self.rnn(self.embed(tokens))
        return self.head(self.cells[0](out[-1])[0])


def test_every_lstm_and_cell_is_turned_and_computes_the_same():
    model = Tagger().eval()
    tokens = torch.randint(11, (7, 2))
    expected = copy.deepcopy(model)(tokens)
    assert tritlstm.swap(model) is model
    assert type(model.rnn) is tritlstm.LSTM
    assert type(model.cells[0]) is tritlstm.LSTMCell
    assert model.same is model.rnn
    assert type(model.head) is nn.Linear
    assert not any(type(m) in (nn.LSTM, nn.LSTMCell) for m in model.modules())
    assert torch.equal(model(tokens), expected)


@pytest.mark.parametrize(("before", "after"), [(nn.LSTM, tritlstm.LSTM), (nn.LSTMCell, tritlstm.LSTMCell)])
def test_the_model_itself_may_be_one(before, after):
    module = before(4, 6)
    assert type(tritlstm.swap(module)) is after


def test_parameters_stay_the_same_objects_and_an_optimizer_goes_on():
    model = Tagger()
    parameters = dict(model.named_parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tritlstm.swap(model)
    assert all(value is parameters[name] for name, value in model.named_parameters())
    assert model.state_dict().keys() == Tagger().state_dict().keys()
    before = model.rnn.weight_hh_l1.clone()
    model(torch.randint(11, (7, 2))).square().sum().backward()
    optimizer.step()
    assert not torch.equal(model.rnn.weight_hh_l1, before)


@pytest.mark.parametrize("training", [True, False])
def test_training_flag_dtype_and_frozen_parameters_stay(training):
    model = Tagger().double().train(training)
    model.rnn.weight_ih_l0.requires_grad_(False)
    tritlstm.swap(model)
    assert model.rnn.training == training
    assert model.rnn.weight_ih_l0.dtype == torch.float64
    assert not model.rnn.weight_ih_l0.requires_grad
    assert model.rnn.dropout == 0.5


def test_hooks_stay_and_their_handles_still_remove_them():
    model, calls = Tagger(), []
    handle = model.rnn.register_forward_hook(lambda *_: calls.append("forward"))
    model.rnn.register_forward_pre_hook(lambda *_: calls.append("before"))
    tritlstm.swap(model)
    model(torch.randint(11, (7, 2)))
    assert calls == ["before", "forward"]
    handle.remove()
    model(torch.randint(11, (7, 2)))
    assert calls == ["before", "forward", "before"]


class Subclass(nn.LSTM):
    def forward(self, input, hx=None):
        return super().forward(2 * input, hx)


def test_a_subclass_is_left_and_named():
    model = nn.ModuleDict({"own": Subclass(4, 6), "plain": nn.LSTM(4, 6)})
    with pytest.warns(UserWarning, match=r"left own \(Subclass\) as before.*Derive it from tritlstm\.LSTM"):
        tritlstm.swap(model)
    assert type(model["own"]) is Subclass
    assert type(model["plain"]) is tritlstm.LSTM


def test_a_subclass_as_the_model_itself_is_left_and_named():
    with pytest.warns(UserWarning, match=r"left the model itself \(Subclass\)"):
        assert type(tritlstm.swap(Subclass(4, 6))) is Subclass


def test_swapping_twice_and_subclasses_of_this_library_pass_in_silence(recwarn):
    class Mine(tritlstm.LSTMCell):
        pass

    model = tritlstm.swap(tritlstm.swap(nn.ModuleList([nn.LSTM(4, 6), Mine(4, 6)])))
    assert [type(m) for m in model] == [tritlstm.LSTM, Mine]
    assert len(recwarn) == 0


def test_other_recurrent_modules_are_left():
    model = nn.ModuleList([nn.GRU(4, 6), nn.RNN(4, 6), nn.GRUCell(4, 6)])
    assert [type(m) for m in tritlstm.swap(model)] == [nn.GRU, nn.RNN, nn.GRUCell]


def test_what_is_not_a_module_is_refused():
    with pytest.raises(TypeError, match=r"expects a torch\.nn\.Module, got dict; pass the model itself"):
        tritlstm.swap({"rnn": nn.LSTM(4, 6)})


def test_a_swapped_model_can_be_copied_and_compiled():
    model = tritlstm.swap(Tagger()).eval()
    tokens = torch.randint(11, (7, 2))
    expected = model(tokens)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(tokens), expected)
    assert torch.equal(copy.deepcopy(model)(tokens), expected)


class TextRecognizer(nn.Module):
    """A CRNN (Shi, Bai & Yao 2015): columns of a convolved picture through two bidirectional LSTMs."""

    def __init__(self) -> None:
        super().__init__()
        self.picture = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d((8, 2)))
        self.lower = nn.LSTM(4, 8, bidirectional=True)
        self.between = nn.Linear(16, 6)
        self.upper = nn.LSTM(6, 8, bidirectional=True)
        self.head = nn.Linear(16, 11)

    def forward(self, pictures: Tensor) -> Tensor:
        columns = self.picture(pictures).squeeze(2).permute(2, 0, 1)
        return self.head(self.upper(self.between(self.lower(columns)[0]))[0]).log_softmax(-1)


class Speaker(nn.Module):
    """After Tacotron 2 (Shen et al. 2018): a packed encoder, and a decoder of two cells with attention."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.encoder = nn.LSTM(6, 4, batch_first=True, bidirectional=True)
        self.attention_cell = nn.LSTMCell(3 + 8, 7)
        self.query = nn.Linear(7, 8)
        self.decoder_cell = nn.LSTMCell(7 + 8, 7)
        self.frame = nn.Linear(7, 3)

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(self.embed(tokens), lengths, True, enforce_sorted=False)
        memory, _ = nn.utils.rnn.pad_packed_sequence(self.encoder(packed)[0], batch_first=True)
        inside = torch.arange(tokens.size(1)) < lengths[:, None]
        frame, context = memory.new_zeros(len(tokens), 3), memory.new_zeros(len(tokens), 8)
        lower = upper = None
        frames = []
        for _ in range(4):
            lower = self.attention_cell(torch.cat((frame, context), -1), lower)
            scores = (memory @ self.query(lower[0])[..., None]).squeeze(-1).masked_fill(~inside, -torch.inf)
            context = (scores.softmax(-1)[:, None] @ memory).squeeze(1)
            upper = self.decoder_cell(torch.cat((lower[0], context), -1), upper)
            frame = self.frame(upper[0])
            frames.append(frame)
        return torch.stack(frames)


REAL = {
    "text recognition": (TextRecognizer, lambda: (torch.randn(2, 1, 8, 20, dtype=torch.float64),)),
    "speech": (Speaker, lambda: (torch.randint(11, (3, 7)), torch.tensor([4, 7, 2]))),
}


@pytest.mark.parametrize("operators", [False, True], ids=["torch", "operators"])
@pytest.mark.parametrize(("model", "draw"), REAL.values(), ids=REAL.keys())
def test_a_whole_model_keeps_its_values_and_its_training(model, draw, operators, monkeypatch):
    torch.manual_seed(0)
    before = model().double()
    after = tritlstm.swap(copy.deepcopy(before))
    if operators:
        monkeypatch.setattr(functional, "runs_kernels", lambda x: True)
    inputs = draw()
    results = []
    for each in (before, after):
        optimizer = torch.optim.Adam(each.parameters(), lr=0.01)
        losses = []
        for _ in range(3):
            optimizer.zero_grad()
            loss = each(*inputs).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        results.append([*losses, *each.parameters()])
    for a, b in zip(*results, strict=True):  # float64; Adam divides by the root of small squares
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


def test_encodec_of_transformers():
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    torch.manual_seed(0)
    config = transformers.EncodecConfig(hidden_size=32, num_filters=4, codebook_dim=32)
    model = transformers.EncodecModel(config).eval()
    sound = torch.randn(2, 1, 3200)
    expected = model(sound).audio_values
    tritlstm.swap(model)
    assert sum(type(m) is tritlstm.LSTM for m in model.modules()) == 2
    assert torch.equal(model(sound).audio_values, expected)
