-- Who leads, of several keymanagers on this database: one row, the seat. See keymanager/leadership.py.
--
-- `epoch` is the key of the row, because of what that does to locks. Whoever writes in an epoch holds the row FOR KEY
-- SHARE until it commits: renewals, which change no key column, go on beside it; a takeover, which changes the key, waits
-- for it. So when a new epoch begins, nothing of an older one is still being written.
CREATE TABLE leader (
    epoch      bigint PRIMARY KEY,
    renewals   bigint NOT NULL,
    holder     text,  -- the process (instance id); NULL: nobody
    node_id    text NOT NULL,
    place      text NOT NULL,  -- where the process listens: no two live in one place
    renewed_at timestamptz,  -- for people: nothing is decided by it
    singleton  boolean NOT NULL DEFAULT true UNIQUE CHECK (singleton)
);
INSERT INTO leader (epoch, renewals, holder, node_id, place) VALUES (0, 0, NULL, '', '');
