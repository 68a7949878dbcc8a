"""Run files, run directories and checkpoints with the names of version 0.1 go on working."""

import pytest

from bigmodel.config.renamed import NEW_NAMES, RENAMED
from bigmodel.config.sections import WARNED, UserError
from bigmodel.config.settings import Settings, load_settings
from bigmodel.run_directory import changes

OLD = """
[data]
pack_tokens = 128
context_tokens = 64
window_packs = 7
[model]
layers = 2
width = 32
heads = 4
feed_forward_width = 96
[training]
packs_per_step = 6
[evaluation]
every_steps = 5
packs = 3
"""


def test_an_old_run_file_is_read_with_one_warning_that_names_the_new_keys(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv(WARNED, raising=False)
    monkeypatch.delenv("RANK", raising=False)
    file = tmp_path / "old.toml"
    file.write_text(OLD)
    settings = load_settings(file, ["model.key_value_heads=2", "training.global_batch_size=8"])
    assert (settings.data.sequence_length, settings.data.max_document_length, settings.data.packing_buffer) == (
        128,
        64,
        7,
    )
    assert (settings.model.num_layers, settings.model.hidden_size, settings.model.num_kv_heads) == (2, 32, 2)
    assert (settings.training.global_batch_size, settings.evaluation.sequences) == (8, 3)
    load_settings(file)
    said = capsys.readouterr().err
    assert said.count("warning") == 1
    assert f"{file}: data.pack_tokens is now data.sequence_length, " in said
    assert "--set model.key_value_heads is now model.num_kv_heads; " in said


def test_an_old_name_in_a_whole_section_of_set_is_read_with_the_warning(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv(WARNED, raising=False)
    (tmp_path / "run.toml").write_text("")
    model = load_settings(tmp_path / "run.toml", ["model={ width = 96, heads = 4 }"]).model
    assert (model.hidden_size, model.num_heads, model.num_kv_heads) == (96, 4, 4)
    assert "--set model.width is now model.hidden_size, --set model.heads is now model.num_heads; " in (
        capsys.readouterr().err
    )


def test_one_rank_warns(tmp_path, monkeypatch, capsys):
    """Under torchrun every rank reads the run file."""
    (tmp_path / "old.toml").write_text(OLD)
    for rank in ("0", "1"):
        monkeypatch.delenv(WARNED, raising=False)
        monkeypatch.setenv("RANK", rank)
        load_settings(tmp_path / "old.toml")
        assert capsys.readouterr().err.count("warning") == (rank == "0")


def test_a_new_run_file_warns_of_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv(WARNED, raising=False)
    (tmp_path / "new.toml").write_text("[data]\nsequence_length = 128\nmax_document_length = 128\n")
    load_settings(tmp_path / "new.toml", ["model.num_layers=3"])
    assert capsys.readouterr().err == ""


def test_both_names_of_a_key_are_one_message(tmp_path):
    (tmp_path / "run.toml").write_text("[data]\npack_tokens = 128\nsequence_length = 256\n")
    with pytest.raises(UserError, match=r"data\.pack_tokens is the old name of data\.sequence_length; both are set"):
        load_settings(tmp_path / "run.toml")


def test_every_new_name_is_a_setting_and_no_old_one_is():
    for section, keys in RENAMED.items():
        fields = set(type(getattr(Settings(), section)).model_fields)
        assert set(keys.values()) <= fields
        assert not set(keys) & fields


def test_settings_that_a_run_stored_under_old_names_are_the_same_settings():
    old = Settings().model.model_dump()
    new_to_old = {
        new.partition(".")[2]: name.partition(".")[2] for name, new in NEW_NAMES.items() if new[:6] == "model."
    }
    stored = {new_to_old.get(name, name): value for name, value in old.items()}
    assert "layers" in stored
    assert Settings.model_validate({"model": stored}) == Settings()
    assert changes({"model": stored}, {"model": old | {"num_layers": 13}}) == [("model.num_layers", 12, 13)]
