"""llaso_jax: LLaSO speech-language models in JAX/Flax."""
