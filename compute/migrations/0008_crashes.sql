-- Crashes of an endpoint's computes, in a row (compute/crashes.py).

ALTER TABLE endpoints
    ADD COLUMN crashes       integer NOT NULL DEFAULT 0,
    -- NULL: it may start at once.
    ADD COLUMN next_start_at timestamptz,
    -- Of the last crash.
    ADD COLUMN crash_reason  text NOT NULL DEFAULT '';
