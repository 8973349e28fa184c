"""Everything Ray: joining or starting a cluster, the executor over it, serving, commands. Ray is imported when used."""

from .connection import Cluster, connect, disconnect
from .serving import Server, serve

__all__ = ["Cluster", "Server", "connect", "disconnect", "serve"]
