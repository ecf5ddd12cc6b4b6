"""Certificates of a local cluster: issued, and renewed, all at once, when two thirds of their time are over."""

from __future__ import annotations

import os
import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from keylake.doctor import Finding, Verdict, _certificates
from keylake.layout import Layout
from shared import tls
from shared.errors import CorruptedError


@pytest.fixture
def days_valid(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Certificates that are issued from here on are as if they were made long ago."""
    monkeypatch.setattr(tls, "_VALIDITY", timedelta(days=120))
    return monkeypatch


def shakes_hands(layout: Layout) -> bool:
    """A client that trusts the home's CA, with every server that has a certificate there."""
    for certificate in layout.pki.glob("*.crt"):
        if certificate == layout.ca_certificate:
            continue
        files = tls.CertificateFiles(certificate, certificate.with_suffix(".key"))
        to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
        server = tls.server_context(files).wrap_bio(to_server, to_client, server_side=True)
        client = tls.client_context(layout.ca_certificate).wrap_bio(to_client, to_server, server_hostname="localhost")
        for _ in range(3):
            for end in (client, server):
                try:
                    end.do_handshake()
                except ssl.SSLWantReadError:
                    continue
        assert client.version() == "TLSv1.3"
    return True


def told(layout: Layout) -> Finding:
    [finding] = _certificates(layout.home)
    return finding


def test_they_are_kept_for_two_thirds_of_their_time_and_then_renewed(
    tmp_path: Path, days_valid: pytest.MonkeyPatch
) -> None:
    layout = Layout(tmp_path / "home")
    assert list(_certificates(layout.home)) == []
    layout.create()
    before = {path.name: path.read_bytes() for path in layout.pki.iterdir()}
    keys = {path.name: path.read_bytes() for path in layout.keys.iterdir()}
    assert shakes_hands(layout)
    assert told(layout).verdict is Verdict.WARNING  # 120 days are less than a third of a year
    assert "keylake up" in told(layout).remedy

    days_valid.undo()
    layout.create()
    after = {path.name: path.read_bytes() for path in layout.pki.iterdir()}
    assert after.keys() == before.keys()
    assert not set(after.values()) & set(before.values())
    assert {path.name: path.read_bytes() for path in layout.keys.iterdir()} == keys
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in layout.pki.iterdir())
    assert layout.pki.stat().st_mode & 0o777 == 0o700
    assert shakes_hands(layout)
    assert told(layout).verdict is Verdict.OK
    assert tls.valid_until(layout.ca_certificate) > datetime.now(UTC) + timedelta(days=364)

    layout.create()
    assert {path.name: path.read_bytes() for path in layout.pki.iterdir()} == after
    assert sorted(path.name for path in layout.home.iterdir()) == ["config", "data", "keys", "logs", "pki"]


def test_what_is_over_is_missing_until_it_is_renewed(tmp_path: Path, days_valid: pytest.MonkeyPatch) -> None:
    days_valid.setattr(tls, "_VALIDITY", timedelta(seconds=-1))
    layout = Layout(tmp_path / "home")
    layout.create()
    assert told(layout).verdict is Verdict.MISSING
    with pytest.raises(ssl.SSLCertVerificationError):
        shakes_hands(layout)
    days_valid.undo()
    layout.create()
    assert shakes_hands(layout)


@pytest.mark.parametrize("step", ["rename", "rmtree"])
def test_a_renewal_that_is_interrupted_is_done_at_the_next_start(
    tmp_path: Path, days_valid: pytest.MonkeyPatch, step: str
) -> None:
    layout = Layout(tmp_path / "home")
    layout.create()
    days_valid.undo()
    # As a crash leaves it: between the two renames, or before what is old is removed.
    (layout.home / "pki.new").mkdir()
    if step == "rename":
        os.rename(layout.pki, layout.home / "pki.old")
    else:
        (layout.home / "pki.old").mkdir()
    layout.create()
    assert shakes_hands(layout)
    assert sorted(path.name for path in layout.home.iterdir()) == ["config", "data", "keys", "logs", "pki"]


def test_what_is_no_certificate(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "home")
    layout.create()
    layout.ca_certificate.write_text("nonsense")
    with pytest.raises(CorruptedError, match=r"ca\.crt"):
        tls.valid_until(layout.ca_certificate)
    assert "remove" in told(layout).remedy
