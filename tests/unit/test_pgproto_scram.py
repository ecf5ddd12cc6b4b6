"""SCRAM-SHA-256: the RFC's vector, both ends against each other, and every way to cheat."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.wire.buffer import ProtocolViolationError
from shared.wire.scram import (
    ScramAuthenticationError,
    ScramClient,
    ScramKeys,
    ScramServer,
    ScramVerifier,
    saslprep,
)

# RFC 7677, section 3.
RFC_CLIENT_NONCE = "rOprNGfwEbeRWgbNEkqO"
RFC_SERVER_NONCE = "%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0"
RFC_SALT = bytes.fromhex("5b6d99689d12358eeca04b141236fa81")
RFC_SERVER_FIRST = f"r={RFC_CLIENT_NONCE}{RFC_SERVER_NONCE},s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096".encode()
RFC_CLIENT_FINAL = (
    f"c=biws,r={RFC_CLIENT_NONCE}{RFC_SERVER_NONCE},p=dHzbZapWIk4jUhN+Ute9ytag9zjfMHgsqmmiz7AndVQ=".encode()
)
RFC_SERVER_FINAL = b"v=6rriTRBi23WpRR/wtup+mMhUZUn/dB5nLTJRsjl95G4="

VERIFIER = ScramVerifier.compute("pencil", RFC_SALT)


def rfc_client() -> ScramClient:
    return ScramClient("pencil", RFC_CLIENT_NONCE, user="user")


def rfc_server() -> ScramServer:
    return ScramServer(VERIFIER, RFC_SERVER_NONCE)


def are_same(left: ScramKeys, right: ScramKeys) -> bool:
    return left.client_key.matches(right.client_key) and left.server_key == right.server_key


def test_the_vector_of_rfc_7677() -> None:
    client = rfc_client()
    assert client.first() == b"n,,n=user,r=rOprNGfwEbeRWgbNEkqO"
    assert client.final(RFC_SERVER_FIRST) == RFC_CLIENT_FINAL
    client.verify(RFC_SERVER_FINAL)


def test_the_servers_end_of_the_vector() -> None:
    server = rfc_server()
    assert server.first(rfc_client().first()) == RFC_SERVER_FIRST
    reply, keys = server.final(RFC_CLIENT_FINAL)
    assert reply == RFC_SERVER_FINAL
    assert are_same(keys, ScramKeys.derive("pencil", RFC_SALT, 4096))


@pytest.mark.parametrize("iterations", [1, 4096, 1_000_001])
def test_a_proxy_can_log_in_with_the_keys_it_saw(iterations: int) -> None:
    """Of a role that was made with any number of iterations: it derives nothing."""
    proved = ScramKeys.derive("pencil", RFC_SALT, 1)  # the number does not matter to what both ends do with them
    verifier = ScramVerifier(iterations, RFC_SALT, proved.stored_key, proved.server_key)
    client, server = ScramClient(proved, "nonce"), ScramServer(verifier, "x")
    _, keys = server.final(client.final(server.first(client.first())))
    upstream_client, upstream = ScramClient(keys, "fresh"), ScramServer(verifier, "nonces")
    reply, _ = upstream.final(upstream_client.final(upstream.first(upstream_client.first())))
    upstream_client.verify(reply)
    assert are_same(keys, proved)


# The integration test compares with what a real Postgres stores.
def test_verifier_text() -> None:
    text = VERIFIER.serialize()
    assert text.startswith("SCRAM-SHA-256$4096:W22ZaJ0SNY7soEsUEjb6gQ==$")
    assert ScramVerifier.parse(text) == VERIFIER
    assert VERIFIER.check_password("pencil")
    assert not VERIFIER.check_password("Pencil")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "md5c4ca4238a0b923820dcc509a6f75849b",
        "SCRAM-SHA-256$0:W22Z$" + "A" * 43 + "=:" + "A" * 43 + "=",
        "SCRAM-SHA-256$4096:W22Z$" + "A" * 42 + "==:" + "A" * 43 + "=",
        "SCRAM-SHA-256$4096:W22$" + "A" * 43 + "=:" + "A" * 43 + "=",
        "SCRAM-SHA-256$4096:W22Z$" + "A" * 43 + "=:" + "A" * 43 + "=\n",
        "SCRAM-SHA-256$٤:W22Z$" + "A" * 43 + "=:" + "A" * 43 + "=",
    ],
)
def test_bad_verifiers(text: str) -> None:
    with pytest.raises(ValueError, match=r"SCRAM|base64"):
        ScramVerifier.parse(text)


def test_a_wrong_password_is_refused_once_and_for_all() -> None:
    client, server = ScramClient("pencils", "nonce"), rfc_server()
    final = client.final(server.first(client.first()))
    with pytest.raises(ScramAuthenticationError) as caught:
        server.final(final)
    assert caught.value.sqlstate == "28P01"
    with pytest.raises(ProtocolViolationError):
        server.final(final)


def test_a_server_without_the_verifier_is_noticed() -> None:
    impostor = ScramServer(ScramVerifier(4096, RFC_SALT, bytes(32), bytes(32)), "x")
    client = rfc_client()
    with pytest.raises(ScramAuthenticationError):
        impostor.final(client.final(impostor.first(client.first())))
    with pytest.raises(ScramAuthenticationError):
        client.verify(b"v=" + b"A" * 43 + b"=")
    with pytest.raises(ScramAuthenticationError):
        client.verify(b"v=")
    with pytest.raises(ScramAuthenticationError):
        client.verify(b"e=invalid-proof")


def test_verify_before_final_proves_nothing() -> None:
    with pytest.raises(ProtocolViolationError):
        rfc_client().verify(RFC_SERVER_FINAL)
    with pytest.raises(ProtocolViolationError):
        rfc_server().final(RFC_CLIENT_FINAL)


@pytest.mark.parametrize(
    "server_first",
    [
        b"",
        b"\xff",
        b"r=rOprNGfwEbeRWgbNEkqO,s=W22Z,i=4096",  # nothing added to our nonce
        b"r=other,s=W22Z,i=4096",
        b"r=rOprNGfwEbeRWgbNEkqO\x7f,s=W22Z,i=4096",
        b"r=rOprNGfwEbeRWgbNEkqOx,s=,i=4096",
        b"r=rOprNGfwEbeRWgbNEkqOx,s=W22,i=4096",
        b"r=rOprNGfwEbeRWgbNEkqOx,s=W22Z,i=4095",  # cheap to guess
        b"r=rOprNGfwEbeRWgbNEkqOx,s=W22Z,i=999999999",  # hours of CPU
        b"r=rOprNGfwEbeRWgbNEkqOx,s=W22Z,i=1e5",
        b"r=rOprNGfwEbeRWgbNEkqOx,s=W22Z,i=-1",
        b"r=rOprNGfwEbeRWgbNEkqOx,s=W22Z,i=04096",
        b"m=must,r=rOprNGfwEbeRWgbNEkqOx,s=W22Z,i=4096",
        b"s=W22Z,r=rOprNGfwEbeRWgbNEkqOx,i=4096",
    ],
)
def test_bad_server_first_messages(server_first: bytes) -> None:
    with pytest.raises(ProtocolViolationError):
        rfc_client().final(server_first)


@pytest.mark.parametrize(
    "client_first",
    [
        b"",
        b"n=user,r=nonce",
        b"p=tls-server-end-point,,n=,r=nonce",
        b"n,a=admin,n=,r=nonce",
        b"n,,n=,r=",
        b"n,,n=,r=a b",
        b"n,,n=a=b,r=nonce",
        b"n,,m=x,n=,r=nonce",
        b"n,,r=nonce,n=",
        b"\xff\xff\xff",
    ],
)
def test_bad_client_first_messages(client_first: bytes) -> None:
    with pytest.raises(ProtocolViolationError):
        rfc_server().first(client_first)


@pytest.mark.parametrize(
    "client_final",
    [
        b"",
        RFC_CLIENT_FINAL.replace(b"c=biws", b"c=eSws"),  # says now that it knows of channel binding
        RFC_CLIENT_FINAL.replace(b"NEkqO", b"NEkqP"),
        RFC_CLIENT_FINAL + b"=",
        RFC_CLIENT_FINAL[:-4],
        RFC_CLIENT_FINAL.replace(b",p=", b",x=y,p="),
        b"\xff",
    ],
)
def test_bad_client_final_messages(client_final: bytes) -> None:
    server = rfc_server()
    server.first(rfc_client().first())
    with pytest.raises(ProtocolViolationError):
        server.final(client_final)


def test_a_decoy_looks_real_and_lets_nobody_in() -> None:
    decoy = ScramVerifier.decoy(b"nobody", b"server secret")
    assert decoy == ScramVerifier.decoy(b"nobody", b"server secret")
    assert decoy.salt != ScramVerifier.decoy(b"somebody", b"server secret").salt
    assert decoy.salt != ScramVerifier.decoy(b"nobody", b"another secret").salt
    assert ScramVerifier.parse(decoy.serialize()) == decoy
    client, server = ScramClient("", "nonce"), ScramServer(decoy, "x")
    with pytest.raises(ScramAuthenticationError):
        server.final(client.final(server.first(client.first())))


# RFC 4013, section 3, and what Postgres does where it fails.
@pytest.mark.parametrize(
    ("text", "prepared"),
    [
        ("I\u00adX", "IX"),
        ("user", "user"),
        ("USER", "USER"),
        ("\u00aa", "a"),
        ("\u2168", "IX"),
        ("a\u00a0b", "a b"),
        ("\u0627\u0031\u0628", "\u0627\u0031\u0628"),
    ],
)
def test_saslprep(text: str, prepared: str) -> None:
    assert saslprep(text) == prepared
    assert ScramVerifier.compute(text, b"salt") == ScramVerifier.compute(prepared, b"salt")


@pytest.mark.parametrize(
    "text", ["\u0007", "\u0627\u0031", "", "\u00ad", "\u0221", "\ue000", "\u0627a\u0627", "\udcff"]
)
def test_saslprep_refuses(text: str) -> None:
    with pytest.raises(ValueError, match="text"):
        saslprep(text)
    verifier = ScramVerifier.compute(text, b"salt")  # the raw password, as Postgres
    assert verifier.check_password(text)
    assert not verifier.check_password(text + "x")


def test_nothing_secret_is_shown() -> None:
    keys = ScramKeys.derive("pencil", RFC_SALT, 4096)
    for secret in (keys, VERIFIER, rfc_client(), rfc_server()):
        shown = repr(secret)
        assert "pencil" not in shown
        assert repr(keys.client_key.copied())[2:12] not in shown
        assert repr(VERIFIER.stored_key)[2:12] not in shown


@settings(deadline=None, max_examples=50)
@given(data=st.binary(max_size=80), prefix=st.sampled_from([b"", b"n,,", b"n,,n=,r=", b"r=rOprNGfwEbeRWgbNEkqO"]))
def test_random_bytes_raise_only_violations(data: bytes, prefix: bytes) -> None:
    for step in (rfc_client().final, rfc_client().verify, rfc_server().first, rfc_server().final):
        with contextlib.suppress(ProtocolViolationError, ScramAuthenticationError):
            step(prefix + data)


@settings(deadline=None, max_examples=20)
@given(password=st.text(st.characters(exclude_categories=["Cs"]), max_size=20), salt=st.binary(min_size=1, max_size=20))
def test_both_ends_agree(password: str, salt: bytes) -> None:
    client, server = ScramClient(password, "client"), ScramServer(ScramVerifier.compute(password, salt), "server")
    reply, keys = server.final(client.final(server.first(client.first())))
    client.verify(reply)
    assert are_same(keys, ScramKeys.derive(password, salt, 4096))
