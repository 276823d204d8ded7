"""What a stage minimizes, and what that needs beside the model's parameters: `objective` of a recipe's stages."""

import dataclasses
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from llaso_jax.config import StageConfig
from llaso_jax.errors import ConfigError
from llaso_jax.modeling.functional import ParamInfo, Params, abstract_params, flatten, unflatten
from llaso_jax.modeling.speech_lm import LossConfig, SpeechLM, SpeechLMConfig
from llaso_jax.modeling.token_ctc import CTCConfig, class_count, ctc_sums, sample_classes
from llaso_jax.training.optimizer import learning_rate_scales

OWN = "objective"
"""Where parameters are that belong to an objective: beside the model's while a stage trains, in its checkpoints, and in
nothing that is handed on or exported."""
BLANK = f"{OWN}/blank"


class Sums(NamedTuple):
    """What a micro-batch adds up to, beside its loss.

    rows: f32[B] loss of each row; tokens: i32[] tokens the loss is of; unaligned: i32[] samples that CTC left out.
    """

    rows: jax.Array
    tokens: jax.Array
    unaligned: jax.Array


class Objective(Protocol):
    """A loss over batches of the batch contract. Hashable: equal ones share compiled steps.

    drops: whether it drops something, and needs a key for that.
    """

    @property
    def drops(self) -> bool: ...

    def own_params(self, cfg: SpeechLMConfig) -> dict[str, ParamInfo]:
        """Trained parameters of its own, by path under OWN; they start at zero."""
        ...

    def classes(self, cfg: SpeechLMConfig, answers: int) -> int | None:
        """Tokens that CTC tells apart in a step with `answers` supervised places; None: it is no CTC."""
        ...

    def prepare(self, cfg: SpeechLMConfig, batch: dict[str, jax.Array], key: jax.Array) -> Any:
        """What all micro-batches of a step share, from its whole batch [..., A]."""
        ...

    def losses(
        self, model: SpeechLM, own: Params, batch: dict[str, jax.Array], prepared: Any
    ) -> tuple[jax.Array, Sums]:
        """Loss summed over the tokens of a micro-batch, f32[], and what comes with it."""
        ...


@dataclasses.dataclass(frozen=True)
class NextToken:
    """`lm`: cross-entropy of the answers, by the language model."""

    loss: LossConfig = LossConfig()
    drops = False

    def own_params(self, cfg: SpeechLMConfig) -> dict[str, ParamInfo]:
        """None."""
        return {}

    def classes(self, cfg: SpeechLMConfig, answers: int) -> None:
        """No CTC."""

    def prepare(self, cfg: SpeechLMConfig, batch: dict[str, jax.Array], key: jax.Array) -> None:
        """Nothing."""

    def losses(
        self, model: SpeechLM, own: Params, batch: dict[str, jax.Array], prepared: None
    ) -> tuple[jax.Array, Sums]:
        """Of the supervised tokens."""
        total, rows = model.losses(batch, self.loss)
        return total, Sums(rows, (batch["answer_index"] >= 0).sum(), jnp.int32(0))


@dataclasses.dataclass(frozen=True)
class TokenCTC:
    """`ctc`: CTC of the audio frames against token embeddings, without the language model (modeling/token_ctc.py)."""

    ctc: CTCConfig = CTCConfig()

    @property
    def drops(self) -> bool:
        """Whether frames are dropped."""
        return self.ctc.dropout > 0

    def own_params(self, cfg: SpeechLMConfig) -> dict[str, ParamInfo]:
        """The vector of blank."""
        return {BLANK: ParamInfo((cfg.text.hidden_size,), jnp.float32, ("norm",))}

    def classes(self, cfg: SpeechLMConfig, answers: int) -> int:
        """Without blank."""
        return class_count(cfg.text.vocab_size, answers, self.ctc)

    def prepare(
        self, cfg: SpeechLMConfig, batch: dict[str, jax.Array], key: jax.Array
    ) -> jax.Array:
        """The classes of the step."""
        index, token = batch["answer_index"], batch["answer_token"]
        count = self.classes(cfg, index.size)
        return sample_classes(key, index, token, vocab_size=cfg.text.vocab_size, count=count)

    def losses(
        self, model: SpeechLM, own: Params, batch: dict[str, jax.Array], prepared: jax.Array
    ) -> tuple[jax.Array, Sums]:
        """Of the label tokens: the answers without their ends."""
        sums = ctc_sums(model, flatten(own)[BLANK], batch, prepared, self.ctc)
        return sums.rows.sum(), Sums(sums.rows, sums.labels, sums.unaligned)


def objective_of(stage: StageConfig) -> Objective:
    """What `stage` minimizes."""
    return TokenCTC(stage.ctc) if stage.objective == "ctc" else NextToken(stage.loss)


def stage_scales(cfg: SpeechLMConfig, stage: StageConfig) -> dict[str, float | None]:
    """Learning-rate factor of every parameter of the model and of the stage's objective; None = frozen.

    Raises:
      ConfigError: rules that do not fit the model, or that train what the objective never runs.
    """
    scales = learning_rate_scales(abstract_params(cfg), stage.parameters)
    trained = [path for path, scale in scales.items() if scale is not None]
    idle = [path for path in trained if path.startswith("language_model/")]
    if stage.objective == "ctc" and idle:
        raise ConfigError(
            f"stage {stage.name!r}: 'parameters' train {idle[0]} and {len(idle) - 1} more of the language model, "
            f"which objective: ctc never runs. Freeze it with a rule such as "
            f"{{pattern: 'language_model/.*', learning_rate_scale: null}}, and train it in a stage with objective: lm."
        )
    return scales | dict.fromkeys(objective_of(stage).own_params(cfg), 1.0)


def model_part(params: Params) -> Params:
    """`params` without what belongs to an objective."""
    return {name: part for name, part in params.items() if name != OWN}


def own_part(params: Params) -> Params:
    """What of `params` belongs to an objective."""
    return {OWN: params[OWN]} if OWN in params else {}


def abstract_own(objective: Objective, cfg: SpeechLMConfig) -> Params:
    """Shapes of the objective's own parameters."""
    infos = objective.own_params(cfg)
    return unflatten(
        {path: jax.ShapeDtypeStruct(info.shape, info.dtype) for path, info in infos.items()}
    )
