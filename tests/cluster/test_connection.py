"""Joining and starting: addresses that are dead, a cluster that is shared, a driver that is killed."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest

from oneira.platform.errors import ClusterError

DRIVER = """
import os, time
from oneira.cluster import connect
from oneira.cluster.executor import RayExecutor
def pid(shared, unit):
    return os.getpid()
cluster = connect()
executor = RayExecutor()
print(cluster.started, executor.submit(pid, None, 0).result(), flush=True)
time.sleep(100)
"""


def gone(pid: int, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


def test_a_dead_address_is_an_error_within_ten_seconds():
    from oneira.cluster.connection import must_answer

    with socket.socket() as closed, socket.socket() as silent:
        closed.bind(("127.0.0.1", 0))
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        for listener in (closed, silent):
            address = f"127.0.0.1:{listener.getsockname()[1]}"
            began = time.monotonic()
            with pytest.raises(ClusterError, match=address):
                must_answer(address)
            assert time.monotonic() - began < 10


@pytest.mark.parametrize(("asks", "joins"), [(False, False), (True, True)])
def test_a_cluster_elsewhere_that_asks_for_no_token_is_not_joined(monkeypatch, asks, joins):
    from concurrent.futures import ThreadPoolExecutor

    import grpc
    import ray

    from oneira.cluster import connection

    class Health(grpc.GenericRpcHandler):
        def service(self, call):
            def answer(request, context):
                if asks:
                    context.abort(grpc.StatusCode.UNAUTHENTICATED, "a token?")
                return b""

            return grpc.unary_unary_rpc_method_handler(answer)

    def init(**options):
        raise RuntimeError("as far as Ray")

    monkeypatch.setattr(ray, "init", init)
    server = grpc.server(ThreadPoolExecutor(2), handlers=[Health()])
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        with pytest.raises(ClusterError, match="as far as Ray" if joins else "from anybody"):
            connection._join(address, local=False)
    finally:
        server.stop(None)


def test_the_local_cluster_is_recorded_and_listens_on_loopback_only(ray_cluster):
    home = os.environ["ONEIRA_HOME"]
    with open(f"{home}/cluster/local.json") as file:
        record = json.load(file)
    assert record["address"] == ray_cluster.address and record["pid"] == os.getpid()
    assert os.stat(f"{home}/cluster/token").st_mode & 0o777 == 0o600
    family = [psutil.Process(), *psutil.Process().children(recursive=True)]
    hosts = {
        listener.laddr.ip
        for process in family
        if "ray" in process.name() or "gcs" in process.name()
        for listener in process.net_connections(kind="tcp")
        if listener.status == psutil.CONN_LISTEN
    }
    assert hosts and hosts <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


def test_without_the_token_the_cluster_refuses(ray_cluster):
    script = f"import ray; ray.init(address={ray_cluster.address!r}, log_to_driver=False)"
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}
    environment.pop("RAY_AUTH_TOKEN_PATH", None)
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0 and "token" in done.stderr.lower()


def test_another_process_joins_and_its_workers_die_with_it(ray_cluster, tmp_path):
    path = tmp_path / "driver.py"
    path.write_text(DRIVER)
    with subprocess.Popen([sys.executable, str(path)], stdout=subprocess.PIPE, text=True) as driver:
        try:
            started, worker = driver.stdout.readline().split()
            assert started == "False"
            os.kill(driver.pid, signal.SIGKILL)
            assert gone(int(worker), 10)
        finally:
            driver.kill()


def test_one_process_cannot_use_two_clusters(ray_cluster):
    from oneira.cluster import connect

    assert connect() is ray_cluster
    with pytest.raises(ClusterError, match="already connected"):
        connect("127.0.0.1:1234")


GUEST = """
import time
from oneira.cluster import connect
from oneira.cluster.executor import RayExecutor
def double(shared, unit):
    return 2 * unit
cluster = connect()
with RayExecutor() as executor:
    print(cluster.started, flush=True)
    time.sleep(4)
    print(executor.submit(double, None, 21).result(), flush=True)
"""
HOST = """
import sys
from oneira.cluster import connect
print(connect().started, flush=True)
sys.stdin.readline()
"""


def test_a_cluster_stays_until_those_who_joined_are_done(tmp_path):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment["ONEIRA_HOME"] = str(tmp_path)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    host = subprocess.Popen([sys.executable, "-c", HOST], env=environment, **pipes)
    assert host.stdout.readline() == "True\n"
    guest = subprocess.Popen([sys.executable, "-c", GUEST], env=environment, **pipes)
    assert guest.stdout.readline() == "False\n"
    host.stdin.write("\n")  # the host's own work is done
    host.stdin.close()
    answer, problems = guest.communicate(timeout=100)
    assert (answer, guest.returncode) == ("42\n", 0), problems
    assert host.wait(timeout=60) == 0
    assert "other commands still use" in host.stderr.read()
    assert not (tmp_path / "cluster" / "local.json").exists()
