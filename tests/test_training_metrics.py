"""What a run writes: JSON lines, TensorBoard events, a plot; MFU where the peak is known."""

import json
import struct

import pytest
from training_setup import (
    PROJECTOR,
    inputs_folder,  # noqa: F401 - the fixture `folder`
    recipe,
    records,
    run,
    shared_programs,  # noqa: F401 - the fixture `compile_once`
)

from llaso_jax.modeling.flops import train_flops
from llaso_jax.training import loop
from llaso_jax.training.metrics import MetricsWriter, peak_flops, plot_metrics, read_metrics

PEAK = 1e12


@pytest.fixture(scope="module")
def output(folder):
    """A run of 4 steps with TensorBoard, logged every 2, on a device whose peak is (made) known."""
    tree = recipe(
        folder,
        stages=({"max_steps": 4, "parameters": list(PROJECTOR)},),
        logging={"every_steps": 2, "tensorboard": True},
    )
    run(tree, folder / "plain")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "peak_flops", lambda kind: PEAK)
        run(tree, folder / "run", mesh="1x1")
    return folder / "run"


def test_every_record_holds_the_numbers_of_its_step(output):
    lines = records(output)
    assert [r["step"] for r in lines] == [2, 4], "logging.every_steps"
    for record in lines:
        assert record["stage"] == "align"
        assert set(record) == {
            *("kind", "stage", "step", "loss", "learning_rate", "grad_norm", "answers", "samples"),
            *("padding", "tokens_per_second", "audio_seconds_per_second", "samples_per_second"),
            *("quarantined", "mfu"),
        }
        assert 0 < record["padding"] < 1
        assert record["answers"] > 0
        assert record["quarantined"] == 0
    assert [r["samples"] for r in lines] == sorted(r["samples"] for r in lines)
    assert lines[1]["tokens_per_second"] > lines[1]["audio_seconds_per_second"] > 0
    # Warm-up to 1e-2 over the first tenth, then cosine: steps 2 and 4 of 4 start at 1/4 and 3/4.
    assert lines[0]["learning_rate"] > lines[1]["learning_rate"] > 0


def test_mfu_is_reported_only_where_the_peak_of_the_device_is_known(output):
    assert all("mfu" not in record for record in records(output.parent / "plain"))
    assert peak_flops("cpu") is None


def test_mfu_is_the_model_s_flops_over_time_and_peak(output):
    record = records(output)[-1]
    from training_setup import config

    model = config(recipe(output.parent)).model
    flops = train_flops(
        model,
        chunks=16,
        mel_frames=50,
        rows=8,
        positions=112,
        answers=8 * 24,
        trains_encoder=False,
        trains_decoder=False,
    )
    seconds_per_step = record["samples"] / record["samples_per_second"] / 4
    assert record["mfu"] == pytest.approx(flops / seconds_per_step / PEAK, rel=0.05)


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA GeForce RTX 3090", None),
        ("cpu", None),
    ],
)
def test_peaks_are_those_of_the_data_sheets(kind: str, peak: float | None):
    assert peak_flops(kind) == peak


def _scalars(folder) -> dict[tuple[str, int], float]:
    """Scalars of TensorBoard event files: records of length, crc, bytes, crc."""
    from tensorboardX.proto.event_pb2 import Event

    found = {}
    for path in folder.iterdir():
        content, at = path.read_bytes(), 0
        while at < len(content):
            (length,) = struct.unpack_from("<Q", content, at)
            event = Event.FromString(content[at + 12 : at + 12 + length])
            for value in event.summary.value:
                found[value.tag, event.step] = value.simple_value
            at += 12 + length + 4
    return found


def test_tensorboard_holds_the_same_numbers(output):
    found = _scalars(output / "tensorboard")
    for record in records(output):
        for name in ("loss", "learning_rate", "grad_norm", "padding", "mfu"):
            logged = found[f"align/train/{name}", record["step"]]
            assert logged == pytest.approx(record[name], rel=1e-6), name


def _pixels(path):
    from matplotlib.image import imread

    return imread(path)


def test_the_plot_shows_three_curves(output):
    pixels = _pixels(output / "metrics.png")
    height, width, _ = pixels.shape
    assert width > 1000
    assert height > 300
    for third in range(3):
        part = pixels[:, third * width // 3 : (third + 1) * width // 3, :3]
        assert (part.min(-1) < 0.5).mean() > 0.005, "no axes drawn"
    coloured = (pixels[..., :3].max(-1) - pixels[..., :3].min(-1)) > 0.3
    for third in range(2):  # nothing was held out: the third has axes only
        assert coloured[:, third * width // 3 : (third + 1) * width // 3].any(), "no curve"


def test_the_plot_of_several_stages_with_validation(tmp_path):
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        for stage in ("align", "instruct"):
            for step in range(1, 6):
                writer.write("train", stage, step, {"loss": 3.0 / step, "learning_rate": 0.1})
            writer.write("eval", stage, 5, {"loss": 1.0, "wer": 0.5, "accuracy": None})
    plot_metrics(tmp_path / "metrics.jsonl", tmp_path / "plot.png")
    pixels = _pixels(tmp_path / "plot.png")
    width = pixels.shape[1]
    coloured = (pixels[..., :3].max(-1) - pixels[..., :3].min(-1)) > 0.3
    assert coloured[:, 2 * width // 3 :].any(), "no scores"


def test_steps_done_again_after_a_kill_replace_the_first_ones(tmp_path):
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        for step in (1, 2, 3):
            writer.write("train", "align", step, {"loss": float(step)})
        writer.write("eval", "align", 3, {"loss": 30.0})
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.write("train", "align", 3, {"loss": 3.5})
        writer.write("train", "align", 4, {"loss": 4.0})
        writer.write("train", "instruct", 1, {"loss": 1.5})
    assert [
        (r["kind"], r["stage"], r["step"], r["loss"])
        for r in read_metrics(tmp_path / "metrics.jsonl")
    ] == [
        ("train", "align", 1, 1.0),
        ("train", "align", 2, 2.0),
        ("train", "align", 3, 3.5),
        ("eval", "align", 3, 30.0),
        ("train", "align", 4, 4.0),
        ("train", "instruct", 1, 1.5),
    ]


@pytest.mark.parametrize("torn", ['{"kind": "train", "sta', "{"])
def test_a_line_cut_short_by_a_kill_is_dropped(tmp_path, torn: str):
    path = tmp_path / "metrics.jsonl"
    whole = json.dumps({"kind": "train", "stage": "align", "step": 1, "loss": 1.0}) + "\n"
    path.write_text(whole + torn)
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.write("train", "align", 2, {"loss": 2.0})
    assert [r["step"] for r in read_metrics(path)] == [1, 2]
    path.write_text(torn)
    MetricsWriter(tmp_path, tensorboard=False).__exit__()
    assert path.read_text() == ""


def test_records_can_be_read_while_the_run_goes_on(tmp_path):
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.write("train", "align", 1, {"loss": 1.0})
        assert len(read_metrics(tmp_path / "metrics.jsonl")) == 1
