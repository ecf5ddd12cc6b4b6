"""The states of an endpoint.

                 start                 started
    STOPPED ───────────► STARTING ───────────────► RUNNING
       ▲                  │     │                 │ ▲  │
       │      failed      │     │ stop       stop │ │  │ failed
       ├──────────────────┘     └────► STOPPING ◄─┘ │  │
       │                                  │  └──────┘  │
       │                                  │   resumed  │
       ├──────────── stopped, failed ─────┘              │
       └─────────────────────────────────────────────────┘

`resumed`: it was to be suspended, and somebody uses it after all. `failed` is everything that nobody asked for: the
agent died, Postgres crashed, the keys were revoked, a newer term came. There is no crashed state: the disk of a compute
is disposable, so the next connection simply starts another one.

This file is a core: no I/O.
"""

from __future__ import annotations

import enum
from typing import Final

from shared.api.compute import EndpointState
from shared.errors import ConflictError


class Event(enum.Enum):
    START = "start"
    STARTED = "started"
    STOP = "stop"
    STOPPED = "stopped"
    RESUMED = "resumed"
    FAILED = "failed"


_NEXT: Final[dict[tuple[EndpointState, Event], EndpointState]] = {
    (EndpointState.STOPPED, Event.START): EndpointState.STARTING,
    (EndpointState.STARTING, Event.STARTED): EndpointState.RUNNING,
    (EndpointState.STARTING, Event.STOP): EndpointState.STOPPING,
    (EndpointState.STARTING, Event.FAILED): EndpointState.STOPPED,
    (EndpointState.RUNNING, Event.STOP): EndpointState.STOPPING,
    (EndpointState.RUNNING, Event.FAILED): EndpointState.STOPPED,
    (EndpointState.STOPPING, Event.RESUMED): EndpointState.RUNNING,
    (EndpointState.STOPPING, Event.STOPPED): EndpointState.STOPPED,
    (EndpointState.STOPPING, Event.FAILED): EndpointState.STOPPED,
}


def next_state(state: EndpointState, event: Event) -> EndpointState:
    """Raises ConflictError when `event` cannot happen in `state`."""
    following = _NEXT.get((state, event))
    if following is None:
        raise ConflictError(f"an endpoint that is {state} cannot {event.value}")
    return following
