-- After how many seconds without use an endpoint's compute is stopped: NULL, the installation's; 0, never.

ALTER TABLE endpoints ADD COLUMN suspend_after_s double precision CHECK (suspend_after_s >= 0);
