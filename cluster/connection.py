"""Join a Ray cluster, or start one on this machine.

`connect()` looks in this order: the address it is given, `RAY_ADDRESS`, the user's running local cluster as recorded
under `$ONEIRA_HOME` (default `~/.oneira`), and else starts a local one. A local cluster listens on loopback only, asks
every client for a token that only this user can read, logs to files, and ends with the process that started it, which
stays until the commands that joined are done.

    $ONEIRA_HOME/cluster/local.json    the running local cluster: address, Jobs API, host, pid and start time of its owner
    $ONEIRA_HOME/cluster/token         its secret (mode 0600), unless RAY_AUTH_MODE or RAY_AUTH_TOKEN* are set
    $ONEIRA_HOME/cluster/lock          held while one process looks for the cluster or starts it
    $ONEIRA_HOME/cluster/users         locked by every process that joined the local cluster, for as long as it lives
"""

from __future__ import annotations

import atexit
import fcntl
import json
import logging
import os
import re
import secrets
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from oneira.platform.devices import num_cores
from oneira.platform.errors import ClusterError

NAMESPACE = "oneira"
OBJECT_STORE_BYTES = 1 << 30
ANSWER_SECONDS = 6.0  # for an address that must answer; the promise is an error within 10 s
HEAD_LOST_SECONDS = "10"  # after which processes of a local cluster whose head was killed end themselves (Ray: 60)
JOBS_ONLY = ["--modules-to-load=JobHead,NodeHead"]  # of the dashboard; NodeHead tells JobHead which node is the head
TOKEN_VARIABLES = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
LOOPBACK_VARIABLE = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"  # "0" on any system: Ray takes 127.0.0.1 as its node address


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """The cluster that this process is connected to. `started`: by this process, so that it ends with it."""

    address: str
    started: bool
    session: Path | None  # Ray's folder of logs and sockets, where this process knows it
    dashboard: str | None = None  # HOST:PORT of the Jobs API, where the cluster takes jobs


_current: Cluster | None = None
before_leaving: list[Callable[[], None]] = []  # what is called, once, before this process leaves the cluster
_in_use: IO[str] | None = None


def connect(address: str | None = None, *, start: bool = True, jobs: bool = False) -> Cluster | None:
    """Connect this process to a Ray cluster; a second call returns the connection that is there.

    Call it from the main thread: Linux ends the processes of a started cluster with the thread that started them.

    Args:
        address: `HOST:PORT` of a cluster's head. None: `RAY_ADDRESS`, or the user's local cluster.
        start: start a local cluster where none runs; else the answer is None.
        jobs: a cluster that is started takes jobs (which costs it a process more).

    Raises:
        ClusterError: the address does not answer (said within 10 s), refuses the token, or runs another version.
    """
    global _current
    import ray

    wanted = address or os.environ.get("RAY_ADDRESS") or None
    if ray.is_initialized():
        current = _current or Cluster(address=ray.get_runtime_context().gcs_address, started=False, session=None)
        if wanted not in (None, current.address):
            raise ClusterError(f"Cannot use {wanted}: already connected to {current.address}. One cluster a process.")
        return current
    if wanted is not None:
        _current = _join(wanted, local=is_loopback(host_of(wanted)))
        return _current
    with _lock():
        record = running()
        if record is not None:
            _current = _join(record["address"], local=True)
            _use()
        elif start:
            _current = _start(jobs)
        else:
            return None
    return _current


def disconnect() -> None:
    """Leave the cluster, and end it where this process started it. Quiet where there is no connection."""
    global _current
    import ray

    while before_leaving:
        before_leaving.pop()()
    if _current is not None and _current.started:
        _hand_over()
    _current = None
    ray.shutdown()


def home() -> Path:
    """The folder of the user's settings: `$ONEIRA_HOME`, default `~/.oneira`."""
    return Path(os.environ.get("ONEIRA_HOME") or Path.home() / ".oneira")


# --- start and join --------------------------------------------------------------------------------------------------


def _start(jobs: bool) -> Cluster:
    import psutil
    import ray

    use_local_settings()
    if jobs:  # jobs and the installer of their code are found by name
        os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    memory = min(OBJECT_STORE_BYTES, psutil.virtual_memory().available // 4)
    try:
        with _keeping_sigterm(), _bare_head(jobs):
            context: Any = ray.init(
                address="local", num_cpus=num_cores(), object_store_memory=memory, include_dashboard=jobs,
                dashboard_host="127.0.0.1", namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR,
            )  # fmt: skip
    except Exception as error:
        raise ClusterError(f"Could not start a local Ray cluster: {error}") from error
    cluster = _cluster(context.address_info, started=True)
    owner = {"host": socket.gethostname(), "pid": os.getpid(), "created": psutil.Process().create_time()}
    record = {"address": cluster.address, "dashboard": cluster.dashboard, "session": str(cluster.session), **owner}
    _write_atomically(_folder() / "local.json", json.dumps(record))
    atexit.register(_hand_over)  # before Ray's own, which was registered when Ray was imported
    return cluster


@contextmanager
def _bare_head(jobs: bool) -> Iterator[None]:
    """Start Ray's head without three helpers of no use to a local cluster, which `ray.init` has no option to leave out.
    With `jobs` the dashboard's server stays, which has the Jobs API, but few of its modules: each is a process.

    They are the autoscaler's monitor, the forwarder of workers' output (`log_to_driver` is off), and what is left of
    the dashboard when it is off (usage statistics). Each is an interpreter with many imports, and Ray waits for the
    last one: together 60% of the CPU time of a start.
    """
    from ray._private import ray_constants, services
    from ray._private.node import Node

    idle = {
        "start_monitor": lambda node: None,
        "start_log_monitor": lambda node: None,
        "start_api_server": lambda node, **options: setattr(node, "_webui_url", ""),
    }
    start_process, agent_port = services.start_ray_process, ray_constants.DEFAULT_DASHBOARD_AGENT_LISTEN_PORT

    def start_lean(command: list[str], process_type: str, *rest: Any, **options: Any) -> Any:
        more = JOBS_ONLY if process_type == ray_constants.PROCESS_TYPE_DASHBOARD else []
        # The raylet's agent, which runs jobs, would insist on one port: a second cluster on the machine would take none.
        words = [word.replace(f"--listen-port={agent_port}", "--listen-port=0") for word in command]
        return start_process([*words, *more], process_type, *rest, **options)

    if jobs:
        del idle["start_api_server"]
    before = {name: getattr(Node, name) for name in idle}
    try:
        services.start_ray_process = start_lean
        for name, function in idle.items():
            setattr(Node, name, function)
        yield
    finally:
        services.start_ray_process = start_process
        for name, function in before.items():
            setattr(Node, name, function)


def _join(address: str, *, local: bool) -> Cluster:
    import ray

    if local:
        use_local_settings()
    must_answer(address)
    if not local and _asks_for_nothing(address):
        raise ClusterError(
            f"The cluster at {address} takes work from anybody who reaches it. Start it with RAY_AUTH_MODE=token; nothing "
            "was sent."
        )
    try:
        with _keeping_sigterm():
            context: Any = ray.init(
                address=address, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR
            )
    except (Exception, SystemExit) as error:  # Ray's core ends the process where its head falls silent
        raise ClusterError(f"Could not join the Ray cluster at {address}: {error}") from error
    return _cluster(context.address_info, started=False)


def _cluster(info: Mapping[str, Any], *, started: bool) -> Cluster:
    dashboard = info.get("webui_url") or None
    return Cluster(address=info["gcs_address"], started=started, session=Path(info["session_dir"]), dashboard=dashboard)


def must_answer(address: str) -> None:
    """Ask the head for its health. Ray itself tries a dead address for two minutes, then ends the process."""
    problem = _silence(address, ANSWER_SECONDS)
    if problem:
        raise ClusterError(
            f"No Ray cluster answers at {address}: {problem}. Allowed: HOST:PORT of a running cluster's head, "
            "or no address at all for a local one."
        )


def _silence(address: str, seconds: float) -> str | None:
    """Why `address` is no Ray head, or None where it is one. Takes at most about `seconds`."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        return "it is not HOST:PORT"
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=seconds / 2).close()
    except OSError as error:
        return str(error)
    if os.environ.get("RAY_USE_TLS") == "1":
        return None
    found = _health(address, seconds / 2)
    # A head that asks for a token is one too; `ray.init` brings it.
    return None if found in ("ok", "unauthenticated") else f"the port is open but {found.replace('_', ' ')}"


def _asks_for_nothing(address: str) -> bool:
    """Whether a head answers one who brings no token. With TLS it has asked for a certificate before."""
    return os.environ.get("RAY_USE_TLS") != "1" and _health(address, ANSWER_SECONDS) == "ok"


def _health(address: str, seconds: float) -> str:
    """What a head answers without a token: gRPC's name of the status, in small letters."""
    import grpc

    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            channel.unary_unary("/grpc.health.v1.Health/Check")(b"", timeout=seconds, wait_for_ready=True)
        except grpc.RpcError as error:
            return error.code().name.lower()
    return "ok"


# --- what Ray reads from the environment -----------------------------------------------------------------------------


def use_local_settings() -> None:
    """Loopback only, a token of this user's own, no usage statistics: for this process and the cluster it starts."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", HEAD_LOST_SECONDS)
    os.environ[LOOPBACK_VARIABLE] = "0"
    if not any(os.environ.get(name) for name in TOKEN_VARIABLES):
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN_PATH"] = str(_token_file())
    from ray._private import ray_constants
    from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

    # Ray has read both when it was imported, which may have been before this call.
    ray_constants.ENABLE_RAY_CLUSTER = False
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


def _token_file() -> Path:
    """Ray's own default is readable to every user of the machine where umask allows; this one never is."""
    path = _folder() / "token"
    if not path.exists():
        _write_atomically(path, secrets.token_hex(32))
    return path


@contextmanager
def _keeping_sigterm() -> Iterator[None]:
    """`ray.init` takes SIGTERM over, in Python and below it (where it prints a stack). The program's handler stays.

    Without one, SIGTERM becomes SystemExit, so that a started cluster is taken down in order.
    """
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, _exit if before in (signal.SIG_DFL, None) else before)


def _exit(number: int, frame: object) -> None:
    raise SystemExit(128 + number)


# --- the record of the local cluster ---------------------------------------------------------------------------------


def running() -> dict[str, Any] | None:
    """The recorded local cluster if its owner lives on this host and its head answers."""
    import psutil

    try:
        record = json.loads((_folder() / "local.json").read_text())
        owner = psutil.Process(record["pid"])
        same = record["host"] == socket.gethostname() and abs(owner.create_time() - record["created"]) < 1
    except (OSError, ValueError, KeyError, TypeError, psutil.Error):
        return None
    return record if same and _silence(record["address"], ANSWER_SECONDS) is None else None


def _use() -> None:
    """Tell the cluster's owner, until this process ends, that somebody works here."""
    global _in_use
    _in_use = open(_folder() / "users", "w")  # noqa: SIM115  (held for as long as the process lives)
    fcntl.flock(_in_use, fcntl.LOCK_SH)


def _hand_over() -> None:
    """Take the record away, so that nobody else joins, and stay until those who joined are done: the cluster ends with its owner."""
    if not _forget():
        return
    with open(_folder() / "users", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(
                "oneira: other commands still use the Ray cluster of this one; it ends with them (Ctrl-C: now).",
                file=sys.stderr,
            )
            with suppress(KeyboardInterrupt):
                fcntl.flock(file, fcntl.LOCK_EX)


def _forget() -> bool:
    """Remove the record if it is this process's. Waits for whoever is joining just now."""
    path = _folder() / "local.json"
    try:
        with _lock():
            if json.loads(path.read_text())["pid"] != os.getpid():
                return False
            path.unlink()
        return True
    except (OSError, ValueError, KeyError):
        return False


@contextmanager
def _lock() -> Iterator[None]:
    """One process at a time looks for the local cluster or starts it."""
    with open(_folder() / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _folder() -> Path:
    folder = home() / "cluster"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


def _write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the host (a name or an address, without a port)."""
    return host in ("localhost", "::1") or re.fullmatch(r"127(\.\d{1,3}){3}", host) is not None


def host_of(address: str) -> str:
    """The host of HOST:PORT."""
    return address.rpartition(":")[0].strip("[]")
