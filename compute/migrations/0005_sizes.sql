-- How large an endpoint's computes are, in compute units (shared/api/compute.py, EndpointSize): NULL, as the
-- installation is set.

ALTER TABLE endpoints ADD COLUMN size text CHECK (size IN ('0.25', '0.5', '1', '2', '4', '8'));
