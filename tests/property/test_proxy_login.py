"""The log-in that the proxy speaks itself: both ends, in pieces of any size, and whatever else comes."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compute.proxy.login import Proof, ask, log_in
from compute.proxy.session import ServerSide
from shared.wire.buffer import ProtocolViolationError
from shared.wire.pgauth import (
    AuthenticationOk,
    AuthenticationSASL,
    AuthenticationSASLContinue,
    AuthenticationSASLFinal,
    SASLInitialResponse,
    SASLResponse,
)
from shared.wire.pgframing import MessageFramer
from shared.wire.pgproto import ErrorResponse, NegotiateProtocolVersion
from shared.wire.pgstartup import PROTOCOL_3_0, StartupMessage
from shared.wire.scram import (
    MECHANISM,
    ScramAuthenticationError,
    ScramClient,
    ScramKeys,
    ScramServer,
    ScramVerifier,
)

KEYS = ScramKeys.derive("pencil", b"0123456789abcdef", 1)
VERIFIER = ScramVerifier(4096, b"0123456789abcdef", KEYS.stored_key, KEYS.server_key)
STARTUP = StartupMessage({"user": "anna"})
OK = AuthenticationOk().serialize()
FINAL = b"the last word to the client"
NEGOTIATION = NegotiateProtocolVersion(PROTOCOL_3_0, ()).serialize()


def cut(data: bytes, sizes: list[int]) -> list[bytes]:
    """Into pieces of these sizes, again and again."""
    pieces: list[bytes] = []
    while data:
        size = sizes[len(pieces) % len(sizes)]
        pieces.append(data[:size])
        data = data[size:]
    return pieces


class ScriptedClient:
    """Answers what it is told, or says what it likes."""

    broke_protocol = False

    def __init__(self, keys: ScramKeys, script: bytes | None = None) -> None:
        self._scram = ScramClient(keys, "nonce")
        self._framer = MessageFramer()
        self._waiting = script or b""
        self._answers = script is None
        self.heard: list[bytes] = []

    def answer(self, data: bytes) -> None:
        for frame in self._framer.feed(data):
            self.heard.append(frame.type)
            if self._answers and len(self.heard) == 1:
                self._waiting += SASLInitialResponse(MECHANISM, self._scram.first()).serialize()
            elif self._answers:
                self._waiting += SASLResponse(self._scram.final(frame.payload[4:])).serialize()

    async def read_exactly(self, size_bytes: int) -> bytes | None:
        if len(self._waiting) < size_bytes:
            return None
        data, self._waiting = self._waiting[:size_bytes], self._waiting[size_bytes:]
        return data


class ScriptedCompute:
    """`ServerSide`, in pieces. `before`: what it says first; `script`: all that it says, whatever it hears."""

    def __init__(
        self,
        sizes: list[int],
        *,
        before: bytes = b"",
        behind: bytes = OK,
        script: bytes | None = None,
        verifier: ScramVerifier = VERIFIER,
    ) -> None:
        self._sizes, self._behind = sizes, behind
        self._scram = ScramServer(verifier, "computes")
        asked = AuthenticationSASL((MECHANISM,)).serialize()
        self._answers = script is None
        self._pieces = cut(before + asked if script is None else script, sizes)
        self._framer = MessageFramer()
        self._heard = 0

    async def words(self) -> bytes:
        return self._pieces.pop(0) if self._pieces else b""

    def send(self, data: bytes) -> None:
        for frame in self._framer.feed(data):
            self._heard += 1
            if not self._answers:
                continue
            if self._heard == 1:
                first = SASLInitialResponse.parse(frame.payload).data
                assert first is not None
                answer = AuthenticationSASLContinue(self._scram.first(first)).serialize()
            else:
                final, _ = self._scram.final(frame.payload)
                answer = AuthenticationSASLFinal(final).serialize() + self._behind
            self._pieces += cut(answer, self._sizes)

    async def let_in(self, keys: ScramKeys) -> bytes:
        """And all that comes behind."""
        said = await log_in(cast("ServerSide", self), await self.words(), Proof(keys, FINAL))
        return said + b"".join(self._pieces)


SIZES = st.lists(st.integers(1, 200), min_size=1, max_size=5)


def test_who_knows_the_keys_is_believed_and_nobody_else() -> None:
    client = ScriptedClient(KEYS)
    proof = asyncio.run(ask(client, STARTUP, VERIFIER))
    assert proof is not None
    assert client.heard == [b"R", b"R"], "the last word is not said yet"
    assert proof.keys.client_key.matches(KEYS.client_key)
    proof.wipe()
    assert proof.keys.client_key.wiped
    for verifier in (ScramVerifier.decoy(b"anna", b"nonce"), ScramVerifier.compute("other", VERIFIER.salt, 1)):
        with pytest.raises(ScramAuthenticationError, match=r'^password authentication failed for user "anna"$'):
            asyncio.run(ask(ScriptedClient(KEYS), STARTUP, verifier))


@given(SIZES, st.booleans(), st.binary(max_size=300))
@settings(deadline=None)
def test_a_compute_may_speak_in_pieces(sizes: list[int], negotiates: bool, behind: bytes) -> None:
    """And nothing of what it says behind the log-in is lost."""
    compute = ScriptedCompute(sizes, before=NEGOTIATION if negotiates else b"", behind=OK + behind)
    assert asyncio.run(compute.let_in(KEYS)) == FINAL + OK + behind


def test_who_does_not_know_the_verifier_is_no_compute() -> None:
    impostor = ScramVerifier(VERIFIER.iterations, VERIFIER.salt, VERIFIER.stored_key, bytes(32))
    with pytest.raises(ScramAuthenticationError):
        asyncio.run(ScriptedCompute([100], verifier=impostor).let_in(KEYS))


@given(SIZES)
@settings(deadline=None)
def test_a_computes_error_is_the_clients(sizes: list[int]) -> None:
    error = ErrorResponse.of("FATAL", "53300", "too many").serialize()
    assert asyncio.run(ScriptedCompute(sizes, script=error).let_in(KEYS)) == error
    assert asyncio.run(ScriptedCompute(sizes, script=error[:-1]).let_in(KEYS)) == b"", "it has gone away"


@given(
    st.binary(max_size=200),
    st.sampled_from([b"", b"p", b"p\0\0\0", SASLInitialResponse(MECHANISM, b"n,,").serialize()]),
)
@settings(deadline=None)
def test_a_client_that_says_anything_else_is_refused(data: bytes, prefix: bytes) -> None:
    with suppress(ProtocolViolationError, ScramAuthenticationError):
        assert asyncio.run(ask(ScriptedClient(KEYS, prefix + data), STARTUP, VERIFIER)) is None


@given(
    st.binary(max_size=200),
    st.sampled_from([b"", b"R\0\0", AuthenticationSASL((MECHANISM,)).serialize(), NEGOTIATION, OK]),
    SIZES,
)
@settings(deadline=None)
def test_a_compute_that_says_anything_else_lets_nobody_in(data: bytes, prefix: bytes, sizes: list[int]) -> None:
    said = b""
    with suppress(ProtocolViolationError, ScramAuthenticationError):
        said = asyncio.run(ScriptedCompute(sizes, script=prefix + data).let_in(KEYS))
    assert not said.startswith(FINAL)
