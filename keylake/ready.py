"""Is a service ready? The health check of the containers: `ready.py PORT NAME [--path PATH] [--ca FILE | --plain]`.

Asks this machine's PORT over TLS for a certificate of NAME, or in plain HTTP. Exit code 0: it answers 200. A health
check runs every few seconds in every container, so this imports the standard library only and works with
`python -I -S` (some 40 ms).
"""

from __future__ import annotations

import argparse
import socket
import ssl
import sys
from typing import Final

TIMEOUT_S: Final = 4.0
_MAX_STATUS_LINE_BYTES: Final = 256


def status_of(line: bytes) -> int | None:
    """The code in an HTTP/1.1 status line (RFC 9112 section 4); None when it is not one."""
    parts = line.split(b" ", 2)
    if len(parts) < 2 or not parts[0].startswith(b"HTTP/1.") or len(parts[1]) != 3 or not parts[1].isdigit():
        return None
    return int(parts[1])


def ask(port: int, name: str, path: str, ca: str | None) -> int | None:
    """`ca`: None for plain HTTP. Raises OSError (ssl.SSLError is one)."""
    with socket.create_connection(("127.0.0.1", port), TIMEOUT_S) as plain:
        if ca is None:
            return _get(plain, f"{name}:{port}", path)
        context = ssl.create_default_context(cafile=ca)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        with context.wrap_socket(plain, server_hostname=name) as secure:
            return _get(secure, name, path)


def _get(connection: socket.socket, host: str, path: str) -> int | None:
    connection.sendall(f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode("ascii"))
    with connection.makefile("rb") as answer:
        return status_of(answer.readline(_MAX_STATUS_LINE_BYTES))


def main() -> int:
    parser = argparse.ArgumentParser(prog="ready", description="Exit code 0 when the service is ready.")
    parser.add_argument("port", type=int)
    parser.add_argument("name", help="the DNS name in its certificate")
    parser.add_argument("--path", default="/readyz")
    parser.add_argument("--ca", default="/etc/keylake/pki/ca.crt", help="PEM file of the CA to trust")
    parser.add_argument("--plain", action="store_true", help="HTTP without TLS")
    arguments = parser.parse_args()
    try:
        status = ask(arguments.port, arguments.name, arguments.path, None if arguments.plain else arguments.ca)
    except OSError as error:
        print(f"not ready: {error}", file=sys.stderr)  # noqa: T201 - `docker inspect` shows it
        return 1
    print(f"status {status}")  # noqa: T201
    return 0 if status == 200 else 1


if __name__ == "__main__":
    sys.exit(main())
