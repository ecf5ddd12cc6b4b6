-- Which node was given keys of which project, and what it said last that it keeps: a KEK version is destroyed only when
-- every one of them has said that it keeps nothing under it.

CREATE TABLE key_user (
    project_id  text NOT NULL REFERENCES project,
    node_id     text NOT NULL REFERENCES node,
    -- The node keeps nothing under an older KEK version than this, and never will. It only rises.
    kek_floor   integer NOT NULL DEFAULT 1 CHECK (kek_floor > 0),
    uses        jsonb NOT NULL DEFAULT '[]',
    reported_at timestamptz,
    PRIMARY KEY (project_id, node_id)
);

-- Who was given keys before this was written down is not known: every node that stores data may have been.
INSERT INTO key_user (project_id, node_id)
SELECT DISTINCT project.project_id, instance.node_id FROM project CROSS JOIN instance
WHERE instance.role IN ('safekeeper', 'pageserver');

-- DEKs made under an older KEK version than this are to be replaced (a full re-key).
ALTER TABLE project ADD COLUMN dek_floor integer NOT NULL DEFAULT 0 CHECK (dek_floor >= 0);

ALTER TABLE kek ADD COLUMN last_unwrap_at timestamptz;
ALTER TABLE kek ADD COLUMN destroyed_at timestamptz;
