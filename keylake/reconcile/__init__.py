"""Our audit chain and the customer's own log, side by side: the same KMS calls, seen from both sides of the trust
boundary. `core` compares; a module per cloud reads that cloud's log; `logs` finds out which one a file is."""
