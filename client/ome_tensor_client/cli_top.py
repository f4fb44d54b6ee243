"""``ome-tensor top``: what a server is doing, live."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Annotated

import typer

from .cli_arguments import Json, Seconds, Target
from .cli_connect import reach

if TYPE_CHECKING:
    from rich.console import RenderableType

    from .counts import Counts

__all__ = ["top"]

_PHASES = ("queue", "gather", "encode", "send")


def top(
    target: Target,
    interval: Annotated[float, typer.Option(metavar="SECONDS", min=0.1, max=3600, help="Time between two looks.")] = 2.0,
    count: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Look so many times.", show_default="until Ctrl-C")
    ] = None,
    json: Json = False,
    timeout: Seconds = 10,
) -> None:
    """Show what a server is doing, live: calls, tiles, bytes, latencies, memory. Wants an admin scope where callers say who they are."""
    import json as json_module

    from rich.console import Console
    from rich.live import Live

    from .cli_text import say

    with reach(target, timeout=timeout) as client:
        before = client.admin.metrics()
        if json:
            samples = [{"name": sample.name, "labels": sample.labels, "value": sample.value} for sample in before.samples]
            say(json_module.dumps(samples, indent=1))
            return
        console = Console(highlight=False)
        looks = 0
        if not console.is_terminal:
            # A pipe gets one picture after the other.
            while count is None or looks < count:
                time.sleep(interval)
                now = client.admin.metrics()
                console.print(picture(client.target, before, now))
                sys.stdout.flush()
                before, looks = now, looks + 1
            return
        try:
            with Live(console=console, screen=count is None, auto_refresh=False) as live:
                live.update(picture(client.target, before, before), refresh=True)
                while count is None or looks < count:
                    time.sleep(interval)
                    now = client.admin.metrics()
                    live.update(picture(client.target, before, now), refresh=True)
                    before, looks = now, looks + 1
        except KeyboardInterrupt:
            return  # How it is left.


def picture(target: str, before: Counts, now: Counts) -> RenderableType:
    """What two looks at a server say of the time between them."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from .cli_output import size_text
    from .cli_text import printable

    head = Text.assemble(
        (printable(target), "bold"),
        f"   {now.total('workers'):.0f} worker{'s' * (now.total('workers') != 1)}   ",
        f"{size_text(int(now.total('resident_bytes')))} of {size_text(int(now.total('memory_limit_bytes')))} in memory   ",
        ", ".join(f"{value:.0f} {state}" for state, value in now.by("datasets", "state").items() if value) or "no datasets",
    )
    hits, misses = now.rate(before, "cache_hits_total"), now.rate(before, "cache_misses_total")
    sent = f"{size_text(int(now.rate(before, 'sent_bytes_total')))}/s"
    reads = f"{now.total('reads_running'):.0f} running, {now.total('reads_waiting'):.0f} waiting"
    facts = Table.grid(padding=(0, 3))
    facts.add_row("tiles/s", f"{now.rate(before, 'tiles_total'):,.0f}", "sent", sent)
    facts.add_row("reads", reads, "in flight", size_text(int(now.total("in_flight_bytes"))))
    facts.add_row(
        "calls/s",
        f"{now.rate(before, 'calls_total'):,.1f}",
        "chunk cache",
        f"{hits / (hits + misses):.0%} hits" if hits + misses else "unused",
    )
    refused = {reason: now.rate(before, "refused_total", reason=reason) for reason in now.by("refused_total", "reason")}
    said = ", ".join(f"{reason} {rate:.1f}/s" for reason, rate in sorted(refused.items()) if rate)
    facts.add_row("refused", said or "none", "", "")

    calls = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for name in ("call", "per second", "p50", "p99"):
        calls.add_column(name, justify="left" if name == "call" else "right")
    for method in sorted(now.by("call_seconds_count", "method")):
        calls.add_row(
            method,
            f"{now.rate(before, 'call_seconds_count', method=method):,.1f}",
            *(_milliseconds(now.quantile(before, "call_seconds", part, method=method)) for part in (0.5, 0.99)),
        )
    phases = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for name in ("message", "p50", "p99"):
        phases.add_column(name, justify="left" if name == "message" else "right")
    for phase in _PHASES:
        phases.add_row(phase, *(_milliseconds(now.quantile(before, "phase_seconds", part, phase=phase)) for part in (0.5, 0.99)))
    return Group(head, Text(), facts, Text(), calls, Text(), phases)


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1e3 * seconds:.3g} ms"
