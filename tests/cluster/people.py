"""People with tokens of their own, and what takes two of them."""

from __future__ import annotations

from contextlib import AsyncExitStack

from keylake.client import KeylakeClient
from keylake.cluster import Cluster
from shared.api.keymanager import Project
from shared.auth import BearerToken, PersonRole


async def person(stack: AsyncExitStack, cluster: Cluster, name: str) -> KeylakeClient:
    token, _ = await cluster.client.create_token(PersonRole.SECURITY_ADMIN, subject=name, ttl_s=600)
    made = KeylakeClient(cluster.ports.addresses(), cluster.layout.ca_certificate, BearerToken(token))
    stack.push_async_callback(made.aclose)
    return made


async def shred_by_two(stack: AsyncExitStack, cluster: Cluster, project: Project) -> None:
    """Returns when it is approved."""
    alice, bob = await person(stack, cluster, "alice"), await person(stack, cluster, "bob")
    asked = await alice.ask_shred(project.project_id, project.name, "the contract has ended")
    await bob.approve_shred(project.project_id, project.name, asked.shred_id)
