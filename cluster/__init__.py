"""Everything Ray: joining or starting a cluster, the executor over it, jobs, serving, commands. Ray is imported when used."""

from .connection import Cluster, connect, disconnect
from .jobs import Job, submit
from .serving import Server, serve

__all__ = ["Cluster", "Job", "Server", "connect", "disconnect", "serve", "submit"]
