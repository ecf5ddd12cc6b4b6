"""The Query protocol, which STS speaks: forms in, XML out."""

from __future__ import annotations

import re
from collections.abc import Mapping
from html import escape
from typing import Any, Final
from urllib.parse import parse_qsl

from customercloud.aws.errors import AwsError
from customercloud.aws.validation import ServiceModel, Shape

XML_NAMESPACE: Final = "https://sts.amazonaws.com/doc/2011-06-15/"
_MAX_FIELDS: Final = 512

Xml = dict[str, "str | Xml"]


def parse_form(body: bytes) -> dict[str, str]:
    """The parameters. Raises AwsError for a body that is no form or names one twice."""
    try:
        pairs = parse_qsl(
            body.decode("ascii"),
            keep_blank_values=True,
            strict_parsing=True,
            errors="strict",
            max_num_fields=_MAX_FIELDS,
        )
    except (UnicodeDecodeError, ValueError):
        raise AwsError("MalformedQueryString", "The query string is malformed", 400) from None
    form = dict(pairs)
    if len(form) != len(pairs):
        raise AwsError("MalformedQueryString", "The query string names a parameter twice", 400)
    return form


def members_of(model: ServiceModel, operation: str, form: Mapping[str, str]) -> dict[str, Any]:
    """The form as the operation's input: `Tags.member.1.Key=a` → `{"Tags": [{"Key": "a"}]}`. What the operation does
    not know is left out, as AWS does. Raises ValidationError for a number that is none."""
    return _structure(model, model.input_shape(operation), form, "")


def _structure(model: ServiceModel, shape: Shape, form: Mapping[str, str], prefix: str) -> dict[str, Any]:
    members = {name: _value(model, model.shape(member), form, prefix + name) for name, member in _members(shape)}
    return {name: value for name, value in members.items() if value is not None}


def _members(shape: Shape) -> list[tuple[str, Any]]:
    return list(shape["members"].items())


def _value(model: ServiceModel, shape: Shape, form: Mapping[str, str], path: str) -> Any:
    match shape["type"]:
        case "structure":
            return _structure(model, shape, form, f"{path}.") or None
        case "list":
            places = re.compile(rf"{re.escape(path)}\.member\.([0-9]{{1,4}})(?:\..*)?")
            found = {int(match[1]) for name in form if (match := places.fullmatch(name))}
            member = model.shape(shape["member"])
            values = [_value(model, member, form, f"{path}.member.{place}") for place in sorted(found)]
            return [value for value in values if value is not None] or None
        case "integer":
            return None if path not in form else _integer(form[path])
        case _:
            return form.get(path)


def _integer(text: str) -> int:
    if re.fullmatch(r"-?[0-9]{1,9}", text) is None:
        raise AwsError("MalformedInput", "a number of the request is none")
    return int(text)


def xml_answer(action: str, result: Xml, request_id: str) -> bytes:
    body = _xml({f"{action}Response": {f"{action}Result": result, "ResponseMetadata": {"RequestId": request_id}}})
    return body.replace(">", f' xmlns="{XML_NAMESPACE}">', 1).encode()


def xml_error(error: AwsError, request_id: str) -> bytes:
    kind = "Sender" if error.http_status < 500 else "Receiver"
    detail: Xml = {"Type": kind, "Code": error.code, "Message": error.message}
    body = _xml({"ErrorResponse": {"Error": detail, "RequestId": request_id}})
    return body.replace(">", f' xmlns="{XML_NAMESPACE}">', 1).encode()


def _xml(tree: Xml) -> str:
    return "".join(
        f"<{name}>{_xml(value) if isinstance(value, dict) else escape(value)}</{name}>" for name, value in tree.items()
    )
