"""A Hugging Face folder of every type in and out: the same bytes; transformers 4 and 5 compute what our model does."""

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from bigmodel.config.settings import load_settings
from bigmodel.data.store.tokenizer import Tokenizer
from bigmodel.exchange.export import write_model
from bigmodel.exchange.run_file import write_run_file
from bigmodel.generation.prompts import pack
from bigmodel.model.huggingface.start import load_start
from bigmodel.model.transformer import Transformer
from bigmodel.training.checkpoint.format import WeightSource
from tests.model.test_huggingface import MODELS, made
from tests.support import load_export

ROWS = 320  # of the vocabulary; the tokenizer has 300 tokens
KINDS = {
    name: MODELS[name]
    for name in (
        "llama 3", "mistral", "qwen2", "qwen3", "olmo2", "olmo3", "gemma2", "gemma3", "phi3",
        "phi3 partial", "mixtral", "qwen3_moe", "olmoe", "dots1", "glm4_moe", "t5 1.0", "t5 1.1", "ul2",
        "mt5", "bert", "modernbert",
    )
}  # fmt: skip
TEXTS = [
    "Document 7: time été people", "", " ", "    if x:\n\t\treturn 1\r\n\r\n", "1234567890 3.14159", "don't we'll",
    "ÄÖÜß e\u0301 Ελλάδα שלום नमस्ते 漢字", "\u00a0\u200b\ufeff\u0085\x00\x7f",
]  # fmt: skip
INTERPRETER = os.environ.get("BIGMODEL_TRANSFORMERS_5", "")


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Path:
    """out/NAME: exports, with what our model computes in ours.json; in/NAME: the folders that they began with."""
    root = tmp_path_factory.mktemp("exports")
    for name, (kind, changes) in KINDS.items():
        model = made(kind, **{**changes, "vocab_size": ROWS})
        folder, out = root / "in" / name, root / "out" / name
        model.save_pretrained(folder, max_shard_size="60KB")
        shutil.copy(shards / "tokenizer.json", folder)
        write_run_file(folder, root / f"{name}.toml")
        export(root / f"{name}.toml", out, kind, shards)
    return root


def export(run_file: Path, out: Path, kind: str, shards: Path) -> None:
    settings = load_settings(run_file)
    ours = Transformer(settings.model, ROWS)
    load_start(ours, settings.run.seed)
    weights = dict(ours.named_parameters()) | dict(ours.named_buffers())
    shapes = {name: list(weight.shape) for name, weight in weights.items()}
    source = WeightSource(shapes, "weight", lambda name, key, start, numel: flat(weights[name])[start : start + numel])
    write_model(out, settings, kind, source, {"tokenizer.json": shards / "tokenizer.json"}, max_bytes=60_000)
    (out / "ours.json").write_text(json.dumps(computed(ours.eval(), Tokenizer.load(shards), out)))


def flat(weight: torch.Tensor) -> torch.Tensor:
    return weight.detach().flatten()


@torch.no_grad()
def computed(model: Transformer, tokenizer: Tokenizer, out: Path) -> dict[str, Any]:
    """What `load_export.load` finds, by our model; writes its case."""
    ids = tokenizer.encode(TEXTS[0]).tolist()
    two_sides, encoder = model.settings.kind == "encoder_decoder", model.settings.kind == "encoder"
    prompt = [*([] if two_sides else [tokenizer.bos]), *ids, *([tokenizer.eos] if two_sides or encoder else [])]
    decoder = [tokenizer.bos, 70, 71]
    (out / "case.json").write_text(json.dumps({"prompt": prompt, "decoder": decoder, "texts": TEXTS}))
    batch = pack([decoder], [prompt]) if two_sides else pack([prompt])
    logits = model.hidden(model.embed(batch)[0], batch) if encoder else model(batch, "logits")
    said = [tokenizer.bos] if two_sides else list(prompt)
    first = len(said)
    while not encoder and len(said) < first + 8 and said[-1] != tokenizer.eos:
        said.append(int(model(pack([said], [prompt] if two_sides else None), "logits")[-1].argmax()))
    return {
        "logits": logits.tolist(),
        "greedy": said[first:],
        "ids": [tokenizer.encode(text).tolist() for text in TEXTS],
        "with_ends": prompt,
        "special": [tokenizer.bos, tokenizer.eos, tokenizer.eos],
    }


def assert_same(out: Path, found: dict[str, Any]) -> None:
    ours = json.loads((out / "ours.json").read_text())
    expected, logits = torch.tensor(ours["logits"]), torch.tensor(found["logits"])
    assert expected.shape == logits.shape
    assert float((expected - logits).abs().max()) < 1e-4 * max(1.0, float(expected.abs().max()))
    for what in ("greedy", "ids", "with_ends", "special"):
        assert found[what] == ours[what], what
    missing = {"missing_keys": ["pooler.dense.bias", "pooler.dense.weight"]} if "BertModel" in config(out) else {}
    assert found["complaints"] == missing


def config(out: Path) -> list[str]:
    return json.loads((out / "config.json").read_text())["architectures"]


@pytest.mark.parametrize("name", KINDS)
def test_import_and_export_gives_the_same_bytes_of_weights(exports: Path, name: str) -> None:
    before, after = (weights_in(exports / side / name) for side in ("in", "out"))
    not_ours = {weight for weight in before if weight.startswith("pooler.")}
    assert before.keys() - not_ours == after.keys()
    assert all(torch.equal(before[weight].view(torch.uint8), after[weight].view(torch.uint8)) for weight in after)


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.glob("model*.safetensors"))
    assert len(files) > 1
    return {name: weight for file in files for name, weight in load_file(file).items()}


@pytest.mark.parametrize("name", KINDS)
def test_transformers_computes_what_our_model_does(exports: Path, name: str) -> None:
    assert_same(exports / "out" / name, load_export.load(exports / "out" / name))


@pytest.mark.skipif(
    not INTERPRETER, reason="BIGMODEL_TRANSFORMERS_5 names no interpreter with torch and transformers 5"
)
def test_transformers_5_computes_what_our_model_does(exports: Path, tmp_path: Path) -> None:
    result = tmp_path / "found.json"
    subprocess.run([INTERPRETER, load_export.__file__, exports / "out", result], check=True)
    found = json.loads(result.read_text())
    assert found.keys() == KINDS.keys()
    for name, one in found.items():
        assert one["version"].startswith("5.")
        assert_same(exports / "out" / name, one)
