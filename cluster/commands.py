"""The cluster's commands."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer


def register(app: typer.Typer) -> None:
    """Adds `devices`."""
    app.command()(devices)


def devices(
    address: Annotated[str | None, typer.Option(help="HOST:PORT of a running cluster's head.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
) -> None:
    """Show the devices that torch sees here and, where a cluster runs, what Ray sees on it. Starts nothing."""
    seen = survey(address)
    if as_json:
        typer.echo(json.dumps(seen, indent=2))
        return
    for name, value in seen["local"].items():
        typer.echo(f"{name}: {value}")
    cluster = seen["cluster"]
    typer.echo(f"cluster: {cluster['address'] if cluster else 'none is running'}")
    for node in cluster["nodes"] if cluster else []:
        typer.echo(f"  node {node['id'][:8]} at {node['address']}: {node['resources']}")


def survey(address: str | None = None) -> dict[str, Any]:
    """{"local": what torch sees, "cluster": None or {"address", "nodes", "resources", "available"}}."""
    import ray

    from oneira.platform.devices import describe

    from .connection import connect

    connected = connect(address, start=False)
    seen: dict[str, Any] = {"local": describe(), "cluster": None}
    if connected is not None:
        nodes = [
            {"id": node["NodeID"], "address": node["NodeManagerAddress"], "resources": node["Resources"]}
            for node in ray.nodes()
            if node["Alive"]
        ]
        seen["cluster"] = {
            "address": connected.address,
            "nodes": nodes,
            "resources": ray.cluster_resources(),
            "available": ray.available_resources(),
        }
    return seen
