"""Bad input on every API and port of a whole cluster: a clear error, and state as it was."""
