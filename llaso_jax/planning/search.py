"""Plans of several meshes and batches: which are possible, and which is fastest."""

from collections.abc import Callable, Iterator, Mapping

from llaso_jax.config import RunConfig
from llaso_jax.errors import ConfigError
from llaso_jax.planning.hardware import GIB
from llaso_jax.planning.plan import Plan, PlanError, plan
from llaso_jax.planning.recipe import planned_model, planned_stage
from llaso_jax.planning.topology import topology_devices
from llaso_jax.sharding.rules import ShardingError

USABLE = 0.92
"""Share of the memory that `--batch auto` fills at most: a run needs some for what comes between two steps."""


def plan_meshes(
    recipe: RunConfig, *, topology: str, mesh: str | None, stage: int = 0, batch: str | None = None
) -> tuple[list[Plan], dict[str, str]]:
    """Plans of one mesh or of all, the fastest first, and why the others are not possible.

    Args:
      recipe, topology, stage: as `plan`.
      mesh: as `plan`; "all" for those of `meshes_of`, None for all devices on fsdp.
      batch: rows of a device at a time, "auto" for as many as fit, None for the recipe's.

    Raises:
      ConfigError: a topology or a stage that is not there, or rows that do not split over the one mesh.
      ShardingError: the one mesh does not fit.
    """
    # What is wrong on every mesh is an error, no mesh's reason.
    planned_model(recipe)
    planned_stage(recipe, stage)
    count = len(topology_devices(topology))
    names = list(meshes_of(count)) if mesh == "all" else [mesh or f"{count}x1"]
    plans: list[Plan] = []
    refusals: dict[str, str] = {}
    for name in names:

        def attempt(rows: int | None, name: str = name) -> Plan:
            return plan(recipe, topology=topology, mesh=name, stage=stage, batch=rows)

        try:
            if batch == "auto":
                plans.append(largest_batch(attempt))
            else:
                plans.append(attempt(None if batch is None else int(batch)))
        except (PlanError, ShardingError, ConfigError) as error:
            if len(names) == 1 and not isinstance(error, PlanError):
                raise
            refusals[name] = str(error)
    plans.sort(key=lambda one: -one.samples_per_second)
    return plans, refusals


def meshes_of(devices: int) -> Iterator[str]:
    """Every mesh of so many devices that has a batch axis, fsdp or data, and a tensor axis."""
    for tensor in range(1, devices + 1):
        if devices % tensor == 0:
            rest = devices // tensor
            yield f"fsdp={rest},tensor={tensor}"
            if rest > 1:
                yield f"data={rest},tensor={tensor}"


def largest_batch(attempt: Callable[[int], Plan]) -> Plan:
    """The plan of the most rows, of those that `attempt` makes, which stays within USABLE of the memory.

    Memory grows by nearly as much with every row, so two plans tell where to look for the last that fits.

    Raises:
      PlanError: not even one row fits.
    """
    first = attempt(1)
    if first.hbm_share > USABLE:
        raise PlanError(
            f"one row needs {first.peak_hbm_bytes / GIB:.2f} GiB of {first.device.hbm_bytes / GIB:.2f}: more than "
            f"{USABLE:.0%}."
        )
    fitting, too_many = {1: first}, None
    while too_many is None or too_many - max(fitting) > 1:
        guess = _next_batch(fitting, too_many)
        tried = _fitting(attempt, guess)
        if tried is None:
            too_many = guess
        else:
            fitting[guess] = tried
    return fitting[max(fitting)]


def _fitting(attempt: Callable[[int], Plan], rows: int) -> Plan | None:
    try:
        tried = attempt(rows)
    except PlanError:
        return None
    return tried if tried.hbm_share <= USABLE else None


def _next_batch(fitting: Mapping[int, Plan], too_many: int | None) -> int:
    """Rows to try: the last that should fit, between the most that do and the fewest that do not."""
    most = max(fitting)
    if len(fitting) == 1:
        guess = 2
    else:
        limit = USABLE * fitting[most].device.hbm_bytes
        row = (fitting[most].peak_hbm_bytes - fitting[1].peak_hbm_bytes) / (most - 1)
        guess = most + int((limit - fitting[most].peak_hbm_bytes) / max(row, 1))
    highest = 4 * most if too_many is None else too_many - 1
    return min(max(guess, most + 1), highest)
