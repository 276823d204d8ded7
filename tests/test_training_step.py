"""One optimizer step: the same on every mesh and split of the batch, and only for what is trained."""

import dataclasses
import functools
import logging
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import jit
from tolerances import COMPOSED, LEAF, assert_close, difference
from training_setup import (
    EVERYTHING,
    PROJECTOR,
    PROJECTOR_AND_DECODER,
    Trainer,
    config,
    inputs_folder,  # noqa: F401 - the fixture `folder`
    read_batches,
    recipe,
    trainer,
)

from llaso_jax.config import load_config
from llaso_jax.errors import ConfigError
from llaso_jax.modeling.compute import ComputeConfig
from llaso_jax.modeling.functional import abstract_params, bind, flatten, merge
from llaso_jax.sharding.mesh import make_mesh, parse_mesh
from llaso_jax.sharding.rules import FSDP_TENSOR
from llaso_jax.training.fit import check_stage
from llaso_jax.training.optimizer import ParameterRule, learning_rate_scales
from llaso_jax.training.state import Layout
from llaso_jax.training.step import place_batch

STEPS = 20
logger = logging.getLogger(__name__)


@pytest.fixture(scope="module")
def inputs(folder):
    """(model, 20 batches of the real pipeline, recipe folder)."""
    cfg = config(recipe(folder))
    return cfg.model, read_batches(cfg, STEPS), folder


@functools.cache
def _curve(model, mesh: str, batches: "_Batches") -> tuple[np.ndarray, np.ndarray]:
    train = trainer(model, mesh=mesh)
    metrics = [train(batch.arrays) for batch in batches.items]
    return (
        np.array([float(m.loss) for m in metrics]),
        np.array([float(m.grad_norm) for m in metrics]),
    )


@dataclasses.dataclass(frozen=True, eq=False)
class _Batches:
    items: list


@pytest.fixture(scope="module")
def batches(inputs):
    return _Batches(inputs[1])


# --- meshes and micro-batches ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "mesh", ["8x1", *(pytest.param(mesh, marks=pytest.mark.slow) for mesh in ("4x2", "2x4"))]
)
def test_twenty_steps_give_the_same_losses_on_every_mesh(inputs, batches, mesh: str):
    expected_losses, expected_norms = _curve(inputs[0], "1x1", batches)
    losses, norms = _curve(inputs[0], mesh, batches)
    assert expected_losses[-1] < 0.7 * expected_losses[0], "the model does not learn"
    logger.info(
        "%s: losses differ by %.2e at most, gradient norms by %.2e (relative)",
        mesh,
        np.abs(losses - expected_losses).max(),
        np.abs(norms / expected_norms - 1).max(),
    )
    np.testing.assert_allclose(losses, expected_losses, rtol=LEAF, atol=0)
    np.testing.assert_allclose(norms, expected_norms, rtol=10 * LEAF, atol=0)


def _counts(arrays, parts: int) -> list[int]:
    supervised = (arrays["answer_index"] >= 0).reshape(parts, -1)
    return supervised.sum(1).tolist()


def test_four_micro_batches_equal_one_batch(inputs):
    model, batches, _ = inputs
    whole, split = trainer(model), trainer(model, accumulation=4)
    for batch in batches[:3]:
        assert len(set(_counts(batch.arrays, 4))) > 1, "counts must differ to tell the two apart"
        expected, actual = whole(batch.arrays), split(batch.arrays)
        assert int(actual.answers) == int(expected.answers) == sum(_counts(batch.arrays, 4))
        assert float(actual.loss) == pytest.approx(float(expected.loss), rel=1e-6)
        assert float(actual.grad_norm) == pytest.approx(float(expected.grad_norm), rel=LEAF)
        assert actual.row_losses.shape == (4, 2)
        assert_close(
            np.asarray(actual.row_losses).reshape(-1), expected.row_losses.reshape(-1), LEAF
        )
    expected_params = whole.trained()
    for path, leaf in split.trained().items():
        assert_close(leaf, expected_params[path], LEAF, path)


def test_the_loss_is_the_mean_over_all_supervised_tokens(inputs):
    """And not a mean of the means of rows or micro-batches, which would weigh short answers more."""
    model, batches, _ = inputs
    arrays = batches[0].arrays
    train = trainer(model, accumulation=4)
    params = jax.tree.map(np.asarray, merge(train.state.trainable, train.frozen))
    logits = np.asarray(
        jit(lambda p, b: bind(model, p).answer_logits(b))(params, arrays), np.float64
    )
    chosen = arrays["answer_index"] >= 0
    log_z = np.log(np.exp(logits).sum(-1))
    picked = np.take_along_axis(logits, arrays["answer_token"][..., None], -1)[..., 0]
    losses = np.where(chosen, log_z - picked, 0)
    expected = losses.sum() / chosen.sum()
    of_means = np.mean([
        part.sum() / n
        for part, n in zip(losses.reshape(4, -1), _counts(arrays, 4), strict=True)
    ])  # fmt: skip
    loss = float(train(arrays).loss)
    assert loss == pytest.approx(expected, rel=LEAF)
    assert abs(of_means - expected) > 100 * LEAF


def _gradients(train: Trainer) -> dict[str, np.ndarray]:
    """Clipped gradients of the first step: Adam's first moment is (1 - b1) times them."""
    return {path: np.asarray(leaf) for path, leaf in flatten(train.state.opt_state[1].mu).items()}


def test_loss_and_gradients_do_not_depend_on_packing(inputs):
    model, _, folder = inputs
    packed = read_batches(config(recipe(folder, stages=({"data": {"shuffle": False}},))), 1)[0]
    alone = read_batches(
        config(
            recipe(
                folder,
                stages=(
                    {
                        "data": {
                            "shuffle": False,
                            "packing": False,
                            "rows": packed.stats.samples,
                            "chunks_per_row": 1,
                        }
                    },
                ),
            )
        ),
        1,
    )[0]
    assert max(map(len, packed.sample_ids)) > 1, "nothing is packed"
    assert max(map(len, alone.sample_ids)) == 1
    assert sorted(i for row in packed.sample_ids for i in row) == sorted(
        i for row in alone.sample_ids for i in row
    )
    together, single = trainer(model), trainer(model)
    a, b = together(packed.arrays), single(alone.arrays)
    assert int(a.answers) == int(b.answers)
    assert float(a.loss) == pytest.approx(float(b.loss), rel=1e-6)
    assert float(a.grad_norm) == pytest.approx(float(b.grad_norm), rel=LEAF)
    expected = _gradients(single)
    for path, gradient in _gradients(together).items():
        assert_close(gradient, expected[path], LEAF, path)


def test_rows_are_dealt_to_micro_batches_in_order_on_every_mesh(inputs):
    model, batches, _ = inputs
    for mesh in ("1x1", "2x1", "data=2,tensor=2"):
        layout = Layout.of(model, make_mesh(mesh))
        placed = place_batch(batches[0].arrays, 2, layout)
        for name, array in batches[0].arrays.items():
            assert placed[name].shape == (2, 4, *array.shape[1:])
            np.testing.assert_array_equal(
                np.asarray(placed[name]).reshape(array.shape), array, err_msg=name
            )


def test_rows_that_do_not_split_over_the_mesh_are_refused_with_both_numbers():
    recipe = load_config("mini", ["stages.0.data.rows=6"])
    assert recipe.model is not None
    with pytest.raises(
        ConfigError, match=r"6 rows per micro-batch .* the 4 devices of mesh axes data, fsdp"
    ):
        check_stage(recipe.model, recipe.stages[0], FSDP_TENSOR, parse_mesh("4x2"))


# --- what is trained ------------------------------------------------------------------------------


def _bits(array) -> np.ndarray:
    array = np.asarray(array)
    return array.view({2: np.uint16, 4: np.uint32}[array.dtype.itemsize])


@pytest.mark.parametrize("frozen_dtype", ["float32", "bfloat16"])
def test_frozen_parameters_stay_bit_identical_and_have_no_optimizer_state(
    inputs, frozen_dtype: str
):
    model, batches, _ = inputs
    train = trainer(model, rules=PROJECTOR, frozen_dtype=frozen_dtype)
    frozen = {path: _bits(leaf).copy() for path, leaf in flatten(train.frozen).items()}
    before = {path: leaf.copy() for path, leaf in train.trained().items()}
    values = [float(train(batch.arrays).loss) for batch in batches[:4]]
    assert values[-1] != values[0]

    after = flatten(train.frozen)
    assert set(after) | set(before) == set(abstract_params(model))
    assert set(before) == {p for p in abstract_params(model) if p.startswith("projector/")}
    for path, bits in frozen.items():
        assert after[path].dtype == jnp.dtype(frozen_dtype)
        np.testing.assert_array_equal(_bits(after[path]), bits, err_msg=path)
    for path, leaf in train.trained().items():
        assert leaf.dtype == np.float32
        assert (leaf != before[path]).any(), f"{path} did not move"

    state = jax.tree.leaves(train.state.opt_state)
    trained = sum(leaf.size for leaf in before.values())
    assert sum(leaf.size for leaf in state) == 2 * trained + 1  # two moments and a count


def test_bfloat16_storage_of_frozen_weights_rounds_them_and_nothing_else(inputs):
    model, batches, _ = inputs
    full = trainer(model, rules=PROJECTOR)
    half = trainer(model, rules=PROJECTOR, frozen_dtype="bfloat16")
    for path, leaf in flatten(half.frozen).items():
        np.testing.assert_array_equal(
            np.asarray(leaf), np.asarray(flatten(full.frozen)[path].astype(jnp.bfloat16))
        )
    for batch in batches[:2]:
        expected, loss = float(full(batch.arrays).loss), float(half(batch.arrays).loss)
        assert 0 < abs(loss - expected) < 1e-2 * expected


@pytest.mark.parametrize(
    ("rules", "moving"),
    [
        (PROJECTOR_AND_DECODER, ("projector/", "language_model/")),
        (EVERYTHING, ("projector/", "language_model/", "audio_tower/")),
    ],
    ids=["encoder frozen", "encoder unfrozen"],
)
def test_every_trained_parameter_has_a_gradient(inputs, rules, moving):
    model, batches, _ = inputs
    train = trainer(model, rules=rules)
    train(batches[0].arrays)
    gradients = _gradients(train)
    assert set(gradients) == {p for p in abstract_params(model) if p.startswith(moving)}
    for path, gradient in gradients.items():
        assert np.isfinite(gradient).all()
        assert np.abs(gradient).max() > 0, f"no gradient reaches {path}"


def test_gradients_of_a_frozen_recipe_are_those_of_the_full_one(inputs):
    """Freezing only leaves gradients out: the projector's are what they are with everything trained."""
    model, batches, _ = inputs
    everything, projector = trainer(model), trainer(model, rules=PROJECTOR)
    everything(batches[0].arrays)
    projector(batches[0].arrays)
    expected = _gradients(everything)
    ours = _gradients(projector)
    scale = {path: np.abs(leaf).max() / np.abs(expected[path]).max() for path, leaf in ours.items()}
    factor = max(scale.values())  # the two are clipped by different global norms
    for path, gradient in ours.items():
        assert_close(gradient, factor * expected[path], COMPOSED, path)


# --- rules ----------------------------------------------------------------------------------------


def _scales(model, *rules: tuple[str, float | None]) -> dict[str, float | None]:
    return learning_rate_scales(
        abstract_params(model), tuple(ParameterRule(pattern, scale) for pattern, scale in rules)
    )


def test_the_first_rule_that_matches_a_whole_path_decides(inputs):
    model = inputs[0]
    scales = _scales(model, ("projector/linear_0/.*", 2.0), ("projector/.*", 0.5), (".*", None))
    assert {path: s for path, s in scales.items() if s is not None} == {
        "projector/linear_0/weight": 2.0,
        "projector/linear_0/bias": 2.0,
        "projector/linear_1/weight": 0.5,
        "projector/linear_1/bias": 0.5,
    }
    with pytest.raises(ConfigError, match=r"decides for no parameter"):
        _scales(model, ("linear_0", 1.0), (".*", None))  # part of a path is not a match


def test_rules_that_cannot_be_meant_are_refused(inputs):
    model = inputs[0]
    with pytest.raises(ConfigError, match=r"no rule of 'parameters' covers audio_tower/conv1/bias"):
        _scales(model, ("projector/.*", 1.0))
    with pytest.raises(ConfigError, match=r"rule 'projektor/\.\*' .* decides for no parameter"):
        _scales(model, ("projektor/.*", 1.0), (".*", 1.0))
    with pytest.raises(ConfigError, match="earlier rule already covers it"):
        _scales(model, (".*", 1.0), ("projector/.*", None))
    with pytest.raises(ConfigError, match="every parameter is frozen"):
        _scales(model, (".*", None))
    with pytest.raises(ConfigError, match="not a regular expression"):
        ParameterRule("projector/(")
    with pytest.raises(ConfigError, match="use null to freeze"):
        ParameterRule(".*", 0.0)


@pytest.mark.slow
def test_bfloat16_compute_keeps_float32_masters(inputs):
    model, batches, _ = inputs
    train = trainer(model, compute=ComputeConfig(dtype="bfloat16"), frozen_dtype="bfloat16")
    exact = trainer(model)
    values = [(float(train(b.arrays).loss), float(exact(b.arrays).loss)) for b in batches[:2]]
    assert all(leaf.dtype == np.float32 for leaf in train.trained().values())
    for loss, expected in values:
        assert math.isfinite(loss)
        assert 0 < abs(loss - expected) < 2e-2 * expected
    assert difference(*zip(*values, strict=True)) > 1e-6
