"""The process that serves: sockets, signals, a clock for slow clients, an orderly end."""

from __future__ import annotations

import asyncio
import errno
import signal
import socket
from collections.abc import Callable
from types import FrameType

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from vlm.errors import BusyError, InvalidInput
from vlm.serving.app import make_app
from vlm.serving.state import State

_DRAIN_S = 8
_HEADER_S = 10
_MAX_CONNECTIONS = 1000
_MAX_HEADER_BYTES = 32 << 10


class PatientProtocol(H11Protocol):
    """HTTP/1.1 that hangs up on clients who do not finish the head of a request in time.

    uvicorn has such a clock only for the pause between an answer and the next request.
    """

    _clock: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the clock."""
        super().connection_made(transport)
        self._set_clock()

    def data_received(self, data: bytes) -> None:
        """Take what came, and stop the clock once a head is whole."""
        super().data_received(data)
        self._set_clock()

    def _set_clock(self) -> None:
        if self.conn.their_state is not h11.IDLE:
            if self._clock is not None:
                self._clock.cancel()
            self._clock = None
        elif self._clock is None:
            self._clock = self.loop.call_later(_HEADER_S, self.transport.close)


def serve(state: State, announce: Callable[[str], object]) -> None:
    """Serve until SIGTERM or Ctrl-C; running requests get some seconds to end.

    Args:
        state: The service's parts; closed at the end.
        announce: Called with the address once requests are accepted.

    Raises:
        BusyError: The port is taken.
        InvalidInput: The host cannot be listened on.
    """
    with listen(state.settings.host, state.settings.port) as listener:
        Server(state, listener, announce).run(sockets=[listener])


class Server(uvicorn.Server):
    """Says when it is ready, and takes a signal as an order, not as an accident."""

    def __init__(self, state: State, listener: socket.socket, announce: Callable[[str], object]) -> None:
        config = uvicorn.Config(
            make_app(state),
            http=PatientProtocol,
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=_HEADER_S,
            timeout_graceful_shutdown=_DRAIN_S,
            h11_max_incomplete_event_size=_MAX_HEADER_BYTES,
            limit_concurrency=_MAX_CONNECTIONS,
        )
        super().__init__(config)
        host = state.settings.host
        name = f"[{host}]" if ":" in host else host
        self._address = f"http://{name}:{listener.getsockname()[1]}"
        self._announce, self._state = announce, state

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen, and say so."""
        await super().startup(sockets)
        if self.started:
            self._announce(self._address)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """End in order; a second Ctrl-C ends at once."""
        self.force_exit = self.should_exit and sig == signal.SIGINT
        # uvicorn would also keep the signal, to raise it once more after an orderly end
        self._state.is_draining = self.should_exit = True


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket; port 0 takes a free one.

    Raises:
        BusyError: The port is taken.
        InvalidInput: The host cannot be listened on.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio sends at once only on sockets that name their protocol; else a body waits 40 ms for its head
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host.strip("[]"), port))
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise BusyError(f"port {port} of {host} is taken; choose another with --port") from error
        raise InvalidInput(f"cannot listen on {host}:{port} ({error.strerror or error})") from error
    listener.set_inheritable(True)
    return listener
