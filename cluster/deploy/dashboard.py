"""The Grafana dashboard over what /metrics tells of a server. Import it as it is; it asks for the Prometheus to read."""

from __future__ import annotations

import json
from typing import Any

SOURCE = {"type": "prometheus", "uid": "${datasource}"}
WIDTH, HEIGHT, COLUMNS = 12, 8, 2

# title, unit, {legend: query}
PANELS: tuple[tuple[str, str, dict[str, str]], ...] = (
    ("Requests by status", "reqps", {"{{status}}": "sum by (status) (rate(oneira_requests_total[5m]))"}),
    (
        "Share that failed in the server", "percentunit",
        {"5xx": 'sum(rate(oneira_requests_total{status=~"5.."}[5m])) / sum(rate(oneira_requests_total[5m]))'},
    ),
    (
        "Seconds for a request", "s",
        {
            f"{{{{route}}}} {name}": f"histogram_quantile({q}, sum by (le, route) (rate(oneira_request_seconds_bucket[5m])))"
            for name, q in (("median", 0.5), ("p99", 0.99))
        },
    ),
    ("Pictures that wait, and under way", "short", {"waiting": "sum(oneira_queue)", "under way": "sum(oneira_under_way)"}),
    ("Steps a second", "ops", {"{{model}} {{stage}}": "sum by (model, stage) (rate(oneira_steps_total[5m]))"}),
    ("Share of the time that a stage works", "percentunit", {"{{stage}}": "sum by (stage) (rate(oneira_stage_seconds_total[5m]))"}),
    (
        "Share of embeddings that were remembered", "percentunit",
        {
            "{{stage}}": "sum by (stage) (rate(oneira_cache_hits_total[5m])) / "
            "(sum by (stage) (rate(oneira_cache_hits_total[5m])) + sum by (stage) (rate(oneira_cache_misses_total[5m])))"
        },
    ),
    ("Bytes of remembered embeddings", "bytes", {"{{stage}}": "sum by (stage) (oneira_cache_bytes)"}),
    (
        "Pictures that share a step", "short",
        {"{{stage}} mean": "sum by (stage) (rate(oneira_batch_rows_sum[5m])) / sum by (stage) (rate(oneira_batch_rows_count[5m]))"},
    ),
    (
        "Memory of a device", "bytes",
        {
            f"{{{{device}}}} {name}": f"sum by (device) (oneira_device_{name}_bytes)" for name in ("memory", "resident", "working")
        },
    ),
    ("Bytes of a model on its device", "bytes", {"{{model}} {{device}}": "sum by (model, device) (oneira_resident_bytes)"}),
    (
        "Slots of a device", "short",
        {"{{device}}": "sum by (device) (oneira_device_slots)", "{{device}} taken": "sum by (device) (oneira_device_slots_taken)"},
    ),
    ("Leases", "short", {"{{priority}} {{state}}": "sum by (priority, state) (oneira_leases)"}),
    (
        "Wait for a lease", "s",
        {
            "{{priority}} mean": "sum by (priority) (rate(oneira_lease_wait_seconds_sum[5m])) / "
            "sum by (priority) (rate(oneira_lease_wait_seconds_count[5m]))"
        },
    ),
    ("A step of work that can pause", "s", {"{{device}}": "sum by (device) (oneira_device_step_seconds)"}),
    (
        "What the scheduler does", "ops",
        {
            name: f"sum(rate(oneira_{metric}_total[5m]))"
            for name, metric in (
                ("grants", "lease_grants"), ("refusals", "lease_refusals"), ("pauses", "lease_pauses"), ("evictions", "model_evictions"),
            )
        },
    ),
)  # fmt: skip


def dashboard() -> str:
    """The dashboard in Grafana's JSON."""
    variable = {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus"}
    document = {
        "title": "Oneira: serving", "uid": "oneira-serving", "tags": ["oneira"], "schemaVersion": 39, "version": 1,
        "editable": True, "refresh": "30s", "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [variable]},
        "panels": [_panel(number, *panel) for number, panel in enumerate(PANELS)],
    }  # fmt: skip
    return json.dumps(document, indent=1) + "\n"


def _panel(number: int, title: str, unit: str, queries: dict[str, str]) -> dict[str, Any]:
    place = {"x": number % COLUMNS * WIDTH, "y": number // COLUMNS * HEIGHT, "w": WIDTH, "h": HEIGHT}
    return {
        "id": number + 1, "type": "timeseries", "title": title, "datasource": SOURCE, "gridPos": place,
        "fieldConfig": {"defaults": {"unit": unit, "min": 0}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}},
        "targets": [
            {"refId": chr(ord("A") + i), "expr": query, "legendFormat": legend, "datasource": SOURCE}
            for i, (legend, query) in enumerate(queries.items())
        ],
    }  # fmt: skip
