"""Bytes of ids are read by the type that they were written by, or refused."""

import numpy as np
import pytest

from bigmodel.config.settings import UserError
from bigmodel.data.prepare.id_types import check_type, fitting_types

IDS = [np.arange(number, 3 * number) * 7 % 300 for number in range(1, 40)]  # odd and even numbers of ids


@pytest.mark.parametrize("vocabulary", [300, 50_000])
@pytest.mark.parametrize("truth", ["uint16", "uint32", "uint64", ">u4"])
def test_any_type_but_the_true_one_is_refused_and_the_true_one_named(truth: str, vocabulary: int) -> None:
    fitting = fitting_types([ids.astype(truth).tobytes() for ids in IDS], vocabulary)
    signed = truth.replace("u", "i", 1) if truth[0] == ">" else truth.removeprefix("u")
    for given in ("uint8", "uint16", "uint32", "uint64", ">u2", ">u4", "int16", "int32", "int64", ">i4"):
        if given in (truth, signed):
            check_type(given, fitting, vocabulary, "theirs")
            continue
        named = truth if np.dtype(given).kind == "u" else signed
        with pytest.raises(
            UserError, match=rf"^--dtype {given}: the samples of theirs .* fit .*set --dtype {named}, or"
        ):
            check_type(given, fitting, vocabulary, "theirs")


def test_a_type_that_any_bytes_fit_is_not_suggested() -> None:
    """Ids of another tokenizer, above the vocabulary: what they are by uint16 proves nothing."""
    fitting = fitting_types([np.array([5, 70_000], np.int32).tobytes()], 66_000)
    assert {one for one in fitting if "u" in one} == {"<u1", "<u2", ">u2"}
    check_type("int32", fitting, 66_000, "theirs")


@pytest.mark.parametrize(("given", "truth"), [("int8", "uint8"), ("int16", "uint16"), (">i2", ">u2")])
def test_a_signed_type_of_negative_ids_is_refused_and_the_unsigned_one_named(given: str, truth: str) -> None:
    highest = np.iinfo(np.dtype(truth)).max
    samples = [np.array([3, highest], truth).tobytes(), np.array([5], truth).tobytes()]
    with pytest.raises(UserError, match=rf"--dtype {given}: .* do not fit it, but {truth}, .*; set --dtype {truth},"):
        check_type(given, fitting_types(samples, 70_000), 70_000, "theirs")


def test_where_there_are_no_ids_every_type_is_right() -> None:
    check_type("uint16", fitting_types([b"", b""], 300), 300, "theirs")


@pytest.mark.parametrize("given", ["float32", "int65", "object", "U4"])
def test_what_is_no_type_of_integers_is_refused(given: str) -> None:
    with pytest.raises(UserError, match=rf"--dtype {given}: no type of integers; name one, as uint16"):
        check_type(given, set(), 300, "theirs")
