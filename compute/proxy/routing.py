"""Which endpoint a client wants, and what of its start-up packet goes on to Postgres. A core.

Two ways to name the endpoint, Neon's (`proxy/README.md` there):

    options   `options=endpoint=ep-0123456789abcdef`; also as `-c endpoint=…`; taken out of the options that go on
    SNI       TLS server name `ep-0123456789abcdef.<domain>`

Both may be given if they agree. Refused: replication (WAL is for safekeepers, who come another way), and our own roles.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from compute.agent.roles import RESERVED_ROLES
from shared.errors import InvalidInputError, PermissionDeniedError
from shared.ids import EndpointId
from shared.wire.pgstartup import StartupMessage

_OPTION: Final = "endpoint="
_NO_REPLICATION: Final = frozenset({"false", "off", "no", "0"})


class RoutingError(InvalidInputError):
    """The client does not say, or says badly, which endpoint it wants."""

    code = "routing"
    sqlstate = "08004"


@dataclass(frozen=True, slots=True)
class Route:
    endpoint_id: EndpointId
    startup: StartupMessage
    """What Postgres gets."""


def route(startup: StartupMessage, server_name: str | None, domain: str) -> Route:
    """Raises RoutingError, PermissionDeniedError."""
    if startup.parameters.get("replication", "false").lower() not in _NO_REPLICATION:
        raise PermissionDeniedError("replication connections are not possible through the proxy")
    if startup.user in RESERVED_ROLES:
        raise PermissionDeniedError(f'role "{startup.user}" is reserved')
    named, options = take_endpoint(startup.parameters.get("options", ""))
    by_name = endpoint_of_server_name(server_name, domain)
    if named is not None and by_name is not None and named != by_name:
        raise RoutingError("the options name another endpoint than the host name")
    endpoint_text = named or by_name
    if endpoint_text is None:
        raise RoutingError(
            f"no endpoint named: connect with options=endpoint=<endpoint id>, or to <endpoint id>.{domain} with TLS"
        )
    try:
        endpoint_id = EndpointId.parse(endpoint_text)
    except ValueError:
        raise RoutingError("that is not an endpoint id: expected ep- and 16 hexadecimal digits") from None
    parameters = {name: value for name, value in startup.parameters.items() if name != "options"}
    if options:
        parameters["options"] = options
    return Route(endpoint_id, replace(startup, parameters=parameters))


def endpoint_of_server_name(server_name: str | None, domain: str) -> str | None:
    """The label before `.<domain>`; None for any other name."""
    if server_name is None:
        return None
    label, dot, rest = server_name.lower().rstrip(".").partition(".")
    return label if dot and rest == domain else None


def take_endpoint(options: str) -> tuple[str | None, str]:
    """(what `endpoint=` names, the options without it). Raises RoutingError when it is named twice."""
    kept: list[str] = []
    found: str | None = None
    words = split_options(options)
    position = 0
    while position < len(words):
        word = words[position]
        spelled, used = word, 1
        if word == "-c" and position + 1 < len(words):
            spelled, used = words[position + 1], 2
        elif word.startswith(("-c", "--")):
            spelled = word[2:]
        if spelled.startswith(_OPTION):
            if found is not None:
                raise RoutingError("the options name an endpoint twice")
            found = spelled[len(_OPTION) :]
        else:
            kept += words[position : position + used]
        position += used
    return found, join_options(kept)


def split_options(options: str) -> list[str]:
    """Words of an `options` parameter, unescaped as pg_split_opts does (postinit.c): a backslash quotes what
    follows.
    """
    words: list[str] = []
    current: list[str] = []
    in_word = quoted = False
    for character in options:
        if quoted:
            current.append(character)
            quoted = False
        elif character == "\\":
            quoted = in_word = True
        elif character in " \t\n\v\f\r":
            if in_word:
                words.append("".join(current))
                current, in_word = [], False
        else:
            current.append(character)
            in_word = True
    if in_word:
        words.append("".join(current))
    return words


def join_options(words: list[str]) -> str:
    """The inverse of `split_options`."""
    return " ".join("".join("\\" + c if c in " \t\n\v\f\r\\" else c for c in word) for word in words)
