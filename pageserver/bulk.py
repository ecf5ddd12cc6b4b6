"""What one WAL record comes to that is too much for memory: a database, copied file by file.

It becomes image layers at the record's LSN, one in memory at a time. They hold everything that exists in a range of
keys, so that nothing older shows there; and the version of the index that lists them lists the record's other values,
too. Until then nobody reads them, and a crash leaves orphans.
"""

from __future__ import annotations

from collections.abc import AsyncIterable

from pageserver.flush import Built, FlushStats, seal_layer, upload_layer
from pageserver.layer.image import ImageBuilder
from pageserver.live import ListedLayer, Live, TimelineConfig, TimelineServices
from shared.keyspace import KeyRange


async def write_images(
    live: Live,
    services: TimelineServices,
    config: TimelineConfig,
    key_range: KeyRange,
    values: AsyncIterable[tuple[bytes, bytes]],
    lsn: int,
) -> tuple[ListedLayer, ...]:
    """Layers of `compaction_target_bytes` that together are complete for `key_range` at `lsn`; stored, and not listed.

    `values`: (key, whole value), in the order of keys. Under `Compactor.lock`, or somebody takes them for orphans.
    Raises what `values` and the store raise; what was written is deleted by the next `publish` then.
    """
    made: list[ListedLayer] = []

    async def write(builder: ImageBuilder, keys: KeyRange) -> None:
        plaintext, index = await services.pool.run(builder.finish, lsn)
        live.check()
        stats = FlushStats()
        built = Built(plaintext, index, keys)
        layer, sealed = await seal_layer(built, live.remote, services.pool, config.chunk_size_bytes, stats)
        live.check()
        made.append((layer.descriptor, layer.envelope))
        await upload_layer(layer, sealed, live.remote, services.files, stats)
        live.check()

    try:
        builder, start = ImageBuilder(), key_range.start
        async for key, value in values:
            if builder.size_bytes and builder.size_bytes + len(value) > config.compaction_target_bytes:
                await write(builder, KeyRange(start, key))
                builder, start = ImageBuilder(), key
            builder.add(key, value)
        await write(builder, KeyRange(start, key_range.end))
    except BaseException:
        live.remote.abandon_layers(layer.name for layer, _ in made)
        raise
    return tuple(made)
