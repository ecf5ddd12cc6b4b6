"""`keylake cloud`: what the customer does in its own cloud, and faults for the cloud to have.

`cloud key` speaks to KMS and CloudTrail with the customer's credentials, as the customer's administrator would.
`cloud fault` (`keylake.cli.faults`) speaks to the simulation itself, and exists only here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from keylake.cli import faults
from keylake.cli.common import AsJson, Home, Yes, examples, group

if TYPE_CHECKING:
    from keylake.cluster import Customer

app = group("The customer's side: its keys and its cloud.")
key_app = group("Keys in the customer's KMS, and who may use them.")
app.add_typer(key_app, name="key")
app.add_typer(faults.app, name="fault")

Key = Annotated[
    str | None,
    typer.Argument(help="Description, id or ARN; not needed when there is only one.", show_default=False),
]


def find_key(customer: Customer, text: str | None) -> dict[str, Any]:
    """Metadata (KMS's KeyMetadata) of the key that is called so. Raises NotFoundError, InvalidInputError."""
    from keylake.cli.lookup import Candidate, resolve

    found = [Candidate.of(key, key["Arn"], {key["KeyId"]}, {key["Description"]} - {""}) for key in _keys(customer)]
    return resolve("key", text, found, create="keylake cloud key create NAME")


def _keys(customer: Customer) -> list[dict[str, Any]]:
    """Metadata of every key of the account, oldest first."""
    kms = customer.aws.kms
    pages = kms.get_paginator("list_keys").paginate()
    found: list[dict[str, Any]] = [dict(customer.aws.describe(key["KeyId"])) for page in pages for key in page["Keys"]]
    return sorted(found, key=lambda key: key["CreationDate"])


def keylake_may(policy: dict[str, Any], role_arn: str) -> str:
    """What the key's policy says about Keylake's role; not all that a policy can say, but what these commands do."""
    from customercloud.client import DENY_SID, USE_SID

    sids = {s.get("Sid") for s in policy["Statement"] if s.get("Principal") == {"AWS": role_arn}}
    return "denied" if DENY_SID in sids else "allowed" if USE_SID in sids else "not allowed"


def _show(customer: Customer, arn: str, as_json: bool, **more: Any) -> None:
    """The key as it is now."""
    from keylake.cli.output import emit, facts

    key = dict(customer.aws.describe(arn))
    role = keylake_may(customer.aws.policy(arn), customer.bootstrap.role_arn)

    emit(
        key | {"KeylakeRole": role} | more,
        as_json,
        lambda: facts(
            [
                ("description", key["Description"]),
                ("key", key["Arn"]),
                ("state", key["KeyState"]),
                ("Keylake's role", role),
                ("created", key["CreationDate"]),
                ("deletion", key.get("DeletionDate")),
                ("material", key.get("CurrentKeyMaterialId")),
                *more.items(),
            ]
        ),
    )


@key_app.command("create", epilog=examples("keylake cloud key create my-key"))
def create(
    description: Annotated[str, typer.Argument(help="Its description, which commands take as its name.")] = "my-key",
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Make a key that Keylake's role may use, and print its ARN."""
    from keylake.cli import session
    from keylake.cli.output import emit

    with session.customer(home) as customer:
        arn = customer.aws.create_key(description, role_arn=customer.bootstrap.role_arn)
    emit({"key_arn": arn, "description": description}, as_json, lambda: arn)


@key_app.command("list", epilog=examples("keylake cloud key list"))
def list_keys(home: Home = None, as_json: AsJson = False) -> None:
    """Every key of the customer's account."""
    from keylake.cli import session
    from keylake.cli.output import emit, table

    with session.customer(home) as customer:
        found = _keys(customer)
    emit(
        found,
        as_json,
        lambda: table(
            ("description", "state", "created", "deletion", "key"),
            [(k["Description"], k["KeyState"], k["CreationDate"], k.get("DeletionDate"), k["Arn"]) for k in found],
        ),
    )


@key_app.command("show", epilog=examples("keylake cloud key show my-key", "keylake cloud key show my-key --json"))
def show(key: Key = None, home: Home = None, as_json: AsJson = False) -> None:
    """One key and its policy."""
    import json

    from keylake.cli import session

    with session.customer(home) as customer:
        arn = find_key(customer, key)["Arn"]
        policy = customer.aws.policy(arn)
        _show(customer, arn, as_json, policy=policy if as_json else json.dumps(policy))


@key_app.command("disable", epilog=examples("keylake cloud key disable my-key  # projects under it stop in seconds"))
def disable(key: Key = None, home: Home = None, as_json: AsJson = False) -> None:
    """Disable a key: everything kept under it stops."""
    with _changed(home, key, as_json) as (customer, arn):
        customer.aws.disable(arn)


@key_app.command("enable", epilog=examples("keylake cloud key enable my-key"))
def enable(key: Key = None, home: Home = None, as_json: AsJson = False) -> None:
    """Enable a key again: what was kept under it comes back by itself."""
    with _changed(home, key, as_json) as (customer, arn):
        customer.aws.enable(arn)


@key_app.command("schedule-deletion", epilog=examples("keylake cloud key schedule-deletion my-key --days 7"))
def schedule_deletion(
    key: Key = None,
    days: Annotated[int, typer.Option(help="How long it can still be cancelled.", min=7, max=30)] = 7,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Have a key destroyed after a waiting period, in which it cannot be used."""
    with _changed(home, key, as_json) as (customer, arn):
        customer.aws.schedule_deletion(arn, days)


@key_app.command(
    "cancel-deletion", epilog=examples("keylake cloud key cancel-deletion my-key", "keylake cloud key enable my-key")
)
def cancel_deletion(key: Key = None, home: Home = None, as_json: AsJson = False) -> None:
    """Do not destroy the key after all. As AWS does it, the key is disabled afterwards."""
    with _changed(home, key, as_json) as (customer, arn):
        customer.aws.cancel_deletion(arn)


@key_app.command("complete-deletion", epilog=examples("keylake cloud key complete-deletion my-key --yes"))
def complete_deletion(key: Key = None, yes: Yes = False, home: Home = None, as_json: AsJson = False) -> None:
    """End the waiting period now: the key is destroyed, and all that was kept under it is lost for good.

    Only the simulated cloud can do that; the real one lets you wait.
    """
    from keylake.cli import session
    from keylake.cli.output import emit

    with session.customer(home) as customer:
        found = find_key(customer, key)
        if not yes:
            typer.confirm(f"Destroy {found['Arn']}, for good?", abort=True, err=True)
        customer.simulation.complete_deletion(found["Arn"])
    emit({"destroyed": found["Arn"]}, as_json, lambda: f"{found['Arn']} is destroyed")


@key_app.command("deny", epilog=examples("keylake cloud key deny my-key"))
def deny(key: Key = None, home: Home = None, as_json: AsJson = False) -> None:
    """Put an explicit Deny for Keylake's role into the key's policy. The customer can still use the key."""
    with _changed(home, key, as_json) as (customer, arn):
        customer.aws.deny_role(arn, customer.bootstrap.role_arn)


@key_app.command("allow", epilog=examples("keylake cloud key allow my-key"))
def allow(key: Key = None, home: Home = None, as_json: AsJson = False) -> None:
    """Let Keylake's role use the key; lifts `deny`."""
    with _changed(home, key, as_json) as (customer, arn):
        customer.aws.allow_role(arn, customer.bootstrap.role_arn)


@key_app.command("rotate", epilog=examples("keylake cloud key rotate my-key"))
def rotate(key: Key = None, home: Home = None, as_json: AsJson = False) -> None:
    """Give the key new material now. What the older material encrypted still opens."""
    with _changed(home, key, as_json) as (customer, arn):
        customer.aws.rotate(arn)


@contextlib.contextmanager
def _changed(home: Path | None, key: str | None, as_json: bool) -> Iterator[tuple[Customer, str]]:
    """Find a key, let the block change it, show what it is then."""
    from keylake.cli import session

    with session.customer(home) as customer:
        arn: str = find_key(customer, key)["Arn"]
        yield customer, arn
        _show(customer, arn, as_json)


@key_app.command(
    "log",
    epilog=examples(
        "keylake cloud key log",
        "keylake cloud key log my-key --event Decrypt --limit 20",
        "keylake cloud key log --json | jq '.[].errorCode'",
    ),
)
def log(
    key: Key = None,
    event: Annotated[
        str | None, typer.Option(help="Only this action, e.g. Decrypt or DisableKey.", show_default=False)
    ] = None,
    limit: Annotated[int, typer.Option(help="At most so many, the newest.", min=1)] = 50,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """The cloud's own record (CloudTrail) of who used which key for what. Oldest first."""
    from itertools import islice

    from keylake.cli import session
    from keylake.cli.output import emit, table

    with session.customer(home) as customer:
        # Without a key: all of the account's, also of what has no key.
        arn = None if key is None else find_key(customer, key)["Arn"]
        events = customer.aws.events() if event is None else customer.aws.events(EventName=event)
        newest = (record for record in events if arn is None or _concerns(record, arn))
        found = list(islice(newest, limit))[::-1]
    emit(
        found,
        as_json,
        lambda: table(
            ("time", "who", "action", "outcome", "for", "key"),
            [
                (
                    record.get("eventTime"),
                    _who(record),
                    record.get("eventName"),
                    record.get("errorCode", "ok"),
                    _context(record),
                    ", ".join(r["ARN"].rpartition("/")[2] for r in record.get("resources") or []),
                )
                for record in found
            ],
        ),
    )


def _concerns(record: dict[str, Any], arn: str) -> bool:
    return any(resource.get("ARN") == arn for resource in record.get("resources") or [])


def _who(record: dict[str, Any]) -> str:
    identity = record.get("userIdentity") or {}
    return str(identity.get("arn") or identity.get("invokedBy") or identity.get("type") or "")


def _context(record: dict[str, Any]) -> str:
    """The encryption context, by which the customer sees what a call was for."""
    context = (record.get("requestParameters") or {}).get("encryptionContext") or {}
    return ", ".join(f"{name}={value}" for name, value in sorted(context.items()))
