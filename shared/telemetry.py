"""Logs and metrics. Logs are JSON lines on stderr; metrics are Prometheus's, on /metrics of every service.

A log line holds ids, LSNs, sizes and durations, never rows, SQL, key bytes or tokens. One event is logged once, where
it is handled; ERROR means that a human should look. `request_id` is the same in all services (shared/tracing.py).
"""

from __future__ import annotations

import json
import logging
import sys
from types import ModuleType
from typing import Final, cast

from shared import tracing

# structlog looks for rich when it is imported, for a developer's console, which no service has: 130 modules, a tenth
# of a compute agent's start. Where rich is used anyway nothing is hidden.
_RICH: Final = "rich"
if _RICH not in sys.modules:
    sys.modules[_RICH] = cast("ModuleType", None)
try:
    import structlog
    from structlog.typing import FilteringBoundLogger
finally:
    if sys.modules[_RICH] is None:
        del sys.modules[_RICH]


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
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonLines(service, node_id))
    logging.basicConfig(handlers=[handler], level=logging.WARNING)


class _JsonLines(logging.Formatter):
    """Whatever stands in a message, it stays one line and one JSON string: nobody writes lines of ours by it.

    All are warnings: ERROR means that a human should look, and a library cannot know that.
    """

    def __init__(self, service: str, node_id: str) -> None:
        super().__init__()
        self._fields = {"service": service, "node_id": node_id}

    def format(self, record: logging.LogRecord) -> str:
        line = {"event": record.getMessage(), "level": "warning", "logger": record.name, **self._fields}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


def get_logger(name: str) -> FilteringBoundLogger:
    return cast("FilteringBoundLogger", structlog.get_logger(logger_name=name))
