"""`bigmodel serve`: one process, one model, on uvicorn.

In: a model and options. Guarantees: the address is checked before the model is loaded, and opened after. SIGTERM or
Ctrl-C: no new connection; what runs may finish within `grace_seconds`, the rest ends with the error 503; exit code 0.
"""

import asyncio
import signal
import socket
import time
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from bigmodel.config.user_error import UserError
from bigmodel.generation.engine import Engine
from bigmodel.generation.served import Served, load_served
from bigmodel.serving.application import application
from bigmodel.serving.batcher import Batcher
from bigmodel.serving.options import Options, bound, open_for_clients, read_token

KEEP_ALIVE_SECONDS = 65  # of a connection without a whole request, above the 60 s of common proxies
TICKS_OF_A_SECOND = 10  # uvicorn's
ENDING_SECONDS = 5  # for the errors after the grace time, and for the last step of the engine


class Server(uvicorn.Server):
    """Says where it serves, closes connections that ask nothing, and bounds the time that its end takes."""

    def __init__(self, config: uvicorn.Config, batcher: Batcher, greeting: str, grace_seconds: float) -> None:
        super().__init__(config)
        self._batcher, self._greeting, self._grace_seconds = batcher, greeting, grace_seconds
        self._quiet_since: dict[tuple[Any, Any], float] = {}  # by connection and its latest request

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        print(self._greeting, flush=True)

    async def on_tick(self, counter: int) -> bool:
        if counter % TICKS_OF_A_SECOND == 0:
            self._close_quiet(time.monotonic())
        return await super().on_tick(counter)

    def _close_quiet(self, now: float) -> None:
        """uvicorn's own timer ends at the first byte; a request whose head never ends would stay for ever."""
        quiet = [
            (one, one.cycle)
            for one in self.server_state.connections
            if isinstance(one, H11Protocol) and (one.cycle is None or one.cycle.response_complete)
        ]
        self._quiet_since = {key: self._quiet_since.get(key, now) for key in quiet}
        for (one, _), since in self._quiet_since.items():
            if now - since > self.config.timeout_keep_alive:
                one.transport.close()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        asyncio.get_running_loop().call_later(self._grace_seconds, self._batcher.close)
        await super().shutdown(sockets)


def serve(location: Path, overrides: list[str], options: Options) -> None:
    """Serve until a signal. Raises `UserError` before the address is open."""
    token = read_token(options.host)
    with bound(options.host, options.port) as listening:
        served = load_served(location, overrides, options.name, options.max_positions)
        batcher = batcher_of(served, options)
        config = uvicorn.Config(
            application(served, batcher, options, token),
            http=H11Protocol,
            log_config=None,
            access_log=False,
            lifespan="on",
            ws="none",
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=int(options.grace_seconds) + ENDING_SECONDS,
        )
        server = Server(config, batcher, _greeting(listening, served, options), options.grace_seconds)

        def stop(number: int, frame: FrameType | None) -> None:
            server.should_exit = True

        for number in (signal.SIGTERM, signal.SIGINT):  # uvicorn puts these back and raises its signals again
            signal.signal(number, stop)
        open_for_clients(listening, options.host, options.port)
        server.run(sockets=[listening])
        batcher.join(ENDING_SECONDS)
    print("bigmodel: the server has ended", flush=True)


def batcher_of(served: Served, options: Options) -> Batcher:
    """Raises `UserError` if the key-value cache does not fit into memory."""

    def engine() -> Engine:
        return Engine(
            served.model, served.tokenizer, options.max_sequences, served.positions, served.device, served.target_ahead
        )

    try:
        return Batcher(engine, options.max_sequences, options.max_queue)
    except RuntimeError as error:  # of torch's allocators, on a CPU and on a GPU
        if "memory" not in str(error):
            raise
        raise UserError(
            f"--max-sequences {options.max_sequences}: a key-value cache of {served.positions} positions for each does "
            "not fit into memory; lower --max-sequences, or give a smaller --max-positions"
        ) from None


def _greeting(listening: socket.socket, served: Served, options: Options) -> str:
    host, port = listening.getsockname()[:2]
    place = f"[{host}]" if ":" in host else host
    return (
        f"bigmodel: {served.name} at http://{place}:{port}/v1, {options.max_sequences} sequences of "
        f"{served.context} tokens"
    )
