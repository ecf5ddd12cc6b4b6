-- Tokens for people, by id. What they say and their SHA-256; never a token. Rows stay: the audit chain names them.
CREATE TABLE token (
    token_id     text PRIMARY KEY,
    digest       bytea NOT NULL,
    role         text NOT NULL,
    subject      text NOT NULL,
    workspace_id text REFERENCES workspace,
    project_id   text REFERENCES project,
    issued_by    text NOT NULL,
    issued_at    timestamptz NOT NULL,
    expires_at   timestamptz NOT NULL,
    revoked_at   timestamptz
);

-- A project's own key configuration; NULL: its workspace's.
ALTER TABLE project ADD COLUMN key_configuration_id text REFERENCES key_configuration;
CREATE INDEX ON project (key_configuration_id);
