"""Settings of the proxy."""

from __future__ import annotations

from ipaddress import IPv4Network, IPv6Network
from pathlib import Path

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from shared.config import Address, Addresses
from shared.settings import ServiceSettings


class ProxySettings(ServiceSettings):
    """`python -m compute.proxy`: where Postgres clients connect."""

    model_config = SettingsConfigDict(env_prefix="KEYLAKE_PROXY_")

    postgres_listen: Address = Field(
        description="where Postgres clients connect; host `::` is every address of this machine, IPv6 and IPv4"
    )
    proxy_protocol_from: tuple[IPv4Network | IPv6Network, ...] = Field(
        default=(),
        max_length=64,
        description="networks of load balancers: connections from there must begin with a PROXY protocol header "
        "(version 1 or 2), from anywhere else they must not",
    )
    certificate: Path = Field(description="what Postgres clients see; should be good for *.<domain>")
    private_key: Path
    domain: str = Field(
        default="db.keylake",
        pattern=r"^[a-z0-9-]+(\.[a-z0-9-]+)*$",
        description="<endpoint id>.<domain> as the TLS server name routes to that endpoint",
    )
    keymanager: Addresses = Field(description="the API of the keymanager, or of all its replicas")
    compute: Address = Field(description="the compute manager's API")
    allow_plaintext_loopback: bool = Field(default=False, description="let clients on this machine connect without TLS")

    max_connections: int = Field(default=2000, ge=1, description="sessions at once; more get SQLSTATE 53300")
    max_endpoint_connections: int = Field(
        default=1000,
        ge=1,
        description="sessions of one endpoint at once, with those that wait for its start; more get SQLSTATE 53300",
    )
    max_handshakes: int = Field(
        default=500, ge=1, description="connections that have not said yet whom they want; more wait for their turn"
    )
    max_address_handshakes: int | None = Field(
        default=None,
        ge=1,
        description="of these, how many may come from one address (of IPv6: from one /64), behind a load balancer from "
        "one that it names; more wait for their turn. Unset: a tenth",
    )
    max_waiting_handshakes: int = Field(
        default=1000,
        ge=0,
        description="connections that wait for their turn; more are refused (SQLSTATE 53000), those first whose "
        "address has most of them",
    )
    startup_timeout_s: float = Field(default=10.0, gt=0, description="from connect to a complete start-up packet")
    wake_timeout_s: float = Field(default=120.0, gt=0, description="how long a client waits for its compute to start")
    auth_timeout_s: float = Field(default=30.0, gt=0, description="from the start-up packet's passing on to logged in")
    shutdown_grace_s: float = Field(
        default=5.0,
        ge=0,
        description="at SIGTERM: how long transactions may go on; idle sessions end, and new ones are refused, at once",
    )
    log_connections: bool = Field(default=False, description="log each session: client's address, endpoint, duration")
    drain_timeout_s: float = Field(default=1.0, gt=0, description="how long a closing session may take to flush")
    stop_grace_s: float = Field(
        default=0.5,
        ge=0,
        description="when a compute vanishes: how long to wait for the news that it was the keys",
    )
    lease_linger_s: float = Field(default=30.0, ge=0, description="a lease is kept this long without a session")

    @property
    def address_handshakes(self) -> int:
        return self.max_address_handshakes or max(1, self.max_handshakes // 10)

    @property
    def open_files(self) -> int:
        """File descriptors at the most: both ends of each session, those that shake hands or wait for it, cancels, and
        some of our own."""
        return 2 * self.max_connections + self.max_handshakes + self.max_waiting_handshakes + 256
