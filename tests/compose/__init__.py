"""`make compose-test`: docker-compose.yml on a real Docker engine, from an empty machine to an empty machine."""
