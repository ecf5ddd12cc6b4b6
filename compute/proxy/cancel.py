"""Cancel keys: which the proxy gives out, and whom they really cancel. A core, but for its random numbers.

Every client gets a process id and key of the proxy's own, so that two computes cannot collide, and clients learn
nothing about a compute's processes.
"""

from __future__ import annotations

import hmac
import secrets
from dataclasses import dataclass, field

from shared.api.safekeeper import ComputeAddress
from shared.ids import ProjectId
from shared.wire.pgproto import BackendKeyData
from shared.wire.pgstartup import CancelRequest


@dataclass(frozen=True, slots=True)
class CancelTarget:
    project_id: ProjectId
    compute: ComputeAddress
    request: CancelRequest = field(repr=False)
    """As the compute wants it."""


class CancelKeys:
    def __init__(self) -> None:
        self._issued: dict[int, tuple[bytes, CancelTarget]] = {}

    def issue(self, project_id: ProjectId, compute: ComputeAddress, backend: BackendKeyData) -> BackendKeyData:
        """What the client gets instead of `backend`. Give it back (`forget`) when the session ends."""
        process_id = secrets.randbelow((1 << 31) - 1) + 1
        while process_id in self._issued:
            process_id = secrets.randbelow((1 << 31) - 1) + 1
        key = secrets.token_bytes(len(backend.secret_key))
        request = CancelRequest(backend.process_id, backend.secret_key)
        self._issued[process_id] = key, CancelTarget(project_id, compute, request)
        return BackendKeyData(process_id, key)

    def find(self, request: CancelRequest) -> CancelTarget | None:
        """Whom a client's request means; None when its key is not good."""
        key, target = self._issued.get(request.process_id, (b"", None))
        return target if hmac.compare_digest(key, request.secret_key) else None

    def forget(self, issued: BackendKeyData) -> None:
        self._issued.pop(issued.process_id, None)

    def __len__(self) -> int:
        return len(self._issued)
