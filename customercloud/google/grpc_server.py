"""The gRPC side: the same operations on a port of its own. Generic handlers; no generated servicers are needed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote

import grpc
import grpc.aio
from google.protobuf.message import DecodeError, Message

from customercloud.google.call import Api, Operation
from customercloud.google.errors import Code, GoogleError, invalid_argument
from customercloud.google.names import location_of
from customercloud.google.service import Carrier, GatewayFaultError, GoogleEndpoint
from shared.tls import CertificateFiles

MAX_MESSAGE_SIZE_BYTES: Final = 1024 * 1024
_GRACE_S: Final = 2.0
_POLICY_METHODS: Final = frozenset({"GetIamPolicy", "SetIamPolicy", "TestIamPermissions"})
_LOCATION_METHODS: Final = frozenset({"GetLocation", "ListLocations"})
_OPERATION_METHODS: Final = frozenset({"GetOperation"})


def _full_name(operation: Operation) -> str:
    if operation.name in _POLICY_METHODS:
        return f"/google.iam.v1.IAMPolicy/{operation.name}"
    if operation.name in _LOCATION_METHODS:
        return f"/google.cloud.location.Locations/{operation.name}"
    if operation.name in _OPERATION_METHODS:
        return f"/google.longrunning.Operations/{operation.name}"
    return f"/google.cloud.kms.v1.KeyManagementService/{operation.name}"


class _Handlers(grpc.GenericRpcHandler):
    def __init__(self, endpoint: GoogleEndpoint, counted: Callable[[str], None]) -> None:
        self._endpoint = endpoint
        self._counted = counted
        operations = [operation for operation in endpoint.operations.values() if operation.api is Api.KMS]
        self._by_name = {_full_name(operation): self._handler(operation) for operation in operations}

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any] | None:
        return self._by_name.get(handler_call_details.method)

    def _handler(self, operation: Operation) -> grpc.RpcMethodHandler[Any, Any]:
        async def unary(data: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
            return await self._call(operation, data, context)

        # Bytes in, bytes out: a request that is no message is an answer of ours, not of the library's.
        return grpc.unary_unary_rpc_method_handler(unary)

    async def _call(self, operation: Operation, data: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
        try:
            answer = await self._endpoint.invoke(operation, lambda: _read(operation, data), _carrier(context))
        except GoogleError as error:
            self._counted(error.code.name)
            status = ("grpc-status-details-bin", error.status().SerializeToString())
            await context.abort(_status_code(error.code), error.message, (status,))
        except GatewayFaultError:
            self._counted(Code.UNAVAILABLE.name)
            await context.abort(grpc.StatusCode.UNAVAILABLE, "Service Unavailable")
        self._counted("OK")
        return bytes(answer.SerializeToString())


class GrpcServer:
    """`async with` starts it and stops it gracefully. TLS with the certificate, when there is one."""

    def __init__(
        self,
        endpoint: GoogleEndpoint,
        host: str,
        port: int,
        files: CertificateFiles | None,
        counted: Callable[[str], None] = lambda _: None,
    ) -> None:
        """`counted` hears the status of every answer."""
        self._endpoint = endpoint
        self._address = f"{host}:{port}"
        self._files = files
        self._counted = counted
        self._server: grpc.aio.Server | None = None
        self.port = port
        """The port that it really listens on, once started."""

    async def __aenter__(self) -> GrpcServer:
        """Raises OSError when the port is taken."""
        server = grpc.aio.server(
            options=[("grpc.max_receive_message_length", MAX_MESSAGE_SIZE_BYTES), ("grpc.so_reuseport", 0)]
        )
        server.add_generic_rpc_handlers((_Handlers(self._endpoint, self._counted),))
        try:
            if self._files is None:
                self.port = server.add_insecure_port(self._address)
            else:
                credentials = await asyncio.to_thread(_credentials, self._files)
                self.port = server.add_secure_port(self._address, credentials)
        except RuntimeError as error:
            raise OSError(f"the gRPC server did not start: {error}") from None
        await server.start()
        self._server = server
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        if self._server is not None:
            await self._server.stop(_GRACE_S)


def _credentials(files: CertificateFiles) -> grpc.ServerCredentials:
    return grpc.ssl_server_credentials([(Path(files.private_key).read_bytes(), Path(files.certificate).read_bytes())])


def _read(operation: Operation, data: bytes) -> Message:
    message = operation.request()
    try:
        message.ParseFromString(data)
    except DecodeError:
        raise invalid_argument("The request is no message of this method.") from None
    return message


def _status_code(code: Code) -> grpc.StatusCode:
    return grpc.StatusCode[code.name]


def _carrier(context: grpc.aio.ServicerContext[bytes, bytes]) -> Carrier:
    metadata = context.invocation_metadata() or ()
    headers = {str(key).lower(): value for key, value in metadata if isinstance(value, str)}
    return Carrier(
        address=_address(context.peer()),
        headers=headers,
        routed_to=_routed_to(headers.get("x-goog-request-params", "")),
        disconnected=_never,
    )


async def _never() -> None:
    """A client that hangs up cancels the call's task: there is nothing to wait for."""
    await asyncio.Event().wait()


def _routed_to(params: str) -> str:
    """Where `x-goog-request-params` sends a request: `name=projects%2Fp%2Flocations%2Feu…`; without it, to global."""
    for pair in params[:4096].split("&"):
        location = location_of(unquote(pair.partition("=")[2]))
        if location is not None:
            return location
    return "global"


def _address(peer: str) -> str:
    """`ipv4:127.0.0.1:40000` → `127.0.0.1`; `ipv6:%5B::1%5D:40000` → `::1`."""
    address = unquote(peer).partition(":")[2].rpartition(":")[0]
    return address.strip("[]") or "unknown"
