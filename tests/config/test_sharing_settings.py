"""Settings under which ranks cannot share packed sequences are refused before ranks start."""

from typing import Any

import pytest

from bigmodel.config.settings import Settings

SHARED = {"sequence_parallel_ranks": 4}
GATHERED = SHARED | {"sequence_parallel_method": "all_gather"}
SIX_HEADS = {"num_heads": 6, "num_kv_heads": 6}


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"model": SIX_HEADS}, r"= 4 does not fit model\.num_heads = 6 .*sequence_parallel_method = \"all_gather\""),
        ({"data": {"sequence_length": 2050}}, r"= 4 does not divide data\.sequence_length = 2050"),
        (
            {"model": {"experts": {"count": 8, "capacity_factor": 1.5}}},
            r"= 4 with model\.experts\.capacity_factor = 1\.5: .* set the first to 1, or the other to 0",
        ),
        ({"model": {"num_mtp_modules": 1}}, r"= 4: needs a decoder-only model"),
        ({"model": {"position_embedding": "learned", "max_positions": 2048}}, r"= 4: needs a decoder-only model"),
        (
            {"model": {"kind": "encoder"}, "data": {"objectives": [{"kind": "masked"}]}, "training": GATHERED},
            r'"all_gather" with model\.kind = "encoder": .* set it to that',
        ),
        (
            {"data": {"objectives": [{"kind": "prefix"}]}, "training": GATHERED},
            r'with data\.bidirectional_prefix = true and the objective "prefix": a position attends to later ones',
        ),
    ],
)
def test_what_cannot_be_shared_is_named(table: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Settings.model_validate({"training": SHARED} | table)


def test_gathered_keys_need_no_heads_and_other_settings_fit() -> None:
    for table in (
        {"model": SIX_HEADS, "training": GATHERED},
        {"data": {"objectives": [{"kind": "prefix"}], "bidirectional_prefix": False}, "training": GATHERED},
        {"model": {"kind": "encoder"}, "data": {"objectives": [{"kind": "masked"}]}, "training": SHARED},
    ):
        assert Settings.model_validate(table).training.sequence_parallel_ranks == 4
