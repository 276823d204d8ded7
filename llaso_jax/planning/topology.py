"""Devices of a TPU slice or a GPU node to compile for: the plugins compile without any TPU or GPU."""

import os
import re
from typing import Any

import jax
from jax.experimental import topologies

from llaso_jax.errors import ConfigError
from llaso_jax.planning.hardware import ACCELERATORS

_ENVIRONMENT = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # several processes may compile at once
    # No search for a TPU, and no warnings that there is none.
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
}
EXAMPLES = "v5e:2x2, v5e:4x2, v5p:2x2x1, v5p:2x2x2, v6e:2x4, v6e:8x8"
_GPUS = ("a100", "h100", "h200")

# What differs between GPUs, in the words of a GpuTargetConfig: XLA's own descriptions (openxla/xla,
# xla/backends/gpu/target_config/specs) and the CUDA programming guide's table of compute capabilities.
_GPU_TARGETS = {
    "a100": "core_count: 108 fpus_per_core: 64 clock_rate_ghz: 1.41 l2_cache_size: 41943040 "
    "shared_memory_per_block_optin: 166912 shared_memory_per_core: 167936 "
    "cuda_compute_capability { major: 8 minor: 0 }",
    "h100": "core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98 l2_cache_size: 52428800 "
    "shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472 "
    "cuda_compute_capability { major: 9 minor: 0 }",
}
_GPU_TARGETS["h200"] = _GPU_TARGETS["h100"]
_GPU_TARGET = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  memory_bandwidth: {bandwidth} device_memory_size: {memory}
  {rest}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 }}
device_description_str: "{kind}"
"""


def topology_devices(name: str) -> list[Any]:
    """The devices of a TPU slice ("v5e:4x2") or of a GPU node ("h100:8"): for meshes, not to run on.

    Call it before JAX has looked for devices: this process computes on the CPU from then on.

    Raises:
      ConfigError: the plugin that compiles for them is not installed, or knows no such slice.
    """
    kind, _, count = name.partition(":")
    if kind not in _GPUS:
        return tpu_devices(name)
    if not re.fullmatch(r"[1-8]", count):
        raise ConfigError(f"topology {name!r}: a node has 1 to 8 GPUs, such as {kind}:8.")
    return gpu_devices(kind, int(count))


def tpu_devices(name: str) -> list[Any]:
    """The devices of the slice `name`, such as "v5e:4x2"; see `topology_devices`."""
    for key, value in _ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    jax.config.update("jax_platforms", "cpu")
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)
    except (ImportError, RuntimeError, ValueError, NotImplementedError) as error:
        raise ConfigError(
            f"topology {name!r} cannot be compiled for ({error}). It needs libtpu (pip install "
            f"'llaso-jax[tpu]'), and a name such as {EXAMPLES}; for GPUs {', '.join(_GPUS)} with their number: h100:8."
        ) from error


def gpu_devices(kind: str, count: int) -> list[Any]:
    """`count` GPUs of one node, "a100", "h100" or "h200"; see `topology_devices`."""
    jax.config.update("jax_platforms", "cpu")
    (gpu,) = (one for one in ACCELERATORS if one.name == kind)
    target = _GPU_TARGET.format(
        bandwidth=int(gpu.hbm_bandwidth),
        memory=gpu.hbm_bytes,
        rest=_GPU_TARGETS[kind],
        kind=gpu.device_kind,
    )
    try:
        topology = topologies.get_topology_desc(
            platform="cuda", topology_name="", target_config=target, topology=f"1x1x{count}"
        )
    except (ImportError, RuntimeError, ValueError, NotImplementedError) as error:
        raise ConfigError(
            f"topology {kind}:{count} cannot be compiled for ({error}). It needs XLA's CUDA plugin: pip install "
            f"--no-deps jax-cuda12-plugin jax-cuda12-pjrt, both of version {jax.__version__}."
        ) from error
    return list(topology.devices)
