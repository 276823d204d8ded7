"""AdamW, clipping and schedule, step by step against torch and optax."""

import dataclasses
import math

import jax
import numpy as np
import optax
import pytest
import torch
from tolerances import LEAF, assert_close

from llaso_jax.errors import ConfigError
from llaso_jax.modeling.functional import flatten, unflatten
from llaso_jax.training.optimizer import (
    OptimizerConfig,
    global_norm,
    learning_rate_at,
    make_optimizer,
)

SHAPES = {
    "language_model/layers/mlp/up_proj/weight": (3, 5, 4),
    "language_model/layers/input_layernorm/weight": (3, 4),
    "language_model/norm/weight": (4,),
    "audio_tower/layers/self_attn_layer_norm/weight": (2, 4),
    "audio_tower/layers/self_attn_layer_norm/bias": (2, 4),
    "projector/linear_0/weight": (4, 6),
    "projector/linear_0/bias": (4,),
}
MATRICES = {"language_model/layers/mlp/up_proj/weight", "projector/linear_0/weight"}
CFG = OptimizerConfig(
    learning_rate=1e-2, b1=0.8, b2=0.95, eps=1e-6, weight_decay=0.3, clip_norm=1.5
)
STEPS = 12


def _random(rng: np.random.Generator, scale: float) -> dict[str, np.ndarray]:
    return {p: scale * rng.standard_normal(s).astype(np.float32) for p, s in SHAPES.items()}


def _gradients() -> list[dict[str, np.ndarray]]:
    """Some above the norm to clip to (about 9), some below."""
    rng = np.random.default_rng(1)
    return [_random(rng, (1.0, 0.03)[step % 2]) for step in range(STEPS)]


def _rate(step: int) -> float:
    return 1e-2 * (1 + step % 3)


def _ours(cfg: OptimizerConfig = CFG, scales=None) -> list[dict[str, np.ndarray]]:
    optimizer = make_optimizer(cfg, scales or dict.fromkeys(SHAPES, 1.0))
    params = unflatten(_random(np.random.default_rng(0), 1.0))
    state = optimizer.init(params)
    history = []
    for step, grads in enumerate(_gradients()):
        updates, state = optimizer.update(
            unflatten(grads), state, params, learning_rate=np.float32(_rate(step))
        )
        params = optax.apply_updates(params, updates)
        history.append({path: np.asarray(leaf) for path, leaf in flatten(params).items()})
    return history


def test_steps_equal_torch_adamw_with_clip_grad_norm():
    start = _random(np.random.default_rng(0), 1.0)
    weights = {p: torch.nn.Parameter(torch.from_numpy(v.copy())) for p, v in start.items()}
    optimizer = torch.optim.AdamW(
        [
            {"params": [weights[p] for p in MATRICES], "weight_decay": CFG.weight_decay},
            {"params": [weights[p] for p in SHAPES if p not in MATRICES], "weight_decay": 0.0},
        ],
        betas=(CFG.b1, CFG.b2),
        eps=CFG.eps,
    )
    clipped = 0
    for step, (grads, ours) in enumerate(zip(_gradients(), _ours(), strict=True)):
        for path, weight in weights.items():
            weight.grad = torch.from_numpy(grads[path].copy())
        norm = torch.nn.utils.clip_grad_norm_(weights.values(), CFG.clip_norm)
        clipped += bool(norm > CFG.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = _rate(step)
        optimizer.step()
        for path, weight in weights.items():
            assert_close(ours[path], weight.detach().numpy(), LEAF, f"step {step} {path}")
    assert 0 < clipped < STEPS, "both sides of the clipping norm must be tested"


def test_steps_equal_optax_adamw():
    params = unflatten(_random(np.random.default_rng(0), 1.0))
    mask = unflatten({path: path in MATRICES for path in SHAPES})
    optimizer = optax.chain(
        optax.clip_by_global_norm(CFG.clip_norm),
        optax.inject_hyperparams(optax.adamw, static_args=("mask",))(
            learning_rate=0.0,
            b1=CFG.b1,
            b2=CFG.b2,
            eps=CFG.eps,
            weight_decay=CFG.weight_decay,
            mask=mask,
        ),
    )
    state = optimizer.init(params)
    for step, (grads, ours) in enumerate(zip(_gradients(), _ours(), strict=True)):
        state[1].hyperparams["learning_rate"] = np.float32(_rate(step))
        updates, state = optimizer.update(unflatten(grads), state, params)
        params = optax.apply_updates(params, updates)
        for path, leaf in flatten(params).items():
            assert_close(ours[path], leaf, LEAF, f"step {step} {path}")


def test_decay_pulls_on_matrices_only():
    """With no gradient, norms and biases stay where they are."""
    optimizer = make_optimizer(CFG, dict.fromkeys(SHAPES, 1.0))
    params = unflatten(_random(np.random.default_rng(0), 1.0))
    zeros = jax.tree.map(np.zeros_like, params)
    updates, _ = optimizer.update(
        zeros, optimizer.init(params), params, learning_rate=np.float32(0.1)
    )
    for path, update in flatten(updates).items():
        if path in MATRICES:
            np.testing.assert_allclose(
                update, -0.1 * CFG.weight_decay * flatten(params)[path], rtol=1e-6
            )
        else:
            assert not np.any(np.asarray(update)), path


def test_a_learning_rate_scale_scales_the_whole_update_of_its_parameters():
    scales = {path: 0.1 if path.startswith("audio_tower/") else 1.0 for path in SHAPES}
    start = _random(np.random.default_rng(0), 1.0)
    plain, scaled = _ours()[0], _ours(scales=scales)[0]
    for path in SHAPES:
        factor = 0.1 if path.startswith("audio_tower/") else 1.0
        assert_close(scaled[path] - start[path], factor * (plain[path] - start[path]), COARSE, path)


COARSE = 1e-4  # differences of f32 numbers a hundred times as large


def test_the_largest_gradient_norm_is_that_of_all_parameters_together():
    tree = {"a": np.array([3.0], np.float32), "b": {"c": np.array([[4.0]], np.float32)}}
    assert float(global_norm(tree)) == pytest.approx(5.0)
    cfg = dataclasses.replace(CFG, clip_norm=1e-3, weight_decay=0.0)
    clipped = _ours(cfg)[0]
    # Adam's first step does not know the scale of the gradient, only eps does.
    norm = math.sqrt(sum(float(np.square(g).sum()) for g in _gradients()[0].values()))
    start = _random(np.random.default_rng(0), 1.0)
    for path, gradient in _gradients()[0].items():
        small = gradient * (1e-3 / norm)
        expected = start[path] - _rate(0) * small / (np.abs(small) + cfg.eps)
        assert_close(clipped[path], expected, LEAF, path)


# --- schedule -------------------------------------------------------------------------------------


def test_warm_up_rises_linearly_from_zero_to_the_peak():
    cfg = OptimizerConfig(learning_rate=2.0, warmup_ratio=0.2)
    assert learning_rate_at(0.0, cfg) == 0
    assert learning_rate_at(0.05, cfg) == pytest.approx(0.5)
    assert learning_rate_at(0.1, cfg) == pytest.approx(1.0)
    assert learning_rate_at(0.2, cfg) == 2.0


def test_cosine_ends_at_its_final_ratio_and_is_half_way_in_the_middle():
    cfg = OptimizerConfig(learning_rate=2.0, warmup_ratio=0.2, final_ratio=0.1)
    assert learning_rate_at(0.6, cfg) == pytest.approx(2.0 * 0.55)
    assert learning_rate_at(1.0, cfg) == pytest.approx(0.2)
    assert learning_rate_at(1.5, cfg) == pytest.approx(0.2)
    assert learning_rate_at(1.0, OptimizerConfig()) == pytest.approx(0, abs=1e-15)
    rates = [learning_rate_at(p / 50, cfg) for p in range(10, 51)]
    assert rates == sorted(rates, reverse=True)


def test_the_schedule_is_that_of_transformers():
    import transformers

    cfg = OptimizerConfig(learning_rate=1.0, warmup_ratio=0.1)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = transformers.get_cosine_schedule_with_warmup(optimizer, 20, 200)
    for step in range(200):
        assert learning_rate_at(step / 200, cfg) == pytest.approx(
            scheduler.get_last_lr()[0], abs=1e-12
        )
        optimizer.step()
        scheduler.step()


def test_a_constant_schedule_stays_at_the_peak_after_warm_up():
    cfg = OptimizerConfig(learning_rate=3.0, warmup_ratio=0.5, schedule="constant")
    assert learning_rate_at(0.25, cfg) == pytest.approx(1.5)
    assert [learning_rate_at(p, cfg) for p in (0.5, 0.75, 1.0)] == [3.0] * 3
    no_warm_up = OptimizerConfig(learning_rate=3.0, warmup_ratio=0.0)
    assert learning_rate_at(0.0, no_warm_up) == 3.0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("learning_rate", 0.0),
        ("eps", 0.0),
        ("clip_norm", -1.0),
        ("warmup_ratio", 1.5),
        ("b1", -0.1),
        ("b2", 1.1),
        ("final_ratio", 2.0),
        ("weight_decay", -0.1),
    ],
)
def test_settings_out_of_range_are_refused_by_name(field: str, value: float):
    with pytest.raises(ConfigError, match=rf"optimizer\.{field}={value}"):
        OptimizerConfig(**{field: value})
