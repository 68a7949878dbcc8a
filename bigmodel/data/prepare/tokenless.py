"""Text without a token: counted in every document, refused above a declared share.

In: the files of encoded parts. Out: by source, ids of the unknown token and characters that are in no id.
"""

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from bigmodel.config.settings import PrepareSettings, UserError
from bigmodel.data.store.unknown_text import in_code_points

SHOWN_CHARACTERS = 5


@dataclass
class Tokenless:
    """What a tokenizer has no tokens for in some documents of `characters` characters: ids of its unknown token, and
    characters that are in no id."""

    characters: int = 0
    unknown: int = 0
    dropped: Counter[str] = field(default_factory=Counter)

    def arrays(self) -> dict[str, np.ndarray]:
        dropped = np.frombuffer(json.dumps(self.dropped).encode(), np.uint8)
        return {"characters": np.array(self.characters), "unknown": np.array(self.unknown), "dropped": dropped}

    @classmethod
    def read(cls, parts: Iterable[Path]) -> "Tokenless":
        """The sum over files of encoded parts."""
        total = cls()
        for part in parts:
            with np.load(part) as arrays:
                total.characters += int(arrays["characters"])
                total.unknown += int(arrays["unknown"])
                total.dropped.update(json.loads(arrays["dropped"].tobytes()))
        return total


def count_tokenless(encoded: Mapping[str, Sequence[Path]], settings: PrepareSettings) -> dict[str, dict[str, int]]:
    """By source: ids of the unknown token, and characters dropped for want of a token. Raises `UserError` if too many
    were dropped."""
    counted = {source: Tokenless.read(parts) for source, parts in encoded.items()}
    characters = sum(one.characters for one in counted.values())
    dropped = sum((one.dropped for one in counted.values()), Counter())
    allowed = settings.dropped_characters_share
    if dropped.total() > allowed * characters:
        most = [f"{in_code_points(one)} {count:,} times" for one, count in dropped.most_common(SHOWN_CHARACTERS)]
        more = f" and {len(dropped) - len(most):,} others" if len(dropped) > len(most) else ""
        raise UserError(
            f"prepare.tokenizer = {settings.tokenizer}: has no token for {dropped.total():,} of {characters:,} "
            f"characters and drops them: {', '.join(most)}{more}; this is above prepare.dropped_characters_share = "
            f"{allowed:g}; use a tokenizer with byte fallback or an unknown token, or set the share to "
            f"{_rounded_up(dropped.total() / characters):g}"
        )
    return {
        source: {"unknown_tokens": one.unknown, "dropped_characters": one.dropped.total()}
        for source, one in counted.items()
    }


def _rounded_up(share: float) -> float:
    """
    >>> _rounded_up(0.0012345)
    0.0013
    """
    unit = 10.0 ** (math.floor(math.log10(share)) - 1)
    return min(1.0, round(math.ceil(share / unit) * unit, 12))
