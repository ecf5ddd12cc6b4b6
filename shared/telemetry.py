"""Logs and metrics. Logs are JSON lines on stderr; metrics are Prometheus's, on /metrics of every service.

A log line holds ids, LSNs, sizes and durations, never rows, SQL, key bytes or tokens. One event is logged once, where
it is handled; ERROR means that a human should look. `request_id` is the same in all services (shared/tracing.py).
"""

from __future__ import annotations

import logging
import sys
from typing import cast

import structlog
from structlog.typing import FilteringBoundLogger

from shared import tracing


def configure_logging(service: str, node_id: str, level: str = "info") -> None:
    """JSON lines with service, node_id, level, timestamp (UTC), event. Called once, at the start of a process."""
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            tracing.request_id,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=structlog.PrintLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=True,
    )
    structlog.contextvars.bind_contextvars(service=service, node_id=node_id)
    # Libraries log through the standard module; their warnings become lines of the same stream.
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format='{"level":"warning","event":"%(message)s"}')


def get_logger(name: str) -> FilteringBoundLogger:
    return cast("FilteringBoundLogger", structlog.get_logger(logger_name=name))
