"""Several processes as one JAX program: who takes part, and how a process joins.

On Cloud TPU, Slurm, Open MPI and GKE a command joins its peers by itself, found out by JAX. Elsewhere each process
is told, by flags or by the variables `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID`, which is
what `launch/local_processes.sh` and the manifests for Kubernetes set.
"""

from __future__ import annotations

import argparse
import glob
import importlib.util
import os
import secrets
import socket
import sys
import time
from collections.abc import Mapping
from typing import Any

from inranker_jax import paths, progress
from inranker_jax.errors import InputError, PeersError

VARIABLES = {
    "coordinator_address": "JAX_COORDINATOR_ADDRESS",
    "process_count": "JAX_NUM_PROCESSES",
    "process_index": "JAX_PROCESS_ID",
}
_HEARTBEAT = "INRANKER_JAX_HEARTBEAT_SECONDS"
_SHARED_SECONDS = 120.0  # network file systems show a file of another host after at most a minute
_count = 1


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds `--coordinator_address`, `--process_count` and `--process_index`."""
    parser.add_argument(
        "--coordinator_address",
        help="HOST:PORT of process 0, for several processes where JAX cannot find its peers by itself",
    )
    parser.add_argument(
        "--process_count",
        type=int,
        help="processes that take part, with --coordinator_address; without it, processes of label and evaluate that "
        "share the work and know nothing of each other",
    )
    parser.add_argument("--process_index", type=int, help="number of this process, from 0")


def join(
    coordinator_address: str | None = None, process_count: int | None = None, process_index: int | None = None
) -> tuple[int, int]:
    """Joins the other processes, if there are any. Must come before anything that touches a device.

    Args:
      coordinator_address: HOST:PORT of process 0, or None: as the environment says, see the module's docstring.
      process_count: how many there are.
      process_index: which of them this one is.

    Returns:
      (index, count) of this process; (0, 1) where it is alone.

    Raises:
      InputError: one of the three is missing or out of range.
      PeersError: the others were not reached in time.
    """
    given = {
        "coordinator_address": coordinator_address,
        "process_count": process_count,
        "process_index": process_index,
    }
    global _count
    told, launcher = _told(given, os.environ), managed_by(os.environ)
    if told is None and launcher is None:
        return 0, 1
    if told is None and launcher == "Kubernetes" and importlib.util.find_spec("kubernetes") is None:
        raise InputError(
            "this pod belongs to an indexed Job of Kubernetes, of whose other pods JAX learns through the 'kubernetes' "
            "package, which is not installed. Run `pip install kubernetes` and let the pod's service account read pods "
            f"and jobs, or set {', '.join(VARIABLES.values())} (localhost:8476, 1 and 0 for a pod on its own)."
        )
    import jax

    jax.config.update("jax_cpu_collectives_implementation", "gloo")  # for CPUs alone
    seconds = int(os.environ.get(_HEARTBEAT, "100"))
    try:
        if told is None:
            jax.distributed.initialize(heartbeat_timeout_seconds=seconds)
        else:
            address, count, index = told
            progress.announce(
                f"process {index} of {count} waits for the others at {address}, at most 5 minutes"
            )
            jax.distributed.initialize(address, count, index, heartbeat_timeout_seconds=seconds)
    except (RuntimeError, ValueError) as error:
        raise PeersError(
            f"could not join the other processes ({told or launcher}): {error}. Start all of them, with "
            "the same coordinator address, which must be reachable from every host."
        ) from error
    index, count = jax.process_index(), jax.process_count()
    _count = count
    if count > 1:
        progress.prefix(f"[{index}/{count}] ")
        progress.announce(
            f"on {socket.gethostname()}: {jax.local_device_count()} of {jax.device_count()} devices"
        )
    return index, count


def _told(
    given: Mapping[str, str | int | None], environment: Mapping[str, str]
) -> tuple[str, int, int] | None:
    """Address, count and index from flags, else from the environment; None where nothing is said."""
    values: dict[str, str | int | None] = dict(given)
    if all(value is None for value in values.values()):
        values = {name: environment.get(variable) for name, variable in VARIABLES.items()}
        if values["process_count"] is None and values["process_index"] is None:
            return None  # JAX reads an address alone by itself, where a cluster says the rest
    missing = [name for name, value in values.items() if value is None]
    if missing:
        flags = ", ".join(f"--{name} (or {VARIABLES[name]})" for name in missing)
        raise InputError(f"several processes need {flags} too.")
    for name in ("process_count", "process_index"):
        if not str(values[name]).isdigit():
            raise InputError(f"--{name} (or {VARIABLES[name]}) is {values[name]!r}; expected a whole number.")
    count, index = int(str(values["process_count"])), int(str(values["process_index"]))
    if not 0 <= index < count:
        raise InputError(
            f"process {values['process_index']} of {values['process_count']}: expected 0 <= index < count."
        )
    address = str(values["coordinator_address"])
    if not address.rpartition(":")[0] or not address.rpartition(":")[2].isdigit():
        raise InputError(f"coordinator address {address!r}: expected HOST:PORT, such as 10.0.0.2:8476.")
    return address, count, index


def managed_by(environment: Mapping[str, str]) -> str | None:
    """The launcher that JAX can ask for the other processes, or None.

    >>> managed_by({"SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NODELIST": "n[0-1]", "SLURM_PROCID": "3"})
    'Slurm'
    """
    if int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1 and "SLURM_PROCID" in environment:
        return "Slurm"
    if int(environment.get("OMPI_COMM_WORLD_SIZE", "1")) > 1:
        return "Open MPI"
    if "MEGASCALE_COORDINATOR_ADDRESS" in environment:
        return "Cloud TPU, several slices"
    hosts = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES") or ""
    if "," in hosts or _on_tpu_vm(environment):
        return "Cloud TPU"
    in_job = "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment
    return "Kubernetes" if in_job and not hosts else None  # a pod that has all of its slice is alone


def _on_tpu_vm(environment: Mapping[str, str]) -> bool:
    chips = glob.glob("/dev/accel[0-9]*") + glob.glob("/dev/vfio/[0-9]*")
    asked_not_to = "TPU_SKIP_MDS_QUERY" in environment or environment.get("JAX_PLATFORMS", "tpu")[:3] != "tpu"
    return bool(chips) and not asked_not_to and importlib.util.find_spec("libtpu") is not None


def alone() -> bool:
    """Whether this is the only process."""
    return _count == 1


def leave(status: int) -> None:
    """Ends this process at once after an error, where others wait for it; does nothing where it is alone.

    An orderly end waits until the others end too, which they do not while they wait in a collective for this one.
    """
    if not alone():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def check_shared(folder: paths.PathType) -> None:
    """Makes sure that all processes see the same folder, before hours are spent on what only one of them would keep.

    Process 0 leaves a file there for the others to find, and removes it again; all call this, once.

    Raises:
      InputError: this process does not see it.
    """
    if alone():
        return
    import jax

    index, client, place = jax.process_index(), _client(), paths.of(folder) / ".session"
    if index == 0:
        token = secrets.token_hex(8)
        paths.write(place, token)
        client.key_value_set("inranker_jax/session", token)
    token = client.blocking_key_value_get("inranker_jax/session", 7 * 24 * 3600 * 1000)
    end = time.monotonic() + _SHARED_SECONDS
    while not _holds(place, token):
        if time.monotonic() > end:
            raise InputError(
                f"{folder}: process {index} does not see there what process 0 wrote. Expected a folder that all "
                "hosts share. Use one in a bucket (gs://), or on a shared or mounted file system."
            )
        time.sleep(0.2)
    barrier("the shared folder")
    if index == 0:
        paths.remove(place)


def _holds(place: Any, token: str) -> bool:
    try:
        return paths.read(place).decode() == token
    except FileNotFoundError:
        return False


def barrier(name: str, seconds: float = 7 * 24 * 3600.0) -> None:
    """Waits until all processes are here; each name serves once.

    It waits in the coordination service: a collective of the devices would give up on a slow peer after half a
    minute on CPUs.
    """
    if not alone():
        _client().wait_at_barrier(f"inranker_jax/{name}", round(seconds * 1000))


def tell(topic: str, text: str) -> None:
    """Leaves `text` for the other processes, in place of what this one told before; waits for nobody."""
    if not alone():
        import jax

        _client().key_value_set(f"inranker_jax/{topic}/{jax.process_index()}", text, allow_overwrite=True)


def told(topic: str) -> list[str]:
    """What processes told last, in no order: this one's too, and none of those that have told nothing yet."""
    return [] if alone() else [text for _, text in _client().key_value_dir_get(f"inranker_jax/{topic}/")]


def _client() -> Any:
    """The coordination service, of which JAX has no public name."""
    from jax._src.distributed import global_state

    assert global_state.client is not None
    return global_state.client
