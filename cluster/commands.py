"""The cluster's commands."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from oneira.platform.errors import UsageError, did_you_mean


def register(app: typer.Typer) -> None:
    """Adds `devices`, `serve`, `deploy`, `submit` and `jobs`."""
    from .deploy.commands import deploy
    from .jobs.commands import register as register_jobs

    app.command()(devices)
    app.command()(serve)
    app.command()(deploy)
    register_jobs(app)


def devices(
    address: Annotated[str | None, typer.Option(help="HOST:PORT of a running cluster's head.")] = None,
    cancel: Annotated[int | None, typer.Option(metavar="LEASE", help="Take back the lease of this number.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
) -> None:
    """Show the devices that torch sees here and, where a cluster runs, what Ray and its scheduler see on it. Starts nothing.

    Work whose lease is taken back stops at its next step; training that was stopped so can be resumed.
    """
    if cancel is not None:
        take_back(cancel, address)
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
    scheduler = cluster["scheduler"] if cluster else None
    for line in scheduler_lines(scheduler) if scheduler else []:
        typer.echo(f"  {line}")


def scheduler_lines(report: Mapping[str, Any]) -> Iterator[str]:
    """A scheduler's report for people."""
    for device in report["devices"]:
        memory = f"{readable(device['used'])} of {readable(device['memory'])}"
        yield f"device {device['name']}: {memory}, {device['slots_taken']} of {device['slots']} slots"
        for resident in device["residents"]:
            yield f"  model {resident['model']}: {readable(resident['bytes'])}"
        for lease in device["leases"]:
            yield (
                f"  lease {lease['id']}: {lease['priority']} of {lease['client']} {lease['state']} for "
                f"{lease['seconds']:.0f} s: {readable(lease['bytes'])}, {lease['slots']} slots"
            )
    counts = report["counts"]
    yield (
        f"{counts['grants']} grants, {counts['pauses']} pauses, {counts['refusals']} refusals, "
        f"{counts['moves']} models sent away"
    )


def readable(bytes: int) -> str:
    """ "1.4 MB"."""
    return f"{bytes / 1e9:.2f} GB" if bytes >= 1e8 else f"{bytes / 1e6:.1f} MB"


def take_back(lease: int, address: str | None) -> None:
    """Cancels a lease of the cluster's scheduler. Raises UsageError where there is no such lease, or no scheduler."""
    import ray

    from .connection import connect
    from .scheduling.actor import find_desk

    desk = find_desk(start=False) if connect(address, start=False) else None
    if desk is None:
        raise UsageError(f"There is no lease {lease}: no cluster with a scheduler runs.")
    if not ray.get(desk.cancel.remote(lease)):
        known = [str(one["id"]) for device in ray.get(desk.report.remote())["devices"] for one in device["leases"]]
        raise UsageError(f"There is no lease {lease}. {did_you_mean(str(lease), known)}")


def survey(address: str | None = None) -> dict[str, Any]:
    """{"local": what torch sees, "cluster": None or {"address", "nodes", "resources", "available", "scheduler"}}.

    scheduler: None, where no process has asked it for a device yet, or its `Scheduler.report`.
    """
    import ray

    from oneira.platform.devices import describe

    from .connection import connect
    from .scheduling.actor import find_desk

    connected = connect(address, start=False)
    seen: dict[str, Any] = {"local": describe(), "cluster": None}
    if connected is not None:
        desk = find_desk(start=False)
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
            "scheduler": None if desk is None else ray.get(desk.report.remote()),
        }
    return seen


def serve(
    model: Annotated[
        list[str] | None, typer.Option(metavar="M", help="A built-in name or a folder; prior=PATH,decoder=PATH.")
    ] = None,
    layout: Annotated[str, typer.Option(metavar="fused|split", help="All stages in one process, or apart.")] = "fused",
    host: Annotated[str, typer.Option(help="Where to listen; any but loopback needs a key and TLS.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    address: Annotated[str | None, typer.Option(metavar="ADDR", help="The Ray cluster to join.")] = None,
    key_file: Annotated[Path | None, typer.Option(help="The clients' key; else ONEIRA_API_KEY.")] = None,
    tls_cert: Annotated[
        Path | None, typer.Option(metavar="PEM", help="The certificate, with its chain: HTTPS.")
    ] = None,
    tls_key: Annotated[Path | None, typer.Option(metavar="PEM", help="The certificate's private key.")] = None,
    plain_http: Annotated[bool, typer.Option("--plain-http", help="No TLS: a proxy before it speaks TLS.")] = False,
    memory: Annotated[
        float | None,
        typer.Option(metavar="GB", min=1e-6, help="Of a device, for models and work; by default most of it."),
    ] = None,
    loader: Annotated[str | None, typer.Option(metavar="MODULE:FUNCTION", help="Who loads the models.")] = None,
    replicas: Annotated[int, typer.Option(metavar="N", help="Of each stage, where they are apart (split).")] = 1,
) -> None:
    """Serve text to image, as OpenAI's Images API, and samples of generative models over HTTP until Ctrl-C."""
    from .connection import disconnect
    from .serving import serve as start
    from .serving.models import LOADER, needed_kinds

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    signal.signal(signal.SIGINT, interrupt)
    settings: dict[str, Any] = {"layout": layout, "host": host, "port": port, "address": address, "replicas": replicas}
    settings["memory"] = int((memory or 0) * 1e9)
    if (tls_cert is None) != (tls_key is None):
        raise UsageError("--tls-cert and --tls-key belong together: give both, or neither.")
    settings["tls"] = (tls_cert, tls_key) if tls_cert and tls_key else None
    settings["plain_http"] = plain_http
    key = read_key(key_file)
    try:
        models = model or ["builtin"]
        path, body = ("images/generations", '{"prompt": "a red circle"}')
        if needed_kinds(models) == ["sampler"]:
            path, body = "samples", '{"n": 4}'
        with start(models, key=key, loader=loader or LOADER, **settings) as server:
            bearer = ' -H "Authorization: Bearer $ONEIRA_API_KEY"' if key else ""
            typer.echo(f"Serving on {server.url} (Ctrl-C stops)")
            typer.echo(f"curl {server.url}/v1/{path}{bearer} -H 'Content-Type: application/json' -d '{body}'")
            try:
                server.watch()
            except KeyboardInterrupt:
                typer.echo("Requests under way are finished first (again: stops now).")
                server.drain()
    except KeyboardInterrupt:
        typer.echo("Stopped.")
    finally:
        disconnect()


def read_key(file: Path | None) -> str | None:
    """What clients must bear: the file's text, or ONEIRA_API_KEY, or nothing. Raises UsageError."""
    if file is None:
        return os.environ.get("ONEIRA_API_KEY") or None
    try:
        key = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeError) as error:
        raise UsageError(f"The key cannot be read from '{file}': {error}.") from error
    if not key:
        raise UsageError(f"The key's file '{file}' is empty.")
    return key
