"""The console as a server: from a listening socket to the last token given back."""

from __future__ import annotations

import asyncio
import secrets
import signal
import socket
from collections.abc import Awaitable, Callable

import uvicorn

from keylake.console.app import create_app
from keylake.console.hats import Wardrobe
from keylake.place import Place
from shared.errors import UnavailableError
from shared.service import QuietServer


def listen(host: str, port: int) -> socket.socket:
    """To be closed. Raises UnavailableError when the port is taken."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen()  # so that whoever reads the address can connect
    except OSError as error:
        listener.close()
        raise UnavailableError(f"port {port} cannot be used ({error.strerror}): choose another with --port") from None
    return listener


async def serve(place: Place, listener: socket.socket, announce: Callable[[str], Awaitable[None]]) -> None:
    """Until SIGINT or SIGTERM. `announce` is told the address, with the key that lets its bearer in; the port is the
    listener's own, which is also what the browser sees. Raises UnavailableError."""
    port = listener.getsockname()[1]
    key = secrets.token_urlsafe(24)
    customer = await asyncio.to_thread(place.customer)
    wardrobe = Wardrobe(place)
    try:
        app = create_app(place, wardrobe, customer, key, port)
        config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=1)
        # Not uvicorn's own way with signals, which raises them anew at the end: our tokens would not be revoked.
        # Before the address is told: whoever has read it may end it.
        server = QuietServer(config)
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, setattr, server, "should_exit", True)
        await announce(f"http://127.0.0.1:{port}/#key={key}")
        await server.serve(sockets=[listener])
    finally:
        await wardrobe.aclose()
        customer.close()
