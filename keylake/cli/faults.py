"""`keylake cloud fault`: bad days of the customer's cloud, on demand."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from keylake.cli.common import AsJson, Home, examples, group

if TYPE_CHECKING:
    from customercloud.faults import Faults

app = group("Bad days of the customer's cloud. Only the simulated one has them on demand.")


@app.command(
    "set",
    epilog=examples(
        "keylake cloud fault set --outage refuse  # the KMS answers 503",
        "keylake cloud fault set --outage hang --spare-customer  # Keylake is cut off, the customer is not",
        "keylake cloud fault set --latency 0.5 --throttle-rate 0.2",
    ),
)
def set_faults(
    outage: Annotated[
        Literal["none", "refuse", "hang"] | None, typer.Option(help="Refuse every request, or never answer.")
    ] = None,
    latency: Annotated[float | None, typer.Option(help="Seconds added to every answer.", min=0)] = None,
    throttle_rate: Annotated[
        float | None, typer.Option(help="Share of requests that are throttled.", min=0, max=1)
    ] = None,
    error_rate: Annotated[float | None, typer.Option(help="Share of requests that fail.", min=0, max=1)] = None,
    error_kind: Annotated[
        Literal["internal", "dependency_timeout", "key_unavailable", "bad_gateway"] | None,
        typer.Option(help="How they fail."),
    ] = None,
    service: Annotated[
        list[str] | None,
        typer.Option(
            metavar="<kms|sts|cloudtrail>", help="Which services the faults above hit; may be repeated. Otherwise all."
        ),
    ] = None,
    spare_customer: Annotated[
        bool | None,
        typer.Option("--spare-customer/--no-spare-customer", help="Faults above hit Keylake only.", show_default=False),
    ] = None,
    propagation_delay: Annotated[
        float | None, typer.Option(help="Seconds until a change of a key's state or policy is felt.", min=0)
    ] = None,
    session_lifetime: Annotated[
        float | None, typer.Option(help="Seconds that new role sessions live, whatever was asked for.", min=0)
    ] = None,
    trail_delay: Annotated[
        float | None, typer.Option(help="Seconds until an event is seen in CloudTrail.", min=0)
    ] = None,
    clock_skew: Annotated[
        float | None,
        typer.Option(help="Seconds by which the cloud's clock is ahead of Keylake's; negative: behind."),
    ] = None,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Let the cloud misbehave, at once. What is not named stays as it is; `clear` ends everything."""
    from customercloud.faults import Faults
    from keylake.cli import session

    wanted: dict[str, Any] = {
        "outage": outage,
        "latency_s": latency,
        "throttle_rate": throttle_rate,
        "error_rate": error_rate,
        "error_kind": error_kind,
        "services": frozenset(service) if service else None,
        "propagation_delay_s": propagation_delay,
        "session_lifetime_s": session_lifetime,
        "trail_delay_s": trail_delay,
        "clock_skew_s": clock_skew,
    }
    changes = {name: value for name, value in wanted.items() if value is not None}
    if not changes and spare_customer is None:
        raise typer.BadParameter("name at least one fault; see keylake cloud fault set --help", param_hint="set")
    with session.customer(home) as customer:
        if spare_customer is not None:
            spared = {customer.bootstrap.customer.access_key_id} if spare_customer else set()
            changes["spared_access_key_ids"] = frozenset(spared)
        faults = session.build(Faults, **(customer.simulation.faults().model_dump() | changes))
        customer.simulation.set_faults(faults)
    _show_faults(faults, as_json)


@app.command("clear", epilog=examples("keylake cloud fault clear"))
def clear_faults(home: Home = None, as_json: AsJson = False) -> None:
    """A healthy cloud again."""
    from keylake.cli import session

    with session.customer(home) as customer:
        customer.simulation.clear_faults()
        faults = customer.simulation.faults()
    _show_faults(faults, as_json)


@app.command("show", epilog=examples("keylake cloud fault show"))
def show_faults(home: Home = None, as_json: AsJson = False) -> None:
    """The faults in force."""
    from keylake.cli import session

    with session.customer(home) as customer:
        faults = customer.simulation.faults()
    _show_faults(faults, as_json)


def _show_faults(faults: Faults, as_json: bool) -> None:
    from keylake.cli.output import emit, facts

    values = {**faults.model_dump(mode="json", exclude_defaults=True)}
    rows = [(name, ", ".join(sorted(v)) if isinstance(v, list) else v) for name, v in values.items()]
    emit(faults, as_json, lambda: facts(rows) if rows else "no faults: the cloud is healthy")
