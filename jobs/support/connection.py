"""Ray for a run: joined, or started on this machine."""

from __future__ import annotations

import logging
import os
import tempfile
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from shard_embedder.pipeline.core.errors import ClusterError
from shard_embedder.pipeline.core.formatting import format_size
from shard_embedder.pipeline.core.redact import describe

_SHARED_MEMORY = "/dev/shm"
_STANDARD_ERROR = 2
_FALSE_ALARM = b"has constructor arguments in the object store"


def connect() -> str | None:
    """Join the cluster that RAY_ADDRESS names, as in a submitted job, or start Ray on this machine.

    If this process is connected already, nothing is done.

    Returns:
        A warning of what will make the run slow, or None.

    Raises:
        ClusterError: Ray cannot be reached or started.
    """
    if ray.is_initialized():
        return None
    # Usage statistics start a process of their own, which takes seconds on a small machine.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Workers are idle for moments while stages take turns. After one second Ray would end those above one a core and
    # later start others, and each start takes seconds of a core.
    os.environ.setdefault("RAY_idle_worker_killing_time_threshold_ms", "300000")
    # Without "local", Ray would join whatever other Ray runs on this machine.
    local = {"address": "local", "include_dashboard": False}
    address = os.environ.get("RAY_ADDRESS")
    options: dict[str, Any] = {} if address else local
    if address:
        # How often Ray tries to reach a cluster. A try without an answer takes 41 s, and the default is 20 tries.
        os.environ.setdefault("RAY_gcs_server_port_wait_time_s", "1")
    try:
        ray.init(log_to_driver=False, logging_level=logging.ERROR, **options)
    except Exception as error:  # Ray raises a plain one if its own processes start too slowly
        where = f"the cluster at {address}" if address else "this machine"
        raise ClusterError(f"Ray cannot be reached or started on {where}: {describe(error)}") from error
    _take_false_alarm()
    # The run itself says in one line what failed in a pass.
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    return _store_on_disk() if options else None


class _Restartable:
    """An actor that is never started."""

    def __init__(self, ref: Any) -> None:
        """Take what the store holds."""


def _take_false_alarm() -> None:
    """Make Ray print a warning now, unheard, that it prints once a process and that does not apply here.

    It warns of the first actor that may restart and has arguments in the object store. Those of Ray Data's actors
    stay there as long as the pass. RAY_BACKEND_LOG_LEVEL would also silence Ray's logs on disk, and announces itself
    on the console. The actor here is for a node that does not exist, so no worker starts for it.
    """
    nowhere = NodeAffinitySchedulingStrategy(node_id="0" * 56, soft=False)
    actor = ray.remote(_Restartable).options(num_cpus=0, max_restarts=1, scheduling_strategy=nowhere)
    ref = ray.put(None)
    standard_error = os.dup(_STANDARD_ERROR)
    with tempfile.TemporaryFile() as said:
        os.dup2(said.fileno(), _STANDARD_ERROR)
        try:
            ray.kill(actor.remote(ref))
        finally:
            os.dup2(standard_error, _STANDARD_ERROR)
            os.close(standard_error)
        said.seek(0)
        # Everything else is passed on.
        os.write(_STANDARD_ERROR, b"".join(line for line in said if _FALSE_ALARM not in line))


def _store_on_disk() -> str | None:
    """A warning if /dev/shm is too small for Ray's object store: of Ray's own logs only errors are shown."""
    store = ray.cluster_resources().get("object_store_memory", 0.0)
    try:
        status = os.statvfs(_SHARED_MEMORY)
    except OSError:  # no Linux
        return None
    size = status.f_blocks * status.f_frsize
    if size >= store:
        return None
    return (
        f"{_SHARED_MEMORY} has {format_size(size)}, so Ray keeps its objects on disk: give it {format_size(store)} "
        "(docker run --shm-size, in Kubernetes a volume with medium: Memory)"
    )
