"""What a profile request may say, checked before anything is done with it.

In: the bytes of RUN_DIR/profile/request.json, which anyone who may write there can write. Out: a `ProfileRequest`, or a
`ValueError` with one line. Imported only when a request comes: pydantic takes 0.1 s, and an exporter starts without it.
"""

import os
import stat
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

MAX_BYTES = 4 << 20  # of a request for 500,000 ranks
MAX_STEPS = 1000  # a profile grows in memory until its last step
MAX_SHOWN = 80  # characters of a value in a message


class ProfileRequest(BaseModel):
    """A request; `id` names the folder of its files, in RUN_DIR/profile."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    id: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")
    kind: Literal["trace", "memory", "stacks"]
    ranks: list[Annotated[int, Field(ge=0)]] = Field(min_length=1)
    steps: int = Field(ge=1, le=MAX_STEPS)


class Passed(BaseModel):
    """What the exporter passes to the ranks of its node: a request with its folder, or why there is none."""

    model_config = ConfigDict(frozen=True, strict=True)

    asked: ProfileRequest | None = None
    folder: str = ""
    refused: str = ""


def read_request(path: Path, world_size: int) -> ProfileRequest:
    """Raises `ValueError` with one line for a request that is refused, `OSError` if it cannot be read.

    world_size: number of ranks of the run; 0: not known.
    """
    try:
        asked = ProfileRequest.model_validate_json(_content(path))
    except ValidationError as error:
        raise ValueError(f"{path}: refused: {_told(error)}; use bigmodel profile") from None
    outside = [rank for rank in asked.ranks if world_size and rank >= world_size]
    if outside:
        raise ValueError(
            f"{path}: refused: rank {_short(str(outside[0]))}: this run has the ranks 0 to {world_size - 1}"
        )
    if (path.parent / asked.id).is_symlink():
        raise ValueError(f"{path}: refused: {path.parent / asked.id} is a link; use bigmodel profile")
    return asked


def _content(path: Path) -> bytes:
    """A pipe would be waited for, a device read without end: only a file is read."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    with open(descriptor, "rb") as file:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode) or found.st_size > MAX_BYTES:
            raise ValueError(f"{path}: refused: not a file of at most {MAX_BYTES} bytes; use bigmodel profile")
        return file.read(MAX_BYTES)


def _told(error: ValidationError) -> str:
    """The first complaint: key, value and reason, on one line."""
    first = error.errors()[0]
    where = _short(ascii(".".join(map(str, first["loc"])))[1:-1])  # an unknown key may be any text
    if first["type"] in ("missing", "json_invalid"):
        return f"{where}: {first['msg']}".removeprefix(": ")
    return f"{where} = {_short(ascii(first['input']))}: {first['msg']}".removeprefix(" = ")


def _short(text: str) -> str:
    return text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + "..."
