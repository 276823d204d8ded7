"""`LLaSOModel`: a speech-language model with the habits of transformers."""

import logging
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh

from llaso_jax.conversion import save_model
from llaso_jax.data.tokenizer import eos_token_ids, load_tokenizer
from llaso_jax.errors import ConfigError
from llaso_jax.inference.decoding import generate_tokens, prompt_logits
from llaso_jax.inference.pretrained import end_tokens, find_model, load_pretrained
from llaso_jax.inference.sampling import GenerationConfig
from llaso_jax.modeling.compute import ComputeConfig
from llaso_jax.modeling.functional import Params
from llaso_jax.modeling.speech_lm import SpeechLMConfig
from llaso_jax.sharding.mesh import make_mesh

logger = logging.getLogger(__name__)

Dtype = Literal["auto", "float32", "bfloat16"]


class LLaSOModel:
    """Parameters, where they are, and how to compute with them.

        model = LLaSOModel.from_pretrained(folder)
        ids = model.generate(**inputs, max_new_tokens=64)
        processor.batch_decode(ids)

    Attributes:
      config: architecture.
      params: nested dict of arrays.
      compute: dtype and kernels.
      mesh: that the parameters are split over; None for one device.
      eos_token_id: ids that end an answer, unless `generate` is given others.
      pad_token_id: fills answers behind their end.
    """

    def __init__(
        self,
        config: SpeechLMConfig,
        params: Params,
        *,
        compute: ComputeConfig | None = None,
        mesh: Mesh | None = None,
        eos_token_id: tuple[int, ...] = (),
        pad_token_id: int = 0,
        hf_config: dict[str, Any] | None = None,
    ) -> None:
        self.config = config
        self.params = params
        self.compute = compute or ComputeConfig()
        self.mesh = mesh
        self.eos_token_id = eos_token_id
        self.pad_token_id = pad_token_id
        self._hf_config = hf_config or {}

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, *, mesh: Mesh | str | None = None, dtype: Dtype = "auto"
    ) -> "LLaSOModel":
        """Load a model folder, a training run's output, or a LLaSO checkpoint in Hugging Face layout.

        Args:
          folder: of the model, with its tokenizer (whose EOS tokens end answers).
          mesh: devices to split it over, such as "8x1"; None for the first device.
          dtype: of parameters and computation. auto: float32 on CPU, bfloat16 on accelerators.

        Raises:
          CheckpointError, ConversionError: no whole model there.
          ShardingError: a mesh that does not fit the devices or the model.
        """
        folder = find_model(folder)
        placed = make_mesh(mesh) if isinstance(mesh, str) else mesh
        compute = ComputeConfig(dtype=resolve_dtype(dtype))
        cfg, params, hf_config = load_pretrained(folder, mesh=placed, dtype=compute.jnp_dtype)
        eos, pad = end_tokens(folder, hf_config), 0
        if any((folder / name).is_file() for name in ("tokenizer_config.json", "tokenizer.json")):
            tokenizer = load_tokenizer(folder)
            eos = tuple(dict.fromkeys((*eos_token_ids(tokenizer), *eos)))
            pad = int(tokenizer.pad_token_id)  # type: ignore[arg-type]
        if not eos:
            logger.warning(
                "%s has no tokenizer and names no eos_token_id: answers end at max_new_tokens only",
                folder,
            )
        return cls(
            cfg,
            params,
            compute=compute,
            mesh=placed,
            eos_token_id=eos,
            pad_token_id=pad,
            hf_config=hf_config,
        )

    def save_pretrained(self, folder: str | Path, *, overwrite: bool = False) -> None:
        """Write a model folder; `LLaSOProcessor.save_pretrained` adds the tokenizer.

        Raises:
          TargetExistsError: the folder is not empty and `overwrite` is off.
        """
        save_model(folder, self.config, self.params, hf_config=self._hf_config, overwrite=overwrite)

    def generate(
        self,
        *,
        tokens: np.ndarray,
        positions: np.ndarray,
        segment_ids: np.ndarray,
        audio_slot: np.ndarray | None = None,
        mel: np.ndarray | None = None,
        mel_frames: np.ndarray | None = None,
        audio_seconds: np.ndarray | None = None,
        audio_seconds_dropped: np.ndarray | None = None,
        **settings: Any,
    ) -> np.ndarray:
        """Answer every prompt of `LLaSOProcessor`'s output.

        Args:
          tokens … mel_frames: `**inputs`; the two audio_seconds are a record and not read.
          **settings: see `generation_config`.

        Returns:
          int32[B, n] new tokens only, n of the longest answer; shorter ones end in an EOS id, then
          pad_token_id. The same for a prompt in whatever batch it is.

        Raises:
          ConfigError: inputs or settings that cannot work.
          TypeError: unknown settings.
        """
        batch = _given(tokens, positions, segment_ids, audio_slot, mel, mel_frames)
        generated = generate_tokens(
            self.config,
            self.params,
            batch,
            self.generation_config(**settings),
            compute=self.compute,
            mesh=self.mesh,
        )
        return generated.tokens[:, : generated.lengths.max()]

    def generation_config(
        self,
        *,
        max_new_tokens: int = 256,
        do_sample: bool | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        eos_token_id: int | tuple[int, ...] | list[int] | None = None,
        pad_token_id: int | None = None,
    ) -> GenerationConfig:
        """Settings of `generate` under the names of transformers.

        Args:
          max_new_tokens: most tokens of an answer.
          do_sample: None samples if `temperature` is above 0; True takes temperature 1 by default.
          temperature, top_k, top_p: of sampling; temperature 0 is greedy.
          seed: of sampling: the same seed draws the same answers.
          eos_token_id, pad_token_id: instead of the model's.

        Raises:
          ConfigError: values out of range or that contradict each other.
        """
        if do_sample is False and temperature:
            raise ConfigError(
                f"do_sample=False and temperature={temperature}: greedy decoding has no temperature."
            )
        if temperature is None:
            temperature = 1.0 if do_sample else 0.0
        ids = self.eos_token_id if eos_token_id is None else eos_token_id
        return GenerationConfig(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k or 0,
            top_p=1.0 if top_p is None else top_p,
            seed=seed,
            eos_token_id=ids,  # type: ignore[arg-type]  # one id becomes a tuple
            pad_token_id=self.pad_token_id if pad_token_id is None else pad_token_id,
        )

    def __call__(
        self,
        *,
        tokens: np.ndarray,
        positions: np.ndarray,
        segment_ids: np.ndarray,
        audio_slot: np.ndarray | None = None,
        mel: np.ndarray | None = None,
        mel_frames: np.ndarray | None = None,
        audio_seconds: np.ndarray | None = None,
        audio_seconds_dropped: np.ndarray | None = None,
        logits_at: np.ndarray | None = None,
    ) -> np.ndarray:
        """Next-token logits.

        Args:
          tokens … mel_frames: `**inputs`.
          logits_at: i32[B, A] positions wanted; None for all S of them, which for a 128 k vocabulary
            and 1600 positions are 0.8 GB a row.

        Returns:
          f32[B, A, V].
        """
        batch = _given(tokens, positions, segment_ids, audio_slot, mel, mel_frames)
        return prompt_logits(
            self.config, self.params, batch, at=logits_at, compute=self.compute, mesh=self.mesh
        )


def resolve_dtype(dtype: Dtype) -> Literal["float32", "bfloat16"]:
    """`auto` is float32 on CPU, where generation in bfloat16 is slow, and bfloat16 on accelerators."""
    if dtype == "auto":
        return "float32" if jax.default_backend() == "cpu" else "bfloat16"
    if dtype not in ("float32", "bfloat16"):
        raise ConfigError(f"dtype {dtype!r} is unknown: choose auto, float32 or bfloat16.")
    return dtype


def _given(
    tokens: np.ndarray,
    positions: np.ndarray,
    segment_ids: np.ndarray,
    audio_slot: np.ndarray | None,
    mel: np.ndarray | None,
    mel_frames: np.ndarray | None,
) -> dict[str, np.ndarray]:
    entries = {
        "tokens": tokens,
        "positions": positions,
        "segment_ids": segment_ids,
        "audio_slot": audio_slot,
        "mel": mel,
        "mel_frames": mel_frames,
    }
    return {name: array for name, array in entries.items() if array is not None}
