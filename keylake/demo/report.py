"""What the demo prints: steps with their times, checks that hold or do not, a closing table."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from time import monotonic

from rich.console import Console
from rich.table import Table


@dataclass(slots=True)
class Timing:
    what: str
    seconds: float
    note: str = ""


@dataclass(slots=True)
class Report:
    """Collects timings and checks. `failed` decides the exit code."""

    console: Console
    timings: list[Timing] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    passed: int = 0
    started: float = field(default_factory=monotonic)
    at: str = ""
    """The chapter that runs, or was the last one."""

    @contextlib.contextmanager
    def chapter(self, title: str) -> Iterator[None]:
        self.console.print(f"\n[bold]{title}[/bold]")
        self.at = title
        begun = monotonic()
        yield
        self.console.print(f"  [dim]{monotonic() - begun:.1f} s[/dim]")

    def say(self, text: str) -> None:
        self.console.print(f"  {text}")

    def time(self, what: str, seconds: float, note: str = "") -> None:
        self.timings.append(Timing(what, seconds, note))
        self.console.print(f"  {what}: [cyan]{seconds:.3f} s[/cyan]{f' ({note})' if note else ''}")

    def check(self, claim: str, holds: bool, otherwise: str = "") -> None:
        """Print a claim and whether it holds; one that does not makes the demo fail."""
        if holds:
            self.passed += 1
            self.console.print(f"  [green]✓[/green] {claim}")
        else:
            self.failed.append(claim)
            self.console.print(f"  [bold red]✗ {claim}[/bold red] {otherwise}")

    def as_dict(self) -> dict[str, object]:
        """For programs: `keylake demo --json`."""
        return {
            "passed": self.passed,
            "failed": self.failed,
            "seconds": monotonic() - self.started,
            "timings": self.timings,
        }

    def close(self) -> None:
        table = Table(title="Timings", title_justify="left", show_edge=False)
        table.add_column("what")
        table.add_column("seconds", justify="right")
        table.add_column("")
        for timing in self.timings:
            table.add_row(timing.what, f"{timing.seconds:.3f}", timing.note)
        self.console.print()
        self.console.print(table)
        total = monotonic() - self.started
        if self.failed:
            self.console.print(
                f"\n[bold red]{len(self.failed)} checks failed[/bold red], {self.passed} held ({total:.0f} s)"
            )
            for claim in self.failed:
                self.console.print(f"  [red]✗[/red] {claim}")
        else:
            self.console.print(f"\n[bold green]all {self.passed} checks held[/bold green] ({total:.0f} s)")
