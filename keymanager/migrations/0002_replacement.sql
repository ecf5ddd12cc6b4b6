-- A CMK that is on its way to replace another. Until the switch, which is one transaction, everything uses the old one;
-- from then on everything uses the new one.

-- How often the key of this configuration was replaced: whoever wrapped a KEK under the one before must not store it.
ALTER TABLE key_configuration ADD COLUMN key_generation integer NOT NULL DEFAULT 1;

CREATE TABLE replacement (
    key_configuration_id text PRIMARY KEY REFERENCES key_configuration ON DELETE CASCADE,
    key                  jsonb NOT NULL,
    canary_wrapped       bytea NOT NULL,
    canary_digest        bytea NOT NULL,
    actor                text NOT NULL,
    started_at           timestamptz NOT NULL
);

-- KEKs as the new CMK wrapped them, waiting for the switch.
CREATE TABLE staged_kek (
    key_configuration_id text NOT NULL REFERENCES replacement ON DELETE CASCADE,
    project_id           text NOT NULL,
    kek_version          integer NOT NULL,
    wrapped              bytea NOT NULL,
    cmk_key_version      text NOT NULL,
    PRIMARY KEY (project_id, kek_version),
    FOREIGN KEY (project_id, kek_version) REFERENCES kek ON DELETE CASCADE
);
