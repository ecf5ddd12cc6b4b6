-- Shredding and erasure of projects, and what receipts need: which key was revoked, and when it came back.

ALTER TABLE project DROP CONSTRAINT project_state_check;
ALTER TABLE project ADD CONSTRAINT project_state_check
    CHECK (state IN ('ACTIVE', 'SUSPENDED', 'REVOKED', 'SHREDDED', 'ERASED'));

-- The customer's key of each project: its own, or its workspace's.
CREATE VIEW project_key AS
SELECT project.project_id, c.key_configuration_id, c.key
FROM project JOIN workspace USING (workspace_id) JOIN key_configuration c
ON c.key_configuration_id = coalesce(project.key_configuration_id, workspace.key_configuration_id);

-- The customer's key at the time. NULL: from before this was written down.
ALTER TABLE revocation ADD COLUMN key_configuration_id text;
ALTER TABLE revocation ADD COLUMN key jsonb;

CREATE TABLE restoration (
    restoration_id       text PRIMARY KEY,
    project_id           text NOT NULL REFERENCES project,
    reason               text NOT NULL,
    key_configuration_id text NOT NULL,
    key                  jsonb NOT NULL,
    detected_at          timestamptz NOT NULL,
    restored_after_s     double precision NOT NULL,
    number               bigint GENERATED ALWAYS AS IDENTITY UNIQUE
);
CREATE INDEX ON restoration (project_id);

-- Every CMK that ever wrapped a KEK of a project: a copy of the database from then may hold what it wrapped.
CREATE TABLE project_cmk (
    project_id           text NOT NULL REFERENCES project,
    key                  jsonb NOT NULL,
    key_configuration_id text NOT NULL,
    first_used_at        timestamptz NOT NULL,
    PRIMARY KEY (project_id, key)
);
INSERT INTO project_cmk
SELECT project_id, key, project_key.key_configuration_id, created_at FROM project JOIN project_key USING (project_id);
INSERT INTO project_cmk
SELECT DISTINCT staged_kek.project_id, replacement.key, replacement.key_configuration_id, replacement.started_at
FROM staged_kek JOIN replacement USING (key_configuration_id) ON CONFLICT DO NOTHING;

-- Who asked for a project's shredding, and what became of that. Rows stay.
CREATE TABLE shred (
    shred_id         text PRIMARY KEY,
    project_id       text NOT NULL REFERENCES project,
    state            text NOT NULL CHECK (state IN ('asked', 'cancelled', 'expired', 'approved')),
    reason           text NOT NULL,
    asked_by         text NOT NULL,
    asked_subject    text NOT NULL,
    asked_at         timestamptz NOT NULL,
    expires_at       timestamptz NOT NULL,
    decided_by       text,
    decided_subject  text,
    decided_at       timestamptz,
    keks_destroyed   integer NOT NULL DEFAULT 0,
    staged_destroyed integer NOT NULL DEFAULT 0,
    -- The database's own files were rewritten without the wraps. Its WAL is not.
    vacuumed_at      timestamptz,
    number           bigint GENERATED ALWAYS AS IDENTITY UNIQUE
);
CREATE UNIQUE INDEX ON shred (project_id) WHERE state IN ('asked', 'approved');

-- What a node says that it deleted of a shredded project, and what it found left when it looked last.
CREATE TABLE shred_node (
    project_id         text NOT NULL REFERENCES project,
    node_id            text NOT NULL REFERENCES node,
    deleted_objects    bigint NOT NULL DEFAULT 0,
    deleted_size_bytes bigint NOT NULL DEFAULT 0,
    left_objects       bigint NOT NULL,
    remains            jsonb NOT NULL,
    not_checked        jsonb NOT NULL,
    holds_keys         boolean NOT NULL,
    looked_at          timestamptz NOT NULL,
    PRIMARY KEY (project_id, node_id)
);

-- What was checked before the word ERASED was used.
CREATE TABLE erasure (
    project_id text PRIMARY KEY REFERENCES project,
    report     jsonb NOT NULL,
    erased_at  timestamptz NOT NULL
);
