"""A new version of the customer's key, a new KEK, and everything wrapped again, while clients work."""

from __future__ import annotations

import asyncio

from keylake.drill.stage import Stage
from shared.errors import KeylakeError


async def run(stage: Stage, hold_s: float = 3.0, timeout_s: float = 120.0) -> None:
    """`hold_s`: how long clients work before and after."""
    project_id = stage.project.project_id
    before = max(kek.kek_version for kek in stage.project.keks)
    async with stage.load() as load:
        await asyncio.sleep(hold_s)
        stage.mark("the customer rotates the key")
        await asyncio.to_thread(stage.customer.aws.rotate, stage.key_arn)
        rewrap = await stage.client.rewrap(stage.configuration.key_configuration_id)
        stage.mark("every KEK is wrapped by the key's new version")
        rotated = await stage.client.rotate_kek(project_id)
        stage.mark("the project has a new KEK")
        await stage.client.start_key_upkeep(project_id)

        async def rewrapped() -> bool | None:
            try:
                return (await stage.client.encryption(project_id)).rewrapped or None
            except KeylakeError:
                return None

        await stage.until("every data key is wrapped by the new KEK", rewrapped, timeout_s)
        stage.mark("every data key is wrapped by the new KEK")
        await load.wait_for_commits(1)
        await asyncio.sleep(hold_s)
    errors = stage.errors_s()
    stage.promise("no client sees an error", "0", str(len(errors)), kept=not errors)
    after = max(kek.kek_version for kek in rotated.keks)
    stage.promise("the project has a new KEK", f"> {before}", f"version {after}", kept=after > before)
    outdated = rewrap.outdated - rewrap.rewrapped
    stage.promise("no KEK is left under an older version of the key", "0", str(outdated), kept=not outdated)
    encryption = await stage.client.encryption(project_id)
    stage.promise(
        "no data key is left under an older KEK",
        "0",
        f"{encryption.outdated_objects} of {encryption.objects}",
        kept=not encryption.outdated_objects,
    )
    await stage.nothing_is_lost()
