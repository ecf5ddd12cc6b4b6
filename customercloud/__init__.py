"""The customer's side of the trust boundary, for demos and tests: key management endpoints that real SDKs talk to.

A process of its own. It holds the customer's keys (CMKs), the customer's and the vendor's cloud identities, and the
cloud's own audit log; Keylake reaches it only as it would reach the real cloud: over HTTPS, with an unmodified SDK, and
with the rights that the customer granted. One package per provider (`aws/`, `google/`); what they share stands here.

    config.py        settings of the process
    app.py           create_app(settings): routes of all providers, health, metrics
    faults.py        outages, errors, latency and throttling on demand
    admin.py         `/_keylake/…`: faults; the guard of every administrative route
    durable.py       atomic files, the append-only log, sealing under the host key
    client.py        what the customer runs: create, disable, enable, schedule deletion, deny, rotate, read the log
"""
