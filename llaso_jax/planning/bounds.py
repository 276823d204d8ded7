"""How fast a compiled step can be at best: what its arithmetic, its memory and its links each need."""

import dataclasses
from collections.abc import Iterable, Mapping

from llaso_jax.planning.hardware import Accelerator
from llaso_jax.sharding.costs import Cost


@dataclasses.dataclass(frozen=True)
class Bounds:
    """Seconds that one step cannot be faster than; no unit reaches its peak for long, so a real step is slower.

    Attributes:
      compute: all matrix products at the peak rate.
      hbm: all bytes between memory and cores at full bandwidth.
      interconnect: all bytes of the collectives, one after the other, at the full bandwidth of the links.
      steps: every operation as long as its own products or its own bytes take, whichever is more: arithmetic of one
        operation does not hide the memory traffic of another.
    """

    compute: float
    hbm: float
    interconnect: float
    steps: float

    @property
    def seconds(self) -> float:
        """The largest of the three: the roofline."""
        return max(self.compute, self.hbm, self.interconnect)

    @property
    def predicted(self) -> float:
        """Time of a step whose collectives all run beside its arithmetic."""
        return max(self.steps, self.interconnect)

    @property
    def binding(self) -> str:
        """Which of the three is the largest."""
        named = {"compute": self.compute, "hbm": self.hbm, "interconnect": self.interconnect}
        return max(named, key=lambda name: named[name])


def step_bounds(
    costs: Iterable[Cost],
    collectives: Mapping[str, Mapping[str, float]],
    device: Accelerator,
) -> Bounds:
    """Bounds of a program on `device`.

    Args:
      costs: of all its operations (sharding/costs.py).
      collectives: bytes that a device sends, by axis and kind (sharding/collectives.py).
      device: what it runs on.
    """
    flops = hbm = steps = 0.0
    for cost in costs:
        flops += cost.times * cost.flops
        hbm += cost.times * cost.hbm_bytes
        steps += cost.times * max(cost.flops / device.flops, cost.hbm_bytes / device.hbm_bandwidth)
    sent = sum(sum(kinds.values()) for kinds in collectives.values())
    return Bounds(
        compute=flops / device.flops,
        hbm=hbm / device.hbm_bandwidth,
        interconnect=sent / device.link_bandwidth,
        steps=steps,
    )
