"""A connection to a compute's Postgres in replication mode: socket, login, the two commands that we need.

Over a Unix socket, or over TLS with exactly one certificate accepted: the one that the compute's agent made at boot.
Inside of that it is Postgres's ordinary protocol with SCRAM, in which the server proves itself, too.

Blocking: every stream has a thread of its own (wal_receiver.py says why). `abort` may be called from any thread.
"""

from __future__ import annotations

import base64
import contextlib
import hmac
import os
import select
import socket
import ssl
import struct
from collections.abc import Iterator
from typing import Final, Self, TypeVar

from safekeeper.copy_stream import CopyStreamReader, Received
from shared.api.safekeeper import ComputeAddress
from shared.crypto.secret import random_bytes
from shared.errors import InvalidInputError, UnauthenticatedError, UnavailableError
from shared.lsn import Lsn
from shared.wire import scram
from shared.wire.buffer import ProtocolViolationError
from shared.wire.pgauth import (
    AuthenticationOk,
    AuthenticationSASL,
    AuthenticationSASLContinue,
    AuthenticationSASLFinal,
    SASLInitialResponse,
    SASLResponse,
)
from shared.wire.pgproto import (
    BackendMessage,
    CommandComplete,
    CopyBothResponse,
    DataRow,
    ErrorResponse,
    NoticeResponse,
    ParameterStatus,
    ReadyForQuery,
    RowDescription,
    parse_backend,
)
from shared.wire.pgstartup import StartupMessage
from shared.wire.replication import SystemIdentity, identify_system, start_replication

PG_TIMELINE: Final = 1
_MAX_MESSAGE_SIZE_BYTES: Final = 64 * 1024
"""Before the stream there are only small messages."""
_HEADER: Final = struct.Struct(">cI")
_TLS_RECORD_SIZE_BYTES: Final = 16 * 1024
_TIMEVAL: Final = struct.Struct("@ll")
_STATUS: Final = struct.Struct(">cIcQQQqB")
"""CopyData around a StandbyStatusUpdate, packed at once: one of them answers every commit."""

M = TypeVar("M", bound=BackendMessage)


class ReplicationConnection:
    """First a conversation (`log_in`, `identify_system`, `start`), then a stream (`receive`, `send_status`)."""

    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected
        # For `abort`: SSLSocket.shutdown takes its TLS state away from under the thread that reads.
        self._raw = socket.socket(fileno=os.dup(connected.fileno()))
        self._reader: CopyStreamReader | None = None
        self._poll: select.poll | None = None
        if isinstance(connected, ssl.SSLSocket):
            self._poll = select.poll()
            self._poll.register(self._raw, select.POLLIN)

    @classmethod
    def connect(cls, address: ComputeAddress, timeout_s: float) -> Self:
        """Raises UnavailableError when the compute cannot be reached or is not the one with the pinned certificate,
        InvalidInputError for an address in plain text over the network. `timeout_s` bounds each step until `start`."""
        try:
            if address.certificate_pem is None:
                if not address.host.startswith("/"):
                    raise InvalidInputError("a compute that is not on a Unix socket needs a certificate")
                plain = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                with _closed_on_error(plain):
                    plain.settimeout(timeout_s)
                    plain.connect(f"{address.host}/.s.PGSQL.{address.port}")
                return cls(plain)
            context = _pinned_context(address.certificate_pem)
            plain = socket.create_connection((address.host, address.port), timeout_s)
            with _closed_on_error(plain):
                plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                secure = context.wrap_socket(plain, server_hostname=address.host)
            with _closed_on_error(secure):
                expected = ssl.PEM_cert_to_DER_cert(address.certificate_pem)
                if not hmac.compare_digest(secure.getpeercert(binary_form=True) or b"", expected):
                    raise UnavailableError("the compute showed another certificate than the pinned one")
            return cls(secure)
        except OSError as error:  # ssl.SSLError and TimeoutError are among them
            raise UnavailableError(f"the compute cannot be reached: {type(error).__name__}") from None

    def abort(self) -> None:
        """End the connection: whoever reads or writes comes back at once. From any thread, any number of times."""
        with contextlib.suppress(OSError):
            self._raw.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """By the thread that uses it."""
        self._socket.close()
        self._raw.close()

    # --- conversation ---

    def log_in(self, user: str, password: str, application_name: str) -> None:
        """Raises UnauthenticatedError when either side does not prove who it is, UnavailableError,
        ProtocolViolationError.

        A server that does not ask for the password is refused when there is one: it has proved nothing.
        """
        parameters = {"user": user, "replication": "true", "application_name": application_name}
        self._send(StartupMessage(parameters).serialize())
        client = scram.ScramClient(password, base64.b64encode(random_bytes(scram.NONCE_LENGTH_BYTES)).decode("ascii"))
        proved = False
        while True:
            match self._receive():
                case AuthenticationSASL(mechanisms=mechanisms) if scram.MECHANISM in mechanisms:
                    self._send(SASLInitialResponse(scram.MECHANISM, client.first()).serialize())
                case AuthenticationSASLContinue(data=data):
                    self._send(SASLResponse(client.final(data)).serialize())
                case AuthenticationSASLFinal(data=data):
                    client.verify(data)
                    proved = True
                case AuthenticationOk():
                    if password and not proved:
                        raise UnauthenticatedError("the compute did not prove that it knows the password")
                    break
                case _:
                    raise UnauthenticatedError(
                        "the compute asks for a kind of authentication that is not SCRAM-SHA-256"
                    )
        while not isinstance(self._receive(), ReadyForQuery):
            pass

    def identify_system(self) -> SystemIdentity:
        """Raises UnavailableError, ProtocolViolationError."""
        self._send(identify_system().serialize())
        self._expect(RowDescription)
        row = self._expect(DataRow)
        self._expect(CommandComplete)
        self._expect(ReadyForQuery)
        return SystemIdentity.from_row(row.values)

    def start(self, lsn: int, idle_timeout_s: float) -> None:
        """START_REPLICATION. From then on only `receive` and `send_status`. Raises UnavailableError,
        ProtocolViolationError."""
        self._send(start_replication(Lsn(lsn), pg_timeline=PG_TIMELINE).serialize())
        self._expect(CopyBothResponse)
        self._reader = CopyStreamReader(lsn)
        # Timeouts by the kernel: Python's own would cost a poll() per read.
        self._socket.settimeout(None)
        seconds, rest = divmod(idle_timeout_s, 1)
        limit = _TIMEVAL.pack(int(seconds), int(rest * 1e6))
        self._raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
        self._raw.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)

    def _send(self, data: bytes) -> None:
        try:
            self._socket.sendall(data)
        except OSError as error:
            raise UnavailableError(f"the connection to the compute is lost: {type(error).__name__}") from None

    def _expect(self, kind: type[M]) -> M:
        message = self._receive()
        if not isinstance(message, kind):
            raise ProtocolViolationError("the compute sent another message than the protocol expects here")
        return message

    def _receive(self) -> BackendMessage:
        """The next message that is not an aside. Raises UnavailableError when there is none, or it is an error."""
        while True:
            # Exactly one message: what follows the last of them belongs to the stream.
            header = self._read(_HEADER.size)
            _, length = _HEADER.unpack(header)
            if not 4 <= length <= _MAX_MESSAGE_SIZE_BYTES:
                raise ProtocolViolationError("invalid message length")
            message = parse_backend(header[:1], self._read(length - 4))
            if isinstance(message, ErrorResponse):
                raise UnavailableError(f"the compute refuses the stream: SQLSTATE {message.sqlstate}")
            if not isinstance(message, NoticeResponse | ParameterStatus):
                return message

    def _read(self, size_bytes: int) -> bytes:
        data = bytearray()
        while len(data) < size_bytes:
            try:
                chunk = self._socket.recv(size_bytes - len(data))
            except OSError as error:
                raise UnavailableError(f"the connection to the compute is lost: {type(error).__name__}") from None
            if not chunk:
                raise UnavailableError("the compute closed the connection")
            data += chunk
        return bytes(data)

    # --- stream ---

    def receive(self) -> Received | None:
        """What has come since the last call, waiting for something to come; None after `idle_timeout_s` of silence.

        Raises UnavailableError at the end of the connection, ProtocolViolationError.
        """
        reader = self._reader
        assert reader is not None  # noqa: S101 - `start` was called
        try:
            size = self._socket.recv_into(reader.free)
            reader.received(size)
            if self._poll is not None:
                # TLS hands out one record, 16 KiB at most, per call. What else is there belongs to the same frame.
                while size and len(reader.free) > _TLS_RECORD_SIZE_BYTES and self._poll.poll(0):
                    size = self._socket.recv_into(reader.free)
                    reader.received(size)
        except (BlockingIOError, ssl.SSLWantReadError):
            return None
        except OSError as error:
            raise UnavailableError(f"the connection to the compute is lost: {type(error).__name__}") from None
        if size == 0:
            raise UnavailableError("the compute closed the connection")
        return reader.take()

    def wait_readable(self, timeout_s: float) -> bool:
        """Is there something to receive, or does it come in time?"""
        if isinstance(self._socket, ssl.SSLSocket) and self._socket.pending():
            return True
        poll = select.poll()
        poll.register(self._raw, select.POLLIN)
        return bool(poll.poll(timeout_s * 1e3))

    def send_status(self, lsn: int, *, reply_requested: bool = False) -> None:
        """StandbyStatusUpdate: written, flushed and applied are all one to us; the time is for monitoring only, and
        left out. Raises UnavailableError."""
        self._send(_STATUS.pack(b"d", _STATUS.size - 1, b"r", lsn, lsn, lsn, 0, reply_requested))


@contextlib.contextmanager
def _closed_on_error(resource: socket.socket) -> Iterator[None]:
    try:
        yield
    except BaseException:
        resource.close()
        raise


def _pinned_context(certificate_pem: str) -> ssl.SSLContext:
    """TLS 1.3 with one trusted certificate, which is the server's own; so its name does not matter.

    Raises InvalidInputError when it is not a certificate.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    try:
        context.load_verify_locations(cadata=certificate_pem)
    except (ssl.SSLError, ValueError):
        raise InvalidInputError("the compute's certificate is not a PEM certificate") from None
    return context
