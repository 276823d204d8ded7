"""Which strategies a recipe can be trained with on a number of devices, and what is in the way of the others."""

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

from llaso_jax.config import RunConfig
from llaso_jax.errors import ConfigError
from llaso_jax.modeling.functional import param_shardings
from llaso_jax.planning.recipe import planned_model, planned_stage
from llaso_jax.sharding.mesh import abstract_mesh
from llaso_jax.sharding.rules import ShardingError
from llaso_jax.sharding.strategies import Plan, plans
from llaso_jax.training.fit import check_stage


class JudgedPlan(NamedTuple):
    """A plan, and why the recipe cannot be trained with it: None if it can."""

    plan: Plan
    reason: str | None


def judged_plans(recipe: RunConfig, devices: int, *, stage: int = 0) -> Iterator[JudgedPlan]:
    """Every strategy on every mesh of `devices` devices, as stage `stage` of `recipe` fits it.

    `sharding.encoder` of the recipe is kept. No device is needed.

    Raises:
      ConfigError: no such stage, or rules that do not fit the model.
    """
    # What is wrong on every mesh is an error, no plan's reason.
    planned_model(recipe)
    planned_stage(recipe, stage)
    for plan in plans(devices):
        sharding = dataclasses.replace(recipe.sharding, strategy=plan.strategy)
        try:
            check_plan(dataclasses.replace(recipe, sharding=sharding), plan.mesh, stage=stage)
        except (ShardingError, ConfigError) as error:
            yield JudgedPlan(plan, str(error))
        else:
            yield JudgedPlan(plan, None)


def check_plan(recipe: RunConfig, mesh: str, *, stage: int = 0) -> None:
    """Raise unless stage `stage` of `recipe` can be trained on `mesh` with the recipe's strategy. No device is needed.

    Raises:
      ConfigError: no such stage, rules that do not fit the model, or rows and chunks that do not split.
      ShardingError: a mesh that is not understood, or parameters, sequences or heads that do not split over it.
    """
    devices, rules = abstract_mesh(mesh), recipe.sharding.rules()
    model, _ = planned_model(recipe)
    param_shardings(model, devices, rules)
    check_stage(model, planned_stage(recipe, stage), rules, devices.shape)
