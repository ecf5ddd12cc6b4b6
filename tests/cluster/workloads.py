"""What users do with Postgres, broadly: every built-in type, access method and kind of relation, and all rewrites."""

# ruff: noqa: E501 - SQL statements, one a line

from __future__ import annotations

import asyncio

import asyncpg

from keylake.cluster import RunningProject
from tests.cluster.primary import Session, connect

TYPES: dict[str, str] = {
    "int2": "(g % 30000)::int2", "int4": "g", "int8": "g::int8 << 20", "numeric": "g::numeric / 7 * 10::numeric ^ 40",
    "float4": "g / 3.0", "float8": "g / 3.0", "money": "g::money", "bool": "g % 2 = 0", '"char"': "'c'",
    "char(7)": "'p' || g", "varchar(90)": "repeat('v', g % 90)", "text": "repeat('t', g % 300)", "name": "'n' || g",
    "bytea": "decode(md5(g::text), 'hex')", "date": "date '2020-01-01' + g", "time": "time '00:00' + g * interval '1 s'",
    "timetz": "timetz '00:00+02'", "timestamp": "timestamp '2020-01-01' + g * interval '1 h'",
    "timestamptz": "timestamptz '2020-01-01 UTC' + g * interval '1 h'", "interval": "g * interval '1 day 1 s'",
    "uuid": "md5(g::text)::uuid", "bit(9)": "(g % 500)::bit(9)", "varbit": "(g % 500)::bit(12)::varbit",
    "inet": "'10.0.0.1'::inet + g", "cidr": "'10.1.0.0/16'::cidr", "macaddr": "'08:00:2b:01:02:03'::macaddr",
    "macaddr8": "'08:00:2b:01:02:03:04:05'::macaddr8", "point": "point(g, g * 2)", "line": "line(point(0, 0), point(g, 1))",
    "lseg": "lseg(point(0, 0), point(g, 1))", "box": "box(point(g, g), point(g + 1, g + 1))",
    "path": "'((0,0),(1,1),(2,0))'::path", "polygon": "box(point(0, 0), point(g, g))::polygon",
    "circle": "circle(point(g, 0), 1)", "json": "json_build_object('a', g)", "jsonb": "jsonb_build_object('a', g, 'b', md5(g::text))",
    "jsonpath": "'$.a ? (@ > 1)'::jsonpath", "tsvector": "to_tsvector('english', 'the quick foxes jumped ' || g)",
    "tsquery": "'fox & jump'::tsquery", "int4range": "int4range(g, g + 5)", "int8range": "int8range(g, g + 5)",
    "numrange": "numrange(g, g + 5)", "daterange": "daterange('2020-01-01', '2020-01-02')",
    "tsrange": "tsrange('2020-01-01', '2020-01-02')", "tstzrange": "tstzrange('2020-01-01', '2020-01-02')",
    "int4multirange": "int4multirange(int4range(g, g + 2), int4range(g + 5, g + 9))", "nummultirange": "'{[1,2),[5,9)}'::nummultirange",
    "int4[]": "array[g, g % 7, g % 101]", "text[][]": "array[array['a', 'b'], array['c', g::text]]",
    "pg_lsn": "'0/1'::pg_lsn + g", "xid8": "'5'::xid8", "oid": "g::oid", "regclass": "'pg_class'::regclass", "tid": "'(1,2)'::tid",
    "pg_snapshot": "'10:20:10,14'::pg_snapshot", "mood": "(array['sad', 'ok', 'happy'])[1 + g % 3]::mood",
    "positive": "(g + 1)::positive", "pair": "row(g, 'x')::pair", "pair[]": "array[row(g, 'x')::pair]",
    "floatrange": "floatrange(g, g + 1)",
}  # fmt: skip

BEFORE_TYPES = [
    "create type mood as enum ('sad', 'ok', 'happy')",
    "create domain positive as int check (value > 0)",
    "create type pair as (a int, b text)",
    "create type floatrange as range (subtype = float8)",
]

INDEXES = [
    f"create index on typed using {index}"
    for index in (
        "btree (c_int4, c_text)", "hash (c_text)", 'gin ("c_int4[]")', "gin (c_jsonb jsonb_path_ops)",
        "gin (c_tsvector) with (fastupdate = off)", "gist (c_point)", "gist (c_box)", "gist (c_int4range)", "gist (c_tsvector)",
        "gist (c_inet inet_ops)", "gist (c_circle)", "gist (c_polygon)", "gist (c_int4multirange)", "gist (c_tsquery)",
        "spgist (c_point)", "spgist (c_point kd_point_ops)", "spgist (c_text)", "spgist (c_int4range)", "spgist (c_inet)",
        "spgist (c_box)", "spgist (c_polygon)", "brin (c_int4)", "brin (c_date date_minmax_multi_ops)",
        "brin (c_text text_bloom_ops)", "brin (c_box box_inclusion_ops)", "btree (lower(c_text)) where c_bool",
        "btree (c_int8 desc nulls first) include (c_uuid)", 'btree (c_text collate "POSIX")', "btree (c_mood)",
    )
]  # fmt: skip

KINDS = [
    # Partitions, inheritance, generated columns, identity, sequences.
    "create table parted (id int, v text) partition by range (id)",
    "create table parted_low partition of parted for values from (0) to (500)",
    "create table parted_rest partition of parted default partition by hash (id)",
    "create table parted_h0 partition of parted_rest for values with (modulus 2, remainder 0)",
    "create table parted_h1 partition of parted_rest for values with (modulus 2, remainder 1)",
    "create index on parted (id)",
    "insert into parted select g, md5(g::text) from generate_series(1, 1500) g",
    "update parted set id = id + 1000 where id < 100",
    "alter table parted detach partition parted_low",
    "create table parent (id int generated always as identity, twice int generated always as (id * 2) stored, v text)",
    "create table child (extra text default 'e') inherits (parent)",
    "insert into parent (v) select 'p' from generate_series(1, 300)",
    "insert into child (id, v) overriding system value select g, 'c' from generate_series(1, 300) g",
    "update parent set v = v || 'x' where twice % 3 = 0",
    "create sequence counted increment by 7 cache 5",
    "select nextval('counted') from generate_series(1, 100)",
    "alter sequence counted restart with 5000",
    # Triggers, rules, views, row security, constraints.
    "create table log (at timestamptz default now(), what text)",
    "create function note() returns trigger language plpgsql as $$ begin insert into log (what) values (tg_op); return new; end $$",
    "create trigger noted after insert or update or delete on parent for each row execute function note()",
    "insert into parent (v) values ('noted')",
    "create view seen as select id, v from parent where id < 100",
    "create rule redirect as on delete to seen do instead update parent set v = 'deleted' where id = old.id",
    "delete from seen where id < 10",
    "alter table parent enable row level security",
    "create policy everyone on parent using (true)",
    "create table booked (room int, during tsrange, exclude using gist (during with &&))",
    "insert into booked select g, tsrange(timestamp '2020-01-01' + g * interval '1 h', timestamp '2020-01-01' + (g + 1) * interval '1 h')"
    " from generate_series(1, 200) g",
    "create table owner (id int primary key)",
    "create table owned (id int primary key, owner int references owner on delete cascade deferrable initially deferred)",
    "insert into owner select generate_series(1, 200)",
    "insert into owned select g, 1 + g % 200 from generate_series(1, 2000) g",
    "delete from owner where id % 50 = 0",
    "create statistics related (dependencies, mcv) on id, owner from owned",
    "analyze owned",
    # Materialized views, large objects, TOAST of every kind, copies, cursors.
    "create materialized view summed as select owner, count(*) n from owned group by owner",
    "create unique index on summed (owner)",
    "insert into owned values (5001, 1)",
    "refresh materialized view concurrently summed",
    "refresh materialized view summed",
    "select lo_from_bytea(77001, decode(repeat(md5('lo'), 2000), 'hex'))",
    "select lo_put(77001, 9000, 'overwritten')",
    "select lo_from_bytea(77002, 'short'); select lo_unlink(77002)",
    "create table toasted (id int, plain text storage plain, extended text storage extended, external text storage external, main text storage main)",
    "insert into toasted select g, repeat('p', 500), repeat(md5(g::text), 300), repeat(md5(g::text), 300), repeat('m', 6000)"
    " from generate_series(1, 60) g",
    "update toasted set external = external || 'more' where id % 3 = 0",
    "delete from toasted where id % 7 = 0",
    "create table copied_in (v int)",
    "copy copied_in from program 'seq 1 3000'",
    "create table frozen_in (v int)",
    "begin; truncate frozen_in; copy frozen_in from program 'seq 1 3000' with (freeze); commit",
    # Relations of other persistence; what goes from one to the other.
    "create unlogged table unlogged (id int primary key, v text, i int generated by default as identity)",
    "insert into unlogged (id, v) select g, 'u' from generate_series(1, 500) g",
    "create index on unlogged using gin (to_tsvector('simple', v)); create index on unlogged using hash (v)",
    "create index on unlogged using gist (int4range(id, id + 1)); create index on unlogged using spgist (v); create index on unlogged using brin (id)",
    "create unlogged table becomes_logged as select generate_series(1, 500) g",
    "alter table becomes_logged set logged",
    "create table becomes_unlogged as select generate_series(1, 500) g",
    "alter table becomes_unlogged set unlogged",
    "create temporary table temporary as select generate_series(1, 5000) g; create index on temporary (g); update temporary set g = -g",
    # Rewrites.
    "alter table owned alter column id type bigint",
    "alter table owned add column volatile_default float8 default random()",
    "alter table owned add column fast_default int default 7",
    "alter table owned drop column fast_default",
    "cluster owned using owned_pkey",
    "vacuum full toasted",
    "vacuum (full, freeze) parent",
    "reindex table concurrently typed",
    "reindex index concurrently owned_pkey",
    "reindex schema public",
    "create index concurrently on owned (owner)",
    "drop index concurrently owned_owner_idx",
    "create table truncated as select generate_series(1, 2000) g; create index on truncated (g)",
    "begin; truncate truncated; insert into truncated values (1); rollback",
    "begin; savepoint a; truncate truncated; rollback to a; delete from truncated where g > 1990; commit",
    "begin; truncate truncated restart identity; insert into truncated select generate_series(1, 50); commit",
    "truncate owner cascade",
    "create table made as select 1 v; drop table made",
    "begin; create table never (v int primary key); insert into never values (1); rollback",
    # Two-phase, subtransactions by the thousand, an error in the middle of everything.
    "begin; insert into log (what) values ('first'); savepoint s; create table by_two_phase (v int primary key);"
    " insert into by_two_phase values (1); prepare transaction 'kept'",
    "commit prepared 'kept'",
    "begin; create table undone (v int primary key); insert into undone values (1); prepare transaction 'undone'",
    "rollback prepared 'undone'",
    "begin; insert into log (what) values ('over a restart'); prepare transaction 'left'",
    "do $$ begin for i in 1..3000 loop begin insert into log (what) values (i::text);"
    " if i % 5 = 0 then raise division_by_zero; end if; exception when division_by_zero then null; end; end loop; end $$",
    # Parallel query and parallel builds, hash and merge joins that spill to disk.
    "set max_parallel_workers_per_gather = 2; set parallel_setup_cost = 0; set parallel_tuple_cost = 0; set min_parallel_table_scan_size = 0;"
    " set debug_parallel_query = on; set work_mem = '64kB'",
    "create table big as select g, md5(g::text) h from generate_series(1, 40000) g",
    "set max_parallel_maintenance_workers = 2; set min_parallel_index_scan_size = 0",
    "create index big_h on big (h)",
    "vacuum (parallel 2) big",
    "create table joined as select a.g, b.h from big a join big b on a.h = b.h where a.g % 3 = 0 order by b.h",
    "reset all",
    "notify nobody, 'hears'",
    "comment on table big is 'commented'",
]  # fmt: skip

AS_SUPERUSER = [
    "create extension vector",
    "create table embedded (id int, v vector(3))",
    "insert into embedded select g, array[g % 10, g % 7, g % 3]::float4[]::vector from generate_series(1, 600) g",
    "create index on embedded using hnsw (v vector_l2_ops)",
    "create index on embedded using ivfflat (v vector_l2_ops) with (lists = 5)",
    "insert into embedded select g, array[g % 10, g % 7, g % 3]::float4[]::vector from generate_series(601, 700) g",
    "create function watch() returns event_trigger language plpgsql as $$ begin raise notice '%', tg_tag; end $$",
    "create event trigger watched on ddl_command_end execute function watch()",
    "create table noticed (v int)",
    "drop event trigger watched",
    "create publication everything for all tables",
    "create collation german (provider = libc, locale = 'C.utf8')",
    "create table collated (v text collate german primary key); insert into collated select md5(g::text) from generate_series(1, 500) g",
    "vacuum full pg_class",
    "vacuum full pg_database",
    "reindex system app",
    "create database by_log strategy wal_log",
    "create database by_copy template by_log strategy file_copy",
    "create database by_log_again template by_copy strategy wal_log",
    "create database dropped_by_log strategy wal_log",
    "create database dropped_by_copy strategy file_copy",
    "drop database dropped_by_log",
    "drop database dropped_by_copy",
    "alter database by_copy rename to by_copy_renamed",
]  # fmt: skip


async def typed_table(connection: Session) -> None:
    for statement in BEFORE_TYPES:
        await connection.execute(statement)
    columns = ", ".join(f'"c_{name.strip(chr(34))}" {name}' for name in TYPES)
    values = ", ".join(f"({value})::{name}" for name, value in TYPES.items())
    await connection.execute(f"create table typed ({columns})")
    for statement in INDEXES[::2]:
        await connection.execute(statement)
    insert = f"insert into typed select {values} from generate_series(1, 400) g"  # noqa: S608
    await connection.execute(insert)
    for statement in INDEXES[1::2]:
        await connection.execute(statement)
    await connection.execute("update typed set c_text = c_text || 'u', c_point = point(1, c_int4) where c_int4 % 5 = 0")
    await connection.execute("delete from typed where c_int4 % 9 = 0")
    await connection.execute("vacuum (analyze) typed")
    await connection.execute(insert)


async def foreign_keys_under_load(project: RunningProject, sessions: int = 4, transactions: int = 60) -> None:
    """Many lock the same few keys, and some update what others lock: multixacts of all kinds."""
    connection = await connect(project)
    await connection.execute("create table fk_parent (id int primary key, v int default 0)")
    await connection.execute("create table fk_child (id serial primary key, parent int references fk_parent)")
    await connection.execute("insert into fk_parent select generate_series(1, 5)")

    async def work(number: int) -> None:
        session = await connect(project)
        for turn in range(transactions):
            try:
                async with session.transaction():
                    await session.execute("insert into fk_child (parent) values ($1)", 1 + turn % 5)
                    await session.execute("savepoint s")
                    await session.execute(
                        "select 1 from fk_parent where id = $1 for no key update skip locked", 1 + number
                    )
                    await session.execute("update fk_parent set v = v + 1 where id = $1 and id in"
                                          " (select id from fk_parent where id = $1 for no key update skip locked)",
                                          1 + (turn + number) % 5)  # fmt: skip
                    if turn % 7 == 0:
                        await session.execute("rollback to s")
            except asyncpg.DeadlockDetectedError:
                pass
        await session.close()

    async with asyncio.TaskGroup() as group:
        for number in range(sessions):
            group.create_task(work(number))
    await connection.close()


async def run_all(project: RunningProject) -> None:
    connection = await connect(project)
    await typed_table(connection)
    for statement in (*KINDS, *AS_SUPERUSER):
        await _run(connection, statement)
    await connection.close()
    await foreign_keys_under_load(project)


async def _run(connection: Session, statement: str) -> None:
    try:
        await connection.execute(statement)
    except asyncpg.PostgresError as error:
        error.add_note(statement)
        raise
