"""Limits and address of the server, checked before a model is loaded."""

import importlib.util
import ipaddress
import os
import re
import socket
from dataclasses import dataclass

from bigmodel.config.user_error import UserError

TOKEN = "BIGMODEL_SERVE_TOKEN"


@dataclass(frozen=True)
class Options:
    """name: of the model in requests; empty: the folder's. max_positions: of a sequence, 0: the model's own context.
    max_tokens: generated for a request at most, 0: what the context has."""

    host: str = "127.0.0.1"
    port: int = 8000
    name: str = ""
    max_sequences: int = 8
    max_positions: int = 0
    max_queue: int = 64
    max_tokens: int = 0
    max_body_bytes: int = 1 << 20
    timeout_seconds: float = 600.0
    grace_seconds: float = 30.0


def require_packages() -> None:
    """Raises `UserError` without the packages of the extra `serve`."""
    missing = [name for name in ("starlette", "uvicorn") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"serving: needs {' and '.join(missing)}; run pip install 'bigmodel[serve]'")


def read_token(host: str) -> str:
    """The bearer token of the environment; empty: none is asked for.

    Raises `UserError` for a token that no header can hold, and where there is none and other machines reach the host.
    """
    token = os.environ.get(TOKEN)
    if token is not None and not re.fullmatch(r"[!-~]{8,}", token):
        raise UserError(
            f"{TOKEN}: {len(token)} characters; a token has at least 8, of ASCII, without spaces: set one, as from "
            "`openssl rand -hex 32`, or unset it"
        )
    if token is None and not is_loopback(host):
        raise UserError(
            f"--host {host}: other machines reach it, and {TOKEN} is not set; set it, as from `openssl rand -hex 32`, "
            "or leave --host out"
        )
    return token or ""


def is_loopback(host: str) -> bool:
    """Raises `UserError` for a name without an address."""
    try:
        found = socket.getaddrinfo(host or None, 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise UserError(
            f"--host {host}: has no address: {error.strerror or error}; use an address of this machine"
        ) from None
    return all(ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback for *_, address in found)


def bound(host: str, port: int) -> socket.socket:
    """A socket with this address, which does not listen yet. Raises `UserError` if it is taken or of no interface."""
    made = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind((host, port))
    except OSError as error:
        made.close()
        raise _unopened(host, port, error) from None
    return made


def open_for_clients(made: socket.socket, host: str, port: int) -> None:
    """Raises `UserError` if another process opened the address since it was bound here."""
    try:
        made.listen()
    except OSError as error:
        raise _unopened(host, port, error) from None


def _unopened(host: str, port: int, error: OSError) -> UserError:
    return UserError(
        f"--host {host} --port {port}: cannot be opened: {error.strerror}; choose another port, or 0 for a free one"
    )
