"""Everything Ray: joining or starting a cluster, the executor over it, its commands. Ray is imported when used."""

from .connection import Cluster, connect, disconnect

__all__ = ["Cluster", "connect", "disconnect"]
