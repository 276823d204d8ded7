"""Checkpoints of a stage: trained parameters, optimizer state, step and position in the data, together.

Frozen weights are not saved: they come from the run's own starting point (`weights`, or `model` and
`seed`), so a stage-1 checkpoint of LLaSO-Base is 160 MB, not 7.9 GB.
"""

import logging
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from llaso_jax.config import CheckpointConfig
from llaso_jax.errors import CheckpointError
from llaso_jax.training.state import TrainState

logger = logging.getLogger(__name__)


class StageCheckpoints:
    """Async Orbax checkpoints of one stage, in `folder/<step>`; a context manager that waits on exit."""

    def __init__(self, folder: Path, cfg: CheckpointConfig) -> None:
        policies: list[Any] = [checkpoint_managers.LatestN(cfg.keep_latest)]
        if cfg.keep_every_steps is not None:
            policies.append(checkpoint_managers.EveryNSteps(cfg.keep_every_steps))
        self.folder = folder
        self._manager = ocp.CheckpointManager(
            folder.absolute(),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
                enable_async_checkpointing=True,
            ),
        )

    def __enter__(self) -> "StageCheckpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.wait_until_finished()
        self._manager.close()

    def latest_step(self) -> int | None:
        """Step of the newest complete checkpoint; None if there is none."""
        return self._manager.latest_step()

    def save(self, state: TrainState, progress: dict[str, Any], *, step: int) -> None:
        """Start saving `state` and the JSON-serializable `progress`; returns before it is written."""
        if step == self.latest_step():
            return
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state._asdict()),
                progress=ocp.args.JsonSave(progress),
            ),
        )

    def wait(self) -> None:
        """Block until what was started is on disk."""
        self._manager.wait_until_finished()

    def restore(self, like: TrainState, step: int) -> tuple[TrainState, dict[str, Any]]:
        """State with the shapes and shardings of `like`, whatever mesh it was saved on, and progress.

        Raises:
          CheckpointError: the checkpoint is of other parameters than this run trains.
        """
        abstract = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding),
            like._asdict(),
        )
        try:
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(abstract),
                    progress=ocp.args.JsonRestore(),
                ),
            )
        except (ValueError, KeyError) as error:
            raise CheckpointError(
                f"checkpoint {self.folder / str(step)} does not hold the parameters this run trains: "
                f"{error}. Choose another --output, or pass --overwrite to start over."
            ) from error
        return TrainState(**restored["state"]), restored["progress"]
