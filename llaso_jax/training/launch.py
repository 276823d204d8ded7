"""Starting as one of several processes: by explicit flags, or as SLURM, Open MPI or a TPU pod say."""

import contextlib
import dataclasses
import importlib.util
import logging
import os
from collections.abc import Mapping

import jax
from jax._src import distributed  # the key-value store has no public name; Orbax takes it there too

from llaso_jax.errors import ConfigError
from llaso_jax.training.peers import Peers, service_seconds

logger = logging.getLogger(__name__)

START_SECONDS = 300
LEAST_TIMEOUT = 5
_SLURM = (
    *("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS"),
    *("SLURM_PROCID", "SLURM_LOCALID"),
)
_OPEN_MPI = ("OMPI_MCA_orte_hnp_uri", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK")


@dataclasses.dataclass(frozen=True)
class ProcessOptions:
    """What the command line says about processes.

    Attributes:
      coordinator: host:port of process 0, which all processes reach.
      processes: their number; 1 is one process whatever the environment says.
      process_id: this one's number, from 0.
      peer_timeout: seconds after which the loss of a process has ended all others.

    None of the first three: the environment says.
    """

    coordinator: str | None = None
    processes: int | None = None
    process_id: int | None = None
    peer_timeout: float = 60.0

    def __post_init__(self) -> None:
        if self.peer_timeout < LEAST_TIMEOUT:
            raise ConfigError(
                f"--peer-timeout {self.peer_timeout:g} is too short for beats over a network: "
                f"{LEAST_TIMEOUT} s is the least."
            )
        flags = {
            "--coordinator": self.coordinator,
            "--processes": self.processes,
            "--process-id": self.process_id,
        }
        if self.alone or all(value is None for value in flags.values()):
            return
        if missing := [name for name, value in flags.items() if value is None]:
            given = [f"{name} {value}" for name, value in flags.items() if value is not None]
            raise ConfigError(
                f"{' '.join(given)} was given without {' and '.join(missing)}: the three belong "
                "together. Without any, SLURM, Open MPI or the TPU pod says."
            )
        assert self.coordinator is not None
        assert self.processes is not None
        assert self.process_id is not None
        host, _, port = self.coordinator.rpartition(":")
        if not host or not port.isdecimal():
            raise ConfigError(
                f"--coordinator {self.coordinator!r} is no address: give HOST:PORT of process 0, "
                "with a port that is free there, such as 10.0.0.1:9876."
            )
        if not 0 <= self.process_id < self.processes:
            raise ConfigError(
                f"--process-id {self.process_id} of --processes {self.processes} does not exist: "
                f"ids go from 0 to {self.processes - 1}."
            )

    @property
    def alone(self) -> bool:
        """Whether one process was asked for."""
        return self.processes == 1


def announced_processes(environment: Mapping[str, str]) -> int | None:
    """Number of processes that SLURM or Open MPI started; None outside of them."""
    for names, count in ((_SLURM, "SLURM_NTASKS"), (_OPEN_MPI, "OMPI_COMM_WORLD_SIZE")):
        if all(name in environment for name in names):
            return int(environment[count])
    return None


def start_processes(
    options: ProcessOptions, *, devices: int
) -> contextlib.AbstractContextManager[Peers | None]:
    """Join the other processes of the run, before JAX starts a backend; to be left when the run ends.

    Args:
      options: of the command line.
      devices: of the mesh, over all processes: virtual ones are made where there are only CPUs.

    Returns:
      A context of the watch over the others; of None where this process is the only one.

    Raises:
      ConfigError: the processes do not find each other, or `devices` do not divide among them.
    """
    count = options.processes or announced_processes(os.environ)
    if count == 1 or (count is None and not _may_be_tpu_pod()):
        return contextlib.nullcontext()
    if count is not None:
        if devices % count:
            raise ConfigError(
                f"--mesh has {devices} devices, which do not divide among {count} processes: each "
                "has the same number."
            )
        jax.config.update("jax_num_cpu_devices", devices // count)
    # Signals are ours to take: see `StopRequest`.
    jax.config.update("jax_enable_preemption_service", False)
    seconds = service_seconds(options.peer_timeout)
    try:
        jax.distributed.initialize(
            options.coordinator,
            options.processes,
            options.process_id,
            initialization_timeout=START_SECONDS,
            heartbeat_timeout_seconds=seconds,
            shutdown_timeout_seconds=seconds,
        )
    except ValueError:
        if count is None:  # JAX knows no cluster around it: this is no TPU pod
            return contextlib.nullcontext()
        raise
    except jax.errors.JaxRuntimeError as error:
        raise ConfigError(
            f"process {options.process_id} did not find the others at "
            f"{options.coordinator or 'the address their scheduler gave'} within {START_SECONDS} s "
            f"({str(error).splitlines()[0]}). Start as many as --processes says, with the same "
            "--coordinator: HOST:PORT of process 0, reachable from every machine."
        ) from error
    state = distributed.global_state
    logger.info(
        "process %d of %d; the coordinator is at %s",
        state.process_id,
        state.num_processes,
        state.coordinator_address,
    )
    if state.num_processes == 1:
        return contextlib.nullcontext()
    return Peers(
        state.client,
        index=state.process_id,
        count=state.num_processes,
        timeout=options.peer_timeout,
    )


def _may_be_tpu_pod() -> bool:
    platforms = jax.config.jax_platforms or ""  # pyright: ignore[reportAttributeAccessIssue]
    wanted = not platforms or "tpu" in platforms
    return wanted and importlib.util.find_spec("libtpu") is not None
