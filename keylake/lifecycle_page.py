"""docs/lifecycle.md, out of the table that the keymanager runs on.

A core: text out. `python -m keylake.lifecycle_page > docs/lifecycle.md`
"""

from __future__ import annotations

import sys
from typing import Final

from keymanager.lifecycle import LIFECYCLE, STATE_OF, KeyEvent, Refused, Standing
from shared.api.keymanager import KeyState

_HEAD: Final = """\
# The life of a project's keys

Generated from `keymanager/lifecycle.py`, the one table that all of the keymanager's changes of state go through, by
`make docs-lifecycle`. The words that people see:

| state | what it says | comes back |
|---|---|---|
| ACTIVE | the customer's KMS allows the use of the key | |
| SUSPENDED | the KMS has not answered for longer than the outage grace | by itself, when it answers |
| REVOKED | the KMS denies, or an operator holds it | by itself when the KMS allows; an operator's hold by `restore` |
| SHREDDED | all KEKs are destroyed, by the word of two people ([shredding](shredding.md)) | never |
| ERASED | and every precondition was checked: the CMK is destroyed, nothing can open a copy | never |

Whatever leaves ACTIVE, or goes on to SHREDDED, is fanned out to every instance in the same way. A project becomes
ACTIVE again only when its last revocation is sealed.

"""
_EVENTS: Final = {
    KeyEvent.KMS_ALLOWED: "the KMS unwrapped the canary; one that flaps, for a while",
    KeyEvent.KMS_OUTAGE: "no yes from the KMS for longer than the grace",
    KeyEvent.KMS_DENIED: "two definitive denials in a row",
    KeyEvent.OPERATOR_REVOKED: "`project revoke`",
    KeyEvent.OPERATOR_RESTORED: "`project restore`",
    KeyEvent.SHREDDED: "`project shred approve`, of what somebody else asked for",
    KeyEvent.ERASED: "`project verify-erasure`, with every precondition met",
}


def page() -> str:
    """The whole document."""
    return _HEAD + _diagram() + _events() + _table() + _refusals()


def _diagram() -> str:
    """States, and the events that lead from one to another. An operator's hold is drawn as what it is: part of
    REVOKED."""
    lines = ["```mermaid", "stateDiagram-v2", "    [*] --> ACTIVE"]
    for state in KeyState:
        members = [standing for standing in Standing if STATE_OF[standing] is state]
        if len(members) > 1:
            lines.append(f"    state {state} {{")
            lines += [f"        {standing}" for standing in members]
            lines.append("    }")
    for (standing, event), after in LIFECYCLE.items():
        if not isinstance(after, Refused) and after is not standing:
            lines.append(f"    {_node(standing)} --> {_node(after)}: {event}")
    return "\n".join([*lines, "    ERASED --> [*]", "```", ""]) + "\n"


def _node(standing: Standing) -> str:
    alone = sum(each is STATE_OF[standing] for each in STATE_OF.values()) == 1
    return STATE_OF[standing].value if alone else standing.value


def _events() -> str:
    rows = [f"| `{event}` | {_EVENTS[event]} |" for event in KeyEvent]
    return "\n".join(["| event | when |", "|---|---|", *rows, ""]) + "\n"


def _table() -> str:
    """Every event in every standing."""
    heads = [f"`{event}`" for event in KeyEvent]
    lines = [f"| standing | state | {' | '.join(heads)} |", "|---" * (len(heads) + 2) + "|"]
    for standing in Standing:
        cells = [_cell(standing, event) for event in KeyEvent]
        lines.append(f"| **{standing}** | {STATE_OF[standing]} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""]) + "\n"


def _cell(standing: Standing, event: KeyEvent) -> str:
    after = LIFECYCLE[standing, event]
    if isinstance(after, Refused):
        return f"refused ({_reasons().index(after.why) + 1})"
    return "stays" if after is standing else after.value


def _reasons() -> list[str]:
    return list(dict.fromkeys(after.why for after in LIFECYCLE.values() if isinstance(after, Refused)))


def _refusals() -> str:
    return "\n".join(f"{number}. {why}" for number, why in enumerate(_reasons(), 1)) + "\n"


if __name__ == "__main__":
    sys.stdout.write(page())
