-- Which disk of a safekeeper is a member. A lost one is replaced under the node's name by one with a number of its own
-- (docs/consensus.md).

ALTER TABLE timelines
    -- How often a member's disk was replaced.
    ADD COLUMN generation integer NOT NULL DEFAULT 0,
    -- {node: number of its disk}; a node that is not named has its first one, 0.
    ADD COLUMN seats      jsonb NOT NULL DEFAULT '{}',
    -- The highest number ever given out, also to a disk that did not become a member.
    ADD COLUMN last_seat  integer NOT NULL DEFAULT 0;
