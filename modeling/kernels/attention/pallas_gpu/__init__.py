"""Attention as GPU kernels (Pallas, Triton): scores exist one block at a time, in registers.

A program owns a block of queries (or, for dK and dV, of keys) and loops over the blocks that it interacts with
(`blocks.Spans`). Arrays are read where they lie, [B, S, N, H]: nothing is transposed, padded or repeated.
"""

from llaso_jax.modeling.kernels.attention.pallas_gpu.attention import gpu_attention, gpu_partial

__all__ = ["gpu_attention", "gpu_partial"]
