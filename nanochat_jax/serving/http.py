"""uvicorn as it is used here: quiet, without what is not needed, and not for ever patient."""

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from typing import ClassVar

import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.h11_impl import H11Protocol

START_SECONDS = 60.0
SHUTDOWN_SECONDS = 600  # that answers may still take when the server is told to end


class PatientProtocol(H11Protocol):
    """Closes a connection on which no request has begun after some seconds: uvicorn would keep it for ever."""

    header_seconds: ClassVar[float] = 30.0

    def connection_made(self, transport: asyncio.Transport) -> None:
        """A client has come."""
        super().connection_made(transport)
        self.loop.call_later(self.header_seconds, self._close_if_silent)

    def _close_if_silent(self) -> None:
        if self.cycle is None and not self.transport.is_closing():
            self.transport.close()


def http_server(app: Starlette) -> uvicorn.Server:
    """A server for the application; `run(sockets=[...])` answers until a signal comes."""
    config = uvicorn.Config(
        app,
        http=PatientProtocol,
        ws="none",
        lifespan="off",
        log_config=None,  # uvicorn's would close all handlers that there are, and with some of them their streams
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=SHUTDOWN_SECONDS,
    )
    return uvicorn.Server(config)


@contextlib.contextmanager
def serving(app: Starlette) -> Iterator[str]:
    """http://127.0.0.1:<port> of a server in a thread of this process, for notebooks, tests and benches; what is being
    answered when it is left is cut off."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = http_server(app)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, name="http", daemon=True)
        thread.start()
        until = time.monotonic() + START_SECONDS
        while not server.started:
            if not thread.is_alive() or time.monotonic() > until:
                raise RuntimeError("the server does not start: what it says is in the lines above")
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = server.force_exit = True
            thread.join()
