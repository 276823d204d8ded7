"""Where the numbers of a run go: JSON lines, TensorBoard, and a plot at the end."""

import json
import math
from pathlib import Path
from typing import Any

from llaso_jax.json_lines import drop_torn_line
from llaso_jax.planning.hardware import find_accelerator


def peak_flops(device_kind: str) -> float | None:
    """Dense bf16 FLOP/s of a device kind as JAX names it; None where it is not known (CPUs)."""
    known = find_accelerator(device_kind)
    return known and known.flops


class MetricsWriter:
    """Appends records to `folder/metrics.jsonl` and, if asked, to TensorBoard events beside it.

    Without a folder, on all processes but one, it writes nothing.
    """

    def __init__(self, folder: Path | None, *, tensorboard: bool) -> None:
        self._file = self._events = None
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        drop_torn_line(path)
        self._file = path.open("a", encoding="utf-8")
        if tensorboard:
            from tensorboardX import SummaryWriter

            self._events = SummaryWriter(str(folder / "tensorboard"))

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()
        if self._events is not None:
            self._events.close()

    def write(self, kind: str, stage: str, step: int, values: dict[str, Any]) -> None:
        """One record: `kind` is train or eval, `values` are numbers (or nested dicts of numbers)."""
        if self._file is None:
            return
        record = {"kind": kind, "stage": stage, "step": step, **values}
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        if self._events is not None:
            for name, value in values.items():
                if isinstance(value, int | float) and math.isfinite(value):
                    self._events.add_scalar(f"{stage}/{kind}/{name}", value, step)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Records of a metrics.jsonl, those a resumed run wrote again replacing the older ones."""
    latest: dict[tuple[str, str, int], dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        latest[record["kind"], record["stage"], record["step"]] = record
    return list(latest.values())


def plot_metrics(path: Path, picture: Path) -> None:
    """Draw loss, learning rate, word error rate and accuracy of a metrics.jsonl into a PNG."""
    from matplotlib.figure import Figure  # without pyplot: no global state, no display

    records = read_metrics(path)
    stages = list(dict.fromkeys(record["stage"] for record in records))
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    loss, rate, score = figure.subplots(1, 3)
    offset = 0
    for stage in stages:
        train = [r for r in records if r["stage"] == stage and r["kind"] == "train"]
        held_out = [r for r in records if r["stage"] == stage and r["kind"] == "eval"]
        loss.plot([offset + r["step"] for r in train], [r["loss"] for r in train], label=stage)
        loss.plot(
            [offset + r["step"] for r in held_out],
            [r["loss"] for r in held_out],
            "o--",
            label=f"{stage}, held out",
        )
        rate.plot([offset + r["step"] for r in train], [r["learning_rate"] for r in train])
        for name, marker in (("wer", "o-"), ("accuracy", "s-"), ("token_error_rate", "^-")):
            scored = [r for r in held_out if r.get(name) is not None]
            score.plot(
                [offset + r["step"] for r in scored],
                [r[name] for r in scored],
                marker,
                label=f"{stage}, {name}",
            )
        offset += max((r["step"] for r in train), default=0)
    loss.set(title="loss", xlabel="step", yscale="log")
    rate.set(title="learning rate", xlabel="step")
    score.set(title="held-out error rates and accuracy", xlabel="step", ylim=(0, 1.1))
    for axes in (loss, score):
        if axes.get_legend_handles_labels()[1]:
            axes.legend(fontsize=7)
    figure.savefig(picture, dpi=120)
