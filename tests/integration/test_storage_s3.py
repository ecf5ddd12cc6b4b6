"""The S3 backend when network or server misbehave: a real server behind a proxy that breaks chosen requests."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import boto3
import httpx
import pytest
from pydantic import SecretStr

from shared.retry import RetryPolicy
from shared.storage.base import (
    InvalidRangeError,
    ObjectExistsError,
    ObjectNotFoundError,
    StoreDeniedError,
    StoreUnavailableError,
)
from shared.storage.s3 import S3ObjectStore
from shared.storage.s3_client import S3Options

if TYPE_CHECKING:
    from tests.fixtures.s3 import S3Server  # not imported twice: pytest wants to rewrite its asserts


pytestmark = pytest.mark.integration


@dataclass(frozen=True)
class Forward:
    """The request reaches the server; `reply_bytes_max` bytes of the reply come back, then the connection breaks."""

    reply_bytes_max: int | None = None


@dataclass(frozen=True)
class Swallow:
    """The request never reaches the server and is never answered."""


@dataclass(frozen=True)
class Hangup:
    """The connection breaks; the server saw nothing."""


@dataclass(frozen=True)
class Answer:
    """The proxy answers; the server saw nothing."""

    status: int
    code: str = ""
    body: bytes | None = None


Action = Forward | Swallow | Hangup | Answer
LOST_REPLY = Forward(reply_bytes_max=0)


@dataclass
class Proxy:
    """HTTP/1.1 with one request per connection. `script` is consumed one entry per request; then all is forwarded."""

    upstream: tuple[str, int]
    endpoint: str = ""
    script: list[Action] = field(default_factory=list)
    seen: list[str] = field(default_factory=list)
    """`METHOD` of each request, with `!` when it was conditional."""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await self._serve(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # the client went away: some tests make it do so
        finally:
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        if re.search(rb"\r\nexpect: *100-continue", head, re.IGNORECASE):
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            head = re.sub(rb"\r\nexpect: *100-continue", b"", head, flags=re.IGNORECASE)
        length = re.search(rb"\r\ncontent-length: *(\d+)", head, re.IGNORECASE)
        body = await reader.readexactly(int(length[1]) if length else 0)
        conditional = re.search(rb"\r\nif-none-match: *\*", head, re.IGNORECASE)
        self.seen.append(head.split(b" ")[0].decode() + ("!" if conditional else ""))
        match self.script.pop(0) if self.script else Forward():
            case Hangup():
                return
            case Swallow():
                await reader.read()  # until the client gives up
            case Answer(status, code, answer_body):
                if answer_body is None:
                    answer_body = f"<Error><Code>{code}</Code><Message>secret detail</Message></Error>".encode()
                writer.write(
                    f"HTTP/1.1 {status} X\r\nConnection: close\r\nContent-Type: application/xml\r\n"
                    f"Content-Length: {len(answer_body)}\r\n\r\n".encode()
                    + answer_body
                )
                await writer.drain()
            case Forward(reply_bytes_max):
                head = head.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
                reply = await self._ask_upstream(head + body)
                writer.write(reply[:reply_bytes_max])
                await writer.drain()

    async def _ask_upstream(self, request: bytes) -> bytes:
        reader, writer = await asyncio.open_connection(*self.upstream)
        try:
            writer.write(request)
            return await reader.read()
        finally:
            writer.close()
            await writer.wait_closed()


@asynccontextmanager
async def serving(proxy: Proxy) -> AsyncIterator[Proxy]:
    server = await asyncio.start_server(proxy.serve, "127.0.0.1", 0)
    proxy.endpoint = "http://{}:{}".format(*server.sockets[0].getsockname())
    try:
        yield proxy
    finally:
        server.close()
        await server.wait_closed()


@pytest.fixture
async def proxy(s3_server: S3Server) -> AsyncIterator[Proxy]:
    target = urlsplit(s3_server.endpoint)
    if target.scheme != "http":
        pytest.skip("the proxy speaks plain HTTP only")
    async with serving(Proxy((target.hostname or "", target.port or 80))) as proxy:
        yield proxy


def options_for(server: S3Server, endpoint: str, bucket: str, *, create_bucket: bool = True) -> S3Options:
    settings = server.settings(bucket)
    return S3Options(
        bucket=bucket,
        endpoint=endpoint,
        access_key_id=settings.access_key_id,
        secret_access_key=settings.secret_access_key,
        create_bucket=create_bucket,
        read_timeout_s=2.0,
        retry=RetryPolicy(attempts=3, first_delay_s=0.01, max_delay_s=0.02),
    )


def boto_client(store: S3ObjectStore) -> Any:
    """For calls that a store does not make."""
    return store._client


@pytest.fixture
async def bucket(s3_server: S3Server) -> str:
    return s3_server.new_bucket()


@pytest.fixture
async def store(s3_server: S3Server, proxy: Proxy, bucket: str) -> AsyncIterator[S3ObjectStore]:
    """Through the proxy."""
    store = await S3ObjectStore.open(options_for(s3_server, proxy.endpoint, bucket))
    proxy.seen.clear()
    yield store
    await store.close()


@pytest.fixture
async def rival(s3_server: S3Server, store: S3ObjectStore, bucket: str) -> AsyncIterator[S3ObjectStore]:
    """The same bucket, without the proxy."""
    rival = await S3ObjectStore.open(options_for(s3_server, s3_server.endpoint, bucket))
    yield rival
    await rival.close()


async def test_a_create_whose_reply_was_lost_has_succeeded(store: S3ObjectStore, proxy: Proxy) -> None:
    proxy.script = [LOST_REPLY]
    await store.put_if_absent("key", b"ours")
    assert proxy.seen == ["PUT!", "PUT!", "HEAD"]
    assert await store.get("key") == b"ours"
    with pytest.raises(ObjectExistsError):
        await store.put_if_absent("key", b"ours")  # another call, though of the same bytes


async def test_a_create_whose_replies_were_all_lost_is_reported_as_unknown(
    store: S3ObjectStore, rival: S3ObjectStore, proxy: Proxy
) -> None:
    proxy.script = [LOST_REPLY] * 3
    with pytest.raises(StoreUnavailableError):
        await store.put_if_absent("key", b"ours")
    assert await rival.get("key") == b"ours"


@pytest.mark.parametrize("rival_data", [b"theirs", b"ours"])
async def test_a_rival_that_came_first_wins_even_with_the_same_bytes(
    store: S3ObjectStore, rival: S3ObjectStore, proxy: Proxy, rival_data: bytes
) -> None:
    proxy.script = [Hangup()]
    await rival.put_if_absent("key", rival_data)
    with pytest.raises(ObjectExistsError):
        await store.put_if_absent("key", b"ours")
    assert proxy.seen == ["PUT!", "PUT!", "HEAD"]
    assert await rival.get("key") == rival_data


async def test_the_question_who_won_is_itself_retried(store: S3ObjectStore, proxy: Proxy) -> None:
    proxy.script = [LOST_REPLY, Forward(), Hangup()]
    await store.put_if_absent("key", b"ours")
    assert proxy.seen == ["PUT!", "PUT!", "HEAD", "PUT!", "HEAD"]


async def test_a_create_in_progress_elsewhere_is_waited_for(store: S3ObjectStore, proxy: Proxy) -> None:
    proxy.script = [Answer(409, "ConditionalRequestConflict")]
    await store.put_if_absent("key", b"ours")
    assert proxy.seen == ["PUT!", "PUT!"]


@pytest.mark.parametrize(
    "fault",
    [
        Answer(503, "SlowDown"),
        Answer(500, "InternalError"),
        Answer(502, body=b"<html>Bad gateway"),
        Answer(429, "TooManyRequests"),
        Answer(400, "RequestTimeout"),
        Hangup(),
        LOST_REPLY,
        Forward(reply_bytes_max=100),
    ],
)
async def test_faults_that_pass_are_retried(store: S3ObjectStore, proxy: Proxy, fault: Action) -> None:
    await store.put("key", b"x" * 1000)
    proxy.seen.clear()
    proxy.script = [fault, fault]
    assert await store.get("key") == b"x" * 1000
    assert proxy.seen == ["GET"] * 3
    proxy.script = [fault] * 3
    with pytest.raises(StoreUnavailableError) as caught:
        await store.get("key")
    assert "secret" not in str(caught.value)
    assert proxy.endpoint.removeprefix("http://") not in str(caught.value)


# botocore's date parser warns about a Last-Modified that was cut to "… GM".
@pytest.mark.filterwarnings("ignore::dateutil.parser.UnknownTimezoneWarning")
@pytest.mark.parametrize("reply_bytes_max", [0, 17, 60, 150, 250, 300, 400, 500, 600])
async def test_a_reply_cut_short_anywhere_is_never_believed(
    store: S3ObjectStore, proxy: Proxy, reply_bytes_max: int
) -> None:
    cut = Forward(reply_bytes_max)
    await store.put("a/key", b"x" * 1000)
    await store.put("b/key", b"y")
    proxy.script = [cut]
    assert [info.key async for info in store.list()] == ["a/key", "b/key"]
    proxy.script = [cut]
    assert await store.get("a/key") == b"x" * 1000
    proxy.script = [cut]
    assert await store.get_range("a/key", 0, 10) == b"x" * 10
    proxy.script = [cut]
    assert (await store.head("a/key")).size_bytes == 1000
    proxy.script = [cut]
    await store.delete_many(["a/key", "b/key"])
    assert [info.key async for info in store.list()] == []


async def test_a_body_cut_short_is_never_returned(store: S3ObjectStore, proxy: Proxy) -> None:
    await store.put("key", b"x" * 100_000)
    proxy.script = [Forward(reply_bytes_max=50_000)]
    assert await store.get("key") == b"x" * 100_000
    proxy.script = [Forward(reply_bytes_max=50_000)]
    assert await store.get_range("key", 0, 90_000) == b"x" * 90_000


@pytest.mark.parametrize(
    "refusal", [Answer(403, "AccessDenied"), Answer(403, "InvalidAccessKeyId"), Answer(400, "X Y")]
)
async def test_refusals_are_not_retried(store: S3ObjectStore, proxy: Proxy, refusal: Answer) -> None:
    proxy.script = [refusal]
    with pytest.raises(StoreDeniedError) as caught:
        await store.put("key", b"x")
    assert proxy.seen == ["PUT"]
    assert "secret" not in str(caught.value)
    assert " Y" not in str(caught.value)


async def test_a_silent_server_is_given_up(s3_server: S3Server, proxy: Proxy, bucket: str) -> None:
    proxy.script = [Forward(), Forward(), Swallow()]
    options = options_for(s3_server, proxy.endpoint, bucket)
    impatient = replace(options, read_timeout_s=0.3, retry=RetryPolicy(attempts=1))
    store = await S3ObjectStore.open(impatient)
    with pytest.raises(StoreUnavailableError):
        await store.get("key")
    await store.close()


async def test_nobody_listens(s3_server: S3Server, bucket: str) -> None:
    with pytest.raises(StoreUnavailableError):
        await S3ObjectStore.open(options_for(s3_server, "http://127.0.0.1:1", bucket))


async def test_a_lost_bucket_is_not_a_lost_object(s3_server: S3Server, store: S3ObjectStore, bucket: str) -> None:
    with pytest.raises(ObjectNotFoundError):
        await store.get("key")
    with pytest.raises(ObjectNotFoundError):
        await store.head("key")
    await store._pool.run(boto_client(store).delete_bucket, Bucket=bucket)
    with pytest.raises(StoreDeniedError):
        await store.get("key")
    with pytest.raises(StoreDeniedError):
        await store.head("key")
    with pytest.raises(StoreDeniedError):
        await store.get_range("key", 0, 1)
    with pytest.raises(StoreDeniedError):
        await store.put_if_absent("key", b"x")
    with pytest.raises(StoreDeniedError):
        [info async for info in store.list()]


async def test_a_bucket_is_created_only_on_request(s3_server: S3Server, bucket: str) -> None:
    with pytest.raises(StoreDeniedError):
        await S3ObjectStore.open(options_for(s3_server, s3_server.endpoint, bucket, create_bucket=False))
    options = options_for(s3_server, s3_server.endpoint, bucket)
    stores = await asyncio.gather(*(S3ObjectStore.open(options) for _ in range(8)))
    for store in stores:
        await store.close()
    store = await S3ObjectStore.open(options_for(s3_server, s3_server.endpoint, bucket, create_bucket=False))
    await store.close()


async def test_a_server_that_ignores_ranges_is_noticed(store: S3ObjectStore, proxy: Proxy) -> None:
    proxy.script = [Answer(200, body=b"0123456789")]
    with pytest.raises(InvalidRangeError):
        await store.get_range("key", 2, 4)


async def test_delete_many_reports_what_was_refused(store: S3ObjectStore, proxy: Proxy) -> None:
    await store.put("a", b"x")
    result = "<DeleteResult><Error><Key>a</Key><Code>{}</Code></Error></DeleteResult>"
    proxy.script = [Answer(200, body=result.format("InternalError").encode()), Answer(200, body=b"<DeleteResult/>")]
    await store.delete_many(["a", "a"])  # again, and then it works
    assert proxy.seen == ["PUT", "POST", "POST", "POST"]
    proxy.script = [Answer(200, body=result.format("AccessDenied").encode())]
    with pytest.raises(StoreDeniedError):
        await store.delete_many(["a"])


@pytest.fixture
def checked_user(s3_server: S3Server) -> Iterator[tuple[SecretStr, SecretStr]]:
    """Credentials of a user who may do anything in S3, on a server that checks signatures and policies meanwhile."""
    if s3_server.pid is None:
        pytest.skip("an S3 server of somebody else")
    iam: Any = boto3.session.Session().client(
        "iam",
        region_name="us-east-1",
        endpoint_url=s3_server.endpoint,
        aws_access_key_id=s3_server.access_key,
        aws_secret_access_key=s3_server.secret_key,
    )
    name = "keylake-test-user"
    iam.create_user(UserName=name)
    policy = {"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "s3:*", "Resource": "*"}]}
    iam.put_user_policy(UserName=name, PolicyName="s3", PolicyDocument=json.dumps(policy))
    key = iam.create_access_key(UserName=name)["AccessKey"]
    iam.close()
    with httpx.Client(base_url=s3_server.endpoint) as moto:
        moto.post("/moto-api/reset-auth", content="0").raise_for_status()
        try:
            yield SecretStr(key["AccessKeyId"]), SecretStr(key["SecretAccessKey"])
        finally:
            moto.post("/moto-api/reset-auth", content="inf").raise_for_status()


async def test_a_server_that_checks_signatures_takes_ours(
    s3_server: S3Server, checked_user: tuple[SecretStr, SecretStr], bucket: str
) -> None:
    good = replace(
        options_for(s3_server, s3_server.endpoint, bucket),
        access_key_id=checked_user[0],
        secret_access_key=checked_user[1],
    )
    store = await S3ObjectStore.open(good)
    await store.put_if_absent("a/key", b"0123456789")
    with pytest.raises(ObjectExistsError):
        await store.put_if_absent("a/key", b"")
    assert await store.get_range("a/key", 2, 4) == b"23"
    assert [info.key async for info in store.list("a/")] == ["a/key"]
    await store.delete_many(["a/key"])
    await store.close()
    for bad in (
        replace(good, secret_access_key=SecretStr("hunter2")),
        replace(good, access_key_id=SecretStr("AKIAHUNTER2")),
    ):
        with pytest.raises(StoreDeniedError) as caught:
            await S3ObjectStore.open(bad)
        assert "hunter2" not in str(caught.value).lower()


async def test_listing_skips_names_that_are_not_keys(store: S3ObjectStore, bucket: str) -> None:
    await store.put("a", b"x")
    for name in ("folder/", "with space", "../up"):
        await store._pool.run(store._client.put_object, Bucket=bucket, Key=name, Body=b"")
    assert [info.key async for info in store.list()] == ["a"]
