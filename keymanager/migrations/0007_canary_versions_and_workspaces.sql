-- Which version of the CMK wrapped the canary: it is wrapped again with the KEKs when there is a newer one, and also
-- where there are none. '': not known, from before this was written down.
ALTER TABLE key_configuration ADD COLUMN canary_cmk_key_version text NOT NULL DEFAULT '';
ALTER TABLE replacement ADD COLUMN canary_cmk_key_version text NOT NULL DEFAULT '';

-- A workspace may come under another key configuration, for projects to come: what wrapped the KEKs of a project stands
-- with the project, and nowhere else.
UPDATE project SET key_configuration_id = workspace.key_configuration_id
FROM workspace WHERE workspace.workspace_id = project.workspace_id AND project.key_configuration_id IS NULL;
ALTER TABLE project ALTER COLUMN key_configuration_id SET NOT NULL;
CREATE OR REPLACE VIEW project_key AS
SELECT project.project_id, c.key_configuration_id, c.key
FROM project JOIN key_configuration c USING (key_configuration_id);

-- And it may be deleted. Tokens that were bound to it stay, because the audit chain names them, and reach nothing.
ALTER TABLE token DROP CONSTRAINT token_workspace_id_fkey;
