"""Memory and FLOPs of a recipe's training step, compiled for TPUs that need not be there.

python scripts/aot_train_step.py llaso_base_instruct --topology v5e:4x2 --mesh 8x1 [--remat none dots layer offload]
    [--layers N] [field=value ...]

One row per rematerialization policy: peak memory per device, FLOPs of all devices as the program counts them (loop
bodies as often as they run, kernels by their own estimate) and over the formulas of modeling/flops.py, and the
seconds that compilation took.
`--layers` cuts both towers to N layers. Needs `pip install 'llaso-jax[tpu]'` (libtpu compiles without a TPU).
"""

import argparse
import dataclasses
import time


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help="a recipe, as for llaso train")
    parser.add_argument("overrides", nargs="*", help="any.field=value")
    parser.add_argument("--topology", default="v5e:4x2")
    parser.add_argument("--mesh", default="8x1")
    parser.add_argument("--stage", type=int, default=0)
    parser.add_argument("--remat", nargs="+", default=["none", "dots", "layer", "offload"])
    parser.add_argument("--layers", type=int)
    args = parser.parse_args()

    import jax

    from llaso_jax.config import load_config
    from llaso_jax.planning.recipe import planned_model, planned_stage
    from llaso_jax.planning.topology import tpu_devices
    from llaso_jax.sharding.hlo import count_flops, parse
    from llaso_jax.sharding.mesh import make_mesh
    from llaso_jax.training.abstract import abstract_step, stage_flops
    from llaso_jax.training.state import Layout

    devices = tpu_devices(args.topology)
    recipe = load_config(args.config, args.overrides)
    stage = planned_stage(recipe, args.stage)
    model, _ = planned_model(recipe)
    if args.layers:
        model = dataclasses.replace(
            model,
            audio=dataclasses.replace(model.audio, encoder_layers=args.layers),
            text=dataclasses.replace(model.text, num_hidden_layers=args.layers),
        )
    mesh = make_mesh(args.mesh, devices=devices)
    layout = Layout.of(model, mesh, recipe.sharding.rules(), frozen=recipe.sharding.frozen)
    data = stage.data
    print(
        f"{recipe.name}, stage {stage.name}: {data.rows // stage.accumulation} rows of "
        f"{data.sequence_length} positions and {data.chunks_per_row} chunks at a time, "
        f"{data.answers_per_row} answers; {args.topology}, mesh {args.mesh}, "
        f"{recipe.precision.resolve('tpu')[0].dtype}"
    )
    print(
        "| remat | peak per device, GiB | arguments, GiB | TFLOP | over formula | compiled in, s |"
    )
    print("|---|---|---|---|---|---|")
    expected = stage_flops(model, stage)
    for remat in args.remat:
        compute, frozen = dataclasses.replace(recipe.precision, remat=remat).resolve("tpu")
        start = time.perf_counter()
        try:
            compiled = abstract_step(model, stage, layout, compute, frozen_dtype=frozen).compile()
        except jax.errors.JaxRuntimeError as error:
            reason = next((line for line in str(error).splitlines() if "RESOURCE" in line), error)
            print(f"| {remat} | does not fit: {str(reason)[:160]} | | | | |", flush=True)
            continue
        seconds = time.perf_counter() - start
        memory = compiled.memory_analysis()
        if memory is None:
            raise SystemExit(f"the compiler of {args.topology} gives no memory analysis")
        flops = count_flops(parse(compiled.as_text() or "")) * mesh.size
        print(
            f"| {remat} | {memory.peak_memory_in_bytes / 2**30:.2f} "
            f"| {memory.argument_size_in_bytes / 2**30:.2f} | {flops / 1e12:.1f} "
            f"| {flops / expected:.3f} | {seconds:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
