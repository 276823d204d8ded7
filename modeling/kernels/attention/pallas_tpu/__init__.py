"""Attention as TPU kernels (Pallas, Mosaic): scores exist one block at a time, in VMEM.

The last axis of a kernel's grid is a list of block pairs (`blocks.Schedule`) that the kernel is handed before it
starts, so that pairs which cannot interact cost neither a product nor a copy. Query heads of a group read one
key/value head: K and V are never repeated. f32 inputs are multiplied in f32 (six passes), bf16 ones in one; sums are
f32 always.

Rotary positions are applied outside: XLA fuses them into the copy that brings heads first, where q and k are read and
written once anyway. Inside, keys would be rotated again for every block of queries that reads them, and the backward
kernels would have to rotate both and turn the gradients back.
"""

from llaso_jax.modeling.kernels.attention.pallas_tpu.attention import tpu_attention, tpu_partial

__all__ = ["tpu_attention", "tpu_partial"]
