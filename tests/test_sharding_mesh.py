"""Meshes from a short text."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from llaso_jax.sharding.mesh import MESH_AXES, make_mesh, parse_mesh, parse_shape
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
        ("dcn_data=2,fsdp=4", {"data": 2, "fsdp": 4}),
        ("dcn_data=2,dcn_fsdp=2,data=2,tensor=4", {"data": 4, "fsdp": 2, "tensor": 4}),
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
        (
            "dcn_tensor=2,fsdp=4",
            "'dcn_tensor': tensor talks in every layer.* dcn_data and dcn_fsdp",
        ),
        ("dcn_rows=2", "'dcn_rows' is unknown"),
        ("dcn_data=2,dcn_data=2", "names the axis 'dcn_data' twice"),
        ("dcn_data=0,fsdp=8", "size 0"),
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


# --- slices ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Device:
    """A device of a slice that is not there."""

    id: int
    slice_index: int
    process_index: int = 0
    platform: str = "gpu"
    device_kind: str = "none"


def sliced(*sizes: int) -> list[Device]:
    """Devices of slices of these sizes, in no order."""
    numbers = [number for number, size in enumerate(sizes) for _ in range(size)]
    return [Device(place, number) for place, number in enumerate(numbers)][::-1]


def test_text_says_what_lies_inside_slices_and_what_between():
    shape = parse_shape("dcn_data=2,dcn_fsdp=3,data=2,tensor=4")
    assert shape.slice_count == 6
    assert shape.inside == dict.fromkeys(MESH_AXES, 1) | {"data": 2, "tensor": 4}
    assert shape.slices == dict.fromkeys(MESH_AXES, 1) | {"data": 2, "fsdp": 3}


@pytest.mark.parametrize(
    ("text", "slices"),
    [
        ("dcn_data=2,fsdp=4", 2),
        ("dcn_fsdp=2,data=2,fsdp=2", 2),
        ("dcn_data=2,dcn_fsdp=2,tensor=2", 4),
    ],
)
def test_only_the_outermost_part_of_a_sliced_axis_leaves_its_slice(text: str, slices: int):
    shape = parse_shape(text)
    mesh = make_mesh(text, devices=sliced(*[8 // slices] * slices))
    assert dict(mesh.shape) == shape.sizes
    for index, device in np.ndenumerate(mesh.devices):
        place = [i // size for i, size in zip(index, shape.inside.values(), strict=True)]
        assert device.slice_index == np.ravel_multi_index(place, tuple(shape.slices.values()))
    assert len(set(mesh.devices.flat)) == 8


def test_virtual_devices_are_cut_into_slices_in_their_order():
    mesh = make_mesh("dcn_data=2,fsdp=2,tensor=2")
    assert list(mesh.devices[0].flat) == jax.devices()[:4]
    assert list(mesh.devices[1].flat) == jax.devices()[4:]
    assert mesh.axis_names == MESH_AXES


@pytest.mark.parametrize(
    ("text", "sizes", "told"),
    [
        ("8x1", (4, 4), r"1 slice\(s\) of 8 devices, .* 2 slice\(s\) of 4, 4.*dcn_data=2,fsdp=4"),
        ("dcn_data=4,fsdp=2", (4, 4), r"4 slice\(s\) of 2 devices, .* 2 slice\(s\) of 4, 4"),
        ("dcn_data=2,fsdp=4", (6, 2), r"2 slice\(s\) of 4 devices, .* 2 slice\(s\) of 6, 2"),
        ("dcn_data=2,fsdp=8", (4, 4), r"needs 16 devices .* but 8 gpu"),
    ],
)
def test_other_slices_than_asked_for_are_an_error_with_both_numbers(text, sizes, told):
    with pytest.raises(ShardingError, match=told):
        make_mesh(text, devices=sliced(*sizes))
