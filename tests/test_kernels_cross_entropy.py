"""Cross-entropy in chunks is cross-entropy: values, gradients, padding, meshes, and nothing it should not compute."""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from llaso_jax.modeling.kernels.cross_entropy import cross_entropy, reference_cross_entropy
from llaso_jax.sharding.collectives import collectives
from llaso_jax.sharding.hlo import Program, parse
from llaso_jax.sharding.mesh import make_mesh
from llaso_jax.sharding.rules import FSDP_TENSOR, gather, use_rules

B, A, D, V = 4, 13, 24, 96
OPTIONS = {
    "plain": {},
    "padded vocabulary": {"vocab_size": 91},
    "smoothing": {"label_smoothing": 0.1, "vocab_size": 91},
    "z-loss": {"z_loss": 1e-2},
    "both": {"label_smoothing": 0.2, "z_loss": 1e-3, "vocab_size": 90},
}


@dataclasses.dataclass(frozen=True)
class Case:
    hidden: jax.Array
    table: jax.Array
    targets: jax.Array
    valid: jax.Array

    def grads(self, function, **options):
        """(sum, losses, gradient of hidden, gradient of the table)."""

        def total(hidden, table):
            return function(hidden, table, self.targets, self.valid, **options)

        value_and_grad = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)
        (loss, losses), grads = jax.jit(value_and_grad)(self.hidden, self.table)
        return loss, losses, *grads


@pytest.fixture(scope="module")
def case() -> Case:
    keys = jax.random.split(jax.random.key(0), 4)
    return Case(
        2 * jax.random.normal(keys[0], (B, A, D)),
        jax.random.normal(keys[1], (V, D)),
        jax.random.randint(keys[2], (B, A), 0, 90),
        jax.random.bernoulli(keys[3], 0.7, (B, A)),
    )


def assert_close(actual, expected, tolerance=1e-6):
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == b.dtype
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.abs(a - b).max() <= tolerance * np.abs(b).max()


@pytest.mark.parametrize("chunk", [1, 4 * 5, 4 * 13, 256])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_values_and_gradients_are_those_of_the_plain_form(case, options, chunk):
    expected = case.grads(reference_cross_entropy, **options)
    assert_close(case.grads(cross_entropy, chunk=chunk, **options), expected)


def test_a_position_that_does_not_count_costs_and_changes_nothing(case):
    ruined = dataclasses.replace(
        case, hidden=jnp.where(case.valid[..., None], case.hidden, jnp.nan)
    )
    loss, losses, d_hidden, _ = ruined.grads(cross_entropy, chunk=4 * 5)
    assert np.isfinite(loss)
    assert not np.asarray(losses)[~np.asarray(case.valid)].any()
    assert not np.asarray(d_hidden)[~np.asarray(case.valid)].any()


def test_a_row_that_is_not_finite_leaves_the_losses_of_others_alone(case):
    ruined = dataclasses.replace(case, hidden=case.hidden.at[1].set(jnp.inf))
    _, losses, _, _ = ruined.grads(cross_entropy, chunk=4 * 5)
    _, expected, _, _ = case.grads(cross_entropy, chunk=4 * 5)
    assert np.isnan(np.asarray(losses)[1]).any()
    np.testing.assert_array_equal(np.asarray(losses)[[0, 2, 3]], np.asarray(expected)[[0, 2, 3]])


def test_the_gradient_scales_with_what_the_sum_is_used_for(case):
    def used(function):
        def mean(hidden, table):
            total, _ = function(hidden, table, case.targets, case.valid)
            return -3 * total**2

        return jax.jit(jax.grad(mean, argnums=(0, 1)))(case.hidden, case.table)

    assert_close(used(cross_entropy), used(reference_cross_entropy), 2e-6)


def test_losses_have_no_gradient(case):
    def only_losses(hidden):
        return cross_entropy(hidden, case.table, case.targets, case.valid)[1].sum()

    assert not np.asarray(jax.grad(only_losses)(case.hidden)).any()


def test_bfloat16_products_sum_in_float32(case):
    half = dataclasses.replace(
        case, hidden=case.hidden.astype(jnp.bfloat16), table=case.table.astype(jnp.bfloat16)
    )
    exact = dataclasses.replace(
        case,
        hidden=half.hidden.astype(jnp.float32),
        table=half.table.astype(jnp.float32),
    )
    loss, losses, d_hidden, d_table = half.grads(cross_entropy, chunk=4 * B)
    expected = exact.grads(reference_cross_entropy)
    assert_close((loss, losses), expected[:2])  # products of bf16 are exact in f32
    assert (d_hidden.dtype, d_table.dtype) == (jnp.bfloat16, jnp.bfloat16)
    # The gradient of the logits is rounded to bf16 (2**-9) before its products, and these after.
    rounded = (d_hidden.astype(jnp.float32), d_table.astype(jnp.float32))
    assert_close(rounded, expected[2:], 2**-7)


@pytest.mark.parametrize("mesh", ["8x1", "4x2", "2x4", "1x8"])
def test_every_mesh_gives_the_same(case, mesh):
    expected = case.grads(reference_cross_entropy, vocab_size=91)
    wide = dataclasses.replace(
        case,
        hidden=jnp.concatenate([case.hidden] * 2),
        targets=jnp.concatenate([case.targets] * 2),
        valid=jnp.concatenate([case.valid] * 2),
    )
    with use_rules(make_mesh(mesh), FSDP_TENSOR):
        loss, losses, d_hidden, d_table = wide.grads(cross_entropy, vocab_size=91, chunk=10)
    assert_close(
        (loss / 2, losses[:B], losses[B:], d_hidden[:B], d_table / 2),
        (*expected[:2], *expected[1:]),
        2e-6,
    )


def test_no_device_sums_a_whole_gradient_of_a_trained_table():
    """Stored over 8 devices, gathered for use in bfloat16; a second chunk sends its answers, no table."""
    entries, whole = 4096, 4096 * D
    mesh = make_mesh("8x1")
    stored = NamedSharding(mesh, P(None, "fsdp"))
    rows = NamedSharding(mesh, P("fsdp"))

    def loss(table, hidden, targets, valid):
        table = gather(table.astype(jnp.bfloat16), ("vocab", "embed"))
        return cross_entropy(hidden, table, targets, valid, chunk=8 * 8)[0]

    def program(answers: int) -> Program:
        inputs = [
            jax.ShapeDtypeStruct((8, answers, *more), dtype, sharding=rows)
            for more, dtype in (((D,), jnp.bfloat16), ((), jnp.int32), ((), jnp.bool_))
        ]
        table = jax.ShapeDtypeStruct((entries, D), jnp.float32, sharding=stored)
        with use_rules(mesh, FSDP_TENSOR):
            step = jax.jit(jax.grad(loss), out_shardings=stored)
            return parse(step.lower(table, *inputs).compile().as_text())

    one, two = (program(8 * chunks) for chunks in (1, 2))
    for found in (one, two):
        sums = [c for c in collectives(found) if c.kind in ("all-reduce", "reduce-scatter")]
        assert all(c.operand_bytes < whole for c in sums), "a sum of whole gradients"
    sent = [sum(c.sent_bytes(8) for c in collectives(found)) for found in (one, two)]
    assert sent[1] - sent[0] < whole, "a chunk sends the table, or its gradient"


def products(function, *arguments) -> list[tuple[int, ...]]:
    """Shapes of the results of all matrix products, loop bodies counted once."""
    found = []

    def walk(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "dot_general":
                found.append(equation.outvars[0].aval.shape)
            for value in equation.params.values():
                for inner in value if isinstance(value, list | tuple) else [value]:
                    inner = getattr(inner, "jaxpr", inner)
                    if hasattr(inner, "eqns"):
                        walk(inner)

    walk(jax.make_jaxpr(function)(*arguments).jaxpr)
    return found


def test_a_frozen_table_gets_no_gradient_and_no_logits_are_kept(case):
    def total(hidden, table):
        return cross_entropy(hidden, table, case.targets, case.valid, chunk=4 * B)[0]

    arguments = (case.hidden, case.table)
    assert products(total, *arguments) == [(B, 4, V)]
    frozen = products(jax.grad(total), *arguments)
    assert sorted(frozen) == sorted([(B, 4, V), (B, 4, D)])
    trained = products(jax.grad(total, argnums=(0, 1)), *arguments)
    assert sorted(trained) == sorted([(B, 4, V), (B, 4, D), (V, D)])
    only_table = products(jax.grad(total, argnums=1), *arguments)
    assert sorted(only_table) == sorted([(B, 4, V), (V, D)])


@pytest.mark.parametrize(("mesh", "columns"), [(None, 1), ("2x4", 3), ("8x1", 12)])
def test_a_chunk_is_what_one_device_holds(case, mesh, columns):
    hidden, targets, valid = (
        jnp.concatenate([array] * 2) for array in (case.hidden, case.targets, case.valid)
    )

    def total(hidden):
        return cross_entropy(hidden, case.table, targets, valid, chunk=12)[0]

    with use_rules(make_mesh(mesh), FSDP_TENSOR) if mesh else contextlib.nullcontext():
        assert products(total, hidden) == [(8, columns, V)]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"chunk": 0}, "chunk=0"),
        ({"label_smoothing": 1.0}, "label_smoothing=1.0"),
        ({"vocab_size": V + 1}, f"vocab_size={V + 1}"),
    ],
)
def test_options_that_make_no_sense_are_refused(case, options, told):
    with pytest.raises(ValueError, match=told):
        cross_entropy(case.hidden, case.table, case.targets, case.valid, **options)
