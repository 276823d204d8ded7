"""Attention kernels compiled for TPUs and GPUs that need not be there: blocks, on-chip memory, temporaries, traffic.

python scripts/aot_attention.py [--targets v5e v5p v6e h100] [--vmem]

Per target: every kernel at LLaSO's real shapes, forward and with its backward kernels, and the step of generation.
Work and traffic are counted from the block pairs that a kernel visits, beside those of splash attention (JAX's own TPU
kernel) with the same blocks. `--vmem` finds the least of some VMEM limits that each compiles with: minutes more.
TPUs need `pip install 'llaso-jax[tpu]'`, GPUs `jax-cuda12-plugin` and `jax-cuda12-pjrt` of jax's version.
"""

import argparse
import dataclasses
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Where the GPU compiler says what shared memory a kernel takes.
DUMP = tempfile.TemporaryDirectory()
os.environ["JAX_PLATFORMS"] = "cpu"  # the plugins only compile

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "h100": "h100:1"}


@dataclasses.dataclass(frozen=True)
class Shape:
    """One call: positions, heads, key/value heads, head width; causal or not; dtype; packed: segment ids, two rows."""

    name: str
    length: int
    heads: int
    kv_heads: int
    width: int
    causal: bool
    dtype: str = "bfloat16"
    packed: bool = False


SHAPES = (
    Shape("encoder, 30 s", 1500, 20, 20, 64, False),
    Shape("encoder, padded audio", 1500, 20, 20, 64, False, packed=True),
    Shape("decoder, 30 s and a prompt", 1560, 24, 8, 128, True),
    Shape("decoder, f32", 1560, 24, 8, 128, True, dtype="float32"),
    Shape("decoder, packed", 4096, 24, 8, 128, True, packed=True),
    Shape("decoder, long", 32768, 24, 8, 128, True),
)
# name, layers, rows, heads, key/value heads, positions, head width
STEPS = (
    ("step of LLaSO-Base", 28, 8, 24, 8, 1664, 128),
    ("step, heads split over 8", 28, 8, 3, 1, 1664, 128),
)


def main() -> None:
    """Print the tables of every target."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--targets", nargs="+", default=["v5e"], choices=[*TOPOLOGIES])
    parser.add_argument("--vmem", action="store_true")
    args = parser.parse_args()
    if "h100" in args.targets:
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_dump_to={DUMP.name}"
    for target in args.targets:
        mesh = one_device(target)
        print(f"\n{target} ({mesh.devices.flat[0].device_kind})\n")
        print("| call | blocks q x kv: forward, backward | pass | on chip | temporaries, MiB | s |")
        print("|---|---|---|---|---|---|")
        for row in compiled_rows(target, mesh, args.vmem):
            print("| " + " | ".join(row) + " |", flush=True)
    if set(args.targets) - {"h100"}:
        print("\n| call | kernel | GFLOP | of all pairs | MB: ours | splash | FLOP/byte, ours |")
        print("|---|---|---|---|---|---|---|")
        for row in traffic_rows():
            print("| " + " | ".join(row) + " |")


def one_device(target: str) -> Any:
    """A mesh of one device of a target."""
    from llaso_jax.errors import ConfigError
    from llaso_jax.planning.topology import topology_devices
    from llaso_jax.sharding.mesh import make_mesh

    try:
        return make_mesh("1x1", devices=topology_devices(TOPOLOGIES[target])[:1])
    except ConfigError as error:
        raise SystemExit(str(error)) from error


def compiled_rows(target: str, mesh: Any, vmem: bool) -> Iterator[tuple[str, ...]]:
    """What compiling every call gives."""
    for shape in SHAPES:
        for direction, program, inputs in passes(shape, target, mesh):
            yield (
                shape.name,
                blocks_of(shape, target, mesh),
                *compile_row(direction, program, inputs, target, vmem),
            )
    for name, *sizes in STEPS:
        program, inputs = step_of(sizes, target, mesh)
        yield name, "", *compile_row("decode", program, inputs, target, vmem)


def passes(shape: Shape, target: str, mesh: Any) -> Iterator[tuple[str, Callable, tuple]]:
    """(name, function, abstract inputs) of the forward pass and of the gradient."""
    import jax
    import jax.numpy as jnp

    from llaso_jax.modeling.kernels.attention import attention
    from llaso_jax.sharding.rules import FSDP_TENSOR, use_rules

    def forward(q: Any, k: Any, v: Any, ids: Any) -> Any:
        ids = ids if shape.packed else None
        with use_rules(mesh, FSDP_TENSOR):
            return attention(
                q,
                k,
                v,
                causal=shape.causal,
                q_segment_ids=ids,
                kv_segment_ids=ids,
                implementation="pallas_gpu" if target == "h100" else "pallas_tpu",
            )

    def loss(*inputs: Any) -> Any:
        return (forward(*inputs).astype(jnp.float32) ** 2).sum()

    positions = (2 if shape.packed else 1), shape.length
    of = [(*positions, n, shape.width) for n in (shape.heads, *[shape.kv_heads] * 2)]
    inputs = (*(spec(s, shape.dtype, mesh) for s in of), spec(positions, "int32", mesh))
    yield "forward", forward, inputs
    yield "and backward", jax.grad(loss, (0, 1, 2)), inputs


def step_of(sizes: list[int], target: str, mesh: Any) -> tuple[Callable, tuple]:
    """One query per row against a bf16 cache of all layers."""
    from llaso_jax.modeling.kernels.attention import decode_attention
    from llaso_jax.sharding.rules import FSDP_TENSOR, use_rules

    layers, rows, heads, kv_heads, length, width = sizes

    def step(*inputs: Any) -> Any:
        with use_rules(mesh, FSDP_TENSOR):
            name = "pallas_gpu" if target == "h100" else "pallas_tpu"
            return decode_attention(*inputs, implementation=name)

    cache = spec((layers, rows, kv_heads, length, width), "bfloat16", mesh)
    query = spec((rows, heads, width), "bfloat16", mesh)
    return step, (query, cache, cache, spec((rows,), "int32", mesh), spec((), "int32", mesh))


def spec(shape: tuple[int, ...], dtype: str, mesh: Any) -> Any:
    """An abstract array on the mesh's device."""
    import jax

    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def compile_row(
    direction: str, program: Callable, inputs: tuple, target: str, vmem: bool
) -> tuple[str, ...]:
    """(pass, on-chip memory, temporaries, seconds): an error of the compiler ends the script."""
    import jax

    for file in Path(DUMP.name).glob("*thunk_sequence.txt"):
        file.unlink()
    start = time.perf_counter()
    memory = jax.jit(program).lower(*inputs).compile().memory_analysis()
    spent = time.perf_counter() - start
    temporaries = "?" if memory is None else f"{memory.temp_size_in_bytes / 2**20:.1f}"
    chip = "fits"
    if target == "h100":
        chip = shared_memory()
    elif vmem:
        chip = f"<= {least_vmem(program, inputs)} MiB"
    return direction, chip, temporaries, f"{spent:.1f}"


def shared_memory() -> str:
    """KiB of shared memory of the kernels that were compiled last."""
    text = "".join(file.read_text() for file in Path(DUMP.name).glob("*thunk_sequence.txt"))
    found = re.findall(r"attention_(\w+) grid: .*?shared_memory: (\d+)", text)
    return ", ".join(f"{name} {int(size) / 1024:.0f} KiB" for name, size in found)


def least_vmem(program: Callable, inputs: tuple) -> int:
    """Least of some limits in MiB that a TPU program's kernels compile with."""
    import jax

    from llaso_jax.modeling.kernels.attention.pallas_tpu import common

    usual = common.VMEM_LIMIT
    fits = usual >> 20
    for limit in (32, 24, 16, 12, 8):
        common.VMEM_LIMIT = limit << 20
        try:
            jax.jit(lambda *x: program(*x)).lower(*inputs).compile()
        except jax.errors.JaxRuntimeError:
            break
        fits = limit
    common.VMEM_LIMIT = usual
    return fits


def blocks_of(shape: Shape, target: str, mesh: Any) -> str:
    """Block sizes of a call: forward, backward."""
    from llaso_jax.modeling.kernels.attention.pallas_gpu.sizes import BACKWARD, FORWARD
    from llaso_jax.modeling.kernels.attention.pallas_tpu.sizes import block_sizes

    itemsize = 4 if shape.dtype == "float32" else 2
    if target == "h100":
        sizes = [table[itemsize] for table in (FORWARD, BACKWARD)]
    else:
        kind = mesh.devices.flat[0].device_kind
        sizes = [
            block_sizes(phase, kind, shape.length, shape.length, itemsize)
            for phase in ("forward", "backward")
        ]
    return ", ".join(f"{size.q} x {size.kv}" for size in sizes)


def traffic_rows() -> Iterator[tuple[str, ...]]:
    """Work and HBM traffic of the TPU kernels, v5e's blocks, one row, without segment ids.

    A block moves when its index changes; the last axis of an array takes whole lanes of 128. Splash differs in what
    belongs to a query: it writes the logsumexp for 128 lanes, and reads it for 8 sublanes in its dK and dV kernel. Both
    skip pairs above the diagonal.
    """
    from llaso_jax.modeling.kernels.attention import blocks
    from llaso_jax.modeling.kernels.attention.pallas_tpu.sizes import block_sizes

    for shape in SHAPES:
        if shape.packed or shape.dtype == "float32":
            continue
        for kernel, products in (("forward", 2), ("dQ", 3), ("dK, dV", 4)):
            phase = "forward" if kernel == "forward" else "backward"
            size = block_sizes(phase, "TPU v5 lite", shape.length, shape.length, 2)
            q_count, kv_count = (-(-shape.length // block) for block in size)
            pairs = sum(
                not shape.causal or (i + 1) * size.q > j * size.kv
                for i in range(q_count)
                for j in range(kv_count)
            )
            flops = 2 * products * shape.heads * pairs * size.q * size.kv * shape.width
            q, kv = (2 * block * max(shape.width, blocks.LANES) for block in size)
            rows = 4 * size.q  # one f32 per query of a block
            moved = {
                "forward": shape.heads * (q_count * (2 * q + rows) + pairs * 2 * kv),
                "dQ": shape.heads * (q_count * (3 * q + 2 * rows) + pairs * 2 * kv),
                "dK, dV": shape.kv_heads * kv_count * 4 * kv
                + shape.heads * pairs * (2 * q + 2 * rows),
            }[kernel]
            extra = {
                "forward": shape.heads * q_count * rows * (blocks.LANES - 1),
                "dQ": 0,
                "dK, dV": shape.heads * pairs * 2 * rows * 7,
            }[kernel]
            yield (
                shape.name,
                kernel,
                f"{flops / 1e9:.1f}",
                f"{pairs / (q_count * kv_count):.0%}",
                f"{moved / 1e6:.0f}",
                f"{(moved + extra) / 1e6:.0f}",
                f"{flops / moved:.0f}",
            )


if __name__ == "__main__":
    main()
