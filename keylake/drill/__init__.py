"""Drills: a key is taken away, its KMS goes down, keys are rotated, on a live cluster, with proof of what came of it.

A drill ends with a report (`report.py`) that says what was promised and what was measured; `page.py` makes a page of
it. What a drill does is in `revocation.py`, `outage.py` and `rotation.py`, over what they share in `stage.py`.
"""
