"""W3C trace contexts, what becomes of a request's trace in a service, and the spans that leave."""

from __future__ import annotations

import asyncio
import threading

import httpx
import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute
from prometheus_client import CollectorRegistry
from starlette.responses import Response

from shared import tracing
from shared.auth import Service, TokenVerifier, TrustBundle
from shared.errors import ConflictError
from shared.service import Readiness, create_service_app
from shared.tracing import Exporter, Kind, Span, TraceContext, current, request_id, span
from tests.fixtures.otlp import collecting
from tests.fixtures.waiting import wait_until

PARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
TRACE = PARENT[3:35]


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[Span]:
    spans: list[Span] = []
    monkeypatch.setattr(tracing, "record", spans.append)
    return spans


def test_a_header_is_read_and_written() -> None:
    context = TraceContext.parse(PARENT)
    assert context is not None
    assert context.traceparent == PARENT
    child = context.child()
    assert (child.trace_id, child.sampled) == (TRACE, True)
    assert child.span_id != context.span_id
    future = TraceContext.parse(PARENT.replace("00-", "01-", 1) + "-more")
    assert future is not None
    assert future.trace_id == TRACE
    unsampled = TraceContext.parse(PARENT[:-1] + "2")
    assert unsampled is not None
    assert not unsampled.sampled
    assert TraceContext.parse(TraceContext.new().traceparent) is not None


@pytest.mark.parametrize(
    "header",
    [
        "",
        "x",
        PARENT.upper(),
        PARENT + "-more",
        "ff" + PARENT[2:],
        PARENT.replace(TRACE, "0" * 32),
        PARENT.replace("00f067aa0ba902b7", "0" * 16),
        PARENT[:-3],
        PARENT + "\n",
        "00-" + "g" * 32 + PARENT[35:],
    ],
)
def test_what_is_no_header_begins_a_trace(header: str) -> None:
    assert TraceContext.parse(header) is None


async def test_work_that_a_request_leaves_behind_is_not_part_of_it(recorded: list[Span]) -> None:
    go_on = asyncio.Event()

    async def left_behind() -> TraceContext | None:
        await go_on.wait()
        return current()

    with span("outer", Kind.SERVER, None) as outer:
        task = asyncio.create_task(left_behind())
        assert current() == outer.context
        with span("inner", Kind.CLIENT, current()) as inner:
            assert current() == inner.context
        assert current() == outer.context
        tracing.record_stage("step", 0.5)
    go_on.set()
    assert await task is None
    assert current() is None
    assert [each.name for each in recorded] == ["inner", "step", "outer"]
    assert {each.context.trace_id for each in recorded} == {outer.context.trace_id}
    assert {each.parent_id for each in recorded[:2]} == {outer.context.span_id}
    tracing.record_stage("step", 0.5)
    assert len(recorded) == 3


def service() -> tuple[FastAPI, CollectorRegistry]:
    registry = CollectorRegistry()
    verifier = TokenVerifier(TrustBundle(keys={}), Service.COMPUTE)
    app = create_service_app(Service.COMPUTE, registry, Readiness(), verifier)
    app.router.route_class = APIRoute  # no token is asked for

    async def look(secret_name: str) -> Response:
        event = request_id(None, "info", {})
        return Response(event["request_id"])

    async def fail(secret_name: str) -> Response:
        raise ConflictError("the text of an error")

    async def break_down(secret_name: str) -> Response:
        raise ZeroDivisionError("with a secret")

    app.add_api_route("/look/{secret_name}", look, methods=["GET", "POST"])
    app.add_api_route("/fail/{secret_name}", fail, methods=["POST"])
    app.add_api_route("/break/{secret_name}", break_down, methods=["POST"])
    return app, registry


async def ask(app: FastAPI, method: str, path: str, **headers: str) -> httpx.Response:
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
        return await http.request(method, path, headers=headers)


async def test_a_service_goes_on_with_the_callers_trace(recorded: list[Span]) -> None:
    app, registry = service()
    answer = await ask(app, "POST", "/look/hunter2", traceparent=PARENT)
    assert answer.headers["x-request-id"] == answer.text == TRACE
    [noted] = recorded
    assert (noted.name, noted.parent_id) == ("POST /look/{secret_name}", "00f067aa0ba902b7")
    assert noted.attributes["http.response.status_code"] == 200
    assert "hunter2" not in repr(noted)
    assert noted.ended_ns >= noted.started_ns
    labels = {"method": "POST", "route": "/look/{secret_name}", "status": "200"}
    assert registry.get_sample_value("keylake_http_request_duration_seconds_count", labels) == 1


async def test_without_one_it_begins_here_and_looks_are_not_sampled(recorded: list[Span]) -> None:
    app, _ = service()
    answers = [await ask(app, method, "/look/x", traceparent="nonsense") for method in ("GET", "POST")]
    assert len({answer.headers["x-request-id"] for answer in answers}) == 2
    assert [each.context.sampled for each in recorded] == [False, True]
    assert not any(each.parent_id for each in recorded)


async def test_failures_are_noted_without_their_text(recorded: list[Span]) -> None:
    app, registry = service()
    assert (await ask(app, "POST", "/fail/x")).status_code == 409
    broken = await ask(app, "POST", "/break/x", traceparent=PARENT)
    assert broken.json()["message"] == f"internal error; the service's log has the details: request {TRACE}"
    assert (await ask(app, "BREW", "/nowhere")).status_code in (404, 405)
    assert [each.failed for each in recorded] == [False, True, False]
    assert not [word for word in ("a secret", "text of an error") if word in repr(recorded)]
    labels = {"method": "other", "route": "none"}
    assert any(
        registry.get_sample_value("keylake_http_request_duration_seconds_count", labels | {"status": status})
        for status in ("404", "405")
    ), "what a stranger sends becomes no label"


def test_spans_leave_as_otlp_has_them() -> None:
    with collecting() as (url, collector):
        exporter = Exporter(f"{url}/base/", {"service.name": "keylake-test"})
        with span("POST /x", Kind.SERVER, TraceContext.parse(PARENT)) as made:
            made.attributes |= {"http.route": "/x", "http.response.status_code": 503}
            made.failed = True
        exporter.add(made)
        exporter.close()
        [sent] = collector.spans
        assert collector.paths == [("/base/v1/traces", "application/json")]
        assert sent == {
            "traceId": TRACE,
            "spanId": made.context.span_id,
            "parentSpanId": "00f067aa0ba902b7",
            "name": "POST /x",
            "kind": 2,
            "startTimeUnixNano": str(made.started_ns),
            "endTimeUnixNano": str(made.ended_ns),
            "attributes": [
                {"key": "http.route", "value": {"stringValue": "/x"}},
                {"key": "http.response.status_code", "value": {"intValue": "503"}},
            ],
            "status": {"code": 2},
        }
        [resource] = [each["resource"] for each in collector.bodies[0]["resourceSpans"]]
        assert resource == {"attributes": [{"key": "service.name", "value": {"stringValue": "keylake-test"}}]}
        assert exporter.dropped == 0


async def test_a_receiver_that_refuses_costs_spans_and_nothing_else() -> None:
    with collecting() as (url, collector):
        collector.status = 500
        exporter = Exporter(url, {})
        for _ in range(3):
            exporter.add(Span("x", Kind.INTERNAL, TraceContext.new()))
        await wait_until(lambda: exporter.dropped == 3)
        exporter.close()


@pytest.mark.parametrize("url", ["", "collector:4318", "ftp://x", "http://", "https://user:pw@x", "http://x/?a=b"])
def test_what_is_no_endpoint_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="OTLP"):
        Exporter(url, {})


def test_without_an_endpoint_nothing_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(tracing.STANDARD_VARIABLE, raising=False)
    before = threading.active_count()
    tracing.configure_tracing("test", "test-1", None)
    assert threading.active_count() == before


def test_a_variable_that_is_meant_for_others_stops_no_service(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(tracing.STANDARD_VARIABLE, "grpc://collector:4317")
    tracing.configure_tracing("test", "test-1", None)
    assert tracing.STANDARD_VARIABLE in caplog.text
    with pytest.raises(ValueError, match="OTLP"):
        tracing.configure_tracing("test", "test-1", "grpc://collector:4317")
