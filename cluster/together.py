"""Units of work that several processes do together, as one group of torch.distributed: by Ray Train.

Ray Train starts the processes, on as many nodes as it takes, and makes the group (gloo, or nccl where there are GPUs). What
became of the unit comes back through an actor of ours, because Ray Train's own errors do not keep their type.
"""

from __future__ import annotations

import logging
import tempfile
from dataclasses import dataclass
from typing import Any

from oneira.platform.executor import Tree

from .scheduling.client import ClusterDevice
from .workers import DONE, FAILED, NO_MEMORY, Worker

WORKER_CPUS = 0.01  # a worker's claim on Ray's ledger, as of the executor's actors
# What torch.distributed raises in those that wait for a process that died.
OF_OTHERS = ("builtins:RuntimeError", "torch.")


@dataclass(frozen=True)
class Outcome:
    """What became of a unit, as `Worker.run` says it. again: a process died, or seems to have."""

    status: str
    value: Any
    said: str
    core_seconds: float
    again: bool = False


class Box:
    """Holds what the first process returned, or what the first to fail raised."""

    def __init__(self) -> None:
        self.found: tuple[str, Any, str, float] | None = None

    def put(self, found: tuple[str, Any, str, float]) -> None:
        if self.found is None:
            self.found = found

    def get(self) -> tuple[str, Any, str, float] | None:
        return self.found


def run_together(name: str, code: list, unit: Tree, count: int) -> Outcome:
    """Runs the function "module:qualname" (or what `code` refers to) in `count` processes at once."""
    import ray
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    logging.getLogger("ray.train").setLevel(logging.ERROR)
    box: Any = ray.remote(Box).options(num_cpus=0).remote()
    has_gpus = ray.cluster_resources().get("GPU", 0) >= count
    claim = {"CPU": WORKER_CPUS} | ({"GPU": 1.0} if has_gpus else {})
    with tempfile.TemporaryDirectory(prefix="oneira-train-") as notes:  # of Ray Train's own; the state is the run's
        trainer = TorchTrainer(
            _loop, train_loop_config={"name": name, "code": code, "unit": unit, "box": box},
            scaling_config=ScalingConfig(num_workers=count, use_gpu=has_gpus, resources_per_worker=claim),
            run_config=RunConfig(name="together", storage_path=notes),
        )  # fmt: skip
        why = ""
        try:
            trainer.fit()
        except Exception as error:  # of a process that died, or of a unit that failed
            why = str(error)
    try:
        found: tuple[str, Any, str, float] | None = ray.get(box.get.remote())
    finally:
        ray.kill(box)
    if found is None:
        return Outcome(
            FAILED, ("builtins:RuntimeError", f"a process of the group died ({why})", why), "", 0.0, again=True
        )
    status, value, said, core_seconds = found
    if status == NO_MEMORY:
        return Outcome(FAILED, ("builtins:MemoryError", value, ""), said, core_seconds, again=True)
    return Outcome(status, value, said, core_seconds, again=status == FAILED and value[0].startswith(OF_OTHERS))


def _device_of_group(name: str = "auto", *, cores: int = 0) -> ClusterDevice:
    """The device of the first process, with all its cores, which are those of the others on its node as well."""
    return ClusterDevice(name)


def _loop(config: dict[str, Any]) -> None:
    """What each process of the group does."""
    import ray
    from ray.train import get_context

    from oneira.platform.devices import num_cores

    here = get_context()
    threads = max(1, num_cores() // here.get_local_world_size())
    # The first takes the lease: were each to ask, one might hold what another waits for while it waits for that one.
    device = _device_of_group if here.get_world_rank() == 0 else None
    found = Worker(threads, device).run(config["name"], config["code"], [], config["unit"], threads)
    if found[0] != DONE or here.get_world_rank() == 0:
        ray.get(config["box"].put.remote(found))
    if found[0] != DONE:
        raise RuntimeError("the unit failed")  # ends the others, which wait for this process
