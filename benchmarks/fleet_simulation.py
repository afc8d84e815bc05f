"""Prints how long long lists take on many cards, and what bounds them: a simulation with service times that were measured.

    python benchmarks/fleet_simulation.py FLEET [--scale 10] [--requests 10000,1000000] [--cards 8,64,512] [--publish]

Service times are drawn from what the requests of a real fleet took (`FLEET/erasers/*/status.json`), times `--scale` for another
model and card. Workers load the base first, from storage that all of them share; each may be lost, with its job, at a rate; the
driver hands out jobs in turn, at what it was measured to spend on one (`benchmarks/fleet.py`); results are written to
the same storage. Fusing comes last, on one machine, at a time for each eraser that was measured (`--fusing`). The bound is what
was busiest.
"""

from __future__ import annotations

import argparse
import heapq
import json
import random
from pathlib import Path
from typing import NamedTuple

from tables import add_publish, show


class Costs(NamedTuple):
    """What things take, in seconds, bytes and bytes a second."""

    service: list[float]
    """Seconds of requests, as they were measured."""
    driver: float
    """Seconds that the driver spends on a request."""
    loading: float
    """Seconds until a worker has loaded its base, once the files are there."""
    base: float
    """Bytes of the base's files."""
    result: float
    """Bytes of an eraser and its measurement."""
    storage: float
    """Bytes a second that storage gives and takes, all together."""
    lost: float
    """Share of workers that are lost in an hour, spot machines for example."""
    fusing: float
    """Seconds of fusing for an eraser."""


class Run(NamedTuple):
    """What came of a simulated fleet."""

    hours: float
    """To the last eraser."""
    fusing: float
    """Hours of fusing, after that."""
    busy: float
    """Share of the cards' time in which requests were worked on that came to an end."""
    driver: float
    """Share of the time in which the driver was busy."""
    storage: float
    """The same of storage."""
    lost: int
    """Jobs that were worked on again."""


def simulate(requests: int, cards: int, costs: Costs, seed: int = 0) -> Run:
    """Return what a fleet comes to: a queue, workers that draw from it, one driver, one storage."""
    generator = random.Random(seed)
    nodes = -(-cards // 8)
    first = costs.base * nodes / costs.storage + costs.loading  # eight cards read their files through one node
    events = [(first + generator.random(), card, False) for card in range(cards)]
    heapq.heapify(events)
    driver_free = storage_free = end = 0.0
    driver_busy = worked = 0.0
    storage_busy = costs.base * nodes / costs.storage
    written = costs.result / costs.storage
    lost, left = 0, requests
    while events:
        now, card, has_result = heapq.heappop(events)
        if has_result:  # in the order in which results are ready, whoever began first
            now = end = storage_free = max(now, storage_free) + written
            storage_busy += written
        if not left:
            continue
        now = driver_free = max(now, driver_free) + costs.driver
        driver_busy += costs.driver
        seconds = generator.choice(costs.service)
        fails = generator.expovariate(costs.lost / 3600) if costs.lost else float("inf")
        if fails < seconds:
            lost += 1
            heapq.heappush(events, (now + fails + costs.loading, card, False))
            continue
        worked += seconds
        left -= 1
        heapq.heappush(events, (now + seconds, card, True))
    hours = end / 3600
    return Run(hours, requests * costs.fusing / 3600, worked / cards / end, driver_busy / end, storage_busy / end, lost)


def bound(run: Run) -> str:
    """Return what a fleet waits for most."""
    shares = {"the cards": run.busy, "the driver": run.driver, "storage": run.storage, "fusing": run.fusing / run.hours}
    return max(shares, key=lambda name: shares[name])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fleet", type=Path)
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--requests", default="10000,1000000")
    parser.add_argument("--cards", default="8,64,512")
    parser.add_argument("--driver", type=float, required=True, help="seconds for a request")
    parser.add_argument("--fusing", type=float, required=True, help="seconds for an eraser")
    parser.add_argument("--loading", type=float, default=20.0)
    parser.add_argument("--base", type=float, default=4e9)
    parser.add_argument("--result", type=float, default=10e6)
    parser.add_argument("--storage", type=float, default=2e9)
    parser.add_argument("--lost", type=float, default=0.02)
    add_publish(parser)
    options = parser.parse_args()
    statuses = [json.loads(file.read_text()) for file in sorted((options.fleet / "erasers").glob("*/status.json"))]
    service = [status["seconds"] * options.scale for status in statuses if status["state"] == "done"]
    names = ("driver", "loading", "base", "result", "storage", "lost", "fusing")
    costs = Costs(service, **{name: getattr(options, name) for name in names})
    rows: list[list[str]] = []
    for requests in map(int, options.requests.split(",")):
        for cards in map(int, options.cards.split(",")):
            run = simulate(requests, cards, costs)
            shares = [f"{share:.0%}" for share in (run.busy, run.driver, run.storage)]
            rows.append(
                [f"{requests:,}", str(cards), f"{run.hours:.2f}", *shares, f"{run.fusing:.2f}", str(run.lost), bound(run)]
            )
    mean = sum(service) / len(service)
    note = (
        f"{len(service)} measured requests of {mean / options.scale:.2f} s each, times {options.scale:g}; driver"
        f" {1000 * costs.driver:.1f} ms, base {costs.base / 1e9:g} GB, result {costs.result / 1e6:g} MB, storage"
        f" {costs.storage / 1e9:g} GB/s, {costs.lost:.0%} of workers lost in an hour, fusing {1000 * costs.fusing:.1f} ms."
    )
    head = [
        "requests",
        "cards",
        "hours",
        "cards busy",
        "driver busy",
        "storage busy",
        "hours of fusing",
        "jobs lost",
        "bound by",
    ]
    show("fleet-simulation", head, rows, note, publish=options.publish)


if __name__ == "__main__":
    main()
