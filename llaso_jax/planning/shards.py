"""The parameters of a recipe on a mesh that need not be there."""

import jax.numpy as jnp

from llaso_jax.config import RunConfig
from llaso_jax.modeling.functional import abstract_params, param_shardings
from llaso_jax.planning.recipe import planned_model, planned_stage
from llaso_jax.sharding.mesh import abstract_mesh
from llaso_jax.sharding.report import shard_row, shard_table
from llaso_jax.training.optimizer import learning_rate_scales

PLATFORM = "tpu"  # what `auto` of a recipe's precision stands for; a gpu has the same


def recipe_shards(recipe: RunConfig, mesh: str, *, stage: int = 0) -> str:
    """Table of every parameter of `recipe` on `mesh`: shape, dtype, layout, bytes per device, copies.

    Args:
      recipe: its model, weights' architecture or LLaSO-Base (planning/recipe.py).
      mesh: as `llaso train --mesh`; devices need not exist.
      stage: whose trained parameters are f32 and have moments.

    Raises:
      ShardingError: a mesh that is not understood, that the recipe's strategy does not use, or over which a
        parameter does not split.
      ConfigError: no such stage, or rules that do not fit the model.
    """
    abstract = abstract_mesh(mesh)
    model, source = planned_model(recipe)
    chosen = planned_stage(recipe, stage)
    infos = abstract_params(model)
    scales = learning_rate_scales(infos, chosen.parameters)
    _, frozen = recipe.precision.resolve(PLATFORM)
    rules, replicated = recipe.sharding.rules(), recipe.sharding.frozen == "replicated"
    trained_shardings = param_shardings(model, abstract, rules)
    frozen_shardings = param_shardings(model, abstract, rules, as_used=replicated)
    rows, trained = [], 0
    for path, info in infos.items():
        still = scales[path] is None
        dtype, shardings = (frozen, frozen_shardings) if still else ("float32", trained_shardings)
        row = shard_row(path, info.shape, dtype, jnp.dtype(dtype).itemsize, shardings[path])
        rows.append(row)
        trained += 0 if still else row.device_bytes
    how = rules.name + (f", encoder {rules.encoder.name}" if rules.encoder else "")
    head = (
        f"{recipe.name}, stage {chosen.name!r}, strategy {how}, mesh {mesh} ({abstract.size} devices); "
        f"sizes of {source}\n\n"
    )
    totals = {
        "parameters": sum(row.device_bytes for row in rows),
        "of them trained": trained,
        "moments of AdamW": 2 * trained,
    }
    return head + shard_table(rows, totals)
