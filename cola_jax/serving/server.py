"""A server's life: it takes its address, compiles, answers, and drains when it is told to end."""

import asyncio
import ipaddress
import logging
import signal
import socket
from types import FrameType

import uvicorn
from starlette.applications import Starlette

from cola_jax.serving.batcher import Batcher
from cola_jax.types import UserError

_LOG = logging.getLogger("cola_jax.serving")


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a host name or address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def bind(host: str, port: int) -> socket.socket:
    """A socket at this address, which nobody can reach until the server listens.

    Raises:
      UserError: the address cannot be had.
    """
    # Raised outside of the handlers: an error with a cause outside of the program would ask for another start.
    wrong = ""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, kind, protocol)
    except OSError as error:
        wrong = f"--host = {host}: must be a name or an address of this machine ({error.strerror})"
    if wrong:
        raise UserError(wrong)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind(address)
    except OSError as error:
        found.close()
        where = f"--port = {port}: cannot be had on {host} ({error.strerror})"
        wrong = f"{where}; must be a free port of this machine, 0 takes any"
    if wrong:
        raise UserError(wrong)
    return found


class Server(uvicorn.Server):
    """A server that drains when it is told to end: new requests are answered 503, what has begun is finished."""

    def __init__(self, app: Starlette, batcher: Batcher, drain_seconds: float):
        """Args:
        app: the application.
        batcher: is closed first, and must be idle before the server ends.
        drain_seconds: after which it ends all the same.
        """
        config = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            ws="none",
            lifespan="off",
            server_header=False,
            timeout_graceful_shutdown=2,
        )
        super().__init__(config)
        self._batcher, self._drain_seconds = batcher, drain_seconds
        self._loop: asyncio.AbstractEventLoop | None = None
        self._draining: asyncio.Task | None = None

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Answers until it is told to end."""
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal drains, another one ends at once."""
        if self._batcher.closing or self._loop is None:
            self.should_exit = True
            return
        self._batcher.close()
        _LOG.warning("%s: draining, at most %.0f s", signal.Signals(sig).name, self._drain_seconds)
        self._loop.call_soon_threadsafe(self._begin_to_drain)

    def _begin_to_drain(self) -> None:
        self._draining = asyncio.get_running_loop().create_task(self._drain())

    async def _drain(self) -> None:
        end = asyncio.get_running_loop().time() + self._drain_seconds
        while self._batcher.busy and asyncio.get_running_loop().time() < end:
            await asyncio.sleep(0.02)
        self.should_exit = True
