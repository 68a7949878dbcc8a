"""The masks of a batch: trained, drawn and counted are the same; windows are those of Hugging Face's models."""

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from matplotlib.axes import Axes
from pydantic import ValidationError

from bigmodel.checks.leak import isolation, packed_equals_single
from bigmodel.config.layer_kinds import layer_kind
from bigmodel.config.settings import DataSettings, ModelSettings, Settings
from bigmodel.data.load.batch import Batch, documents_of, real_documents
from bigmodel.data.objectives.examples import Examples, Pair
from bigmodel.data.plan.attention_work import count_work
from bigmodel.data.plan.planned import PackTable
from bigmodel.data.plan.visible_pairs import visible_pairs
from bigmodel.generation.prompts import pack
from bigmodel.inspect.draw_masks import TEXT_COLUMNS, draw_masks, mask_text, shown_documents
from bigmodel.model import transformer
from bigmodel.model.attention_masks import MaskMatrix, attention_masks, mask_matrices
from bigmodel.model.transformer import Attention, Transformer
from tests.support.example_batches import VOCABULARY, batch_of, fragment_of, model_of, text
from tests.system.test_guarantee_leak import make_batch
from tools.torchvision_operators import define_missing_torchvision_operators

ONE_SIDE = {"max_document_length": 32, "sequence_length": 32, "max_documents": 4}
TWO_SIDES = ONE_SIDE | {"source_sequence_length": 20}
TEXTS = [[text(6), text(0), text(3)], [text(9)]]
PAIRS = [[Pair(text(6), text(9)), Pair(text(0), text(1)), Pair(text(7), text(3))], [Pair(text(13), text(16))]]
KINDS = {  # (model, data, documents)
    **{
        name: ({}, ONE_SIDE | {"objectives": [{"kind": name}], "bidirectional_prefix": both_ways}, TEXTS)
        for name, both_ways in (
            ("causal", True),
            ("prefix", True),
            ("span_corruption", True),
            ("ul2", True),
            ("fill_in_the_middle", True),
        )
    },
    "prefix, causal": ({}, ONE_SIDE | {"objectives": [{"kind": "prefix"}], "bidirectional_prefix": False}, TEXTS),
    "pairs on one side": ({"num_mtp_modules": 1}, ONE_SIDE, [PAIRS[0][:2], [PAIRS[0][2]]]),
    "relative bias": ({"position_embedding": "relative_bias"}, ONE_SIDE, TEXTS),
    "encoder": ({"kind": "encoder"}, ONE_SIDE | {"objectives": [{"kind": "masked"}]}, TEXTS),
    "cross": ({"kind": "encoder_decoder", "encoder_num_layers": 2}, TWO_SIDES, PAIRS),
    "mixed": ({"kind": "encoder_decoder", "source_attention": "mixed", "encoder_num_layers": 2}, TWO_SIDES, PAIRS),
    "cross, prefix": ({"kind": "encoder_decoder"}, TWO_SIDES | {"objectives": [{"kind": "prefix"}]}, TEXTS),
    "mixed, prefix": (
        {"kind": "encoder_decoder", "source_attention": "mixed"},
        TWO_SIDES | {"objectives": [{"kind": "causal"}, {"kind": "prefix"}]},
        TEXTS,
    ),
}
WINDOWS = {
    "no window": {},
    "all sliding": {"sliding_window": 4},
    "window of 1": {"sliding_window": 1},
    "every second full": {"sliding_window": 5, "full_attention_every": 2},
}
ALL = [
    pytest.param(*kind, window, id=f"{name}, {window_name}")
    for (name, kind), (window_name, window) in itertools.product(KINDS.items(), WINDOWS.items())
]


def example(changes: dict, data: dict, documents: list, window: dict) -> tuple[Transformer, Batch]:
    model = model_of(num_layers=2, **changes, **window)
    return model, batch_of(documents, DataSettings(**data))


# ---- drawn = trained ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("changes", "data", "documents", "window"), ALL)
def test_the_drawn_mask_is_the_trained_one(changes: dict, data: dict, documents: list, window: dict) -> None:
    """Trained: where the output of a query moves with the input of a key, in the attention of the blocks, with what
    they were given in a forward pass of training."""
    model, batch = example(changes, data, documents, window)
    drawn = {mask.name: mask for mask in mask_matrices(batch, model.settings)}
    used: set[str] = set()
    views: dict[tuple[str, str], object] = {}
    for stack, block, arguments in blocks_as_called(model, batch):
        is_first = (stack, layer_kind(model.settings, block.layer)) not in views
        inputs = views.setdefault((stack, layer_kind(model.settings, block.layer)), arguments[1])
        assert inputs is arguments[1], "layers of one kind share their inputs"
        if not is_first:
            continue
        for name, reached_QK in reached_by(stack, block, arguments, model, drawn).items():
            used.add(name)
            shown = shown_documents(batch, drawn[name])
            real_Q, real_K = (real_rows(batch, sides) for sides in ((drawn[name].query_side,), drawn[name].key_sides))
            assert reached_QK[real_Q].any() or not real_K.any()
            assert np.array_equal(~np.ma.getmaskarray(shown)[real_Q], (reached_QK & real_K)[real_Q]), name
            assert not (reached_QK & ~real_K)[real_Q].any(), "a document sees padding"
    assert used == set(drawn)


def blocks_as_called(model: Transformer, batch: Batch) -> list[tuple[str, torch.nn.Module, tuple]]:
    """(stack, block, arguments) of every call of a block in a forward pass of training."""
    calls: list[tuple[str, torch.nn.Module, tuple]] = []
    stacks = [("stack", model.blocks), ("stack", model.extra_blocks)]
    stacks += [("encoder", model.encoder.blocks)] if hasattr(model, "encoder") else []
    for stack, blocks in stacks:
        for block in blocks:
            block.register_forward_pre_hook(lambda one, given, stack=stack: calls.append((stack, one, given)))
    model.train()(batch)
    return calls


def reached_by(stack: str, block, arguments: tuple, model: Transformer, drawn: dict) -> dict[str, np.ndarray]:
    """By the name of the mask, (Q, K) whether the output of the query moves with the input of the key."""
    x_TH, inputs, _, *rest = arguments
    source = rest[0] if rest else None
    name = "encoder" if stack == "encoder" or model.settings.kind == "encoder" else "decoder"
    settings_ = model.settings.encoder if stack == "encoder" else model.settings
    kind = layer_kind(settings_, block.layer)
    if settings_.sliding_window:
        marker = "whole document" if kind == "full" else "window of"
        name = next(one for one in drawn if one.startswith(name) and marker in one)
    random = torch.Generator().manual_seed(1)

    def random_inputs(*shapes: torch.Size) -> list[torch.Tensor]:
        return [torch.randn(shape, generator=random, dtype=torch.float64) for shape in shapes]

    block = block.double()
    if block.is_mixed:
        x, states = random_inputs(x_TH.shape, source.states_SE.shape)
        return {name: moves(lambda states, x: block.attention(x, inputs, states), [states, x])}
    (x,) = random_inputs(x_TH.shape)
    found = {name: moves(lambda x: block.attention(x, inputs), [x])}
    if block.is_cross:
        x, states = random_inputs(x_TH.shape, source.states_SE.shape)
        found["cross-attention"] = moves(
            lambda states: block.cross_attention(x, source._replace(states_SE=states)), [states]
        )
    return found


def moves(attend: Callable[..., torch.Tensor], inputs: list[torch.Tensor]) -> np.ndarray:
    """(Q, K) whether an output moves when one row of the inputs, which lie one behind the other, does."""
    columns = []
    with torch.no_grad():
        before_QH = attend(*inputs)
        for number, rows in enumerate(inputs):
            for row in range(len(rows)):
                changed = [one.clone() for one in inputs]
                changed[number][row] += 1.0
                columns.append((attend(*changed) - before_QH).abs().amax(-1) > 1e-12)
    return torch.stack(columns, 1).numpy()


def real_rows(batch: Batch, sides: tuple[str, ...]) -> np.ndarray:
    """(rows,) whether a row of these sides, one behind the other, belongs to a document that is not padding."""
    is_real = np.array(real_documents(batch))
    return np.concatenate([is_real[documents_of(batch.source if one == "source" else batch)] for one in sides])


def test_the_picture_holds_the_masks_and_those_of_cross_and_mixed_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[np.ma.MaskedArray] = []
    imshow = Axes.imshow
    monkeypatch.setattr(
        Axes, "imshow", lambda axes, image, **look: (drawn.append(image), imshow(axes, image, **look))[1]
    )
    pictures = []
    for name in ("cross", "mixed", "causal"):
        changes, data, documents = KINDS[name]
        model, batch = example(changes, data, documents, {})
        masks = mask_matrices(batch, model.settings)
        drawn.clear()
        draw_masks(batch, masks, tmp_path / f"{name}.png", num_packs=2)
        for mask, image in zip(masks, drawn[1::2], strict=True):
            assert np.array_equal(np.ma.getmaskarray(image), np.ma.getmaskarray(shown_documents(batch, mask)))
        pictures.append((tmp_path / f"{name}.png").read_bytes())
    assert len(set(pictures)) == 3
    assert all(picture[:8] == b"\x89PNG\r\n\x1a\n" for picture in pictures)


def test_the_mask_in_the_terminal_is_this_picture() -> None:
    batch = batch_of([[text(7), text(3)]], DataSettings(max_document_length=16, sequence_length=16, max_documents=3))
    mask = mask_matrices(batch, ModelSettings(sliding_window=3))[0]
    assert mask_text(batch, mask) == [
        "decoder: window of 3 (down: queries, across: keys; a mark is 2 x 1 tokens)",
        "|█▒              |",
        "|▒██▒            |",
        "|  ▒██▒          |",
        "|    ▒██▒        |",
        "|        █▒      |",
        "|        ▒██▒    |",
        "|                |",
        "|                |",
    ]


@pytest.mark.parametrize("tokens", [40, 700, 4000])
def test_the_mask_in_the_terminal_fits(tokens: int) -> None:
    data = DataSettings(max_document_length=tokens, sequence_length=tokens, max_documents=3)
    batch = batch_of([[text(tokens // 2), text(tokens // 4)]], data)
    name, *lines = mask_text(batch, mask_matrices(batch, ModelSettings(sliding_window=5))[0])
    assert name.startswith("decoder: window of 5 (down: queries, across: keys; a mark is ")
    assert all(len(line) <= TEXT_COLUMNS + 2 for line in lines)
    assert len(lines) <= TEXT_COLUMNS // 2
    assert all(set(line) & set("░▒▓█") for line in lines[: len(lines) * 3 // 4 - 1]), "a thin window is seen"


# ---- counted = drawn -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("changes", "data", "documents", "window"), ALL)
def test_the_counted_pairs_are_those_of_the_masks(changes: dict, data: dict, documents: list, window: dict) -> None:
    model, batch = example(changes, data, documents, window)
    examples, rows = Examples(DataSettings(**data), 1, VOCABULARY), itertools.count()
    packs = [
        tuple(fragment_of(row, one, examples, row % examples.pairs) for one, row in zip(pack, rows, strict=False))
        for pack in documents
    ]
    work = count_work(
        PackTable.of_packs(packs), DataSettings(**data), lambda *lengths: visible_pairs(*lengths, model.settings)
    )
    masks = mask_matrices(batch, model.settings)
    expected = {"stack": 0, "encoder": 0, "cross": 0}
    for name, settings_, count in (
        ("stack", model.settings, model.settings.num_layers + model.settings.num_mtp_modules),
        ("encoder", model.settings.encoder, model.settings.encoder.num_layers if batch.source else 0),
    ):
        start = "encoder" if name == "encoder" or model.settings.kind == "encoder" else "decoder"
        for layer in range(count):
            wanted = "window of" if layer_kind(settings_, layer) == "sliding" else "whole document"
            mask = next(m for m in masks if m.name.startswith(start) and (not window or wanted in m.name))
            expected[name] += pairs_in(mask, batch)
    crossing = [mask for mask in masks if mask.name == "cross-attention"]
    expected["cross"] = sum(model.settings.num_layers * pairs_in(mask, batch) for mask in crossing)
    expected["cross"] += sum(model.settings.num_mtp_modules * pairs_in(mask, batch) for mask in crossing)
    assert work[2:] == tuple(expected.values())
    assert work.positions == batch.num_tokens
    assert work.source_positions == (batch.source.num_tokens if batch.source else 0)


def pairs_in(mask: MaskMatrix, batch: Batch) -> int:
    """Pairs of documents that were packed: padding lies behind the documents of its pack, with token 0."""
    side = batch.source if mask.query_side == "source" else batch
    assert side is not None
    documents, tokens = documents_of(side), side.tokens.numpy()
    packed = [number for number in np.unique(documents) if tokens[documents == number].any()]
    return int(mask.sees()[torch.from_numpy(np.isin(documents, packed))].sum())


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    some.lists(some.tuples(some.integers(1, 12), some.integers(0, 9), some.integers(0, 12)), min_size=1, max_size=4),
    some.sampled_from(["decoder", "encoder", "cross", "mixed"]),
    some.integers(0, 14),
    some.sampled_from([0, 2, 3]),
)
def test_the_closed_forms_count_any_lengths(documents: list, kind: str, window: int, every: int) -> None:
    tokens, sources, prefixes = (torch.tensor(column, dtype=torch.int32) for column in zip(*documents, strict=True))
    prefixes = torch.minimum(prefixes, tokens)
    two_sides = kind in ("cross", "mixed")
    changes = {"kind": "encoder_decoder", "source_attention": kind} if two_sides else {"kind": kind}
    model = ModelSettings(
        layers=4, num_mtp_modules=0 if kind == "encoder" else 1, encoder_num_layers=3 if two_sides else 0, **changes,
        sliding_window=window, full_attention_every=every if window else 0,
    )  # fmt: skip
    batch = bare_batch(tokens, sources if two_sides else None, prefixes if kind == "decoder" else None)
    masks = attention_masks(batch, model)
    counted = visible_pairs(
        *(column.numpy().astype(np.int64) for column in (tokens, sources if two_sides else 0 * sources, prefixes)),
        model,
    )
    seen = {mask.name: int(mask.sees().sum()) for mask in mask_matrices(batch, model)}
    names = iter(seen)
    by_kind = {one: seen[next(names)] for one in masks.stack}
    assert counted.stack == sum(by_kind[layer_kind(model, layer)] for layer in range(4 + model.num_mtp_modules))
    assert counted.cross == (5 * seen[next(names)] if kind == "cross" else 0)
    by_kind = {one: seen[next(names)] for one in masks.encoder or {}}
    assert counted.encoder == (sum(by_kind[layer_kind(model.encoder, layer)] for layer in range(3)) if two_sides else 0)


def bare_batch(tokens: torch.Tensor, sources: torch.Tensor | None, prefixes: torch.Tensor | None) -> Batch:
    from bigmodel.data.load.batch import SourceSide

    def side(lengths: torch.Tensor) -> dict:
        zeros = torch.zeros(int(lengths.sum()), dtype=torch.int64)
        cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
        return {
            "tokens": zeros,
            "positions": zeros,
            "cu_seqlens": cu_seqlens,
            "dropout_seeds": zeros,
            "num_tokens": len(zeros),
        }

    own = side(tokens)
    source = None if sources is None else SourceSide(**side(sources))
    return Batch(**own, labels=own["tokens"], num_labels=1, num_documents=len(tokens), prefixes=prefixes, source=source)


# ---- as in Hugging Face's models -----------------------------------------------------------------------------------


def one_document(length: int) -> Batch:
    return bare_batch(torch.tensor([length], dtype=torch.int32), None, None)


@pytest.mark.parametrize("window", [1, 2, 5, 30])
@pytest.mark.parametrize("name", ["Mistral", "Gemma2", "Gemma3Text", "Olmo3", "Qwen3"])
def test_a_window_is_that_of_transformers(name: str, window: int) -> None:
    define_missing_torchvision_operators()
    import transformers
    from transformers.masking_utils import create_sliding_window_causal_mask

    more = {"use_sliding_window": True} if name == "Qwen3" else {}
    config = getattr(transformers, f"{name}Config")(sliding_window=window, attn_implementation="eager", **more)
    theirs = create_sliding_window_causal_mask(
        config=config, input_embeds=torch.zeros(1, 12, 4), attention_mask=None, cache_position=torch.arange(12),
        past_key_values=None, position_ids=None,
    )  # fmt: skip
    ours = mask_matrices(one_document(12), ModelSettings(sliding_window=window))[0].sees()
    assert torch.equal(theirs[0, 0] == 0, ours)
    assert ours.sum(1).max() == min(window, 12)


@pytest.mark.parametrize("window", [2, 5, 8])
def test_an_encoders_window_is_that_of_embedding_gemma(window: int) -> None:
    define_missing_torchvision_operators()
    from transformers import Gemma3TextConfig
    from transformers.models.gemma3.modeling_gemma3 import _bidirectional_window_overlay

    config = Gemma3TextConfig(sliding_window=window, use_bidirectional_attention=True)
    sees = _bidirectional_window_overlay(config.sliding_window)
    theirs = torch.tensor([[sees(0, 0, query, key) for key in range(12)] for query in range(12)])
    ours = mask_matrices(one_document(12), ModelSettings(kind="encoder", sliding_window=window))[0].sees()
    assert torch.equal(theirs, ours)


@pytest.mark.parametrize(("name", "every"), [("Gemma2", 2), ("Gemma3Text", 6), ("Olmo3", 4)])
def test_full_layers_are_those_of_transformers(name: str, every: int) -> None:
    define_missing_torchvision_operators()
    import transformers

    theirs = getattr(transformers, f"{name}Config")(num_hidden_layers=26).layer_types
    ours = ModelSettings(num_layers=26, sliding_window=4, full_attention_every=every)
    assert theirs == [f"{layer_kind(ours, layer)}_attention" for layer in range(26)]


@pytest.mark.parametrize("window", [0, 3])
def test_a_soft_cap_and_a_window_are_those_of_gemma2s_attention(window: int) -> None:
    define_missing_torchvision_operators()
    from transformers import Gemma2Config
    from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
    from transformers.models.gemma2.modeling_gemma2 import Gemma2Attention, Gemma2RotaryEmbedding

    config = Gemma2Config(
        hidden_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_hidden_layers=2,
        sliding_window=window or 99, attn_logit_softcapping=0.7, query_pre_attn_scalar=20, attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(2)
    theirs, x_TH = Gemma2Attention(config, layer_idx=0).eval(), torch.randn(11, 32)
    make_mask = create_sliding_window_causal_mask if window else create_causal_mask
    mask = make_mask(
        config=config, input_embeds=x_TH[None], attention_mask=None, cache_position=torch.arange(11),
        past_key_values=None, position_ids=None,
    )  # fmt: skip
    rotation = Gemma2RotaryEmbedding(config)(x_TH[None], torch.arange(11)[None])
    expected = theirs(x_TH[None], rotation, mask)[0][0]

    model = model_of(head_dim=8, sliding_window=window, attention_softcap=0.7, attention_scale=20**-0.5)
    ours = model.blocks[0].attention
    with torch.no_grad():
        ours.query_key_value.weight.copy_(torch.cat([p.weight for p in (theirs.q_proj, theirs.k_proj, theirs.v_proj)]))
        ours.output.weight.copy_(theirs.o_proj.weight)
    batch = one_document(11)
    batch.positions.copy_(torch.arange(11))
    inputs = model.attention_inputs(None, batch)[0][model.blocks[0].kind]
    torch.testing.assert_close(ours(x_TH, inputs), expected, rtol=1e-5, atol=1e-6)
    ours.softcap = None
    assert not torch.allclose(Attention.forward(ours, x_TH, inputs), expected, rtol=1e-2)


# ---- the settings in the model --------------------------------------------------------------------------------------

NEW: dict[str, dict] = {
    "window": {"sliding_window": 3},
    "pattern, two bases": {"sliding_window": 3, "full_attention_every": 2, "sliding_rope_theta": 100.0},
    "cap": {"attention_softcap": 0.5},
    "part of a head": {"rotary_fraction": 0.5},
    "yarn": {"rope_scaling": {"kind": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}},
    "all": {
        "sliding_window": 3,
        "full_attention_every": 2,
        "attention_softcap": 0.5,
        "rotary_fraction": 0.5,
        "rope_scaling": {"kind": "llama3", "factor": 8.0, "original_max_position_embeddings": 16},
    },
}


@pytest.mark.parametrize("new", NEW.values(), ids=NEW)
@pytest.mark.parametrize("name", ["causal", "prefix", "encoder", "cross", "mixed"])
def test_documents_stay_apart_under_every_new_setting(name: str, new: dict) -> None:
    changes, data, documents = KINDS[name]
    more = {} if name == "encoder" else {"num_mtp_modules": 1}
    model, batch = example(changes | more, data, documents, new)
    findings = [*isolation(model, batch), *packed_equals_single(model.double(), batch)]
    assert [f"{one.claim}: {one.evidence}" for one in findings if not one.holds] == []
    plain, _ = example(changes | more, data, documents, {})
    assert not torch.allclose(plain.double()(batch), model(batch), rtol=1e-9), "the setting changes nothing"


def test_tiles_are_made_once_for_each_mask_of_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[object] = []
    make = transformer.make_tile_metadata
    monkeypatch.setattr(
        transformer, "make_tile_metadata", lambda mask, *rows: (made.append(mask), make(mask, *rows))[1]
    )
    pattern = {"sliding_window": 3, "full_attention_every": 2}
    for name, window, count in (
        ("causal", {}, 1), ("causal", pattern, 2), ("causal", {"sliding_window": 3}, 1), ("cross", {}, 3),
        ("cross", pattern, 5), ("mixed", pattern, 4),
    ):  # fmt: skip
        model, batch = example(KINDS[name][0] | {"num_mtp_modules": 1}, *KINDS[name][1:], window)
        made.clear()
        model.train()(batch)
        assert len(made) == len(set(map(id, made))) == count, (name, window)


def test_generated_text_depends_on_no_more_than_the_windows_reach() -> None:
    """Two layers of a window of 3 reach 4 tokens back: the last token is H."""
    text_of = {}
    for window in (0, 3):
        model = model_of(sliding_window=window).eval()
        for prompt in ("ABCDEFGH", "XBCDEFGH", "ABXDEFGH", "ABCXEFGH"):
            ids = [1, *(ord(letter) - 60 for letter in prompt)]
            text_of[window, prompt] = model(pack([ids]), "logits")[-1]
    assert torch.equal(text_of[3, "ABCDEFGH"], text_of[3, "XBCDEFGH"])
    assert torch.equal(text_of[3, "ABCDEFGH"], text_of[3, "ABXDEFGH"])
    assert not torch.equal(text_of[3, "ABCDEFGH"], text_of[3, "ABCXEFGH"])
    assert not torch.equal(text_of[0, "ABCDEFGH"], text_of[0, "XBCDEFGH"])


def test_a_step_with_windows_costs_fewer_operations_of_attention() -> None:
    from bigmodel.data.plan.attention_work import Work
    from bigmodel.metrics.flops import flops

    lengths = [np.array([n], dtype=np.int64) for n in (1000, 0, 0)]
    found = []
    for window in ({}, {"sliding_window": 100, "full_attention_every": 2}):
        model = ModelSettings(num_layers=4, hidden_size=32, num_heads=4, intermediate_size=48, **window)
        work = Work(1000, 0, *visible_pairs(*lengths, model))
        found.append(flops(model, 60, work, (1000, 0)))
    of_window = 100 * 1000 - 100 * 99 // 2
    assert found[0].causal - found[1].causal == 3 * 4 * 32 * 2 * (1000 * 1001 // 2 - of_window)
    assert found[0].full == found[1].full


def test_the_plan_of_memory_counts_the_tiles_of_both_masks() -> None:
    from bigmodel.config.deepspeed_config import resolve_deepspeed
    from bigmodel.inspect.memory import activation_bytes

    found = []
    for window in ({}, {"sliding_window": 16, "full_attention_every": 2, "attention_softcap": 5.0}):
        model = {"num_layers": 2, "hidden_size": 64, "num_heads": 4, "intermediate_size": 64, **window}
        run = Settings.model_validate({"model": model, "data": {"max_document_length": 256, "sequence_length": 256}})
        effective, run = resolve_deepspeed(run, 1)
        found.append(activation_bytes(run, effective, 100))
    assert found[0] < found[1] < 1.2 * found[0]


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"full_attention_every": 2}, "full_attention_every = 2 has no effect without sliding_window"),
        ({"sliding_rope_theta": 100.0}, "sliding_rope_theta = 100.0 has no effect without sliding_window"),
        ({"sliding_window": 4, "full_attention_every": 1}, "leaves no layer with model.sliding_window = 4"),
        ({"sliding_window": 4, "full_attention_every": 5, "num_layers": 4}, "more than the 4 layers of the decoder"),
        (
            {"sliding_window": 4, "full_attention_every": 5, "kind": "encoder_decoder", "encoder_num_layers": 3},
            "more than the 3 layers of the encoder",
        ),
        ({"sliding_window": 4, "sliding_rope_theta": 100.0}, "sliding; set model.rope_theta"),
        (
            {"sliding_window": 4, "rope_scaling": {"kind": "linear", "factor": 2.0}},
            "model.rope_scaling needs layers with full attention",
        ),
        (
            {"position_embedding": "relative_bias", "rotary_fraction": 0.5},
            'has no effect with position_embedding = "relative_bias"',
        ),
        ({"rotary_fraction": 0.3, "head_dim": 10}, "is 3; it must be an even number"),
        ({"rotary_fraction": 0.01}, "is 0; it must be an even number"),
    ],
)
def test_settings_without_an_effect_are_refused(changes: dict, complaint: str) -> None:
    with pytest.raises(ValidationError, match=complaint):
        ModelSettings(**changes)


def test_a_batch_that_does_not_suit_the_model_is_a_bug() -> None:
    with pytest.raises(AssertionError, match=r"model.kind = 'encoder_decoder' and a batch with source: False"):
        attention_masks(make_batch(), ModelSettings(kind="encoder_decoder"))
