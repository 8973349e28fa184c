"""Oneira's commands as jobs of a Ray cluster. Ray is imported when used.

wheel        the code, as one file named after its content     client      submit, list, status, logs, stop
entry        what a job runs: the command, no shell            supervisor  an actor that submits again what died
commands     `oneira submit`, `oneira jobs ...`
"""

from .client import Job, submit

__all__ = ["Job", "submit"]
