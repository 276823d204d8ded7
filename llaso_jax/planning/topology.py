"""Devices of a TPU slice to compile for: libtpu compiles without any TPU."""

import os
from typing import Any

import jax
from jax.experimental import topologies

from llaso_jax.errors import ConfigError

_ENVIRONMENT = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # several processes may compile at once
    # No search for a TPU, and no warnings that there is none.
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
}
EXAMPLES = "v5e:2x2, v5e:4x2, v5p:2x2x1, v5p:2x2x2, v6e:2x4, v6e:8x8"


def tpu_devices(name: str) -> list[Any]:
    """The devices of the slice `name`, such as "v5e:4x2": for meshes and shardings, not to run on.

    Call it before JAX has looked for devices: this process computes on the CPU from then on.

    Raises:
      ConfigError: libtpu is not installed, or knows no such slice.
    """
    for key, value in _ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    jax.config.update("jax_platforms", "cpu")
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)
    except (ImportError, RuntimeError, ValueError, NotImplementedError) as error:
        raise ConfigError(
            f"topology {name!r} cannot be compiled for ({error}). It needs libtpu (pip install "
            f"'llaso-jax[tpu]'), and a name such as {EXAMPLES}."
        ) from error
