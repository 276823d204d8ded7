"""Cross-entropy over a large vocabulary without its logits: some positions at a time, gradients in the same pass.

Logits of 4,096 positions and 128,256 entries take 2.1 GB in f32, and as much again for their gradient. Here a
chunk's logits give its losses and, while they are there, its gradients: they are never stored, and never
computed twice. Idea: Liger-Kernel's fused linear cross-entropy (arXiv 2410.10989, section 3.2); derived here anew.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from llaso_jax.modeling.kernels.chunks import cut, join
from llaso_jax.sharding.rules import constrain, parts_of

CHUNK = 256
"""Positions whose logits a device has at a time: 131 MB in f32 at 128,256 entries."""
MASKED = -1e30


class Options(NamedTuple):
    """What is the same for all positions (see `cross_entropy`)."""

    vocab_size: int
    label_smoothing: float
    z_loss: float
    columns: int  # positions of each row that are worked on at a time


class _Axes(NamedTuple):
    """Logical axes of rows and of the vocabulary while logits are there."""

    rows: str
    vocab: str


ROWS_APART = _Axes("batch", "vocab")
VOCABULARY_APART = _Axes("batch_at_head", "vocab_at_head")


class _Sums(NamedTuple):
    """What chunks add up to: f32[] loss and, where the table is trained, f32[V, D] its gradient."""

    total: jax.Array
    d_table: jax.Array | None


def cross_entropy(
    hidden: jax.Array,
    table: jax.Array,
    targets: jax.Array,
    valid: jax.Array,
    *,
    vocab_size: int | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    chunk: int = CHUNK,
) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy of `hidden @ table.T` with `targets`, summed over the valid positions.

    Each position costs logsumexp(z) - (1 - s) z[target] - s mean(z) + w logsumexp(z)**2, with smoothing s and z-loss
    weight w. Gradients are those of the sum: with respect to `hidden` always, to `table` only if it is
    differentiated, which a frozen head is not. Reverse mode only.

    Args:
      hidden: [B, A, D] hidden states, in the dtype of the products.
      table: [V, D] output embeddings, in the same dtype.
      targets: i32[B, A] entries of the table.
      valid: bool[B, A] positions that count.
      vocab_size: rows of the table that are tokens; the others pad it. Default: all.
      label_smoothing: share s of the aim that is spread over all tokens.
      z_loss: weight w that keeps the normalizer near 1 (PaLM, arXiv 2204.02311, section 5).
      chunk: positions that a device works on at a time, of all its rows together.

    Returns:
      f32[] sum, and f32[B, A] the losses themselves: 0 where not valid, without a gradient.

    Raises:
      ValueError: a chunk that is not positive, smoothing outside [0, 1), or a vocabulary larger than the table.
    """
    rows = -(-len(hidden) // parts_of("batch"))
    columns = max(1, chunk // rows) * parts_of("answers")
    options = Options(vocab_size or table.shape[0], label_smoothing, z_loss, columns)
    if chunk < 1:
        raise ValueError(f"chunk={chunk} positions: at least 1 is needed.")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing={label_smoothing}: a share from 0 to below 1 is needed.")
    if options.vocab_size > table.shape[0]:
        raise ValueError(f"vocab_size={vocab_size}, but the table has {table.shape[0]} rows.")
    total, losses = _cross_entropy(hidden, table, targets, valid, options)
    return total, jax.lax.stop_gradient(losses)


def _value(
    hidden: jax.Array, table: jax.Array, targets: jax.Array, valid: jax.Array, options: Options
) -> tuple[jax.Array, jax.Array]:
    sums, losses, _ = _run(hidden, table, targets, valid, options, d_hidden=False, d_table=False)
    return sums.total, losses


def _forward(hidden: Any, table: Any, targets: Any, valid: Any, options: Options):
    sums, losses, d_hidden = _run(
        hidden.value,
        table.value,
        targets.value,
        valid.value,
        options,
        d_hidden=hidden.perturbed,
        d_table=table.perturbed,
    )
    d_table = None if sums.d_table is None else sums.d_table.astype(table.value.dtype)
    return (sums.total, losses), (d_hidden, d_table)


def _backward(options: Options, residuals: tuple[Any, Any], cotangents: tuple[Any, Any]):
    scale = cotangents[0]  # the losses' own cotangent is cut off in cross_entropy
    if isinstance(scale, jax.custom_derivatives.SymbolicZero):
        return None, None, None, None
    d_hidden, d_table = (
        None if gradient is None else (scale * gradient).astype(gradient.dtype)
        for gradient in residuals
    )
    return d_hidden, d_table, None, None


_cross_entropy = jax.custom_vjp(_value, nondiff_argnums=(4,))
_cross_entropy.defvjp(_forward, _backward, symbolic_zeros=True)


def _run(
    hidden: jax.Array,
    table: jax.Array,
    targets: jax.Array,
    valid: jax.Array,
    options: Options,
    *,
    d_hidden: bool,
    d_table: bool,
) -> tuple[_Sums, jax.Array, jax.Array | None]:
    """All chunks in turn: the sums, losses [B, A] and, if asked for, the gradient of `hidden`."""
    axes = ROWS_APART
    if d_table and len(table) % parts_of(VOCABULARY_APART.vocab) == 0:
        # Answers are few: all their hidden states weigh less than the gradient of the table, which then is never whole.
        axes = VOCABULARY_APART
    table = constrain(table, axes.vocab, "embed")
    step = functools.partial(_chunk, table, options, axes, d_hidden)
    sums = _Sums(jnp.zeros(()), jnp.zeros(table.shape, jnp.float32) if d_table else None)
    length = targets.shape[1]
    if length <= options.columns:
        sums, (losses, gradient) = step(sums, (hidden, targets, valid))
        return sums, losses, gradient
    parts = tuple(cut(array, options.columns) for array in (hidden, targets, valid))
    sums, outputs = jax.lax.scan(step, sums, parts)
    losses, gradient = jax.tree.map(lambda chunks: join(chunks, length), outputs)
    return sums, losses, gradient


def _chunk(
    table: jax.Array,
    options: Options,
    axes: _Axes,
    d_hidden: bool,
    sums: _Sums,
    inputs: tuple[jax.Array, ...],
) -> tuple[_Sums, tuple[jax.Array, jax.Array | None]]:
    hidden = constrain(inputs[0], axes.rows, "answers", "embed")
    targets, valid = (constrain(array, axes.rows, "answers") for array in inputs[1:])
    size, smoothing, z_loss, _ = options
    logits = jnp.einsum("BAD,VD->BAV", hidden, table, preferred_element_type=jnp.float32)
    logits = constrain(logits, axes.rows, "answers", axes.vocab)
    entry = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 2)
    real = entry < size
    if size < table.shape[0]:
        logits = jnp.where(real, logits, MASKED)
    hit = entry == targets[..., None]
    # Reductions over the vocabulary, no gather: a vocabulary that is split over devices stays split.
    normalizer = jax.nn.logsumexp(logits, axis=-1)
    aim = (1 - smoothing) * jnp.where(hit, logits, 0).sum(-1)
    if smoothing:
        aim += smoothing / size * jnp.where(real, logits, 0).sum(-1)
    losses = jnp.where(valid, normalizer - aim + z_loss * normalizer**2, 0)
    total = sums.total + losses.sum()
    losses = constrain(losses, "batch", "answers")
    if not d_hidden and sums.d_table is None:
        return _Sums(total, None), (losses, None)

    probability = jnp.exp(logits - normalizer[..., None])
    d_logits = probability * (1 + 2 * z_loss * normalizer)[..., None] - (1 - smoothing) * hit
    if smoothing:
        d_logits -= smoothing / size * real
    d_logits = jnp.where(valid[..., None], d_logits, 0).astype(hidden.dtype)
    gradient = d_table = None
    if d_hidden:
        gradient = jnp.einsum(
            "BAV,VD->BAD", d_logits, table, preferred_element_type=jnp.float32
        ).astype(hidden.dtype)
        gradient = constrain(gradient, "batch", "answers", "embed")
    if sums.d_table is not None:
        d_table = sums.d_table + jnp.einsum(
            "BAV,BAD->VD", d_logits, hidden, preferred_element_type=jnp.float32
        )
        d_table = constrain(d_table, axes.vocab, "embed")
    return _Sums(total, d_table), (losses, gradient)
