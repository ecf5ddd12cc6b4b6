"""`keylake token`: who may do what, for how long."""

from __future__ import annotations

import getpass
import re
from typing import TYPE_CHECKING, Annotated, Final

import typer

from keylake.cli.common import AsJson, Home, examples, group
from shared.roles import PersonRole

if TYPE_CHECKING:
    from keylake.client import KeylakeClient
    from shared.api.keymanager import IssuedToken

_UNITS_S: Final = {"s": 1, "m": 60, "h": 3600, "d": 24 * 3600}

app = group("Tokens for people: a role, for a time, perhaps for one workspace or project only. See docs/roles.md.")


def ttl_s(text: str) -> int:
    """`90s`, `30m`, `8h`, `7d` in seconds. Raises InvalidInputError."""
    from shared.errors import InvalidInputError

    match = re.fullmatch(r"([1-9][0-9]{0,6})([smhd])", text)
    if match is None:
        raise InvalidInputError(f"a time is a number and one of s, m, h, d, as in 8h; not {text[:20]!r}")
    return int(match[1]) * _UNITS_S[match[2]]


@app.command(
    "create",
    epilog=examples(
        "keylake token create --role auditor --ttl 8h --for alice",
        "keylake token create --role data-user --ttl 7d --project shop",
        "KEYLAKE_TOKEN=$(keylake token create --role security-admin --ttl 1h) keylake project list",
    ),
)
def create(
    role: Annotated[PersonRole, typer.Option(help="What its bearer may do.", show_default=False)],
    ttl: Annotated[str, typer.Option(help="How long: 90s, 30m, 8h, 7d.", show_default=False)],
    subject: Annotated[
        str | None,
        typer.Option("--for", help="Whose it is, for the audit log; you unless given.", show_default=False),
    ] = None,
    workspace: Annotated[
        str | None, typer.Option(help="Name or id: good for this workspace only.", show_default=False)
    ] = None,
    project: Annotated[
        str | None, typer.Option(help="Name or id: good for this project only.", show_default=False)
    ] = None,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Make a token and print it, once: nobody keeps it. Whoever has it uses it as the variable KEYLAKE_TOKEN."""
    from keylake.cli import lookup, session
    from keylake.cli.output import emit, notes

    life_s, whose = ttl_s(ttl), subject or getpass.getuser()

    async def make(client: KeylakeClient) -> tuple[str, IssuedToken]:
        return await client.create_token(
            role,
            subject=whose,
            ttl_s=life_s,
            workspace_id=None if workspace is None else (await lookup.workspace(client, workspace)).workspace_id,
            project_id=None if project is None else (await lookup.project(client, project)).project_id,
        )

    token, issued = session.ask(home, make)
    if not as_json:
        notes().print(f"{issued.token_id}, {issued.role} for {issued.subject}, until {issued.expires_at:%F %T %Z}")
    emit({"token": token, **issued.model_dump(mode="json")}, as_json, lambda: token)


@app.command("list", epilog=examples("keylake token list", "keylake token list --json"))
def list_tokens(home: Home = None, as_json: AsJson = False) -> None:
    """The last thousand tokens that were made, newest first; without the tokens themselves, which nobody has kept."""
    from keylake.cli import session
    from keylake.cli.output import emit, table

    found = session.ask(home, lambda client: client.tokens())
    emit(
        found,
        as_json,
        lambda: table(
            ("id", "role", "for", "bound to", "issued", "expires", "revoked"),
            [
                (
                    t.token_id,
                    t.role.value,
                    t.subject,
                    t.project_id or t.workspace_id,
                    t.issued_at,
                    t.expires_at,
                    t.revoked_at,
                )
                for t in found
            ],
        ),
    )


@app.command("revoke", epilog=examples("keylake token revoke tok-0123456789abcdef"))
def revoke(
    token_id: Annotated[str, typer.Argument(help="Its id, as `keylake token list` shows it.", show_default=False)],
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """End a token now, on every service."""
    from keylake.cli import session
    from keylake.cli.output import emit
    from shared.errors import InvalidInputError
    from shared.ids import TokenId

    try:
        wanted = TokenId.parse(token_id)
    except ValueError:
        raise InvalidInputError("a token's id begins with tok-; `keylake token list` shows it") from None
    gone = session.ask(home, lambda client: client.revoke_token(wanted))
    emit(gone, as_json, lambda: f"{gone.token_id} is revoked")
