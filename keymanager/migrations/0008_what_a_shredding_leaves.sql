-- A DEK that seals nothing, wrapped by the KEK when that is made: whoever opens it has the KEK. NULL: from before this
-- was kept; it is made when the KEK is unwrapped the next time.
ALTER TABLE kek ADD COLUMN canary bytea CHECK (octet_length(canary) = 118);

-- Projects with a branch of another project's data: what a branch has changed is a copy, under the branch's own keys.
-- Rows stay, also when the branch is deleted: a store may keep old versions of its objects.
CREATE TABLE branched_project (
    project_id          text NOT NULL REFERENCES project,
    ancestor_project_id text NOT NULL REFERENCES project,
    noted_at            timestamptz NOT NULL,
    PRIMARY KEY (ancestor_project_id, project_id)
);

-- What each node deleted of a shredded project, by kind.
CREATE TABLE shred_node_object (
    project_id   text NOT NULL,
    node_id      text NOT NULL,
    kind         text NOT NULL,
    objects      bigint NOT NULL,
    old_versions bigint NOT NULL,
    size_bytes   bigint NOT NULL,
    PRIMARY KEY (project_id, node_id, kind),
    FOREIGN KEY (project_id, node_id) REFERENCES shred_node
);
INSERT INTO shred_node_object
SELECT project_id, node_id, 'other', deleted_objects, 0, deleted_size_bytes FROM shred_node WHERE deleted_objects > 0;
ALTER TABLE shred_node DROP COLUMN deleted_objects, DROP COLUMN deleted_size_bytes;
