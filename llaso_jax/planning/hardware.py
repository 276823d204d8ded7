"""Accelerators: what one device can do, as its maker says."""

import dataclasses

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Accelerator:
    """One kind of device.

    Attributes:
      name: as in `--topology`.
      device_kind: how JAX's names of it begin.
      flops: dense bf16 FLOP/s.
      hbm_bytes: memory that programs may use.
      hbm_bandwidth: bytes/s between it and the cores.
      link_bandwidth: bytes/s that a device sends to the others along one mesh axis. TPU: in both directions of
        a ring, one link each; GPU: to the switch that joins a node.
    """

    name: str
    device_kind: str
    flops: float
    hbm_bytes: int
    hbm_bandwidth: float
    link_bandwidth: float


# TPUs: cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}, "Key chip specifications". Interconnect there is per chip, over all
# of its links (4; v4 and v5p 6): 50 GB/s each way on v4 and v5e, 100 GB/s on v5p and v6e. Memory is what libtpu leaves
# to programs of 32, 16, 96 and 32 GiB ("... of 15.75G hbm" in its messages).
# GPUs: NVIDIA's data sheets of A100 80GB SXM, H100 SXM and H200 SXM, without sparsity; memory as the driver reports it
# (openxla/xla, xla/backends/gpu/target_config/specs). NVLink there is the sum of both directions: 600 and 900 GB/s.
ACCELERATORS = (
    Accelerator("v4", "TPU v4", 275e12, int(30.75 * GIB), 1228e9, 100e9),
    Accelerator("v5e", "TPU v5 lite", 197e12, int(15.75 * GIB), 819e9, 100e9),
    Accelerator("v5p", "TPU v5", 459e12, int(95.74 * GIB), 2765e9, 200e9),
    Accelerator("v6e", "TPU v6 lite", 918e12, int(31.25 * GIB), 1640e9, 200e9),
    Accelerator("a100", "NVIDIA A100", 312e12, 85_100_068_864, 2039e9, 300e9),
    Accelerator("h100", "NVIDIA H100", 989e12, 84_942_979_072, 3352e9, 450e9),
    Accelerator("h200", "NVIDIA H200", 989e12, 151_397_597_184, 4800e9, 450e9),
)


def find_accelerator(device_kind: str) -> Accelerator | None:
    """The accelerator that JAX calls `device_kind`; None where it is not known (CPUs)."""
    known = [one for one in ACCELERATORS if device_kind.startswith(one.device_kind)]
    return max(known, key=lambda one: len(one.device_kind), default=None)
