"""`bigmodel import`, and the way back through a real run: prepare, train at every ZeRO stage, export."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as Library

from bigmodel.config.settings import UserError, load_settings
from bigmodel.data.objectives.examples import num_special_tokens
from bigmodel.data.store.tokenizer import Tokenizer
from bigmodel.exchange.export import export
from bigmodel.exchange.run_file import dropout_in, write_run_file
from bigmodel.exchange.tokenizer_files import tokenizer_files
from bigmodel.model.huggingface.start import StartWeights, load_start
from bigmodel.model.transformer import Transformer
from tests.model.test_huggingface import UNTIED, made
from tests.support.ranks import command, run_ranks
from tests.support.tiny_corpus import write_sources

ROWS = 320  # of the vocabulary; the tokenizer has 300 tokens
NO_CHANGE = (  # a step so short that fp32 weights stay as they are
    "optimizer.learning_rate=1e-30", "training.steps=1", "schedule.warmup_steps=0", "schedule.decay_steps=1",
    "checkpoint.every_steps=1", "evaluation.at_end=false", "data.packing_buffer=10", "training.global_batch_size=2",
    "data.sequence_length=512",
)  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Path:
    """llama and t5: Hugging Face folders with the tokenizer of the tiny corpus."""
    root = tmp_path_factory.mktemp("folders")
    made("llama", vocab_size=ROWS, max_position_embeddings=128).save_pretrained(root / "llama", max_shard_size="60KB")
    made("t5", **UNTIED, vocab_size=ROWS).save_pretrained(root / "t5")
    for folder in root.iterdir():
        shutil.copy(shards / "tokenizer.json", folder)
    return root


@pytest.fixture
def llama(folders: Path, tmp_path: Path) -> Path:
    return shutil.copytree(folders / "llama", tmp_path / "llama")


def set_all(*settings: str) -> list[str]:
    return [word for setting in settings for word in ("--set", setting)]


def run(ranks: int, folder: Path, *arguments: str) -> str:
    run_ranks(ranks, command, list(arguments), folder / "printed")
    return (folder / "printed.0").read_text()


def test_a_run_file_is_prepared_trained_and_exported_as_it_is(folders: Path, tmp_path: Path) -> None:
    run_file, folder = tmp_path / "mine.toml", folders / "llama"
    said = run(1, tmp_path, "import", str(folder), str(run_file))
    assert "15 weights, 300 tokens of 320 rows" in said
    sources = json.dumps(write_sources(tmp_path / "text")).replace('":', '"=')
    places = (f"run.directory={tmp_path}/run", f"data.directory={tmp_path}/data", "prepare.workers=1")
    run(
        1,
        tmp_path,
        "prepare",
        str(run_file),
        *set_all(*places, f"prepare.sources={sources}", "prepare.validation_share=0.2"),
    )
    run(1, tmp_path, "train", str(run_file), *set_all(*places, *NO_CHANGE))
    said = run(1, tmp_path, "export", str(tmp_path / "run"), str(tmp_path / "out"))
    assert "LlamaForCausalLM of step 1" in said
    assert weights_in(tmp_path / "out") == weights_in(folder)


@pytest.mark.parametrize(("stage", "ranks", "name"), [(1, 1, "llama"), (2, 2, "llama"), (3, 2, "t5")])
def test_a_run_at_any_zero_stage_exports_what_it_began_with(
    folders: Path, shards: Path, tmp_path: Path, stage: int, ranks: int, name: str
) -> None:
    """In bf16, so that a rounded master would show. T5's rows for sentinels are new."""
    run_file, deepspeed = tmp_path / "mine.toml", tmp_path / "deepspeed.json"
    write_run_file(folders / name, run_file)
    deepspeed.write_text(f'{{"zero_optimization": {{"stage": {stage}, "stage3_param_persistence_threshold": 0}}}}')
    places = (f"run.directory={tmp_path}/run", f"data.directory={shards}", f"training.deepspeed={deepspeed}")
    run(ranks, tmp_path, "train", str(run_file), *set_all(*places, *NO_CHANGE))
    done = export(tmp_path / "run", tmp_path / "out", max_bytes=50_000)
    assert done.class_name == ("LlamaForCausalLM" if name == "llama" else "T5ForConditionalGeneration")
    before, after = (weights_in(place) for place in (folders / name, tmp_path / "out"))
    assert before.keys() == after.keys()
    for weight, content in before.items():
        assert after[weight][: len(content)] == content, weight
    if name == "t5":
        names = Library.from_file(str(tmp_path / "out" / "tokenizer.json"))
        assert [names.token_to_id(one) for one in ("<|mask|>", "<extra_id_0>", "<extra_id_99>")] == [300, 406, 307]


@pytest.mark.parametrize("name", ["<extra_id_{}>", "▁<extra_id_{}>"], ids=["t5", "mt5"])
def test_special_tokens_that_the_tokenizer_has_are_those_of_the_objective(
    folders: Path, tmp_path: Path, name: str
) -> None:
    """No rows are added for them, and an export names them as the folder does."""
    folder = shutil.copytree(folders / "t5", tmp_path / "t5")
    library = Library.from_file(str(folder / "tokenizer.json"))
    library.add_special_tokens([name.format(number) for number in reversed(range(20))])
    library.save(str(folder / "tokenizer.json"))
    write_run_file(folder, tmp_path / "mine.toml")
    settings = load_settings(tmp_path / "mine.toml")
    assert (settings.data.first_sentinel, settings.data.sentinels) == (319, 20)
    assert settings.model.num_rows(320 + num_special_tokens(settings.data)) == ROWS


def test_the_mask_token_of_an_encoder_is_that_of_its_tokenizer(folders: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bert"
    made("bert", vocab_size=ROWS, max_position_embeddings=64).save_pretrained(folder)
    library = Library.from_file(str(folders / "t5" / "tokenizer.json"))
    library.add_special_tokens(["[MASK]"])
    library.save(str(folder / "tokenizer.json"))
    write_run_file(folder, tmp_path / "mine.toml")
    settings = load_settings(tmp_path / "mine.toml")
    assert (settings.data.mask_token, num_special_tokens(settings.data)) == (300, 0)
    used = Tokenizer.load(folder, fast=False)
    files = tokenizer_files(settings, used, json.loads((folder / "tokenizer.json").read_text()), 64)
    written = json.loads(files["tokenizer_config.json"])
    assert written["mask_token"] == "[MASK]"
    assert written["model_input_names"] == ["input_ids", "token_type_ids", "attention_mask"]


def weights_in(folder: Path) -> dict[str, bytes]:
    files = sorted(folder.glob("model*.safetensors"))
    return {name: weight.numpy().tobytes() for file in files for name, weight in load_file(file).items()}


def test_new_rows_are_the_mean_and_little_noise_and_padding_reaches_the_multiple(folders: Path, tmp_path: Path) -> None:
    run_file = tmp_path / "mine.toml"
    write_run_file(folders / "llama", run_file)
    settings = load_settings(run_file, ["model.vocabulary_multiple=64"]).model
    rows = settings.num_rows(330)
    assert (settings.num_rows(300), rows) == (320, 384)
    model, again = Transformer(settings, rows), Transformer(settings, rows + 64)
    load_start(model, 1)
    load_start(again, 1)
    theirs = StartWeights(folders / "llama", settings).read("embedding.weight")
    ours = model.embedding.weight.detach()
    assert torch.equal(ours[:ROWS], theirs)
    assert torch.equal(ours, again.embedding.weight[:rows])
    distance = (ours[ROWS:] - theirs.mean(0)) / theirs.std(0)
    assert 0.008 < float(distance.std()) < 0.012
    assert len({tuple(row.tolist()) for row in ours[ROWS:]}) == rows - ROWS


def test_a_larger_tokenizer_is_taken_where_it_is_asked_for(llama: Path, tmp_path: Path) -> None:
    grow(llama)
    write_run_file(llama, tmp_path / "mine.toml", llama)
    settings = load_settings(tmp_path / "mine.toml")
    assert settings.prepare.tokenizer == llama
    assert settings.model.num_rows(330) == 330


def grow(folder: Path) -> None:
    """30 more tokens than there are."""
    tokenizer = Library.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens([f"new{number}" for number in range(30)])
    tokenizer.save(str(folder / "tokenizer.json"))


def change_config(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def nest(name: str, depth: int = 100_000) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).write_text('{"weight_map": ' + "[" * depth + "]" * depth + "}")

    return change


def remove(pattern: str) -> Callable[[Path], None]:
    return lambda folder: next(folder.glob(pattern)).unlink()


def spoil(folder: Path) -> None:
    file = next(path for path in folder.glob("*.safetensors") if "model.norm.weight" in load_file(path))
    weights = {name: weight.clone() for name, weight in load_file(file).items()}
    weights["model.norm.weight"][3] = float("nan")
    file.unlink()
    save_file(weights, file)


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (change_config(model_type="gpt2"), "llama: model_type = 'gpt2': cannot be read; types read: llama, mistral"),
        (remove("config.json"), "config.json: cannot be read as JSON"),
        (nest("config.json"), "config.json: cannot be read as JSON: its brackets are nested too deep; name a folder"),
        (nest("model.safetensors.index.json"), "index.json: cannot be read as JSON: its brackets are nested too deep"),
        (remove("model-00002-*"), "model-00002-of-.*: cannot be read as safetensors"),
        (spoil, "llama: model.norm.weight holds NaN or infinite values; fetch the folder again"),
        (remove("tokenizer.json"), "tokenizer.json: missing; save it there with AutoTokenizer"),
        (grow, "tokenizer.json: has 330 tokens, and vocab_size = 320 in config.json: not the tokenizer of this model"),
        (change_config(vocab_size=3200), r"embed_tokens.weight \(320, 48\) instead of \(3200, 48\)"),
        (change_config(num_hidden_layers=3), "weights missing: model.layers.2"),
    ],
)
def test_a_folder_that_cannot_be_continued_is_refused_by_its_fault(
    llama: Path, tmp_path: Path, damage: Callable[[Path], None], complaint: str
) -> None:
    damage(llama)
    with pytest.raises(UserError, match=f"{re.escape(str(tmp_path))}.*{complaint}"):
        write_run_file(llama, tmp_path / "mine.toml")
    assert not (tmp_path / "mine.toml").exists()


def test_a_tokenizer_with_far_fewer_tokens_than_rows_is_refused(folders: Path, tmp_path: Path) -> None:
    made("llama", vocab_size=400).save_pretrained(tmp_path / "wide")
    shutil.copy(folders / "llama" / "tokenizer.json", tmp_path / "wide")
    with pytest.raises(UserError, match=r"has 300 tokens, and vocab_size = 400"):
        write_run_file(tmp_path / "wide", tmp_path / "mine.toml")


def test_a_file_that_exists_is_not_overwritten(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text("mine")
    with pytest.raises(UserError, match=r"mine.toml: exists already; choose another name, or delete it"):
        write_run_file(llama, tmp_path / "mine.toml")
    assert (tmp_path / "mine.toml").read_text() == "mine"
    with pytest.raises(UserError, match=r"mine: is no name of a run file; end it in .toml"):
        write_run_file(llama, tmp_path / "mine")
    with pytest.raises(UserError, match=r"nothing: is no folder; give a folder with config.json"):
        write_run_file(tmp_path / "nothing", tmp_path / "other.toml")


def test_the_dropout_that_a_config_states_stands_in_the_run_file(llama: Path, tmp_path: Path) -> None:
    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.2}))
    write_run_file(llama, tmp_path / "mine.toml")
    model = load_settings(tmp_path / "mine.toml").model
    assert (model.dropout, model.attention_dropout, model.embedding_dropout) == (0.0, 0.2, 0.0)
    bert = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.3}
    assert dropout_in(bert) == {"dropout": 0.1, "attention_dropout": 0.3, "embedding_dropout": 0.1}
    assert dropout_in({"dropout_rate": 0.1}) == {"dropout": 0.1, "attention_dropout": 0.1, "embedding_dropout": 0.1}
    assert dropout_in({"resid_pdrop": 0.1, "embd_pdrop": 0.0, "attention_dropout": 0.0}) == {"dropout": 0.1}


def test_a_run_file_names_what_differs_from_the_folder(llama: Path, tmp_path: Path) -> None:
    write_run_file(llama, tmp_path / "mine.toml")
    with pytest.raises(UserError, match=r"model.num_layers = 5 \(there 2\): not the model of model.from"):
        load_settings(tmp_path / "mine.toml", ["model.num_layers=5"])
    with pytest.raises(UserError, match=r"leave model.min_vocabulary out, or set it to the rows there or more"):
        load_start(Transformer(load_settings(tmp_path / "mine.toml").model, 300), 1)
