-- Which version of the CMK wrapped the canary: it is wrapped again with the KEKs when there is a newer one, and also
-- where there are none. '': not known, from before this was written down.
ALTER TABLE key_configuration ADD COLUMN canary_cmk_key_version text NOT NULL DEFAULT '';
ALTER TABLE replacement ADD COLUMN canary_cmk_key_version text NOT NULL DEFAULT '';

-- A workspace may be deleted. Tokens that were bound to it stay, because the audit chain names them, and reach nothing.
ALTER TABLE token DROP CONSTRAINT token_workspace_id_fkey;
