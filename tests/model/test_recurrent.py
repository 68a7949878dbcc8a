"""Recurrent layers against torch's modules, NumPy and a plain loop over time; documents of a pack beside each other."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_sequence

from bigmodel.checks.audit import count_by_torch
from bigmodel.checks.leak import isolation, packed_equals_single
from bigmodel.config.settings import ClassificationSettings, DataSettings, ModelSettings
from bigmodel.data.load.batch import Batch
from bigmodel.data.objectives.examples import Pair
from bigmodel.data.plan.visible_pairs import visible_pairs
from bigmodel.inspect.memory import LiveBytes
from bigmodel.model.attention_masks import mask_matrices
from bigmodel.model.init import init_weights
from bigmodel.model.recurrent.layer import Layer
from bigmodel.model.recurrent.model import Recurrent, attention_heads, build_model
from bigmodel.model.recurrent.timeline import Timeline, timeline
from tests.support.example_batches import batch_of, text

WIDTH, VOCABULARY, LENGTHS = 6, 64, (3, 9, 0, 1, 7)
TORCH = {"rnn": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}
ALL: dict[str, dict[str, Any]] = {
    "rnn": {"kind": "rnn"},
    "lstm": {"kind": "lstm", "dropout": 0.3, "embedding_dropout": 0.1, "tied_embeddings": True},
    "gru": {"kind": "gru", "backpropagation_tokens": 3},
    "peepholes": {"kind": "lstm", "peepholes": True, "backpropagation_tokens": 4},
    "pairs": {"kind": "lstm_encoder_decoder", "dropout": 0.2, "embedding_dropout": 0.2, "separate_embeddings": True},
}


def layer_of(**settings: Any) -> Layer:
    """In float64, every weight random."""
    layer = Layer(ModelSettings(num_layers=1, hidden_size=WIDTH, **settings), 0).double()
    draw = torch.Generator().manual_seed(3)
    for parameter in layer.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=draw, dtype=torch.float64) * 0.5)
    return layer


def inputs_of(layer: Layer) -> tuple[Timeline, Tensor, tuple[Tensor, ...]]:
    """The documents of LENGTHS, their rows in order, first states."""
    cu_seqlens = torch.tensor([0, *np.cumsum(LENGTHS)], dtype=torch.int32)
    draw = torch.Generator().manual_seed(4)
    line = timeline(cu_seqlens, sum(LENGTHS))

    def rows(count: int) -> Tensor:
        return torch.randn(count, WIDTH, generator=draw, dtype=torch.float64).requires_grad_()

    first = (rows(4), rows(4)) if layer.cell == "lstm" else (rows(4),)
    return line, rows(sum(LENGTHS)), first


def results(out_TH: Tensor, last: Sequence[Tensor], leaves: Sequence[Tensor]) -> list[Tensor]:
    """Outputs, and gradients of a sum that weighs every number differently."""
    outputs = [out_TH, *last]
    total = sum((one * torch.arange(one.numel()).view_as(one).sin()).sum() for one in outputs)
    return [*outputs, *torch.autograd.grad(total, leaves)]


def ours(layer: Layer) -> list[Tensor]:
    line, x_TH, first = inputs_of(layer)
    return results(*layer(x_TH, line, None, first), [x_TH, *first, *layer.parameters()])


def assert_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def by_loop(layer: Layer, every: int) -> list[Tensor]:
    """The reference: each document alone, a loop over its tokens, gates written out; the state is detached by hand."""
    line, x_TH, first = inputs_of(layer)
    flat_TH, out, last = x_TH[line.place_T], [], []
    for number, rows in enumerate(flat_TH[: sum(LENGTHS)].split(LENGTHS)):
        if number not in line.documents_N.tolist():
            continue
        state = [side[line.documents_N.tolist().index(number)] for side in first]
        for place, x_H in enumerate(rows):
            if every and place and place % every == 0:
                state = [one.detach() for one in state]
            state = one_token(layer, x_H, state)
            out.append(state[0])
        last.append((number, state))
    ends = dict(last)
    ordered = [torch.stack([ends[number][side] for number in line.documents_N.tolist()]) for side in range(len(first))]
    return results(torch.stack(out)[line.order_T], ordered, [x_TH, *first, *layer.parameters()])


def one_token(layer: Layer, x_H: Tensor, state: list[Tensor]) -> list[Tensor]:
    a, u = layer.input_weight @ x_H + layer.bias, layer.state_weight @ state[0]
    if layer.cell == "rnn":
        return [torch.tanh(a + u)]
    if layer.cell == "gru":
        (ar, az, an), (ur, uz, un) = a.chunk(3), u.chunk(3)
        r, z = torch.sigmoid(ar + ur), torch.sigmoid(az + uz)
        return [(1 - z) * torch.tanh(an + r * (un + layer.candidate_bias)) + z * state[0]]
    i, f, g, o = (a + u).chunk(4)
    pi, pf, po = torch.zeros(3 * WIDTH).chunk(3) if layer.peepholes is None else layer.peepholes.chunk(3)
    c = torch.sigmoid(f + pf * state[1]) * state[1] + torch.sigmoid(i + pi * state[1]) * torch.tanh(g)
    return [torch.sigmoid(o + po * c) * torch.tanh(c), c]


@pytest.mark.parametrize("kind", TORCH)
def test_outputs_and_gradients_are_those_of_torch_s_modules_on_packed_sequences(kind: str) -> None:
    layer = layer_of(kind=kind)
    line, x_TH, first = inputs_of(layer)
    module = TORCH[kind](WIDTH, WIDTH).double()
    more = torch.zeros_like(layer.bias)
    if layer.candidate_bias is not None:
        more[2 * WIDTH :] = layer.candidate_bias
    for name, value in zip(
        module.state_dict(), (layer.input_weight, layer.state_weight, layer.bias, more), strict=True
    ):
        module.get_parameter(name).data.copy_(value)
    rows = x_TH[line.place_T].split(LENGTHS)
    packed = pack_sequence([rows[number] for number in line.documents_N])
    begin = tuple(state[None] for state in first)
    out, last = module(packed, begin if kind == "lstm" else begin[0])
    last = [state[0] for state in (last if kind == "lstm" else (last,))]
    expected = results(out.data, last, [x_TH, *first, *module.parameters()])
    if kind == "gru":  # the second bias of r and z adds nothing to the first
        expected[-1] = expected[-1][2 * WIDTH :]
    assert_equal(ours(layer), expected if kind == "gru" else expected[:-1])


@pytest.mark.parametrize("every", [0, 1, 3])
@pytest.mark.parametrize("kind", TORCH)
def test_torch_s_kernels_which_a_gpu_runs_give_the_same_as_the_scan(kind: str, every: int) -> None:
    layer = layer_of(kind=kind, backpropagation_tokens=every)
    line, x_TH, first = inputs_of(layer)
    assert_equal(results(*layer.by_torch(x_TH, line, first), [x_TH, *first, *layer.parameters()]), ours(layer))


@pytest.mark.parametrize("every", [0, 1, 3, 4, 100])
@pytest.mark.parametrize("kind", ["rnn", "gru", "lstm", "peepholes"])
def test_a_state_goes_on_where_its_gradient_is_cut(kind: str, every: int) -> None:
    given = {"kind": "lstm", "peepholes": True} if kind == "peepholes" else {"kind": kind}
    layer = layer_of(**given, backpropagation_tokens=every)
    assert_equal(ours(layer), by_loop(layer, every))


def test_peepholes_are_those_of_gers_and_schmidhuber_in_numpy() -> None:
    layer = layer_of(kind="lstm", peepholes=True)
    line, x_TH, (h_NH, c_NH) = inputs_of(layer)
    w, u, b, p = (one.detach().numpy() for one in (layer.input_weight, layer.state_weight, layer.bias, layer.peepholes))

    def sigmoid(x: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-x))

    h, c, x = h_NH[0].detach().numpy(), c_NH[0].detach().numpy(), x_TH.detach().numpy()
    out_TH = layer(x_TH, line, None, (h_NH, c_NH))[0]
    for step, start in enumerate(line.starts):  # the longest document is the first of every time step
        parts = (w @ x[start] + u @ h + b).reshape(4, WIDTH)
        i, f = sigmoid(parts[0] + p[:WIDTH] * c), sigmoid(parts[1] + p[WIDTH : 2 * WIDTH] * c)
        c = f * c + i * np.tanh(parts[2])
        h = sigmoid(parts[3] + p[2 * WIDTH :] * c) * np.tanh(c)
        np.testing.assert_allclose(out_TH[start].detach().numpy(), h, rtol=1e-12, err_msg=f"step {step}")


# ---- models -------------------------------------------------------------------------------------------------------


def recurrent_model(**changes: Any) -> Recurrent:
    """Two layers; every number random, norms and biases too."""
    model = build_model(ModelSettings(**({"num_layers": 2, "hidden_size": 16} | changes)), VOCABULARY)
    assert isinstance(model, Recurrent)
    init_weights(model, seed=5)
    draw = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data.add_(torch.randn(parameter.shape, generator=draw) * 0.2)
    return model


def batch_for(model: Recurrent) -> Batch:
    """Two packs, the second with one document; padding in both."""
    sides = {"source_sequence_length": 40} if model.settings.has_source else {}
    data = DataSettings(max_document_length=24, sequence_length=40, max_documents=4, **sides)
    lengths = (7, 20, 1), (15,)
    if not model.settings.has_source:
        return batch_of([[text(length) for length in pack] for pack in lengths], data)
    return batch_of([[Pair(text(length, 1), text(length)) for length in pack] for pack in lengths], data)


@pytest.mark.parametrize("changes", ALL.values(), ids=ALL)
def test_editing_a_document_changes_no_bit_of_another_one(changes: dict[str, Any]) -> None:
    model = recurrent_model(**changes)
    findings = isolation(model, batch_for(model))
    assert [finding for finding in findings if not finding.holds] == []
    assert len(findings) == 4


@pytest.mark.parametrize("changes", ALL.values(), ids=ALL)
def test_packed_equals_one_document_at_a_time_in_float64(changes: dict[str, Any]) -> None:
    model = recurrent_model(**changes).double()
    findings = packed_equals_single(model, batch_for(model))
    assert [finding for finding in findings if not finding.holds] == []
    assert len(findings) == 2


def test_a_decoder_is_embedding_norm_lstm_norm_and_output_matrix() -> None:
    model = recurrent_model(kind="lstm", tied_embeddings=True).double().eval()
    batch = batch_for(model)
    lstm = nn.LSTM(16, 16, num_layers=2).double()
    for layer, block in enumerate(model.blocks):
        for name, value in (
            ("weight_ih", block.input_weight),
            ("weight_hh", block.state_weight),
            ("bias_ih", block.bias),
        ):
            lstm.get_parameter(f"{name}_l{layer}").data.copy_(value)
        lstm.get_parameter(f"bias_hh_l{layer}").data.zero_()
    assert batch.cu_seqlens[1:3].tolist() == [8, 29]  # the second document
    rows = model.embedding.weight[batch.tokens[8:29]]
    x = F.rms_norm(rows, (16,), model.input.norm.weight, 1e-5)
    logits = F.rms_norm(lstm(x)[0], (16,), model.norm.weight, 1e-5) @ model.embedding.weight.T
    torch.testing.assert_close(model(batch, "logits")[8:29], logits.float())


def test_an_encoder_decoder_is_two_lstms_and_luong_s_general_attention() -> None:
    model = recurrent_model(kind="lstm_encoder_decoder", num_layers=1).double().eval()
    batch = batch_for(model)
    assert batch.source
    source, target = (slice(*side.cu_seqlens[1:3].tolist()) for side in (batch.source, batch))
    sides = []
    for stack in (model.encoder, model):
        block, lstm = stack.blocks[0], nn.LSTM(16, 16).double()
        values = (block.input_weight, block.state_weight, block.bias, 0 * block.bias)
        lstm.load_state_dict(dict(zip(lstm.state_dict(), values, strict=True)))
        sides.append((lstm, stack.input.norm.weight))
    (reader, its_norm), (writer, norm) = sides
    rows_SH, rows_TH = model.embedding.weight[batch.source.tokens[source]], model.embedding.weight[batch.tokens[target]]
    s_SH, state = reader(F.rms_norm(rows_SH, (16,), its_norm, 1e-5))
    h_TH, _ = writer(F.rms_norm(rows_TH, (16,), norm, 1e-5), state)
    weights_TS = (h_TH @ model.source_attention.query.weight.T @ s_SH.T).softmax(-1)
    found_TH = torch.tanh(torch.cat((weights_TS @ s_SH, h_TH), -1) @ model.source_attention.combine.weight.T)
    logits = F.rms_norm(found_TH, (16,), model.norm.weight, 1e-5) @ model.head.weight.T
    torch.testing.assert_close(model(batch, "logits")[target], logits.float())


@pytest.mark.parametrize("changes", ALL.values(), ids=ALL)
def test_the_formula_s_flops_are_those_that_torch_counts(changes: dict[str, Any]) -> None:
    model = recurrent_model(**(changes | {"dropout": 0.0, "embedding_dropout": 0.0}))
    counted, expected = count_by_torch(model, batch_for(model))
    assert counted == expected > 0


def test_the_memory_of_a_layer_is_counted_without_memory() -> None:
    """The plan's count, on the meta device, against the same count of real tensors."""
    peaks = []
    for device in ("cpu", "meta"):
        model = recurrent_model(kind="lstm", hidden_size=32).to(device)
        batch = batch_for(model).to(device)
        with LiveBytes() as live:
            model(batch).backward()
        peaks.append(live.peak)
    assert peaks[0] == pytest.approx(peaks[1], rel=0.1)


def test_the_only_mask_is_that_of_the_attention_to_the_source() -> None:
    """What `show batch` draws, and what the FLOPs count."""
    drawn = {}
    for kind in ("gru", "lstm_encoder_decoder"):
        model = recurrent_model(kind=kind)
        drawn[kind] = {one.name: int(one.sees().sum()) for one in mask_matrices(batch_for(model), model.settings)}
    batch = batch_for(model)
    assert batch.source
    pairs = int((batch.cu_seqlens.diff() * batch.source.cu_seqlens.diff()).sum())
    lengths = [side.cu_seqlens.diff().numpy().astype(np.int64) for side in (batch, batch.source)]
    assert drawn == {"gru": {}, "lstm_encoder_decoder": {"cross-attention": pairs}}
    assert visible_pairs(*lengths, np.zeros_like(lengths[0]), model.settings) == (0, 0, pairs)


def test_classes_are_read_from_the_last_state_of_a_document() -> None:
    classes = ClassificationSettings(classes=["a", "b", "c"])
    settings = ModelSettings(kind="gru", num_layers=1, hidden_size=16).with_classes_of(classes)
    model = build_model(settings, VOCABULARY).double()
    init_weights(model, seed=5)
    batch = batch_for(recurrent_model(kind="gru"))
    ends = batch.cu_seqlens[1:].long() - 1
    states_TH = model.hidden(*model.embed(batch)[:1], batch)
    torch.testing.assert_close(model(batch, "logits")[:3], (states_TH[ends] @ model.head.weight.T)[:3])


def test_attention_has_one_head_up_to_256_channels() -> None:
    assert [attention_heads(width) for width in (16, 256, 512, 1000)] == [1, 1, 2, 4]


def test_the_forget_gate_begins_open() -> None:
    model = build_model(ModelSettings(kind="lstm", num_layers=1, hidden_size=4, peepholes=True), VOCABULARY)
    init_weights(model, seed=1)
    layer = model.blocks[0]
    assert layer.bias.tolist() == [0.0] * 4 + [1.0] * 4 + [0.0] * 8
    assert layer.peepholes.tolist() == [0.0] * 12
    assert build_model(ModelSettings(kind="gru", num_layers=1, hidden_size=4), VOCABULARY).blocks[0].peepholes is None
