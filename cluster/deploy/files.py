"""One set of settings, and the files that follow from it. Every cluster in them asks for a token, and every server for a key.

rayjob.yaml        KubeRay: a training, tried again with a new cluster where it dies; the run goes on from its last checkpoint
rayservice.yaml    KubeRay: the HTTP interface, its stages in deployments that scale
ray-up.yaml        `ray up`: a cluster of machines reached by ssh
Dockerfile         the image that all three use
oneira.service     systemd: the HTTP interface on one machine, without containers
grafana.json       a dashboard over the servers' /metrics (see `dashboard`)
"""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from typing import Any

from oneira.platform.errors import ConfigError

from .dashboard import dashboard

RUNS = "/runs"  # in every container: the folder that all nodes share
KEY_SECRET, KEY_NAME = "oneira-api-key", "key"
TOKEN_FILE = "~/.ray/auth_token"  # where Ray looks for it


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """What differs between one place and another.

    Args:
        name, namespace: of what is made in Kubernetes. image: built from the Dockerfile.
        preset: that the RayJob trains. attempts: how often it is tried.
        model: that is served; a folder in the image or under /runs.
        workers, most_workers: pods or machines at first and at most. A training uses those that are there when it begins.
        cpus, memory_gib, gpus: of each worker. head_memory_gib: of the head, which does no work.
        claim: a volume that many pods may write to (ReadWriteMany), for runs.
        head, machines, user: `ray up` reaches these by ssh.
    """

    name: str = "oneira"
    namespace: str = "default"
    image: str = "oneira:0.1.0"
    preset: str = "carracing-paper"
    attempts: int = 6
    model: str = "/runs/model"
    workers: int = 2
    most_workers: int = 8
    cpus: int = 8
    memory_gib: int = 16
    gpus: int = 0
    head_memory_gib: int = 4
    claim: str = "oneira-runs"
    head: str = "192.0.2.10"
    machines: tuple[str, ...] = ("192.0.2.11", "192.0.2.12")
    user: str = "oneira"

    def __post_init__(self) -> None:
        for key in ("name", "namespace", "claim"):
            if not re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?", getattr(self, key)):
                raise ConfigError(f"{key} is '{getattr(self, key)}'; allowed are up to 40 small letters, digits and -.")
        for key in ("image", "preset", "model", "head", "user", *(() if not self.machines else ("machines",))):
            for text in self.machines if key == "machines" else (getattr(self, key),):
                if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._:/@-]*|/[A-Za-z0-9._/-]+", text):
                    raise ConfigError(f"{key} is '{text}'; allowed are letters, digits and . _ : / @ -")
        if not 1 <= self.workers <= self.most_workers:
            raise ConfigError(
                f"workers is {self.workers}; it must be from 1 to most_workers, which is {self.most_workers}."
            )
        for key in ("attempts", "cpus", "memory_gib", "head_memory_gib"):
            if getattr(self, key) < 1:
                raise ConfigError(f"{key} is {getattr(self, key)}; it must be at least 1.")
        if self.gpus < 0:
            raise ConfigError(f"gpus is {self.gpus}; it must not be negative.")


def deployment_files(deployment: Deployment) -> dict[str, str]:
    """The files by name."""
    head = "# Written by `oneira deploy`; change its settings rather than this file.\n"
    documents = {
        "rayjob.yaml": _ray_job(deployment),
        "rayservice.yaml": _ray_service(deployment),
        "ray-up.yaml": _ray_up(deployment),
    }
    texts = {"Dockerfile": DOCKERFILE, "oneira.service": _unit(deployment)}
    texts = {**{name: _yaml(document) for name, document in documents.items()}, **texts}
    return {**{name: head + text for name, text in texts.items()}, "grafana.json": dashboard()}


def _yaml(document: Any) -> str:
    import yaml  # type: ignore[import-untyped]

    return yaml.safe_dump(document, sort_keys=False, width=120)


# --- KubeRay ---------------------------------------------------------------------------------------------------------


def _ray_job(d: Deployment) -> dict[str, Any]:
    spec = {
        "entrypoint": f"oneira train {d.preset} --run {RUNS}/{d.preset}",
        "submissionMode": "K8sJobMode",
        "backoffLimit": d.attempts - 1,
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": 600,
        "rayClusterSpec": _cluster(d, {}),
    }
    return _resource("RayJob", f"{d.name}-train", d, spec)


def _ray_service(d: Deployment) -> dict[str, Any]:
    key = {"name": "ONEIRA_API_KEY", "valueFrom": {"secretKeyRef": {"name": KEY_SECRET, "key": KEY_NAME}}}
    application = {
        "name": "oneira",
        "route_prefix": "/",
        "import_path": "oneira.cluster.serving.deployed:app",
        "args": {
            "models": [d.model],
            "layout": "split",
            "cpus": d.cpus * d.most_workers,
            "gpus": d.gpus * d.most_workers,
        },
    }
    serve = {
        "proxy_location": "EveryNode",
        "http_options": {"host": "0.0.0.0", "port": 8000, "request_timeout_s": 600},
        "applications": [application],
    }
    spec = {"serveConfigV2": _yaml(serve), "rayClusterConfig": _cluster(d, {"env": [key]})}
    return _resource("RayService", f"{d.name}-serve", d, spec)


def _resource(kind: str, name: str, d: Deployment, spec: dict[str, Any]) -> dict[str, Any]:
    metadata = {"name": name, "namespace": d.namespace, "labels": {"app.kubernetes.io/name": "oneira"}}
    return {"apiVersion": "ray.io/v1", "kind": kind, "metadata": metadata, "spec": spec}


def _cluster(d: Deployment, more: dict[str, Any]) -> dict[str, Any]:
    import ray

    gpus = {"nvidia.com/gpu": str(d.gpus)} if d.gpus else {}
    return {
        "rayVersion": ray.__version__,
        "authOptions": {"mode": "token"},
        "enableInTreeAutoscaling": True,
        "autoscalerOptions": {"version": "v2", "idleTimeoutSeconds": 120},
        "headGroupSpec": {
            "rayStartParams": {"num-cpus": "0"},
            "template": _pod("ray-head", d, {"cpu": "2", "memory": f"{d.head_memory_gib}Gi"}, more),
        },
        "workerGroupSpecs": [
            {
                "groupName": "workers",
                "replicas": d.workers,
                "minReplicas": d.workers,
                "maxReplicas": d.most_workers,
                "rayStartParams": {},
                "template": _pod("ray-worker", d, {"cpu": str(d.cpus), "memory": f"{d.memory_gib}Gi", **gpus}, more),
            }
        ],
    }


def _pod(name: str, d: Deployment, resources: dict[str, str], more: dict[str, Any]) -> dict[str, Any]:
    container = {
        "name": name,
        "image": d.image,
        "resources": {"requests": dict(resources), "limits": dict(resources)},
        "volumeMounts": [{"name": "runs", "mountPath": RUNS}],
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
        **copy.deepcopy(more),
    }
    return {
        "spec": {
            "securityContext": {"runAsNonRoot": True, "runAsUser": 1000, "fsGroup": 1000},
            "automountServiceAccountToken": name == "ray-head",  # the autoscaler beside the head talks to Kubernetes
            "terminationGracePeriodSeconds": 60,
            "containers": [container],
            "volumes": [{"name": "runs", "persistentVolumeClaim": {"claimName": d.claim}}],
        }
    }


# --- ray up, systemd, Docker -----------------------------------------------------------------------------------------


def _ray_up(d: Deployment) -> dict[str, Any]:
    start = f"RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH={TOKEN_FILE} RAY_USAGE_STATS_ENABLED=0 ray start"
    return {
        "cluster_name": d.name,
        "provider": {"type": "local", "head_ip": d.head, "worker_ips": list(d.machines)},
        "auth": {"ssh_user": d.user},
        "docker": {"image": d.image, "container_name": "oneira", "run_options": [f"-v {RUNS}:{RUNS}"]},
        "file_mounts": {TOKEN_FILE: TOKEN_FILE},
        "head_start_ray_commands": [
            "ray stop",
            f"{start} --head --port=6379 --dashboard-host=127.0.0.1 --autoscaling-config=~/ray_bootstrap_config.yaml",
        ],
        "worker_start_ray_commands": ["ray stop", f"{start} --address=$RAY_HEAD_IP:6379"],
    }


def _unit(d: Deployment) -> str:
    return f"""[Unit]
Description=Oneira: text to image over HTTP
Wants=network-online.target
After=network-online.target

[Service]
Type=exec
ExecStart=/opt/oneira/bin/oneira serve --model {d.model} --host 127.0.0.1 --port 8000 --key-file %d/key
LoadCredential=key:/etc/oneira/key
Environment=ONEIRA_HOME=%S/oneira ONEIRA_LOG=json
DynamicUser=yes
StateDirectory=oneira
WorkingDirectory=%S/oneira
Restart=on-failure
RestartSec=5
KillMode=mixed
TimeoutStopSec=60
LimitNOFILE=65536
NoNewPrivileges=yes
PrivateTmp=yes
ProtectSystem=strict
ProtectHome=read-only
ProtectKernelTunables=yes
ProtectControlGroups=yes
RestrictSUIDSGID=yes
RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6 AF_NETLINK

[Install]
WantedBy=multi-user.target
"""


DOCKERFILE = """# docker build -f cluster/deploy/Dockerfile -t oneira:0.1.0 .
FROM python:3.11-slim AS build
RUN apt-get update && apt-get install -y --no-install-recommends build-essential swig && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . .
RUN python -m venv /opt/oneira && /opt/oneira/bin/pip install --no-cache-dir -c constraints.txt .

FROM python:3.11-slim
# wget: KubeRay's probes call it.
RUN apt-get update && apt-get install -y --no-install-recommends wget libgl1 libglib2.0-0 && rm -rf /var/lib/apt/lists/* \\
    && useradd --uid 1000 --create-home oneira && mkdir /runs && chown oneira /runs
COPY --from=build /opt/oneira /opt/oneira
ENV PATH=/opt/oneira/bin:$PATH RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0 PYTHONUNBUFFERED=1 ONEIRA_LOG=json
USER 1000
WORKDIR /runs
CMD ["oneira", "doctor"]
"""
