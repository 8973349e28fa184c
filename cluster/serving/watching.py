"""What the cluster's scheduler sees, for whoever looks at the server: the rows of /metrics, and the page /devices.

The page is one document without anything from elsewhere. It asks /v1/devices once a second, with the key where the server
wants one; what it shows comes in as text only.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric, SummaryMetricFamily

from oneira.platform.devices import PRIORITIES

ANSWER_SECONDS = 2.0
STATES = ("running", "paused", "waiting")

Report = Mapping[str, Any]  # of `Scheduler.report`


async def ask_scheduler() -> dict[str, Any] | None:
    """The report of this cluster's scheduler; None where there is none, or it does not answer just now."""
    from ray.exceptions import RayError

    from ..scheduling.actor import find_desk

    try:
        desk = await asyncio.to_thread(find_desk, start=False)
        return None if desk is None else await asyncio.wait_for(desk.report.remote(), ANSWER_SECONDS)
    except (RayError, TimeoutError):
        return None


class _Rows:
    """Prometheus' view of one report."""

    def __init__(self, report: Report) -> None:
        self.report = report

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        devices = self.report["devices"]
        for key, name, text in (
            ("memory", "memory_bytes", "Bytes that may be used."),
            ("resident", "resident_bytes", "Bytes of resident models."),
            ("working", "working_bytes", "Bytes of working memory of leases."),
            ("slots", "slots", "Leases of one slot that may run at once."),
            ("slots_taken", "slots_taken", "Slots of leases that run."),
            ("step_seconds", "step_seconds", "A step of those that can pause."),
        ):
            rows = GaugeMetricFamily(f"oneira_device_{name}", text, labels=["device"])
            for device in devices:
                rows.add_metric([device["name"]], device[key])
            yield rows
        models = GaugeMetricFamily("oneira_resident_bytes", "A model's bytes on a device.", labels=["device", "model"])
        leases = GaugeMetricFamily("oneira_leases", "Leases by state.", labels=["device", "priority", "state"])
        for device in devices:
            for resident in device["residents"]:
                models.add_metric([device["name"], resident["model"]], resident["bytes"])
            counts = Counter((lease["priority"], lease["state"]) for lease in device["leases"])
            for priority in PRIORITIES:
                for state in STATES:
                    leases.add_metric([device["name"], priority, state], counts[priority, state])
        yield models
        yield leases
        waits = SummaryMetricFamily("oneira_lease_wait_seconds", "From an ask to its first grant.", labels=["priority"])
        for priority, seen in self.report["waits"].items():
            waits.add_metric([priority], seen["leases"], seen["seconds"])
        yield waits
        for key, name, text in (
            ("grants", "oneira_lease_grants", "Leases granted, resumed ones too."),
            ("refusals", "oneira_lease_refusals", "Asks that were refused."),
            ("pauses", "oneira_lease_pauses", "Pauses between two steps."),
            ("moves", "oneira_model_evictions", "Models that were sent off a device."),
        ):
            yield CounterMetricFamily(name, text, value=self.report["counts"][key])


def metrics_of(report: Report) -> bytes:
    """A report in Prometheus' text format."""
    registry = CollectorRegistry()
    registry.register(_Rows(report))  # type: ignore[arg-type]  # it has what a collector needs
    return generate_latest(registry)


STYLE = """
:root { color-scheme: light dark; --line: color-mix(in srgb, currentColor 18%, transparent); --full: #3b7dd8; --part: #d8893b; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.3rem; } h2 { font-size: 1.05rem; margin: 2rem 0 .3rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .25rem .6rem .25rem 0; border-bottom: 1px solid var(--line); overflow-wrap: anywhere; }
.bar { display: flex; height: .8rem; border: 1px solid var(--line); border-radius: .3rem; overflow: hidden; }
.bar div:first-child { background: var(--full); } .bar div:last-child { background: var(--part); }
.quiet { opacity: .7; } #wrong { color: #c33; }
"""

SCRIPT = """
"use strict";
const size = bytes => bytes >= 1e8 ? (bytes / 1e9).toFixed(2) + " GB" : (bytes / 1e6).toFixed(1) + " MB";
const at = id => document.getElementById(id);
function make(tag, text, ...children) {
  const node = document.createElement(tag);
  if (text !== null) node.textContent = text;
  node.append(...children);
  return node;
}
function table(heads, rows) {
  const head = make("tr", null, ...heads.map(text => make("th", text)));
  return make("table", null, head, ...rows.map(row => make("tr", null, ...row.map(text => make("td", String(text))))));
}
function bar(device) {
  const parts = [device.resident, device.working].map(bytes => {
    const part = make("div", null);
    part.style.setProperty("width", 100 * bytes / device.memory + "%");
    return part;
  });
  const whole = make("div", null, ...parts);
  whole.className = "bar";
  return whole;
}
function draw(seen) {
  const found = [];
  for (const device of seen.devices) {
    found.push(make("h2", device.name), bar(device));
    const said = make("p", `${size(device.resident)} of models and ${size(device.working)} of work in ${size(device.memory)}; ` +
      `${device.slots_taken} of ${device.slots} slots taken; a step takes ${(1000 * device.step_seconds).toFixed(1)} ms`);
    said.className = "quiet";
    found.push(said);
    if (device.residents.length) found.push(table(["model", "bytes", "owner", ""], device.residents.map(
      one => [one.model, size(one.bytes), one.owner, one.leaving ? "leaving" : one.pinned ? "pinned" : ""])));
    if (device.leases.length) found.push(table(["lease", "priority", "state", "for", "bytes", "slots", "model", "client"],
      device.leases.map(one => [one.id, one.priority, one.state, one.seconds.toFixed(1) + " s", size(one.bytes), one.slots,
        one.model || "", one.client])));
  }
  found.push(make("h2", "Since the scheduler began"));
  const counts = seen.counts;
  found.push(make("p", `${counts.grants} grants, ${counts.pauses} pauses, ${counts.refusals} refusals, ${counts.moves} evictions`));
  found.push(table(["priority", "leases", "mean wait"], Object.entries(seen.waits).map(([priority, one]) =>
    [priority, one.leases, one.leases ? (1000 * one.seconds / one.leases).toFixed(1) + " ms" : ""])));
  at("seen").replaceChildren(...found);
}
async function look() {
  const key = sessionStorage.getItem("key");
  try {
    const answer = await fetch("v1/devices", {headers: key ? {Authorization: "Bearer " + key} : {}});
    at("ask").hidden = answer.status !== 401;
    const document = await answer.json();
    at("wrong").textContent = answer.ok ? "" : document.error.message;
    if (answer.ok) draw(document);
  } catch (error) {
    at("wrong").textContent = "The server does not answer.";
  }
  setTimeout(look, 1000);
}
at("ask").addEventListener("submit", event => { event.preventDefault(); sessionStorage.setItem("key", at("key").value); });
look();
"""

PAGE = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Oneira: devices</title><style>{STYLE}</style></head>
<body><h1>Who has the devices</h1><p id="wrong" role="status"></p>
<form id="ask" hidden><label>API key <input id="key" type="password" autocomplete="off"></label> <button>Look</button></form>
<main id="seen"></main><script>{SCRIPT}</script></body></html>
"""


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


HEADERS = {
    "Content-Security-Policy": f"default-src 'none'; script-src {_hash(SCRIPT)}; style-src {_hash(STYLE)}; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-store",
}  # fmt: skip
