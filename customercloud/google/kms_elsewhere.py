"""What KeyManagementService has and this simulator does not, over both transports.

Import jobs and retired resources: there are none, so listings are empty and what names one is NOT_FOUND. Imports,
deletion of keys and versions, decapsulation and trusted export: UNIMPLEMENTED. The caller is authorised first, on what
the request is about: who may not see it does not learn what is there.
"""

from __future__ import annotations

from typing import Any, Final, NoReturn

import proto
from google.cloud import kms_v1
from google.longrunning import operations_pb2
from google.protobuf.message import Message

from customercloud.google.access import Access
from customercloud.google.call import Api, Call, LogType, Operation, Resource, operation
from customercloud.google.errors import not_found, unimplemented
from customercloud.google.names import KeyName, LocationName, RingName, VersionName

_READ, _WRITE = LogType.ADMIN_READ, LogType.ADMIN_WRITE

_Parser = type[KeyName] | type[VersionName] | type[RingName]

_ABSENT: Final[tuple[tuple[str, type[Any], LogType, str, str, _Parser], ...]] = (
    ("CreateImportJob", kms_v1.CreateImportJobRequest, _WRITE, "parent", "importJobs.create", RingName),
    ("ImportCryptoKeyVersion", kms_v1.ImportCryptoKeyVersionRequest, _WRITE, "parent", "cryptoKeyVersions.create",
     KeyName),
    ("ImportTrustedKeyWrappedCryptoKeyVersion", kms_v1.ImportTrustedKeyWrappedCryptoKeyVersionRequest, _WRITE, "parent",
     "cryptoKeyVersions.create", KeyName),
    ("ExportTrustedKeyWrappedCryptoKeyVersion", kms_v1.ExportTrustedKeyWrappedCryptoKeyVersionRequest, _READ, "name",
     "cryptoKeyVersions.get", VersionName),
    ("DeleteCryptoKey", kms_v1.DeleteCryptoKeyRequest, _WRITE, "name", "cryptoKeys.delete", KeyName),
    ("DeleteCryptoKeyVersion", kms_v1.DeleteCryptoKeyVersionRequest, _WRITE, "name", "cryptoKeyVersions.delete",
     VersionName),
    ("Decapsulate", kms_v1.DecapsulateRequest, LogType.DATA_READ, "name", "cryptoKeyVersions.useToDecapsulate",
     VersionName),
)  # fmt: skip
"""(method, its request, its log, the member that names what it is about, its permission, what that is)."""


class KmsElsewhere:
    def __init__(self, access: Access) -> None:
        self._access = access

    @property
    def operations(self) -> list[Operation]:
        kms = Api.KMS
        return [
            *(self._absent(*method) for method in _ABSENT),
            operation(kms, "ListImportJobs", _READ, kms_v1.ListImportJobsRequest, self.list_import_jobs),
            operation(kms, "GetImportJob", _READ, kms_v1.GetImportJobRequest, self.get_import_job),
            operation(kms, "ListRetiredResources", _READ, kms_v1.ListRetiredResourcesRequest, self.list_retired),
            operation(kms, "GetRetiredResource", _READ, kms_v1.GetRetiredResourceRequest, self.get_retired),
            Operation(kms, "GetOperation", None, operations_pb2.GetOperationRequest, self.get_operation),
        ]

    def _absent(
        self, name: str, request: type[Any], log: LogType, member: str, permission: str, kind: type[Any]
    ) -> Operation:
        def run(call: Call, message: proto.Message) -> NoReturn:
            resource: Resource = kind.parse(getattr(message, member))
            self._access.require(call, f"cloudkms.{permission}", resource)
            raise unimplemented(f"{name} does not exist here.")

        return operation(Api.KMS, name, log, request, run)

    def list_import_jobs(self, call: Call, request: kms_v1.ListImportJobsRequest) -> kms_v1.ListImportJobsResponse:
        ring = RingName.parse(request.parent)
        self._access.require(call, "cloudkms.importJobs.list", ring)
        self._access.ring(ring)
        return kms_v1.ListImportJobsResponse()

    def get_import_job(self, call: Call, request: kms_v1.GetImportJobRequest) -> NoReturn:
        ring = RingName.parse(request.name.partition("/importJobs/")[0])
        self._access.require(call, "cloudkms.importJobs.get", ring)
        raise not_found(f"ImportJob {request.name} not found.")

    def list_retired(
        self, call: Call, request: kms_v1.ListRetiredResourcesRequest
    ) -> kms_v1.ListRetiredResourcesResponse:
        self._access.require(call, "cloudkms.retiredResources.list", LocationName.parse(request.parent))
        return kms_v1.ListRetiredResourcesResponse()

    def get_retired(self, call: Call, request: kms_v1.GetRetiredResourceRequest) -> NoReturn:
        location = LocationName.parse(request.name.partition("/retiredResources/")[0])
        self._access.require(call, "cloudkms.retiredResources.get", location)
        raise not_found(f"RetiredResource {request.name} not found.")

    def get_operation(self, call: Call, request: Message) -> NoReturn:
        """Nothing here takes so long that it needs one."""
        location = LocationName.parse(request.name.partition("/operations/")[0])
        self._access.require(call, "cloudkms.locations.get", location)
        raise not_found(f"Operation {request.name} not found.")
