"""Resource names of Cloud KMS and IAM, as the service parses them.

    projects/{project}/locations/{location}/keyRings/{ring}/cryptoKeys/{key}/cryptoKeyVersions/{version}

Each parser raises INVALID_ARGUMENT with the pattern that was not met.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from customercloud.google.errors import GoogleError, invalid_argument, not_found

_ID: Final = r"([a-zA-Z0-9_-]{1,63})"
_LOCATION: Final = rf"projects/([^/]+)/locations/{_ID}"
_RING: Final = rf"{_LOCATION}/keyRings/{_ID}"
_KEY: Final = rf"{_RING}/cryptoKeys/{_ID}"
_VERSION: Final = rf"{_KEY}/cryptoKeyVersions/{_ID}"
_SERVICE_ACCOUNT: Final = r"projects/([^/]+)/serviceAccounts/([^/]+)"
PROJECT_PATTERN: Final = r"[a-z][a-z0-9-]{4,28}[a-z0-9]"
ACCOUNT_PATTERN: Final = r"[a-z](?:[a-z0-9-]{4,28}[a-z0-9])"
_MAX_NAME_SIZE_CHARACTERS: Final = 1024

LOCATIONS: Final = frozenset(
    (
        "global",
        "us",
        "europe",
        "asia",
        "eur3",
        "eur4",
        "eur5",
        "nam3",
        "nam4",
        "nam6",
        "asia1",
        "africa-south1",
        "asia-east1",
        "asia-east2",
        "asia-northeast1",
        "asia-northeast2",
        "asia-northeast3",
        "asia-south1",
        "asia-south2",
        "asia-southeast1",
        "asia-southeast2",
        "australia-southeast1",
        "australia-southeast2",
        "europe-central2",
        "europe-north1",
        "europe-southwest1",
        "europe-west1",
        "europe-west2",
        "europe-west3",
        "europe-west4",
        "europe-west6",
        "europe-west8",
        "europe-west9",
        "europe-west10",
        "europe-west12",
        "me-central1",
        "me-central2",
        "me-west1",
        "northamerica-northeast1",
        "northamerica-northeast2",
        "southamerica-east1",
        "southamerica-west1",
        "us-central1",
        "us-east1",
        "us-east4",
        "us-east5",
        "us-south1",
        "us-west1",
        "us-west2",
        "us-west3",
        "us-west4",
    )
)  # fmt: skip


@dataclass(frozen=True, slots=True, order=True)
class LocationName:
    project: str
    location: str

    def __str__(self) -> str:
        return f"projects/{self.project}/locations/{self.location}"

    def ring(self, ring_id: str) -> RingName:
        return RingName.parse(f"{self}/keyRings/{ring_id}")

    @classmethod
    def parse(cls, name: str) -> LocationName:
        return cls(*_parse(_LOCATION, name))


@dataclass(frozen=True, slots=True, order=True)
class RingName:
    location: LocationName
    ring_id: str

    def __str__(self) -> str:
        return f"{self.location}/keyRings/{self.ring_id}"

    @property
    def project(self) -> str:
        return self.location.project

    def key(self, key_id: str) -> KeyName:
        return KeyName.parse(f"{self}/cryptoKeys/{key_id}")

    @classmethod
    def parse(cls, name: str) -> RingName:
        project, location, ring = _parse(_RING, name)
        return cls(LocationName(project, location), ring)


@dataclass(frozen=True, slots=True, order=True)
class KeyName:
    ring: RingName
    key_id: str

    def __str__(self) -> str:
        return f"{self.ring}/cryptoKeys/{self.key_id}"

    @property
    def location(self) -> LocationName:
        return self.ring.location

    @property
    def project(self) -> str:
        return self.location.project

    def version(self, number: int) -> VersionName:
        return VersionName(self, str(number))

    @classmethod
    def parse(cls, name: str) -> KeyName:
        project, location, ring, key = _parse(_KEY, name)
        return cls(RingName(LocationName(project, location), ring), key)


@dataclass(frozen=True, slots=True, order=True)
class VersionName:
    key: KeyName
    version_id: str

    def __str__(self) -> str:
        return f"{self.key}/cryptoKeyVersions/{self.version_id}"

    @property
    def location(self) -> LocationName:
        return self.key.location

    @property
    def project(self) -> str:
        return self.location.project

    @property
    def number(self) -> int | None:
        """None for an id that no version can have."""
        return int(self.version_id) if re.fullmatch("[1-9][0-9]{0,8}", self.version_id) else None

    @classmethod
    def parse(cls, name: str) -> VersionName:
        project, location, ring, key, version = _parse(_VERSION, name)
        return cls(KeyName(RingName(LocationName(project, location), ring), key), version)


@dataclass(frozen=True, slots=True, order=True)
class ProjectName:
    project: str

    def __str__(self) -> str:
        return f"projects/{self.project}"


@dataclass(frozen=True, slots=True, order=True)
class ServiceAccountName:
    project: str
    email: str

    def __str__(self) -> str:
        return f"projects/{self.project}/serviceAccounts/{self.email}"


PolicyTarget = ProjectName | ServiceAccountName | RingName | KeyName
"""What an IAM policy can be attached to."""


def parse_policy_target(name: str) -> PolicyTarget:
    if re.fullmatch(r"projects/[^/]+", name):
        return ProjectName(name.removeprefix("projects/"))
    if match := re.fullmatch(_SERVICE_ACCOUNT, name):
        return ServiceAccountName(*match.groups())
    return KeyName.parse(name) if "/cryptoKeys/" in name else RingName.parse(name)


def parse_key_or_version(name: str) -> KeyName | VersionName:
    return VersionName.parse(name) if "/cryptoKeyVersions/" in name else KeyName.parse(name)


def check_location(location: str, routed_to: str) -> None:
    """`routed_to` is where the request was sent: over gRPC what `x-goog-request-params` says, else `global`."""
    if location not in LOCATIONS or location != routed_to:
        raise not_found(
            f"The request concerns location '{location}' but was sent to location '{routed_to}'. Either Cloud KMS is "
            f"not available in '{location}' or the request was misrouted. gRPC clients must ensure that "
            "'x-goog-request-params' is specified in request metadata. See https://cloud.google.com/kms/docs/grpc for "
            "more information."
        )


def location_of(name: str) -> str | None:
    """The location in any resource name; None when there is none."""
    match = re.match(r"projects/[^/]+/locations/([^/:]+)", name)
    return None if match is None else match.group(1)


def _parse(pattern: str, name: str) -> tuple[str, ...]:
    match = re.fullmatch(pattern, name) if len(name) <= _MAX_NAME_SIZE_CHARACTERS else None
    if match is None:
        raise _mismatch(pattern, name)
    return match.groups()


def _mismatch(pattern: str, name: str) -> GoogleError:
    shown = name[:_MAX_NAME_SIZE_CHARACTERS]
    return invalid_argument(f"Resource name '{shown}' does not match pattern '{pattern}'.")
