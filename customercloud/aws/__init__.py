"""AWS: KMS, STS AssumeRole and CloudTrail LookupEvents as far as an envelope-encrypting vendor needs them.

Cores (no I/O): `arn`, `errors`, `params`, `validation`, `sigv4`, `policy`, `authorization`, `grants`, `blob`,
`key_pairs`, `keys`, `identity`, `cloudtrail`.
Shells: `state` (persistence), `trail` (the log), `service` (one request from bytes to bytes), `admin`.
Operations: `kms` (cryptography), `kms_admin`, `kms_aliases`, `kms_grants`, `kms_tags`, `kms_last_usage` with what they
share in `kms_steps` and `access`; `kms_elsewhere` refuses the rest of KMS; `sts`, `lookup_events`.

Written from the service models in botocore, the AWS KMS Developer Guide, the IAM User Guide ("Policy evaluation
logic"), the SigV4 specification, and answers recorded from the real service in public test suites. Where AWS's exact
wording is not public, the code is right and the text is ours.
"""
