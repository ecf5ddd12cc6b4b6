-- Branches: a timeline that was branched off another one, at an LSN. All three are set, or none.
-- Read-only endpoints: one with an LSN shows the timeline as it was there, and writes nothing.

ALTER TABLE timelines
    ADD COLUMN ancestor_project_id  text,
    ADD COLUMN ancestor_timeline_id text REFERENCES timelines,
    ADD COLUMN ancestor_lsn         bigint,
    -- Set before anything of it is deleted: whatever is left of it then, it is never used again.
    ADD COLUMN deleting             boolean NOT NULL DEFAULT false,
    ADD CHECK (num_nulls(ancestor_project_id, ancestor_timeline_id, ancestor_lsn) IN (0, 3));

CREATE INDEX timelines_by_ancestor ON timelines (ancestor_timeline_id) WHERE ancestor_timeline_id IS NOT NULL;

ALTER TABLE endpoints ADD COLUMN read_only_lsn bigint;
