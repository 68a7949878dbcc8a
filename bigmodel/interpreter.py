"""Check of the interpreter: a new enough Python, dependencies installed; else one line with the remedy.

Any system's `python3` runs this file, so its syntax is that of Python 3.6. Imports only the standard library.
"""

import importlib.util
import os
import sys

OLDEST = (3, 11)
EXIT_USER = 2  # as in bigmodel/run_directory.py, which an old Python cannot import
DEPENDENCIES = """
deepspeed fsspec matplotlib numpy prometheus_client psutil pyarrow pydantic pynvml rich safetensors snappy streaming
tenacity tiktoken tokenizers torch torchvision transformers triton typer xxhash
"""  # import names of the dependencies in pyproject.toml
CHECKOUT = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))


def require_interpreter() -> None:
    """End the program (exit code 2) if Python is too old or lacks the modules of the command line."""
    if sys.version_info[:2] < OLDEST:
        end(f"is Python {sys.version_info[0]}.{sys.version_info[1]}; 3.11 or 3.12 is needed")
    for name in ("typer", "pydantic"):
        if importlib.util.find_spec(name) is None:
            end_without(name)


def is_dependency(module: str) -> bool:
    """Whether pip installs this module with us; its absence is then not a bug of ours."""
    return module in DEPENDENCIES.split()


def end_without(module: str) -> None:
    """End the program (exit code 2) because of a missing dependency."""
    end(f"has no module {module}")


def end(complaint: str) -> None:
    """Print the problem of this interpreter and its remedy in one line; exit code 2."""
    print(f"bigmodel: {sys.executable or 'python'} {complaint}; {_remedy()}", file=sys.stderr)
    sys.exit(EXIT_USER)


def _remedy() -> str:
    environment = os.path.join(CHECKOUT, ".venv")
    if not os.path.exists(os.path.join(CHECKOUT, "pyproject.toml")):
        return "install bigmodel together with its dependencies (pip install, without --no-deps)"
    if os.path.realpath(sys.prefix) == environment:
        return f"run `make -B setup` in {CHECKOUT}"
    activate = f"`source {os.path.relpath(environment)}/bin/activate`"
    if os.path.exists(os.path.join(environment, "installed")):
        return f"run {activate} first"
    return f"run `make setup` in {CHECKOUT}, then {activate}"
