"""Device memory of the loss and its gradient, compiled for a TPU that need not be there.

python scripts/aot_loss_memory.py [--topology v5p:2x2x1] [--positions 4096] [--hidden 3072] [--vocab 128256]

Prints, for a frozen and a trained head, the temporaries of cross-entropy in chunks and of its plain form, bf16.
Needs `pip install 'llaso-jax[tpu]'` (libtpu compiles without a TPU).
"""

import argparse


def main() -> None:
    """Print one row per form, head and number of rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--topology", default="v5p:2x2x1")
    parser.add_argument("--positions", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=3072)
    parser.add_argument("--vocab", type=int, default=128256)
    args = parser.parse_args()

    import jax
    import jax.numpy as jnp

    from llaso_jax.modeling.kernels.cross_entropy import cross_entropy, reference_cross_entropy
    from llaso_jax.planning.topology import tpu_devices

    on_chip = jax.sharding.SingleDeviceSharding(tpu_devices(args.topology)[0])

    def spec(shape: tuple[int, ...], dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=on_chip)

    print(f"{args.positions} positions, d={args.hidden}, V={args.vocab}, bf16, {args.topology}")
    print("| rows x positions | head | form | temporaries, GiB | peak, GiB |")
    print("|---|---|---|---|---|")
    for rows in (1, 8):
        shape = (rows, args.positions // rows)
        inputs = (
            spec((*shape, args.hidden), jnp.bfloat16),
            spec((args.vocab, args.hidden), jnp.bfloat16),
            spec(shape, jnp.int32),
            spec(shape, jnp.bool_),
        )
        for head, arguments in (("frozen", (0,)), ("trained", (0, 1))):
            for form, function in (("chunks", cross_entropy), ("plain", reference_cross_entropy)):
                gradient = jax.value_and_grad(
                    lambda *x, function=function: function(*x)[0], argnums=arguments
                )
                memory = jax.jit(gradient).lower(*inputs).compile().memory_analysis()
                if memory is None:
                    raise SystemExit(f"the compiler of {args.topology} gives no memory analysis")
                print(
                    f"| {shape[0]} x {shape[1]} | {head} | {form} "
                    f"| {memory.temp_size_in_bytes / 2**30:.2f} "
                    f"| {memory.peak_memory_in_bytes / 2**30:.2f} |"
                )


if __name__ == "__main__":
    main()
