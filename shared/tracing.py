"""One id for a request through all services: W3C Trace Context, in log lines and, where an endpoint is set, as spans.

A trace begins with a client's connection at the proxy, a command of `keylake`, a caller that sends a `traceparent`, or
a request that came without one. It goes along with our HTTP calls while it is *active*: work that a request leaves
behind is no part of it. Log lines made meanwhile carry its id as `request_id`. Key sessions, pages and WAL are not
traced.

Format of the header: W3C Trace Context, Recommendation of 2021-11-23, section 3.2. Spans are sent as OTLP/HTTP 1.x in
its JSON encoding. A span has names of routes, stages and services, methods and statuses, and nothing else: no path, no
name or id of anything that people made, no text of an error.
"""

from __future__ import annotations

import atexit
import contextlib
import http.client
import json
import logging
import os
import queue
import re
import secrets
import ssl
import threading
import time
from collections.abc import Iterator, Mapping, MutableMapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Final
from urllib.parse import urlsplit

STANDARD_VARIABLE: Final = "OTEL_EXPORTER_OTLP_ENDPOINT"
"""As in OpenTelemetry's own SDKs: a base URL, `/v1/traces` is added."""

_TRACEPARENT: Final = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_SAMPLED: Final = 1
_QUEUE: Final = 2048
_BATCH: Final = 256
_INTERVAL_S: Final = 1.0
_TIMEOUT_S: Final = 3.0


class Kind(IntEnum):
    """SpanKind of opentelemetry/proto/trace/v1/trace.proto."""

    INTERNAL = 1
    SERVER = 2
    CLIENT = 3


@dataclass(frozen=True, slots=True)
class TraceContext:
    trace_id: str
    """32 lower-case hex digits, not all zero; our `request_id`."""
    span_id: str
    """16 of them."""
    sampled: bool

    @classmethod
    def new(cls, *, sampled: bool = True) -> TraceContext:
        return cls(secrets.token_hex(16), secrets.token_hex(8), sampled)

    @classmethod
    def parse(cls, header: str) -> TraceContext | None:
        """None for what is no traceparent: then the trace begins here."""
        found = _TRACEPARENT.fullmatch(header)
        if found is None:
            return None
        version, trace_id, span_id, flags, more = found.groups()
        if version == "ff" or (version == "00" and more) or not int(trace_id, 16) or not int(span_id, 16):
            return None
        return cls(trace_id, span_id, bool(int(flags, 16) & _SAMPLED))

    def child(self) -> TraceContext:
        return TraceContext(self.trace_id, secrets.token_hex(8), self.sampled)

    @property
    def traceparent(self) -> str:
        return f"00-{self.trace_id}-{self.span_id}-{_SAMPLED if self.sampled else 0:02x}"


@dataclass(slots=True)
class _Active:
    context: TraceContext
    over: bool = False


_active: ContextVar[_Active | None] = ContextVar("keylake_trace", default=None)


def current() -> TraceContext | None:
    """Of the request that is being worked on; None in what it left behind, and where there is none."""
    active = _active.get()
    return None if active is None or active.over else active.context


def request_id(logger: Any, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """A processor of structlog."""
    context = current()
    if context is not None:
        event.setdefault("request_id", context.trace_id)
    return event


@dataclass(slots=True)
class Span:
    name: str
    kind: Kind
    context: TraceContext
    parent_id: str = ""
    started_ns: int = field(default_factory=time.time_ns)
    ended_ns: int = 0
    attributes: dict[str, str | int] = field(default_factory=dict)
    failed: bool = False

    def to_json(self) -> dict[str, Any]:
        """As OTLP's JSON has it: ids in hex, 64-bit numbers as text."""
        body: dict[str, Any] = {
            "traceId": self.context.trace_id,
            "spanId": self.context.span_id,
            "name": self.name,
            "kind": int(self.kind),
            "startTimeUnixNano": str(self.started_ns),
            "endTimeUnixNano": str(self.ended_ns),
            "attributes": _attributes(self.attributes),
            "status": {"code": 2} if self.failed else {},
        }
        return body | ({"parentSpanId": self.parent_id} if self.parent_id else {})


def _attributes(values: Mapping[str, str | int]) -> list[dict[str, Any]]:
    return [
        {"key": key, "value": {"intValue": str(value)} if isinstance(value, int) else {"stringValue": value}}
        for key, value in values.items()
    ]


@contextlib.contextmanager
def span(name: str, kind: Kind, parent: TraceContext | None, *, sampled: bool = True) -> Iterator[Span]:
    """Work that is part of `parent`'s trace, or begins one. Active inside of the block; recorded at its end."""
    context = TraceContext.new(sampled=sampled) if parent is None else parent.child()
    made = Span(name, kind, context, "" if parent is None else parent.span_id)
    active = _Active(context)
    token = _active.set(active)
    try:
        yield made
    except BaseException:
        made.failed = True
        raise
    finally:
        active.over = True
        with contextlib.suppress(ValueError):  # a generator that is closed by another task
            _active.reset(token)
        made.ended_ns = time.time_ns()
        record(made)


def record_stage(name: str, seconds: float) -> None:
    """A step of the request that is being worked on, which has just ended."""
    context = current()
    if context is not None:
        now = time.time_ns()
        record(Span(name, Kind.INTERNAL, context.child(), context.span_id, now - int(seconds * 1e9), now))


_exporter: Exporter | None = None


def record(ended: Span) -> None:
    if _exporter is not None and ended.context.sampled:
        _exporter.add(ended)


def configure_tracing(service: str, node_id: str, endpoint: str | None) -> None:
    """Once, at the start of a process. `endpoint`: base URL of an OTLP/HTTP receiver; None: what the standard variable
    says; neither: nothing is sent. Raises ValueError for a setting that is no URL. The variable may be meant for
    others: one that is no URL is told of, and no more."""
    global _exporter
    url = endpoint or os.environ.get(STANDARD_VARIABLE, "")
    if not url:
        return
    try:
        _exporter = Exporter(url, {"service.name": f"keylake-{service}", "service.instance.id": node_id})
    except ValueError as error:
        if endpoint:
            raise
        logging.getLogger(__name__).warning("%s: %s", STANDARD_VARIABLE, error)
        return
    atexit.register(_exporter.close)


class Exporter:
    """A thread that sends spans in batches. It never holds work up: what does not fit into the queue, or cannot be
    sent, is dropped and counted."""

    def __init__(self, endpoint: str, resource: Mapping[str, str | int]) -> None:
        parts = urlsplit(endpoint)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.username:
            raise ValueError("an OTLP endpoint is a URL like https://collector.example:4318")
        self._secure = parts.scheme == "https"
        self._host, self._port = parts.hostname, parts.port
        self._path = parts.path.rstrip("/") + "/v1/traces"
        self._resource = _attributes(resource)
        self._spans: queue.Queue[Span] = queue.Queue(_QUEUE)
        self._stop = threading.Event()
        self.dropped = 0
        self._thread = threading.Thread(target=self._run, name="otlp", daemon=True)
        self._thread.start()

    def add(self, ended: Span) -> None:
        try:
            self._spans.put_nowait(ended)
        except queue.Full:
            self.dropped += 1

    def close(self) -> None:
        """Sends what there is; takes as long as one attempt at most."""
        self._stop.set()
        self._thread.join(_TIMEOUT_S + 1)

    def _run(self) -> None:
        while not self._stop.wait(_INTERVAL_S):
            self._flush()
        self._flush()

    def _flush(self) -> None:
        while batch := self._take():
            try:
                self._send(batch)
            except (OSError, http.client.HTTPException):
                self.dropped += len(batch)
                return

    def _take(self) -> list[Span]:
        batch: list[Span] = []
        with contextlib.suppress(queue.Empty):
            while len(batch) < _BATCH:
                batch.append(self._spans.get_nowait())
        return batch

    def _send(self, batch: list[Span]) -> None:
        scope = {"scope": {"name": "keylake"}, "spans": [each.to_json() for each in batch]}
        body = {"resourceSpans": [{"resource": {"attributes": self._resource}, "scopeSpans": [scope]}]}
        connection = (
            http.client.HTTPSConnection(
                self._host, self._port, timeout=_TIMEOUT_S, context=ssl.create_default_context()
            )
            if self._secure
            else http.client.HTTPConnection(self._host, self._port, timeout=_TIMEOUT_S)
        )
        try:
            connection.request("POST", self._path, json.dumps(body), {"Content-Type": "application/json"})
            if connection.getresponse().status >= 300:
                raise http.client.HTTPException("refused")
        finally:
            connection.close()
