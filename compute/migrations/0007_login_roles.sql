-- Who may log in to a timeline's computes, as its last compute had it in pg_authid when it was stopped gracefully: the
-- proxy asks for a password before it has a compute started. SCRAM-SHA-256 verifiers only. No password can be told from
-- one but by trying, and nobody can log in with one.

CREATE TABLE login_roles (
    timeline_id text PRIMARY KEY REFERENCES timelines ON DELETE CASCADE,
    -- Of the compute that said so. The list holds for as long as it is the timeline's last term: whoever could change
    -- a role after that has reserved a higher one before.
    term        bigint NOT NULL,
    -- Whose owner's password it has: at the start of another endpoint the owner gets that one's.
    endpoint_id text NOT NULL,
    -- {digest of the name and the nonce: {"verifier": text, "valid_until": time or null}}: the names are their users'.
    roles       jsonb NOT NULL,
    -- In hex: what Postgres makes salts of for roles that do not exist.
    mock_nonce  text NOT NULL
);
