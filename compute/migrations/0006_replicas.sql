-- Read replicas: endpoints that follow what is committed to their timeline. The verifier of such a row is never used:
-- roles and passwords are the timeline's.

ALTER TABLE endpoints ADD COLUMN follows boolean NOT NULL DEFAULT false;
