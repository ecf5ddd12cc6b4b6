"""Azure as far as customer-managed keys need it: Key Vault (keys), Entra ID's token endpoint, AuditEvent records.

Modules without I/O: durations, errors, access, identity, tokens, keys, rsa, bodies, audit. State on disk: state. One
request: service (what is done with it: operations, crypto_operations, entra). For the simulation's operator: admin.
"""
