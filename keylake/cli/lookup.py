"""From what people type, a name or an id, to the one thing that is meant. `resolve` is a core; the rest asks first."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from keylake.client import KeylakeClient
from shared.api.compute import Endpoint, Timeline
from shared.api.keymanager import KeyConfiguration, Project, Workspace
from shared.errors import InvalidInputError, NotFoundError
from shared.ids import ProjectId

T = TypeVar("T")
_MAX_LISTED = 8


@dataclass(frozen=True, slots=True)
class Candidate(Generic[T]):
    """One thing and what it may be called: `tiers` from the most exact name to the loosest."""

    value: T
    identifier: str
    tiers: tuple[frozenset[str], ...]

    @classmethod
    def of(cls, value: T, identifier: object, *tiers: Iterable[object]) -> Candidate[T]:
        return cls(value, str(identifier), (frozenset({str(identifier)}), *(frozenset(map(str, t)) for t in tiers)))

    @property
    def label(self) -> str:
        """How to tell people about it: the first name, and the id."""
        names = sorted(self.tiers[1]) if len(self.tiers) > 1 else []
        return f"{names[0]} ({self.identifier})" if names else self.identifier


def resolve(kind: str, text: str | None, candidates: Sequence[Candidate[T]], *, create: str) -> T:
    """What `text` means: the first tier in which anything is called so decides, and must do so alone.

    Without a text there must be only one candidate. `create` is the command that makes one.
    Raises NotFoundError, or InvalidInputError when it is ambiguous.
    """
    if not candidates:
        raise NotFoundError(f"there is no {kind} yet; make one with `{create}`")
    if text is None:
        if len(candidates) == 1:
            return candidates[0].value
        raise InvalidInputError(f"which {kind}? There are {_listed(candidates)}")
    for tier in range(max(len(c.tiers) for c in candidates)):
        found = [c for c in candidates if tier < len(c.tiers) and text in c.tiers[tier]]
        if len(found) == 1:
            return found[0].value
        if found:
            raise InvalidInputError(f"{text!r} is ambiguous: there are {_listed(found)}; give the id")
    known = sorted({name for c in candidates for tier in c.tiers for name in tier})
    near = difflib.get_close_matches(text, known, n=1)
    suggestion = f"did you mean {near[0]!r}?" if near else f"there are {_listed(candidates)}"
    raise NotFoundError(f"no {kind} {text!r}; {suggestion}")


def _listed(candidates: Sequence[Candidate[T]]) -> str:
    labels = sorted(c.label for c in candidates)
    more = f" and {len(labels) - _MAX_LISTED} more" if len(labels) > _MAX_LISTED else ""
    return ", ".join(labels[:_MAX_LISTED]) + more


async def key_configuration(client: KeylakeClient, text: str | None) -> KeyConfiguration:
    found = [Candidate.of(c, c.key_configuration_id, {c.name}) for c in await client.key_configurations()]
    return resolve("key configuration", text, found, create="keylake key-config create NAME --key KEY")


async def workspace(client: KeylakeClient, text: str | None) -> Workspace:
    found = [Candidate.of(w, w.workspace_id, {w.name}) for w in await client.workspaces()]
    return resolve("workspace", text, found, create="keylake workspace create NAME")


async def project(client: KeylakeClient, text: str | None) -> Project:
    found = [Candidate.of(p, p.project_id, {p.name}) for p in await client.projects()]
    return resolve("project", text, found, create="keylake project create NAME")


async def timeline(client: KeylakeClient, project_id: ProjectId, text: str | None) -> Timeline:
    """Of its branches, without a text the first one, from which all others come."""
    timelines = await client.timelines(project_id)
    found = [Candidate.of(t, t.timeline_id, {t.name}) for t in timelines if text or t.ancestor_timeline_id is None]
    return resolve("branch of this project", text, found, create="keylake project create NAME")


async def endpoint(client: KeylakeClient, text: str | None) -> Endpoint:
    """By id, `project/endpoint`, the endpoint's name, or the name or id of a project: its endpoint `main`, or the only
    one."""
    projects = {p.project_id: p.name for p in await client.projects()}
    found = [endpoint_candidate(e, projects.get(e.project_id, "")) for e in await client.endpoints()]
    return resolve("endpoint", text, found, create="keylake endpoint create PROJECT")


def endpoint_candidate(endpoint: Endpoint, project_name: str) -> Candidate[Endpoint]:
    return Candidate.of(
        endpoint, endpoint.endpoint_id, *endpoint_names(project_name, endpoint.project_id, endpoint.name)
    )


def endpoint_names(project_name: str, project_id: ProjectId, name: str) -> tuple[set[object], ...]:
    """What an endpoint may be called, from the most exact to the loosest."""
    project: set[object] = {project_name, project_id}
    of_main = project if name == "main" else set[object]()
    return {f"{project_name}/{name}"}, {f"{project_id}/{name}"}, of_main, {*project, name}
