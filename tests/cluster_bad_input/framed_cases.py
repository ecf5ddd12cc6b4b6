"""Attacks on the ports of `shared.wire.frames`: pages of the pageserver, WAL of the safekeepers."""

from __future__ import annotations

import ssl
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import pytest

from shared.auth import Scope, Service
from shared.config import Address
from shared.ids import ProjectId, TimelineId
from shared.keyspace import Fork, RelTag
from shared.tls import client_context, service_host_name
from shared.wire import pagestream, walstream
from shared.wire.frames import HELLO, HELLO_OK, pack_frame
from tests.cluster_bad_input.http_cases import Attempt
from tests.cluster_bad_input.place import CANARY, Place
from tests.cluster_bad_input.tokens import wrong_tokens
from tests.cluster_bad_input.wire import errors_in, framed, frames_in, over_tls, plain

END_OF_TIME: Final = (1 << 64) - 1
_CATALOG: Final = RelTag(1663, 5, 1259, Fork.MAIN)
_SAID_BEFORE_HELLO: Final = {
    "HTTP": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "a frame of no bytes": bytes(4),
    "a frame of 4 GB": b"\xff" * 64,
    "a frame that is longer than a token": struct.pack(">IB", 8192, HELLO) + bytes(64),
    "an unknown type": pack_frame(0x99, b"x"),
    "SUBSCRIBE": walstream.Subscribe(ProjectId.new(), TimelineId.new(), 0, 0, walstream.SubscribeFlags.NONE).pack(),
    "OPEN": pagestream.Open(ProjectId.new(), TimelineId.new()).pack(),
    "our own answer": pack_frame(HELLO_OK),
    "a token that is no text": pack_frame(HELLO, b"\xff\xfe" * 8),
}
_CODES: Final = {401: "unauthenticated", 403: "permission_denied"}


@dataclass(frozen=True, slots=True)
class Port:
    place: Place
    name: str
    service: Service
    address: Address
    scope: Scope

    def token(self, project_id: ProjectId | None = None) -> str:
        return self.place.token(self.service, self.scope, project_id)

    async def refuses(
        self,
        about: str,
        sent: bytes,
        code: str,
        *,
        token: str | None = None,
        closes: bool = True,
        after: bytes | None = None,
    ) -> None:
        """`sent` is answered with an ERROR frame, by which the connection ends or which is one request's.

        `after`: something good that is answered first, so that `sent` meets a connection that is at work.
        """
        async with framed(self.place, self.service, self.address, token) as wire:
            if after is not None:
                await wire.send(after)
                assert errors_in(await wire.some()) == [], (self.name, about)
            await wire.send(sent)
            said = await wire.rest() if closes else await wire.some()
            assert errors_in(said) == [code], (self.name, about, errors_in(said), said[:200])

    async def breaks_off(self, sent: bytes, token: str | None = None) -> None:
        """An end in the middle of a frame is nobody's error."""
        async with framed(self.place, self.service, self.address, token) as wire:
            await wire.send(sent)


def ports(place: Place) -> list[Port]:
    """From the settings of all services."""
    found = []
    for name in sorted(place.cluster.services):
        for setting, scope in (("pages_listen", Scope.STORAGE_READ), ("wal_listen", Scope.WAL_READ)):
            if setting in place.config(name):
                service = Service(name.partition("-")[0])
                found.append(Port(place, name, service, place.address(name, setting), scope))
    return found


def by_strangers(port: Port) -> Iterator[Attempt]:
    yield _no_tls(port)
    yield _old_tls(port)
    for about, sent in _SAID_BEFORE_HELLO.items():
        code = "unauthenticated" if "no text" in about else "protocol"
        yield port.refuses(about, sent, code)
    yield port.breaks_off(pack_frame(HELLO, port.token().encode())[:20])
    for about, (token, status) in wrong_tokens(port.place, port.service, {port.scope}).items():
        if token is not None:
            code = "protocol" if len(token) > 4096 else _CODES[status]
            yield port.refuses(about, pack_frame(HELLO, token.encode()), code)


async def _no_tls(port: Port) -> None:
    for sent in (b"GET / HTTP/1.1\r\n\r\n", pack_frame(HELLO, CANARY.encode()), bytes(1000)):
        async with plain(port.address) as wire:
            await wire.send(sent)
            said = await wire.rest()
            assert said[:1] in (b"", b"\x15"), said  # nothing, or a TLS alert


async def _old_tls(port: Port) -> None:
    context = client_context(port.place.ca_certificate)
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises((ssl.SSLError, OSError)):
        async with over_tls(port.address, context, service_host_name(port.service.value)):
            pass


def by_friends(port: Port) -> Iterator[Attempt]:
    """With a good token."""
    requests = _wal_requests(port) if port.scope is Scope.WAL_READ else _page_requests(port)
    yield from requests
    token = port.token()
    yield port.refuses("HELLO again", pack_frame(HELLO, token.encode()), "protocol", token=token)
    yield port.refuses("a frame of no bytes", bytes(4), "protocol", token=token)
    yield port.refuses("a frame of 4 GB", b"\xff" * 64, "protocol", token=token)


def _ids(port: Port) -> tuple[ProjectId, TimelineId]:
    idle = port.place.idle
    return idle.project.project_id, idle.timeline.timeline_id


def _wal_requests(port: Port) -> Iterator[Attempt]:
    project_id, timeline_id = _ids(port)
    start = port.place.idle.timeline.start_lsn.value
    token, none = port.token(), walstream.SubscribeFlags.NONE

    def subscribe(start: int, end: int, project: ProjectId = project_id, timeline: TimelineId = timeline_id) -> bytes:
        return walstream.Subscribe(project, timeline, start, end, none).pack()

    good = subscribe(start, 0)
    refused = {
        "an empty SUBSCRIBE": (pack_frame(walstream.SUBSCRIBE), "protocol"),
        "a short SUBSCRIBE": (pack_frame(walstream.SUBSCRIBE, good[5:-1]), "protocol"),
        "a long SUBSCRIBE": (pack_frame(walstream.SUBSCRIBE, good[5:], b"x"), "protocol"),
        "no ids": (pack_frame(walstream.SUBSCRIBE, bytes(len(good) - 5)), "protocol"),
        "OPEN": (pagestream.Open(project_id, timeline_id).pack(), "protocol"),
        "an unknown project": (subscribe(start, 0, project=ProjectId.new()), "not_found"),
        "an unknown timeline": (subscribe(start, 0, timeline=TimelineId.new()), "not_found"),
        "before the beginning": (subscribe(start - 1, 0), "invalid_input"),
        "zero": (subscribe(0, 0), "invalid_input"),
        "backwards": (subscribe(start + 100, start + 50), "invalid_input"),
    }
    for about, (sent, code) in refused.items():
        yield port.refuses(about, sent, code, token=token)
    yield port.refuses("for another project", good, "permission_denied", token=port.token(ProjectId.new()))
    later = {
        "an empty FEEDBACK": pack_frame(walstream.FEEDBACK),
        "a long FEEDBACK": pack_frame(walstream.FEEDBACK, bytes(17)),
        "a second SUBSCRIBE": good,
        "a frame of no bytes": bytes(4),
        "a frame of 4 GB": b"\xff" * 64,
    }
    for about, sent in later.items():
        yield port.refuses(about, subscribe(END_OF_TIME, 0) + sent, "protocol", token=token)
        yield port.refuses(about, sent, "protocol", token=token, after=subscribe(END_OF_TIME, 0))
    yield port.breaks_off(good[:10], token)
    yield port.breaks_off(good + b"\0\0", token)
    yield _future_wal(port, subscribe(END_OF_TIME - 8, END_OF_TIME))
    feedback = good + walstream.Feedback(END_OF_TIME, END_OF_TIME).pack()
    yield port.refuses("FEEDBACK by who only reads", feedback, "permission_denied", token=token)


async def _future_wal(port: Port, sent: bytes) -> None:
    """Whoever asks for what is not there yet is told what there is, and waits."""
    async with framed(port.place, port.service, port.address, port.token()) as wire:
        await wire.send(sent)
        assert [kind for kind, _ in frames_in(await wire.some())] == [walstream.STATUS]


def _page_requests(port: Port) -> Iterator[Attempt]:
    project_id, timeline_id = _ids(port)
    token, opened = port.token(), pagestream.Open(project_id, timeline_id).pack()
    # The end of the log: what the last start of the compute left; any position behind the initdb will do.
    lsn = port.place.idle.timeline.start_lsn.value
    refused = {
        "an empty OPEN": (pack_frame(pagestream.OPEN), "protocol"),
        "a long OPEN": (opened[:3] + bytes([opened[3] + 1]) + opened[4:] + b"x", "protocol"),
        "no ids": (pack_frame(pagestream.OPEN, bytes(39)), "protocol"),
        "a request first": (pagestream.BasebackupRequest(1, lsn).pack(), "protocol"),
        "an unknown project": (pagestream.Open(ProjectId.new(), timeline_id).pack(), "not_found"),
        "an unknown timeline": (pagestream.Open(project_id, TimelineId.new()).pack(), "not_found"),
        "a frame of no bytes": (opened + bytes(4), "protocol"),
        "a frame of 4 GB": (opened + b"\xff" * 64, "protocol"),
    }
    for about, (sent, code) in refused.items():
        yield port.refuses(about, sent, code, token=token)
    yield port.refuses("for another project", opened, "permission_denied", token=port.token(ProjectId.new()))

    def block(lsn: int, rel: RelTag = _CATALOG, number: int = 0) -> bytes:
        return pagestream.BlockRequest(7, lsn, rel, number).pack(pagestream.GET_PAGE)

    def blocks(count: int, lsn: int = lsn, rel: RelTag = _CATALOG, first: int = 0) -> bytes:
        return pagestream.BlocksRequest(7, lsn, rel, first, count).pack()

    def at(lsn: int, kind: int) -> bytes:
        return pagestream.BasebackupRequest(7, lsn).pack(kind)

    good = block(lsn)
    size = opened + pagestream.BlockRequest(7, lsn, _CATALOG, 0).pack(pagestream.REL_SIZE)
    yield port.refuses("a frame of no bytes, later", bytes(4), "protocol", token=token, after=size)
    yield port.refuses("a frame of 4 GB, later", b"\xff" * 64, "protocol", token=token, after=size)
    requests = {
        "LSN 0": (block(0), "invalid_input"),
        "before the beginning": (block(lsn - 1), "invalid_input"),
        "the future": (block(END_OF_TIME), "unavailable"),
        "no such relation": (block(lsn, RelTag(1663, 5, 999_999, Fork.MAIN)), "not_found"),
        "no such database": (block(lsn, RelTag(1663, 999_999, 1259, Fork.MAIN)), "not_found"),
        "no such block": (block(lsn, number=(1 << 32) - 1), "not_found"),
        "no such fork": (good[:-5] + b"\xc8" + good[-4:], "protocol"),
        "a short request": (pack_frame(pagestream.GET_PAGE, good[5:-1]), "protocol"),
        "an empty request": (pack_frame(pagestream.GET_PAGE), "protocol"),
        "an empty BASEBACKUP": (pack_frame(pagestream.BASEBACKUP), "protocol"),
        "BASEBACKUP of LSN 0": (pagestream.BasebackupRequest(7, 0).pack(), "invalid_input"),
        "BASEBACKUP of the past": (pagestream.BasebackupRequest(7, lsn).pack(), "invalid_input"),
        "BASEBACKUP of the future": (pagestream.BasebackupRequest(7, END_OF_TIME).pack(), "unavailable"),
        "BASEBACKUP_BARE of the past": (at(lsn, pagestream.BASEBACKUP_BARE), "invalid_input"),
        "BASEBACKUP_BARE_READ_ONLY of LSN 0": (at(0, pagestream.BASEBACKUP_BARE_READ_ONLY), "invalid_input"),
        "BASEBACKUP_STANDBY of LSN 0": (at(0, pagestream.BASEBACKUP_STANDBY), "invalid_input"),
        "BASEBACKUP_BARE_STANDBY of LSN 0": (at(0, pagestream.BASEBACKUP_BARE_STANDBY), "invalid_input"),
        "no pages": (blocks(0), "protocol"),
        "too many pages": (blocks(pagestream.MAX_PAGES_PER_REQUEST + 1), "protocol"),
        "pages of LSN 0": (blocks(1, lsn=0), "invalid_input"),
        "pages of the future": (blocks(1, lsn=END_OF_TIME), "unavailable"),
        "pages of no such relation": (blocks(1, rel=RelTag(1663, 5, 999_999, Fork.MAIN)), "not_found"),
        "pages past the end": (blocks(2, first=(1 << 32) - 3), "not_found"),
        "pages past the last number": (blocks(2, first=(1 << 32) - 1), "protocol"),
        "a short GET_PAGES": (pack_frame(pagestream.GET_PAGES, blocks(1)[5:-1]), "protocol"),
        "an empty RELATIONS": (pack_frame(pagestream.RELATIONS), "protocol"),
        "RELATIONS of LSN 0": (at(0, pagestream.RELATIONS), "invalid_input"),
        "RELATIONS of the future": (at(END_OF_TIME, pagestream.RELATIONS), "unavailable"),
        "an unknown request": (pack_frame(0x99, bytes(8)), "protocol"),
        "OPEN again": (opened, "protocol"),
    }
    for what, (sent, code) in requests.items():
        yield port.refuses(what, opened + sent, code, token=token, closes=False)
    yield port.breaks_off(opened + good[:10], token)
    yield port.breaks_off(opened + b"".join(block(END_OF_TIME) for _ in range(300)), token)
