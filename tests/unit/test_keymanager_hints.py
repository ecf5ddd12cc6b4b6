"""What a cloud's event makes the watcher do: a real `KeyManager` on the simulation's clock and KMS."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from keymanager.kms_events import KmsEvent, names_of
from keymanager.state import KmsAccess
from keymanager.watcher import HINT_SPACING_S
from tests.simulation.kms import Mood
from tests.unit.test_keymanager_stops import AWS, KEY, OTHER_KEY, Place, play, start

EVENT = KmsEvent("aws DisableKey", names_of(AWS))


async def watched_seldom(place: Place) -> None:
    """KEY is probed once, and then every hour."""
    stored = replace(place.database.key_configurations[KEY], probe_interval_s=3600.0)
    place.manager.key_configurations.put(stored)
    place.manager.watcher.start(KEY)
    await asyncio.sleep(5)
    assert len(place.cmk.answers) == 1


def test_a_hint_is_not_answered_by_a_probe_that_was_under_way() -> None:
    async def story(place: Place) -> None:
        await watched_seldom(place)
        before_s = place.cmk.last_yes_s
        under_way = start(place.manager.watcher.check(KEY))
        while place.cmk.last_yes_s == before_s:  # noqa: ASYNC110 - it tells nobody
            await asyncio.sleep(0.0001)
        assert len(place.cmk.answers) == 1, "the KMS has said yes, and nobody has heard it yet"
        place.cmk.become(Mood.DENIES)
        assert place.manager.watcher.hint(KEY)
        await under_way
        assert place.manager.watcher.access(KEY) is KmsAccess.ALLOWED
        await asyncio.sleep(5)
        assert place.manager.watcher.access(KEY) is KmsAccess.DENIED

    play(story)


def test_many_hints_are_few_probes_and_few_records() -> None:
    async def story(place: Place) -> None:
        await watched_seldom(place)
        for _ in range(1000):
            asked = await place.manager.key_configurations.take_events([EVENT], "test")
            assert asked == 2, "both key configurations have this key"
            await asyncio.sleep(0.01)
        long_s = place.process.monotonic_s()
        records = [link.entry for link in place.database.chain if link.entry.action == "kms.event"]
        of_key = [each for each in records if each.details["key_configuration_id"] == str(KEY)]
        assert 2 <= len(place.cmk.answers) - 1 <= long_s / HINT_SPACING_S + 1
        assert 2 <= len(of_key) <= long_s / HINT_SPACING_S + 1
        assert {each.details["event"] for each in records} == {EVENT.kind}

    play(story)


def test_a_hint_about_what_is_gone_does_nothing() -> None:
    async def story(place: Place) -> None:
        await watched_seldom(place)
        watcher = place.manager.watcher
        assert watcher.hint(KEY)
        watcher.remove(KEY)
        assert not watcher.hint(KEY)
        await asyncio.sleep(5)
        assert len(place.cmk.answers) == 1
        assert watcher.hint(OTHER_KEY), "and one that is not watched yet will be, with a probe"
        nothing = [KmsEvent("aws DisableKey", frozenset())]
        assert await place.manager.key_configurations.take_events(nothing, "test") == 0

    play(story)
