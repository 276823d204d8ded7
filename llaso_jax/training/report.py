"""What a person sees of a run: a progress bar, a table of scores before and after, some transcripts."""

from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from llaso_jax.training.validation import SCORES, Report


class StepBar:
    """Progress bar of one stage, in steps or samples, with the newest numbers behind it."""

    def __init__(self, console: Console, stage: str, total: int, unit: str) -> None:
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn(unit),
            TimeRemainingColumn(),
            TextColumn("{task.fields[numbers]}"),
            console=console,
            refresh_per_second=2,
        )
        self._task = self._progress.add_task(stage, total=total, numbers="compiling …")

    def __enter__(self) -> "StepBar":
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def update(self, completed: int, numbers: str) -> None:
        """Move to `completed` and show `numbers`."""
        self._progress.update(self._task, completed=completed, numbers=numbers)


def score_table(before: Report | None, after: Report) -> Table:
    """Scores per task, before and after training."""
    table = Table(title="held-out scores (word error rate: lower is better)")
    for heading in ("task", "metric", "samples", "chance", "before", "after"):
        table.add_column(heading, justify="left" if heading in ("task", "metric") else "right")

    def cell(value: float | None) -> str:
        return "-" if value is None else f"{value:.3f}"

    for task, score in after.tasks.items():
        earlier = before.tasks.get(task) if before else None
        table.add_row(
            task,
            score.metric,
            str(score.samples),
            cell(score.chance),
            cell(earlier.score if earlier else None),
            cell(score.score),
        )
    table.add_section()
    for name in (*SCORES, "loss"):
        value, first = getattr(after, name), getattr(before, name) if before else None
        if value is not None:
            table.add_row("all", name, "", "", cell(first), cell(value))
    return table


def transcript_lines(answers: Sequence[tuple[str, str, str]], count: int = 3) -> list[str]:
    """The first `count` transcripts of different words beside their references."""
    shown: dict[str, str] = {}
    for task, reference, text in answers:
        if task == "ASR" and reference not in shown and len(shown) < count:
            shown[reference] = text
    width = max(map(len, shown), default=0)
    return [f"  said: {said:<{width}}   heard: {heard}" for said, heard in shown.items()]
