"""Meshes from a short text."""

import math

import jax
import pytest

from llaso_jax.sharding.mesh import MESH_AXES, make_mesh, parse_mesh
from llaso_jax.sharding.rules import ShardingError


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("8x1", {"fsdp": 8}),
        ("2x4", {"fsdp": 2, "tensor": 4}),
        ("8", {"fsdp": 8}),
        (" 4x2 ", {"fsdp": 4, "tensor": 2}),
        ("tensor=2", {"tensor": 2}),
        ("data=2,fsdp=2,tensor=2,context=1", {"data": 2, "fsdp": 2, "tensor": 2}),
        ("context = 4 , data = 2", {"context": 4, "data": 2}),
    ],
)
def test_forms_of_a_mesh(text: str, sizes: dict[str, int]):
    assert parse_mesh(text) == dict.fromkeys(MESH_AXES, 1) | sizes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("8x", "'8x' is not understood: write 8x1"),
        ("", "'' is not understood"),
        ("2x2x2", "'2x2x2' is not understood"),
        ("8*1", "not understood"),
        ("-1x8", "not understood"),
        ("fsdp=8,", "not understood"),
        ("model=8", "'model' is unknown; the axes are data, fsdp, tensor, context"),
        ("fsdp=2,fsdp=4", "names the axis 'fsdp' twice"),
        ("0x8", "size 0"),
        ("fsdp=0", "size 0"),
    ],
)
def test_text_that_is_no_mesh_is_an_error_that_says_why(text: str, message: str):
    with pytest.raises(ShardingError, match=message):
        parse_mesh(text)


@pytest.mark.parametrize("text", ["1x1", "8x1", "2x4", "data=2,fsdp=2,tensor=2", "2x1"])
def test_mesh_has_all_axes_and_different_devices(text: str):
    mesh = make_mesh(text)
    assert dict(mesh.shape) == parse_mesh(text)
    assert len(set(mesh.devices.flat)) == math.prod(parse_mesh(text).values())


def test_small_mesh_does_not_take_devices_from_a_later_one():
    make_mesh("1x1")
    assert make_mesh("8x1").size == 8


@pytest.mark.parametrize(("text", "needed"), [("16x1", 16), ("3x3", 9)])
def test_too_few_devices_is_an_error_with_both_numbers(text: str, needed: int):
    with pytest.raises(ShardingError, match=rf"needs {needed} devices .* but 8 .*--mesh 8x1"):
        make_mesh(text)


def test_devices_given_must_all_be_used():
    """What an accelerator sees: a wrong count in either direction is an error."""
    with pytest.raises(ShardingError, match=r"needs 4 devices \(fsdp 4\), but 8 cpu"):
        make_mesh("4x1", devices=jax.devices())
    assert make_mesh("2x2", devices=jax.devices()[4:]).devices.flat[0] == jax.devices()[4]
