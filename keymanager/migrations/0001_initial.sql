-- The keymanager's metadata. No plaintext key is ever stored here: KEKs and canaries only as the KMS wrapped them.

CREATE TABLE account (
    account_id text PRIMARY KEY,
    name       text NOT NULL,
    created_at timestamptz NOT NULL
);

CREATE TABLE key_configuration (
    key_configuration_id text PRIMARY KEY,
    account_id           text NOT NULL REFERENCES account,
    name                 text NOT NULL,
    key                  jsonb NOT NULL,
    outage_grace_s       double precision NOT NULL CHECK (outage_grace_s >= 0),
    probe_interval_s     double precision NOT NULL CHECK (probe_interval_s > 0),
    -- A random key that is good for nothing but being unwrapped: the watcher's probe.
    canary_wrapped       bytea NOT NULL,
    canary_digest        bytea NOT NULL,
    kms_access           text NOT NULL DEFAULT 'ALLOWED' CHECK (kms_access IN ('ALLOWED', 'OUTAGE', 'DENIED')),
    last_verdict         text NOT NULL,
    last_probe_at        timestamptz,
    last_allowed_at      timestamptz NOT NULL,
    created_at           timestamptz NOT NULL,
    UNIQUE (account_id, name)
);

CREATE TABLE workspace (
    workspace_id         text PRIMARY KEY,
    account_id           text NOT NULL REFERENCES account,
    name                 text NOT NULL,
    key_configuration_id text NOT NULL REFERENCES key_configuration,
    created_at           timestamptz NOT NULL,
    UNIQUE (account_id, name)
);
CREATE INDEX ON workspace (key_configuration_id);

CREATE TABLE project (
    project_id   text PRIMARY KEY,
    workspace_id text NOT NULL REFERENCES workspace,
    name         text NOT NULL,
    held         boolean NOT NULL DEFAULT false,
    shredded     boolean NOT NULL DEFAULT false,
    state        text NOT NULL CHECK (state IN ('ACTIVE', 'SUSPENDED', 'REVOKED', 'SHREDDED')),
    state_reason text NOT NULL DEFAULT '',
    created_at   timestamptz NOT NULL,
    UNIQUE (workspace_id, name)
);

CREATE TABLE kek (
    project_id      text NOT NULL REFERENCES project,
    kek_version     integer NOT NULL CHECK (kek_version > 0),
    kek_id          text NOT NULL,
    wrapped         bytea,  -- NULL once shredded
    cmk_key_version text NOT NULL,
    -- Upper bound of the wraps made so far: reserved in blocks before they are made, so a crash never under-counts.
    wraps_reserved  bigint NOT NULL DEFAULT 0 CHECK (wraps_reserved >= 0),
    created_at      timestamptz NOT NULL,
    PRIMARY KEY (project_id, kek_version)
);

-- A node is a stable name, an instance one process under that name. The key that first used a name owns it.
CREATE TABLE node (
    node_id     text PRIMARY KEY,
    kid         text NOT NULL,
    generation  bigint NOT NULL,
    instance_id text NOT NULL
);

-- Every instance that ever said Hello: one that was replaced never comes back.
CREATE TABLE instance (
    instance_id text PRIMARY KEY,
    node_id     text NOT NULL REFERENCES node,
    role        text NOT NULL,
    first_seen  timestamptz NOT NULL
);

-- Leases by name, from before their grant is answered until they are known to be over. Renewals are not written.
CREATE TABLE lease (
    project_id  text NOT NULL REFERENCES project,
    instance_id text NOT NULL REFERENCES instance,
    node_id     text NOT NULL,
    role        text NOT NULL,
    generation  bigint NOT NULL,
    ttl_s       double precision NOT NULL,
    granted_at  timestamptz NOT NULL,
    PRIMARY KEY (project_id, instance_id)
);

CREATE TABLE revocation (
    revocation_id        text PRIMARY KEY,
    project_id           text NOT NULL REFERENCES project,
    state                text NOT NULL,
    reason               text NOT NULL,
    detected_at          timestamptz NOT NULL,
    keks_dropped_after_s double precision,
    sealed_after_s       double precision,
    number               bigint GENERATED ALWAYS AS IDENTITY UNIQUE
);
CREATE INDEX ON revocation (project_id);

CREATE TABLE revocation_instance (
    revocation_id text NOT NULL REFERENCES revocation,
    instance_id   text NOT NULL,
    node_id       text NOT NULL,
    role          text NOT NULL,
    generation    bigint NOT NULL,
    outcome       text NOT NULL DEFAULT 'pending' CHECK (outcome IN ('pending', 'acknowledged', 'fenced')),
    after_s       double precision,
    steps_s       jsonb NOT NULL DEFAULT '{}',
    PRIMARY KEY (revocation_id, instance_id)
);

CREATE TABLE audit (
    sequence      bigint PRIMARY KEY,
    at            timestamptz NOT NULL,
    actor         text NOT NULL,
    action        text NOT NULL,
    outcome       text NOT NULL,
    project_id    text,
    details       jsonb NOT NULL,
    previous_hash bytea NOT NULL,
    record_hash   bytea NOT NULL
);

-- The end of the chain, kept apart, so that cutting records off the end shows. Its row lock puts writers in line.
CREATE TABLE audit_head (
    singleton   boolean PRIMARY KEY DEFAULT true CHECK (singleton),
    sequence    bigint NOT NULL,
    record_hash bytea NOT NULL
);
INSERT INTO audit_head (sequence, record_hash) VALUES (0, '\x0000000000000000000000000000000000000000000000000000000000000000');
