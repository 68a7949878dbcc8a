"""Fabrics: variables that make NCCL use a network, as data files in `launcher/fabrics/`.

In: a name (infiniband, roce, efa, ethernet) or the path of your own TOML file. Out: variables. NCCL silently ignores a
misspelt variable, and the job runs at a tenth of its speed; here it is an error. This project has not run any of the
profiles on its fabric.
"""

import difflib
import tomllib
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from bigmodel.config.settings import UserError

FOLDER = Path(__file__).parent / "fabrics"
CHECKED = ("NCCL_", "TORCH_NCCL_", "GLOO_", "FI_")  # prefixes of the checked names


def fabric_environment(fabric: str) -> dict[str, str]:
    """The variables of a profile. Raises `UserError` for an unknown profile or variable."""
    path = profiles().get(fabric) or Path(fabric)
    if not path.is_file():
        raise UserError(f"fabric = {fabric}: neither a profile ({', '.join(profiles())}) nor an existing TOML file")
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"{path}: cannot be read as TOML: {error}") from None
    complaint = complain_of_unknown(table)
    if complaint:
        raise UserError(f"{path}: {complaint}")
    for name, value in table.items():
        if not isinstance(value, str):
            raise UserError(f'{path}: {name} = {value!r} must be a text: {name} = "{value}"')
    return dict(table)


def profiles() -> dict[str, Path]:
    return {path.stem: path for path in sorted(FOLDER.glob("*.toml"))}


def complain_of_unknown(names: Iterable[str]) -> str:
    """A message on the first unknown name, or ""."""
    for name in names:
        if name.startswith(CHECKED) and name not in known_variables():
            near = difflib.get_close_matches(name, known_variables(), n=1)
            hint = f"did you mean {near[0]}?" if near else f"{FOLDER.name}/known_variables.txt lists the known ones"
            return f"{name}: unknown variable; {hint}"
    return ""


@cache
def known_variables() -> frozenset[str]:
    lines = (FOLDER / "known_variables.txt").read_text(encoding="utf-8").splitlines()
    return frozenset(name for line in lines if not line.startswith("#") for name in line.split())
