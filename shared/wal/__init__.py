"""PostgreSQL 16 WAL: pages, records, the control file. Pure: bytes in, values out.

    page.py      page headers, segment names          reader.py   bytes of a stream → raw records (hot)
    record.py    raw record → block references (hot)  image.py    full-page image → page
    rmgr*.py     main data of the records that ingest must understand itself, one file per resource manager
    control.py   pg_control, CheckPoint               writer.py   record → pages; the minted checkpoint

All of it is the layout of a 64-bit little-endian build with 8 KiB blocks and 16 MiB segments, on WAL timeline 1.
Positions are plain integers here (see `shared.lsn.Lsn` for the type used at the edges). Bytes that are not WAL raise
`CorruptedError`; nothing in this package does I/O.
"""
