"""Prometheus metrics of the keymanager, read from its state when they are asked for."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from keymanager.manager import KeyManager
from shared.api.keymanager import KeyState


class _Collector(Collector):
    def __init__(self, manager: KeyManager) -> None:
        self._manager = manager

    def collect(self) -> Iterable[Metric]:
        status = self._manager.status()
        yield GaugeMetricFamily("keylake_leader_epoch", "Epoch that this keymanager leads in", value=status.epoch)
        yield GaugeMetricFamily("keylake_key_sessions", "Open key sessions", value=status.instances)
        yield GaugeMetricFamily("keylake_plaintext_keks", "KEKs in memory", value=len(status.plaintext_keks))
        yield GaugeMetricFamily("keylake_leases", "Live leases", value=len(status.leases))
        projects = GaugeMetricFamily("keylake_projects", "Projects by key state", labels=["state"])
        states = [project.state for project in self._manager.all_projects()]
        for state in KeyState:
            projects.add_metric([state.value], states.count(state))
        yield projects
        if status.anchoring is not None:
            anchoring = status.anchoring
            yield GaugeMetricFamily(
                "keylake_audit_anchored_sequence", "Newest audit record with an anchor", value=anchoring.sequence
            )
            yield GaugeMetricFamily(
                "keylake_audit_anchored_timestamp_seconds",
                "When the newest anchor was made",
                value=0 if anchoring.at is None else anchoring.at.timestamp(),
            )
            yield GaugeMetricFamily(
                "keylake_audit_anchoring_failing",
                "1 while the last attempt to anchor the audit chain failed",
                value=anchoring.problem is not None,
            )
            yield CounterMetricFamily(
                "keylake_audit_anchoring_failures", "Failed attempts to anchor the chain", value=anchoring.failures
            )


def register_metrics(registry: CollectorRegistry, manager: KeyManager) -> None:
    registry.register(_Collector(manager))
