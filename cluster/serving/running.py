"""Start the server on a Ray cluster, and stop it.

with serve(["builtin"], port=8000) as server:
    print(server.url)
"""

from __future__ import annotations

import logging
import re
import socket
import ssl
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, NoReturn, Self

from oneira.platform import errors
from oneira.platform.errors import ClusterError, UsageError, did_you_mean

from ..connection import connect, is_loopback
from .models import LOADER, anywhere, must_be_here

if TYPE_CHECKING:
    from .application import Layout

APPLICATION = "oneira"
LAYOUTS = ("fused", "split")
SECONDS_BETWEEN_LOOKS = 2.0  # at the health of a server that runs
UNHEALTHY_SECONDS = 120.0  # after which it is given up: Ray Serve has long replaced what can be replaced
DRAIN_SECONDS = 30.0  # for requests under way when the server is asked to stop
READY_SECONDS = 60.0  # for the proxy to learn of an application that runs


class Server:
    """A server that runs. Close it, or use it in a `with` block; the cluster stays as it is."""

    def __init__(self, url: str, trusted: ssl.SSLContext | None = None) -> None:
        """`trusted`: what its certificate is checked with, where it has one."""
        self.url, self._trusted = url, trusted

    def watch(self, seconds: float = UNHEALTHY_SECONDS) -> NoReturn:
        """Looks after the server for ever. Raises ClusterError when it has not been healthy for so many seconds in a row."""
        well = time.monotonic()
        while True:
            time.sleep(SECONDS_BETWEEN_LOOKS)
            if self.is_healthy():
                well = time.monotonic()
            elif time.monotonic() - well > seconds:
                raise ClusterError(f"The server at {self.url} has not been healthy for {seconds:.0f} s: given up.")

    def is_healthy(self) -> bool:
        """Whether it says that it makes pictures."""
        return is_healthy(self.url, self._trusted)

    def drain(self, seconds: float = DRAIN_SECONDS) -> None:
        """New requests hear 503 from now on, as does who asks for its health; those under way have so many seconds."""
        from ray import serve

        with suppress(Exception):  # a server that cannot answer has nothing to finish
            handle = serve.get_app_handle(APPLICATION)
            handle.drain.remote(seconds).result(timeout_s=seconds + SECONDS_BETWEEN_LOOKS)

    def close(self) -> None:
        """Stop what was started; `drain` first, and no request is cut off."""
        from ray import serve

        serve.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def serve(
    models: Sequence[str] = ("builtin",), *, host: str = "127.0.0.1", port: int = 8000, layout: Layout = "fused",
    address: str | None = None, key: str | None = None, loader: str = LOADER, replicas: int = 1, memory: int = 0,
    tls: tuple[Path, Path] | None = None, plain_http: bool = False,
) -> Server:  # fmt: skip
    """Serve models over HTTP; returns when the first request would succeed.

    Args:
        models: built-in names, runs, folders or hub ids. layout: "fused" or "split".
        host: any but a loopback address needs a `key`, which clients bear, and `tls`. port: 0 takes one that is free here.
        address: of the Ray cluster, as for `connect`. loader: "module:function", a model's name to its stages.
        replicas: of each kind of stage, in the layout "split"; where one dies, the others do its work.
        memory: bytes of a device that models and work may use, of whatever command; 0: nine tenths of it. Models that do not fit
            together come and go.
        tls: files of the certificate, with its chain, and of its private key, in PEM, on the cluster's head: HTTPS.
        plain_http: another host without `tls`: a proxy before it speaks TLS, or nobody reads along on that network.

    Raises:
        UsageError: a wrong layout, an address without a key or TLS, a certificate that cannot be used, a port that is taken, an unknown model.
        DataError: a model that cannot be read. ClusterError: no cluster, or something is served there already.
    """
    if layout not in LAYOUTS:
        raise UsageError(f"Unknown layout '{layout}'. {did_you_mean(layout, LAYOUTS)}")
    if not models:
        raise UsageError("No model is named. Allowed: one or more.")
    if replicas < 1 or (replicas > 1 and layout != "split"):
        raise UsageError(f"replicas is {replicas}. Allowed: 1, or more in the layout 'split'.")
    if key is None and not is_loopback(host):
        raise UsageError(f"Host '{host}' can be reached from outside, so a key is required: set ONEIRA_API_KEY.")
    if tls is None and not plain_http and not is_loopback(host):
        raise UsageError(
            f"Host '{host}' can be reached from outside, where a key sent without TLS can be read: give --tls-cert and --tls-key, or "
            "--plain-http where a proxy speaks TLS."
        )
    trusted = None if tls is None else _checked(*tls)
    if address is None:
        port = _free_port(host, port)
    if address is None and loader == LOADER:  # where the cluster is elsewhere, models may be as well
        for model in models:
            must_be_here(model)
    connect(address)
    import ray
    from ray import serve as ray_serve

    logging.getLogger("ray.serve").setLevel(logging.WARNING)

    from .application import Serving, build

    if ray_serve.status().proxies:
        raise ClusterError("This cluster serves already: one server a cluster. Stop the other one, or use --address.")
    head, here = _head(), ray.util.get_node_ip_address()
    reached = _reached_at(host, head, here)
    if address is not None and head == here:
        port = _free_port(host, port)
    resources = ray.cluster_resources()
    serving = Serving(models=tuple(map(anywhere, models)), loader=loader, key=key, replicas=replicas, memory=memory)
    application = build(serving, layout, int(resources.get("CPU", 1)), int(resources.get("GPU", 0)))
    scheme = "http" if tls is None else "https"
    server = Server(f"{scheme}://{reached}:{port}", trusted)
    files = (
        {}
        if tls is None
        else dict(zip(("ssl_certfile", "ssl_keyfile"), (str(file.resolve()) for file in tls), strict=True))
    )
    try:
        ray_serve.start(proxy_location="HeadOnly", http_options={"host": host, "port": port, **files})
        ray_serve.run(application, name=APPLICATION, route_prefix="/")
        _wait_until_ready(server)
    except Exception as error:
        said = _said(error)  # before the replicas are forgotten
        server.close()
        raise _explained(error, said) from error
    except BaseException:
        server.close()
        raise
    return server


def _head() -> str:
    """The address of the cluster's head, where Serve listens."""
    import ray

    heads = [node for node in ray.nodes() if node["Alive"] and "node:__internal_head__" in node["Resources"]]
    return heads[0]["NodeManagerAddress"] if heads else ray.util.get_node_ip_address()


def _reached_at(host: str, head: str, here: str) -> str:
    """Where this process reaches what listens at `host` on the head.

    Raises:
        UsageError: the head is another machine, and nobody else reaches that address of it.
    """
    everywhere = host in ("0.0.0.0", "::")
    if head == here:
        return "127.0.0.1" if everywhere else host
    if is_loopback(host):
        raise UsageError(
            f"The cluster's head is another machine, {head}, whose '{host}' only it can reach. Run this command there, or give "
            "--host 0.0.0.0 with a key and TLS."
        )
    return head if everywhere else host


def _free_port(host: str, port: int) -> int:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, OverflowError) as error:
            raise UsageError(f"Cannot listen on {host}:{port}: {error}. Another --port or --host may do.") from error
        return probe.getsockname()[1]


def _checked(certificate: Path, key: Path) -> ssl.SSLContext:
    """What trusts that certificate and no other. Raises UsageError where a server cannot use the two files."""
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password="")
        trusted = ssl.create_default_context(cafile=certificate)
    except (OSError, ValueError) as error:  # OpenSSL's own errors are OSErrors
        raise UsageError(
            f"No server can use the certificate '{certificate}' with the key '{key}': {error}. Allowed: PEM files that belong "
            "together, the key without a password."
        ) from error
    trusted.check_hostname = False  # it is asked by its loopback address
    trusted.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # whoever has signed it
    return trusted


def is_healthy(url: str, trusted: ssl.SSLContext | None = None) -> bool:
    """Whether the server there says that it makes pictures. `trusted`: as for `Server`."""
    import http.client

    scheme, _, place = url.partition("://")
    connection = http.client.HTTPConnection(place, timeout=5)
    if scheme == "https":
        connection = http.client.HTTPSConnection(place, timeout=5, context=trusted)
    try:
        connection.request("GET", "/healthz")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _wait_until_ready(server: Server) -> None:
    end = time.monotonic() + READY_SECONDS
    while time.monotonic() < end:
        if server.is_healthy():
            return
        time.sleep(0.05)
    raise ClusterError(f"The server does not answer at {server.url} after {READY_SECONDS:.0f} s.")


def _said(error: Exception) -> str:
    """What Ray says of a start that failed: the error, and what Serve keeps of the application and its deployments."""
    from ray import serve

    application = serve.status().applications.get(APPLICATION)
    kept = [] if application is None else [application.message, *(d.message for d in application.deployments.values())]
    return "\n".join([str(error), *kept])


def _explained(error: Exception, said: str) -> Exception:
    """The error of a replica that could not begin, as itself: Ray tells it as a traceback in a text."""
    if isinstance(error, errors.OneiraError):
        return error
    found = re.findall(r"oneira\.platform\.errors\.(\w+): (.+)", said)
    if found:
        return getattr(errors, found[-1][0])(found[-1][1])
    lines = [line.strip() for line in said.splitlines() if re.match(r"\s*[\w.]+(Error|Exception)\b", line)]
    return ClusterError(f"The server did not start: {lines[-1] if lines else error}")
