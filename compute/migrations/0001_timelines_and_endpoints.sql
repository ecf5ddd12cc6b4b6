-- What the compute manager remembers. No key, no password: an owner's password is kept as a SCRAM verifier only.
-- LSNs are bigint: a log would have to write 8 EiB to reach the sign bit.

CREATE TABLE timelines (
    timeline_id       text PRIMARY KEY,
    project_id        text NOT NULL,
    name              text NOT NULL,
    -- 0 and NULL until the pageserver has made it
    system_identifier numeric(20, 0) NOT NULL DEFAULT 0,
    start_lsn         bigint,
    -- Safekeepers that were once told to make this timeline. One of these that no longer knows it has lost its disk,
    -- and must not be made anew: empty, it would vote as if nothing had ever been committed.
    safekeepers       text[] NOT NULL DEFAULT '{}',
    -- The highest term ever asked for. Raised before any vote is asked for.
    term              bigint NOT NULL DEFAULT 0,
    created_at        timestamptz NOT NULL DEFAULT now(),
    UNIQUE (project_id, name)
);

CREATE TABLE endpoints (
    endpoint_id    text PRIMARY KEY,
    project_id     text NOT NULL,
    timeline_id    text NOT NULL REFERENCES timelines,
    name           text NOT NULL,
    owner          text NOT NULL,
    database       text NOT NULL,
    scram_verifier text NOT NULL,
    -- What is shown of the last run once it is over
    reason         text NOT NULL DEFAULT 'created',
    term           bigint NOT NULL DEFAULT 0,
    start_lsn      bigint,
    created_at     timestamptz NOT NULL DEFAULT now(),
    UNIQUE (project_id, name)
);

CREATE INDEX endpoints_by_timeline ON endpoints (timeline_id);
