"""Every kind of rotation while clients work: a new version of the customer's key, other keys in turn, a new KEK with
everything wrapped again, and a full re-key."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from keylake.drill.stage import Stage
from keylake.encryption import Encryption
from shared.cmk import CmkKey
from shared.errors import KeylakeError


async def run(stage: Stage, hold_s: float = 3.0, timeout_s: float = 120.0, *, through: Sequence[CmkKey] = ()) -> None:
    """`hold_s`: how long clients work before and after. `through`: keys, in any cloud, that the key configuration is
    moved to one after the other, and at the end back to its own."""
    client, project_id = stage.client, stage.project.project_id
    before = max(kek.kek_version for kek in stage.project.keks)

    async def until_nodes_say(what: str, done: Callable[[Encryption], bool]) -> Encryption:
        async def look() -> Encryption | None:
            try:
                found = await client.encryption(project_id)
            except KeylakeError:  # of a node that is away just now
                return None
            return found if done(found) else None

        await client.start_key_upkeep(project_id)
        found = await stage.until(what, look, timeout_s)
        stage.mark(what)
        return found

    async with stage.load() as load:
        await asyncio.sleep(hold_s)
        stage.mark("the customer rotates the key")
        await asyncio.to_thread(stage.customer.aws.rotate, stage.key_arn)
        rewrap = await client.rewrap(stage.configuration.key_configuration_id)
        stage.mark("every KEK is wrapped by the key's new version")
        for key in (*through, stage.configuration.key) if through else ():
            await _replace(stage, key, timeout_s)
        await client.rotate_kek(project_id)
        stage.mark("the project has a new KEK")
        rewrapped = await until_nodes_say("every data key is wrapped by the new KEK", lambda found: found.rewrapped)
        floor = (await client.rekey(project_id)).dek_floor
        stage.mark("the project gets new data keys")
        rekeyed = await until_nodes_say(
            "all data is sealed anew", lambda found: found.dek_floor == floor and found.rekeyed
        )
        await load.wait_for_commits(1)
        await asyncio.sleep(hold_s)
    errors = stage.errors_s()
    stage.promise("no client sees an error", "0", str(len(errors)), kept=not errors)
    outdated = rewrap.outdated - rewrap.rewrapped
    stage.promise("no KEK is left under an older version of the key", "0", str(outdated), kept=not outdated)
    stage.promise("the project has two new KEKs", f"version {before + 2}", f"version {floor}", kept=floor == before + 2)
    stage.promise(
        "no data key is left under an older KEK",
        "0",
        f"{rewrapped.outdated_objects} of {rewrapped.objects}",
        kept=not rewrapped.outdated_objects,
    )
    stage.promise(
        "no data is left under an older data key", "0", f"{rekeyed.old_dek_bytes} bytes", kept=not rekeyed.old_dek_bytes
    )
    await stage.nothing_is_lost()


async def _replace(stage: Stage, key: CmkKey, timeout_s: float) -> None:
    """Returns when every KEK is wrapped by it, and by no other. Raises UnavailableError."""
    configuration_id = stage.configuration.key_configuration_id
    await stage.client.replace_key(configuration_id, key)

    async def replaced() -> bool | None:
        return True if await stage.client.replacement(configuration_id) is None else None

    what = f"every KEK is wrapped by {key.identifier}"
    await stage.until(what, replaced, timeout_s)
    now = await stage.client.key_configuration(configuration_id)
    stage.promise("the key is replaced", key.identifier, now.key.identifier, kept=now.key == key)
    stage.mark(what)
