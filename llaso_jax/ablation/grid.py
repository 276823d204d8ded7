"""Points of a sweep: every combination of its axes. An axis is a field of the recipe, or some that move together."""

import dataclasses
import difflib
import itertools
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import yaml

from llaso_jax.config import RunConfig, apply_override, parse_config, to_tree
from llaso_jax.errors import ConfigError
from llaso_jax.sharding.strategies import plans

logger = logging.getLogger(__name__)

MESH, TOPOLOGY = "mesh", "topology"  # options of commands, swept like fields of the recipe

Axis = list[dict[str, str]]
"""What takes turns: settings (field -> YAML text of its value) of each turn."""


@dataclasses.dataclass(frozen=True)
class Point:
    """One combination.

    Attributes:
      mesh: as `llaso train --mesh`.
      settings: (dotted field, YAML text) of what differs from the recipe.
      topology: devices to predict for, such as "v5e:4x2"; None measures on those of this machine.
    """

    mesh: str
    settings: tuple[tuple[str, str], ...] = ()
    topology: str | None = None

    def config(self, base: RunConfig) -> RunConfig:
        """The recipe with this point's settings; raises ConfigError where they cannot work."""
        tree = to_tree(base)
        for field, value in self.settings:
            apply_override(tree, f"{field}={value}")
        return parse_config(RunConfig, tree)

    def values(self) -> dict[str, str]:
        """Value of every swept field, of the mesh and of the topology."""
        topology = {} if self.topology is None else {TOPOLOGY: self.topology}
        return {**topology, MESH: self.mesh, **dict(self.settings)}


def sharding_axis(devices: int) -> Axis:
    """Every strategy on every mesh of `devices`, whether or not a model fits (sharding/strategies.py).

    Whole copies on every device come first: what the others are compared with is then as one device computes it.
    """
    found = list(plans(devices))
    return [{MESH: plan.mesh, "sharding.strategy": plan.strategy} for plan in reversed(found)]


def swept_axis(assignments: Sequence[str], base: RunConfig, stage: int) -> Axis:
    """The axis that one `--sweep field=value,value … field=value,value …` describes.

    Fields of one axis move together: all take their first value, then all their second. A single value stays.

    Raises:
      ConfigError: no assignment, numbers of values that differ, or a field that `find_field` does not find.
    """
    columns: dict[str, list[str]] = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        values = _split(text)
        if not equals or not values:
            raise ConfigError(
                f"--sweep {assignment!r} is not understood: write field=value,value, such as "
                f"remat=none,dots,layer."
            )
        place = name in (MESH, TOPOLOGY)
        field = name if place else find_field(name, base, stage)
        if field in columns:
            raise ConfigError(f"--sweep {' '.join(assignments)}: {field} is there twice.")
        columns[field] = [str(yaml.safe_load(value)) for value in values] if place else values
    length = max(map(len, columns.values()))
    for field, values in columns.items():
        if len(values) not in (1, length):
            raise ConfigError(
                f"--sweep {' '.join(assignments)}: {field} has {len(values)} values where another field has "
                f"{length}. Fields of one --sweep move together; to combine all values give each its own."
            )
    return [
        {field: values[index % len(values)] for field, values in columns.items()}
        for index in range(length)
    ]


def grid(axes: Sequence[Axis], *, mesh: str, topology: str | None = None) -> list[Point]:
    """Every combination of the axes, the last changing fastest; on `mesh` and `topology` where no axis names them.

    Raises:
      ConfigError: a field in two axes.
    """
    fields = [field for axis in axes for field in axis[0]]
    if twice := sorted({field for field in fields if fields.count(field) > 1}):
        raise ConfigError(f"two axes of the sweep set {', '.join(twice)}: leave it in one.")
    points = []
    for turns in itertools.product(*axes):
        settings = {field: value for turn in turns for field, value in turn.items()}
        where = settings.pop(MESH, mesh), settings.pop(TOPOLOGY, topology)
        points.append(Point(where[0], tuple(settings.items()), where[1]))
    return list(dict.fromkeys(points))


def find_field(name: str, base: RunConfig, stage: int) -> str:
    """Dotted path of the field that `name` means: its path, the end of it, or else its last word alone.

    Only fields of `stage` are looked at, not those of other stages. That a name was taken for a path which does not
    end in it ("data.audio_mode" for model.audio_mode) is logged.

    Raises:
      ConfigError: no such field, or several; the message names them.
    """
    paths = [path for path in _paths(base) if not _of_other_stage(path, stage)]
    last = name.rpartition(".")[2]
    for ending in (name,) if _of_other_stage(name, stage) else (name, last):
        found = [path for path in paths if f".{path}".endswith(f".{ending}")]
        found = [name] if name in found else found
        if len(found) > 1:
            raise ConfigError(
                f"--sweep {name}: several fields end so, {', '.join(found)}. Write more of the path."
            )
        if found:
            if ending != name:
                logger.info("--sweep %s is taken for %s", name, found[0])
            return found[0]
    names = {path.rpartition(".")[2]: path for path in reversed(paths)}
    near = [names[close] for close in difflib.get_close_matches(last, names, n=3)]
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise ConfigError(
        f"--sweep {name}: the recipe has no such field in stage {stage}; {hint}"
        f"`config.yaml` of a run lists all fields."
    )


def _paths(value: Any, prefix: str = "") -> Iterator[str]:
    """Dotted path of every field of a configuration, at every depth."""
    if dataclasses.is_dataclass(value):
        inner = [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
    elif isinstance(value, tuple):
        inner = [(str(index), item) for index, item in enumerate(value)]
        inner = [(index, item) for index, item in inner if dataclasses.is_dataclass(item)]
    else:
        return
    for name, item in inner:
        yield f"{prefix}{name}"
        yield from _paths(item, f"{prefix}{name}.")


def _of_other_stage(path: str, stage: int) -> bool:
    return path.startswith("stages") and not f"{path}.".startswith(f"stages.{stage}.")


def _split(text: str) -> list[str]:
    """Texts of the values in "a,b" as they are written; commas inside [], {} or quotes do not split."""
    try:
        node = yaml.compose(f"[{text}]", Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"--sweep values {text!r} are not valid YAML: {error}") from error
    assert isinstance(node, yaml.SequenceNode)
    return [text[item.start_mark.index - 1 : item.end_mark.index - 1] for item in node.value]
