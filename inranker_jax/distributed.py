"""Several processes as one JAX program: who takes part, and how a process joins.

On Cloud TPU, Slurm, Open MPI 4 and GKE a command joins its peers by itself, found out by JAX. Elsewhere each process
is told, by flags or by the variables `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID`, which is
what `launch/local_processes.sh` and the manifests for Kubernetes set; under Open MPI 5 the address is enough.
"""

from __future__ import annotations

import argparse
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
_MPI_SIZE, _MPI_INDEX, _MPI_LOCAL_INDEX = (
    f"OMPI_COMM_WORLD_{name}" for name in ("SIZE", "RANK", "LOCAL_RANK")
)
_MPI_ADDRESS = "OMPI_MCA_orte_hnp_uri"  # from which JAX has process 0; mpirun sets it up to Open MPI 4
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
      InputError: one of the three is missing or out of range, or a launcher's variable is.
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
            address, count, index, devices = told
            progress.announce(
                f"process {index} of {count} waits for the others at {address}, at most 5 minutes"
            )
            jax.distributed.initialize(
                address, count, index, local_device_ids=devices, heartbeat_timeout_seconds=seconds
            )
    except (RuntimeError, ValueError) as error:
        raise PeersError(
            f"could not join the other processes ({told[:3] if told else launcher}): {error}. Start all of them, with "
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
) -> tuple[str, int, int, list[int] | None] | None:
    """Address, count, index and own devices (None: all, or as JAX knows) from flags, else from the environment.

    Returns:
      None where nothing is said.
    """
    values: dict[str, str | int | None] = dict(given)
    devices = None
    if all(value is None for value in values.values()):
        values = {name: environment.get(variable) for name, variable in VARIABLES.items()}
    if values["process_count"] is None and values["process_index"] is None:
        if _MPI_ADDRESS not in environment and _number(environment, _MPI_SIZE) > 1:
            values |= _told_by_mpi(values["coordinator_address"], environment)
            if "JAX_LOCAL_DEVICE_IDS" not in environment:  # one device each, as JAX has it under Open MPI 4
                devices = [_number(environment, _MPI_LOCAL_INDEX, 0)]
        elif given["coordinator_address"] is None:
            return None  # JAX reads an address alone by itself, where a cluster says the rest
    missing = [name for name, value in values.items() if value is None]
    if missing:
        flags = ", ".join(f"--{name} (or {VARIABLES[name]})" for name in missing)
        raise InputError(f"several processes need {flags} too.")
    for name in ("process_count", "process_index"):
        if not _is_number(str(values[name])):
            raise InputError(
                f"--{name} (or {VARIABLES[name]}) is {values[name]!r}; expected a whole number, such as 2. Without "
                f"{', '.join(VARIABLES.values())} and their flags the process is on its own."
            )
    count, index = int(str(values["process_count"])), int(str(values["process_index"]))
    if not 0 <= index < count:
        raise InputError(
            f"process {values['process_index']} of {values['process_count']}: expected 0 <= index < count."
        )
    address = str(values["coordinator_address"])
    if not address.rpartition(":")[0] or not _is_number(address.rpartition(":")[2]):
        raise InputError(f"coordinator address {address!r}: expected HOST:PORT, such as 10.0.0.2:8476.")
    return address, count, index, devices


def _told_by_mpi(address: str | int | None, environment: Mapping[str, str]) -> dict[str, str | int | None]:
    """Count and index under Open MPI 5, which says all but where process 0 is."""
    count, index = _number(environment, _MPI_SIZE), _number(environment, _MPI_INDEX)
    if address is None:
        raise InputError(
            f"process {index} of {count} of Open MPI ({_MPI_SIZE}), whose mpirun does not say where process 0 is, as "
            "it did up to version 4. Add --coordinator_address=HOST:PORT (or set "
            f"{VARIABLES['coordinator_address']}): the host of process 0 and a free port there, such as "
            "10.0.0.2:8476. Count and index need not be given."
        )
    return {"process_count": count, "process_index": index}


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit()


def _number(environment: Mapping[str, str], variable: str, default: int = 1) -> int:
    text = environment.get(variable, str(default))
    if not _is_number(text):
        raise InputError(
            f"{variable} is {text!r}; expected a whole number, as the launcher sets it. `unset {variable}` where no "
            "launcher has started this process."
        )
    return int(text)


def managed_by(environment: Mapping[str, str]) -> str | None:
    """The launcher that JAX can ask for the other processes, or None.

    Raises:
      InputError: a launcher's variable is not a number.

    >>> managed_by({"SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NODELIST": "n[0-1]", "SLURM_PROCID": "3"})
    'Slurm'
    """
    if _MPI_ADDRESS in environment and _number(environment, _MPI_SIZE) > 1:
        return "Open MPI"
    if _number(environment, "SLURM_STEP_NUM_TASKS") > 1 and "SLURM_PROCID" in environment:
        return "Slurm"
    if "MEGASCALE_COORDINATOR_ADDRESS" in environment:
        return "Cloud TPU, several slices"
    hosts = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES") or ""
    if "," in hosts or _on_tpu_vm(environment):
        return "Cloud TPU"
    in_job = "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment
    return "Kubernetes" if in_job and not hosts else None  # a pod that has all of its slice is alone


def _on_tpu_vm(environment: Mapping[str, str]) -> bool:
    """Whether JAX will ask Cloud TPU's metadata for the other hosts; as it is imported, it looks for TPUs' PCI ids."""
    asked_not_to = (
        "TPU_SKIP_MDS_QUERY" in environment or (environment.get("JAX_PLATFORMS") or "tpu")[:3] != "tpu"
    )
    if asked_not_to or importlib.util.find_spec("libtpu") is None:
        return False
    from jax._src import cloud_tpu_init

    return cloud_tpu_init.running_in_cloud_tpu_vm


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

    index, service, place = jax.process_index(), client(), paths.of(folder) / ".session"
    if index == 0:
        token = secrets.token_hex(8)
        paths.write(place, token)
        service.key_value_set("inranker_jax/session", token)
    token = service.blocking_key_value_get("inranker_jax/session", 7 * 24 * 3600 * 1000)
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
        client().wait_at_barrier(f"inranker_jax/{name}", round(seconds * 1000))


def tell(topic: str, text: str) -> None:
    """Leaves `text` for the other processes, in place of what this one told before; waits for nobody."""
    if not alone():
        import jax

        client().key_value_set(f"inranker_jax/{topic}/{jax.process_index()}", text, allow_overwrite=True)


def told(topic: str) -> list[str]:
    """What processes told last, in no order: this one's too, and none of those that have told nothing yet."""
    return [] if alone() else [text for _, text in client().key_value_dir_get(f"inranker_jax/{topic}/")]


def client() -> Any:
    """The client of JAX's coordination service, which has no public name; only where this process has joined others."""
    from jax._src.distributed import global_state

    assert global_state.client is not None
    return global_state.client
