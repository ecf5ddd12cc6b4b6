"""Google Cloud: KMS v1 over REST and gRPC, IAM policies, service account impersonation and tokens, Cloud Audit Logs.

Cores (no I/O): `names`, `errors`, `iam`, `tokens`, `identity`, `blob`, `delayed`, `keys`, `messages`, `auditlog`,
`transcoding`, `methods`. Shells: `state` (persistence), `entries` (the log), `service` (one call, whatever carried it),
`rest`, `grpc_server`, `admin`. Operations: `kms_crypto`, `kms_admin`, `policies`, `oauth`. For the customer: `client`.

Both protocols speak the messages of google-cloud-kms (`kms_v1.types`) to the same operations. Written from those
protos, the Cloud KMS and IAM documentation, and answers that public repositories show. Where Google's exact wording is
not public, status and details are right and the text is ours.
"""
