"""What is known of a timeline, with or without its keys: positions, sizes, faults, where it was branched off."""

from __future__ import annotations

from collections.abc import Mapping

from pageserver.collector import Collector
from pageserver.compactor import Compactor
from pageserver.flush import FlushStats
from pageserver.flusher import Flusher
from pageserver.index_part import Ancestor, IndexPart
from pageserver.layer.name import LayerKind
from pageserver.live import Live
from pageserver.retention import Retention
from shared.errors import UnavailableError
from shared.ids import TimelineId


class KnownTimeline:
    """`Timeline` sets the attributes, and adds whatever takes keys."""

    _live: Live | None
    _index: IndexPart | None
    """The last durable one."""
    _flusher: Flusher
    compactor: Compactor
    history: Collector

    @property
    def is_live(self) -> bool:
        """False between the loss of keys and `reopen`."""
        return self._live is not None and not self._live.closed

    @property
    def fault(self) -> str:
        """Why values are not flushed, or not taken any more, or layers not kept in order, in one line; empty while all
        of it works."""
        if self._flusher.fault or not (other := self.compactor.fault or self.history.fault):
            return self._flusher.fault
        return f"compaction and GC: {other}"

    @property
    def last_flush(self) -> FlushStats:
        return self._flusher.last_flush

    @property
    def system_identifier(self) -> int:
        return self._known_index().system_identifier

    @property
    def initdb_lsn(self) -> int:
        return self._known_index().initdb_lsn

    @property
    def last_record_lsn(self) -> int:
        """End of the last record ingested."""
        return self.remote_consistent_lsn if self._live is None else self._live.last_record_lsn

    @property
    def prev_record_lsn(self) -> int:
        """Start of that record."""
        return self._known_index().prev_record_lsn if self._live is None else self._live.prev_record_lsn

    @property
    def disk_consistent_lsn(self) -> int:
        return self.remote_consistent_lsn if self._live is None else self._live.disk_consistent_lsn

    @property
    def remote_consistent_lsn(self) -> int:
        """Everything at or below it is durable and listed. Never goes back."""
        return 0 if self._index is None else self._index.disk_consistent_lsn

    @property
    def oldest_lsn(self) -> int:
        """Every version from here on can be read. Never goes back."""
        return self.history.oldest_lsn

    @property
    def retention(self) -> Retention:
        return self._known_index().retention

    @property
    def l0_layer_count(self) -> int:
        layers = self._known_index().layers
        return sum(layer.level == 0 and layer.kind is LayerKind.DELTA for layer, _ in layers)

    @property
    def layer_count(self) -> int:
        return len(self._known_index().layers)

    @property
    def layer_size_bytes(self) -> int:
        return sum(layer.size_bytes for layer, _ in self._known_index().layers)

    @property
    def in_memory_size_bytes(self) -> int:
        return 0 if self._live is None else sum(layer.size_bytes for layer in self._live.snapshot.in_memory)

    def _known_index(self) -> IndexPart:
        if self._index is None:
            raise UnavailableError("the timeline is not open yet")
        return self._index

    @property
    def ancestor(self) -> Ancestor | None:
        """Where it was branched off; None for a timeline that began with an initdb, or is not known yet."""
        return None if self._index is None else self._index.ancestor

    @property
    def log_start_lsn(self) -> int:
        """Where its own log begins."""
        return self.initdb_lsn if self.ancestor is None else self.ancestor.lsn

    @property
    def branches(self) -> Mapping[TimelineId, int]:
        """Its children and their ancestor_lsns: garbage collection keeps what is read at these LSNs."""
        return self._known_index().branches
