"""Oneira on clusters and servers: files for KubeRay, `ray up`, Docker, systemd and Grafana, all from one `Deployment`.

files        the settings, and the files as texts      dashboard    Grafana's      commands     `oneira deploy`

The files beside this one are what the default settings give.
"""

from .files import Deployment, deployment_files

__all__ = ["Deployment", "deployment_files"]
