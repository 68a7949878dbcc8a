"""Quantized exports against torch's own quantization, compressed-tensors, gguf, transformers; the loss after."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from bigmodel.__main__ import export as export_command
from bigmodel.config.settings import ModelSettings, Settings, UserError
from bigmodel.data.store.tokenizer import Tokenizer
from bigmodel.distributed.world import ALONE
from bigmodel.evaluation.evaluate import Validation
from bigmodel.exchange import gguf_file, int8
from bigmodel.exchange.export import export, write_model
from bigmodel.exchange.quantization import Gguf, Int8, form_of
from bigmodel.generation.prompts import pack
from bigmodel.model.huggingface.weights import from_transformers, names_of
from bigmodel.model.transformer import Transformer
from bigmodel.training.checkpoint.format import WeightSource
from bigmodel.training.load_model import load_trained
from tests.model.test_huggingface import MODELS, made
from tests.support import load_export
from tests.support.ranks import command, run_ranks
from tests.support.tiny_run import write_run

compressors = pytest.importorskip("compressed_tensors.compressors", reason="compressed-tensors is not installed")
gguf = pytest.importorskip("gguf", reason="gguf is not installed: pip install 'bigmodel[gguf]'")

ROWS = 320
PROMPT = [0, 70, 71, 90, 5, 200]
INT8 = ("llama 3", "gemma3", "phi3", "bert")
Q8_0 = ("llama", "llama linear", "llama 3", "qwen2", "llama biases")


def written(name: str, out: Path, shards: Path, form: str, **changes: Any) -> Transformer:
    """Export a model of transformers in a form; gives ours with the weights that a reader should get."""
    kind, own = MODELS[name]
    theirs = made(kind, **{**own, "vocab_size": ROWS, **changes})
    model_settings, weights = from_transformers(theirs.config.to_dict(), theirs.state_dict())
    kinds = {"encoder_decoder": {"source_sequence_length": 96}, "encoder": {"objectives": [{"kind": "masked"}]}}
    data = {"max_document_length": 48, "sequence_length": 96} | kinds.get(model_settings.kind, {})
    settings = Settings.model_validate({"model": model_settings.model_dump(exclude_none=True), "data": data})
    shapes = {ours: list(weight.shape) for ours, weight in weights.items()}
    source = WeightSource(shapes, "weight", lambda ours, key, first, n: weights[ours].flatten()[first : first + n])
    chosen = Int8(kind, settings.model, torch.float32) if form == "int8" else Gguf(kind, settings.model)
    write_model(out, settings, kind, source, {"tokenizer.json": shards / "tokenizer.json"}, form=chosen)
    model = Transformer(settings.model, ROWS).eval()
    with torch.no_grad():
        for ours, parameter in model.named_parameters():
            parameter.copy_(weights[ours])
            for part in parameter.split([rows or len(parameter) for _, rows in names_of(kind, settings.model)[ours]]):
                part.copy_(chosen.rounded(ours, part))
    return model


@torch.no_grad()
def logits_of(model: Transformer) -> torch.Tensor:
    if model.settings.kind == "encoder_decoder":
        return model(pack([[0, 70, 71]], [PROMPT]), "logits")
    batch = pack([PROMPT])
    return model.hidden(model.embed(batch)[0], batch) if model.settings.kind == "encoder" else model(batch, "logits")


@pytest.mark.parametrize("name", INT8)
def test_transformers_computes_with_the_8_bits_of_each_output(name: str, shards: Path, tmp_path: Path) -> None:
    ours = logits_of(written(name, tmp_path / "out", shards, "int8"))
    (tmp_path / "out" / "case.json").write_text(json.dumps({"prompt": PROMPT, "decoder": [0, 70, 71], "texts": ["a"]}))
    found = load_export.load(tmp_path / "out")
    assert torch.tensor(found["logits"]) == pytest.approx(ours, abs=1e-4 * float(ours.abs().max()))
    assert {*found["complaints"].get("missing_keys", [])} <= {"pooler.dense.bias", "pooler.dense.weight"}
    assert not found["complaints"].get("unexpected_keys")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    matrices = [weight for weight in stored if weight.endswith("weight_packed")]
    assert matrices
    for one in matrices:
        scale, shape = (stored[one.replace("_packed", part)] for part in ("_scale", "_shape"))
        assert (scale.dtype, scale.shape) == (torch.float32, (int(shape[0]), 1))


@pytest.mark.parametrize("columns", [8, 10, 67])
def test_integers_are_those_of_torch_and_packed_as_compressed_tensors_does(columns: int) -> None:
    weight = torch.randn(6, columns, generator=torch.Generator().manual_seed(1))
    weight[2] = 0
    weight[3, ::2] = 0
    integers, scale = int8.quantized(weight)
    expected = torch.quantize_per_channel(weight, scale[:, 0], torch.zeros(6), 0, torch.qint8)
    assert torch.equal(integers, expected.int_repr())
    assert bool(((weight - int8.rounded(weight)).abs() <= scale / 2 * (1 + 1e-5)).all())
    assert torch.equal(int8.rounded(weight) == 0, (weight.abs() < scale / 2) | (weight == 0))
    helpers = compressors.pack_quantized.helpers
    packed = int8.packed(integers)
    assert torch.equal(helpers.unpack_from_int32(packed, 8, weight.shape), integers)
    assert torch.equal(helpers.pack_to_int32(integers, 8), packed)
    for size in (1e-2, 1e-4, 3e-5, 1e-5):  # below 7.7e-3 a scale is no normal number of fp16
        near, scale = int8.quantized(weight * size, torch.float16)
        apart = (weight * size - near.float() * scale.float()).abs()
        assert bool((apart <= scale.float() / 2 * (1 + 1e-5)).all()), size
    half, coarse = int8.quantized(weight * 1e-9, torch.float16)
    assert not half.any()
    assert bool((coarse == 1).all())


@pytest.mark.parametrize("name", Q8_0)
def test_gguf_holds_the_weights_and_transformers_computes_with_them(name: str, shards: Path, tmp_path: Path) -> None:
    import transformers

    model = written(name, tmp_path / "out", shards, "q8_0", hidden_size=64, pad_token_id=2)
    reader = gguf.GGUFReader(tmp_path / "out" / "out-Q8_0.gguf")
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert types["blk.1.ffn_up.weight"] == types["token_embd.weight"] == "Q8_0"
    assert (types["blk.1.ffn_down.weight"], types["output_norm.weight"]) == ("F16", "F32")  # 80 inputs; a vector
    up = next(tensor for tensor in reader.tensors if tensor.name == "blk.0.ffn_up.weight")
    wanted = dict(model.named_parameters())["blocks.0.feed_forward.gate_up.weight"][80:]
    assert torch.equal(torch.from_numpy(gguf.dequantize(up.data, up.tensor_type)), wanted.detach())
    tokens = reader.fields["tokenizer.ggml.tokens"]
    assert len(tokens.data) == ROWS
    kind = MODELS[name][0]
    assert reader.fields["general.architecture"].contents() == kind
    assert reader.fields[f"{kind}.attention.head_count_kv"].contents() == 2
    if name == "llama 3":  # transformers does not read rope_freqs.weight: tests elsewhere compare the frequencies
        factors = next(tensor for tensor in reader.tensors if tensor.name == "rope_freqs.weight").data
        assert (factors[0], factors[-1]) == pytest.approx((1.0, 8.0), rel=1e-5)
        return
    if name == "llama linear":
        assert reader.fields["llama.rope.scaling.factor"].contents() == 3.0
    if name in ("llama linear", "llama biases"):  # transformers leaves the scaling and the biases out
        return
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", gguf_file="out-Q8_0.gguf", dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        found = theirs(torch.tensor([PROMPT])).logits[0]
    ours = logits_of(model)
    assert float((found - ours).abs().max()) < 1e-4 * float(ours.abs().max())


@pytest.mark.parametrize("columns", [32, 96, 40])
def test_a_weight_of_gguf_is_at_most_half_a_scale_away(columns: int) -> None:
    weight = torch.randn(5, columns, generator=torch.Generator().manual_seed(2))
    weight[1] = 0
    found = gguf_file.rounded(weight)
    if columns % 32:
        assert torch.equal(found, weight.half().float())
        return
    blocks = weight.view(5, -1, 32).double().numpy()
    scale = np.abs(blocks).max(axis=2, keepdims=True) / 127
    # Half a scale, and the scale's own rounding to fp16, 127 times.
    bound = (scale / 2 + 127 * scale * 2.0**-11) * (1 + 1e-6)
    assert (np.abs(found.view(5, -1, 32).double().numpy() - blocks) <= bound).all()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Path:
    """A run of the loop that prunes 2:4."""
    folder = tmp_path_factory.mktemp("pruned")
    run_file = write_run(folder, shards)
    pruning = ("kind=2:4", "begin_step=2", "end_step=6", "every_steps=2")
    options = [part for one in pruning for part in ("--set", f"pruning.{one}")]
    options += ["--set", "training.steps=8", "--set", "model.qk_norm=false"]
    run_ranks(1, command, ["train", str(run_file), *options], folder / "printed")
    return folder / "run"


def test_a_pruned_run_says_its_share_and_exports_its_zeros(run: Path, tmp_path: Path) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    shares = [line["pruned_share"] for line in lines if line["kind"] == "step"]
    assert shares[:3] == [None] * 3
    assert shares[3:] == pytest.approx([0.4375, 0.4375, 0.5, 0.5, 0.5], abs=1e-3)
    export(run, tmp_path / "plain")
    export(run, tmp_path / "int8", quantize="int8", evaluate=False)
    plain, packed = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "int8"))
    pruned = [name for name in plain if "proj" in name]
    assert len(pruned) == 14
    for name in pruned:
        assert bool(((plain[name].view(-1, 4) == 0).sum(dim=1) >= 2).all())
        bytes_ = packed[f"{name}_packed"].view(torch.uint8).to(torch.int16) - 128
        assert bool((bytes_[plain[name] == 0] == 0).all())


@pytest.mark.parametrize("form", ["int8", "q8_0"])
def test_the_loss_after_is_that_of_the_weights_in_the_folder(run: Path, tmp_path: Path, form: str) -> None:
    done = export(run, tmp_path / "out", quantize=form)
    numbers = re.findall(r"\d\.\d{5}", done.remarks[0])
    trained = load_trained(run)
    validation = Validation(trained.settings.data, 1)
    before = validation.run(trained.forward, ALONE).nats_per_token
    weights = read_int8(tmp_path / "out") if form == "int8" else read_gguf(tmp_path / "out" / "out-Q8_0.gguf")
    names = names_of("llama", trained.settings.model)
    with torch.no_grad():
        for ours, parameter in trained.model.named_parameters():
            parameter.copy_(torch.cat([weights[theirs] for theirs, _ in names[ours]]))
    after = validation.run(trained.forward, ALONE).nats_per_token
    assert numbers == [f"{before:.5f}", f"{after:.5f}", f"{abs(after - before):.5f}"]
    assert 0 < abs(after - before) < 0.01
    card = (tmp_path / "out" / "README.md").read_text()
    assert done.remarks[0] in card
    assert "LlamaForCausalLM" in card


def read_int8(folder: Path) -> dict[str, torch.Tensor]:
    stored = load_file(folder / "model.safetensors")
    found = {name: weight for name, weight in stored.items() if "weight_" not in name}
    for name in [name.removesuffix("_packed") for name in stored if name.endswith("_packed")]:
        rows, columns = stored[f"{name}_shape"].tolist()
        integers = stored[f"{name}_packed"].numpy().view(np.uint8)[:, :columns].astype(np.int64) - 128
        assert len(integers) == rows
        found[name] = torch.from_numpy(integers).float() * stored[f"{name}_scale"]
    return found


def read_gguf(path: Path) -> dict[str, torch.Tensor]:
    reader, found = gguf.GGUFReader(path), {}
    known = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    theirs = {known.get_name(name, (".weight",)): name for name in names_in_llama()}
    for tensor in reader.tensors:
        weight = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        name = theirs[tensor.name]
        heads = {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2])
        found[name] = (
            weight.view(heads, -1, 2, 32).transpose(1, 2).reshape(-1, 32) if heads else weight
        )  # channel i of both halves lie side by side there
    return found


def names_in_llama() -> list[str]:
    settings = ModelSettings(num_layers=2, hidden_size=32, num_heads=4, num_kv_heads=2, intermediate_size=48)
    return [theirs for parts in names_of("llama", settings).values() for theirs, _ in parts]


def test_words_are_split_as_the_tokenizer_says_or_it_is_said(shards: Path, tmp_path: Path) -> None:
    for pre, name, remarks in (
        ({"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}, "gpt-2", 0),
        (json.loads((shards / "tokenizer.json").read_text())["pre_tokenizer"], "gpt-2", 1),
    ):
        description = json.loads((shards / "tokenizer.json").read_text()) | {"pre_tokenizer": pre}
        folder = tmp_path / f"{remarks}"
        folder.mkdir()
        (folder / "tokenizer.json").write_text(json.dumps(description))
        done = written("llama", folder / "out", folder, "q8_0")
        reader = gguf.GGUFReader(folder / "out" / "out-Q8_0.gguf")
        assert reader.fields["tokenizer.ggml.pre"].contents() == name
        assert ("llama.cpp has no name" in (folder / "out" / "README.md").read_text()) == bool(remarks)
        own = Tokenizer.load(folder / "tokenizer.json")
        assert reader.fields["tokenizer.ggml.tokens"].contents()[own.eos] == own.token_of(own.eos)
        assert done.settings.kind == "decoder"


BAD: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "unknown": ("int4", "llama", {}, r"--quantize int4: unknown; use int8 or q8_0"),
    "type": ("q8_0", "gemma2", {}, r"gemma2 is not written as GGUF, only llama, mistral, qwen2, qwen3 are; use --quan"),
    "window": ("q8_0", "mistral", {"sliding_window": 8}, r"model.sliding_window = 8: llama.cpp has no window for mist"),
    "t5": ("q8_0", "t5", {}, r"t5 is not written as GGUF, only .*; leave it out"),
    "experts": ("int8", "mixtral", {"experts": {"count": 4}}, "int8 with model.experts: it is not tested with exper"),
    "experts in GGUF": ("q8_0", "mixtral", {"experts": {"count": 4}}, "mixtral is not written as GGUF.*; leave it out"),
    "shared": ("int8", "t5", {}, r"int8: transformers with compressed-tensors does not load a quantized t5 .its embed"),
    "yarn": (
        "q8_0",
        "llama",
        {"rope_scaling": {"kind": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}},
        r'model.rope_scaling.kind = "yarn" is not written as GGUF; use --quantize int8',
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_a_form_cannot_hold_is_refused(name: str) -> None:
    form, kind, model, complaint = BAD[name]
    with pytest.raises(UserError, match=complaint):
        form_of(form, kind, Settings.model_validate({"model": model}), "float32", 5 << 30)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match=r"--quantize q8_0 needs the package gguf; pip install 'bigmodel\[gguf\]'"):
        form_of("q8_0", "llama", Settings(), "float32", 5 << 30)


def test_options_without_effect_are_refused() -> None:
    with pytest.raises(UserError, match=r"--dtype has no effect with --quantize q8_0, one file of fixed types; leave"):
        form_of("q8_0", "llama", Settings(), "bfloat16", 5 << 30)
    with pytest.raises(UserError, match=r"--max-gib has no effect with --quantize q8_0"):
        form_of("q8_0", "llama", Settings(), "float32", 5)


def test_the_command_refuses_options_that_do_not_go_together(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--adapter with --quantize int8: adapters are not quantized; give only one"):
        export_command(tmp_path, tmp_path / "out", adapter=True, quantize="int8")
    with pytest.raises(UserError, match=r"--no-evaluate has an effect only with --quantize; leave it out"):
        export_command(tmp_path, tmp_path / "out", evaluate=False)


def test_another_tokenizer_than_a_byte_level_bpe_is_refused(shards: Path, tmp_path: Path) -> None:
    description = json.loads((shards / "tokenizer.json").read_text())
    description["pre_tokenizer"] = {"type": "Whitespace"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(description))
    with pytest.raises(UserError, match=r"tokenizer.json is no byte-level BPE, the only kind that is written as GGUF"):
        written("llama", tmp_path / "out", tmp_path, "q8_0")
