"""Tables and plots of the page, as HTML text."""

from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from llaso_jax.evaluation.metrics.classification import NONE_OR_SEVERAL
from llaso_jax.evaluation.metrics.judge_score import HIGHEST, LOWEST
from llaso_jax.evaluation.report.notes import notes_of
from llaso_jax.evaluation.report.svg import Point, Series, dots, radar, scatter
from llaso_jax.evaluation.scoring import ModelScores, Settings
from llaso_jax.evaluation.tables import OVERALL, PROTOCOL_NAMES, flat, tasks_scored
from llaso_jax.evaluation.tasks import TaskFiles
from llaso_jax.evaluation.unit_score import LOWER_IS_BETTER, Protocol

COLOURS = 8  # of the style sheet; more models use them again


def colour(number: int) -> str:
    """CSS colour of a model."""
    return f"var(--m{number % COLOURS})"


def legend(scored: Sequence[ModelScores]) -> str:
    """Names of the models in their colours."""
    keys = (
        f'<span class="key"><i style="background:{colour(n)}"></i>{escape(m.name)}</span>'
        for n, m in enumerate(scored)
    )
    return f'<p class="legend">{"".join(keys)}</p>'


def overall_table(scored: Sequence[ModelScores], tasks: TaskFiles, settings: Settings) -> str:
    """Means over tasks and categories with their intervals, of how many tasks, and abstention."""
    heads = ["tasks", *OVERALL.values(), "abstention"]
    rows = []
    for model in scored:
        for protocol in settings.protocols:
            means = model.aggregates[protocol]
            bounds = model.intervals.get("aggregates", {}).get(protocol, {})
            cells = [_cell(means[name], bounds.get(name)) for name in OVERALL]
            cells.append(_share(model.aggregates["abstention_mean"]))
            count = tasks_scored(model, tasks, protocol)
            rows.append([escape(model.name), PROTOCOL_NAMES[protocol], count, *cells])
    return table(["model", "protocol", *heads], rows, left=2)


def task_radar(scored: Sequence[ModelScores], tasks: TaskFiles, protocol: Protocol) -> str:
    """Scores of all tasks on 0..1."""
    axes = list(dict.fromkeys(spec.task for spec in tasks.values()))
    series = [
        Series(m.name, colour(n), m.aggregates[protocol]["tasks"]) for n, m in enumerate(scored)
    ]
    return legend(scored) + radar(axes, series)


def task_table(scored: Sequence[ModelScores], tasks: TaskFiles, settings: Settings) -> str:
    """Scores of tasks on 0..1, both protocols, with intervals."""
    titles = {spec.task: spec.title for spec in tasks.values()}
    rows = []
    for task, title in titles.items():
        row = [f"<b>{escape(task)}</b><small>{escape(title)}</small>"]
        for model in scored:
            for protocol in settings.protocols:
                bounds = model.intervals.get("aggregates", {}).get(protocol, {}).get("tasks", {})
                row.append(_cell(model.aggregates[protocol]["tasks"].get(task), bounds.get(task)))
        rows.append(row)
    return table(["task", *_columns(scored, settings)], rows, left=1)


def file_table(scored: Sequence[ModelScores], tasks: TaskFiles, settings: Settings) -> str:
    """Scores of files in their own metric, both protocols, with intervals and baselines."""
    rows = []
    for file, spec in tasks.items():
        entries = [m.entries[file] for m in scored if file in m.entries]
        if not entries:
            continue
        arrow = "↓" if spec.metric in LOWER_IS_BETTER else "↑"
        rates = ("wer", "cer") if spec.metric == "WER/CER" else ("",)
        for rate in rates:
            broken = escape(file).replace("_", "_<wbr>")  # where a narrow column may break it
            name = f"{broken}<small>{escape(spec.task)} {escape(spec.modality)}</small>"
            metric = f"{rate.upper() or spec.metric} {arrow}"
            row = [name, metric, *(_each(entries, of) for of in (_items, _baseline))]
            for model in scored:
                row += [_file_cell(model, file, rate, protocol) for protocol in settings.protocols]
            rows.append(row)
    heads = ["file", "metric", "items", "baseline"]
    return table([*heads, *_columns(scored, settings)], rows, left=2)


def _file_cell(model: ModelScores, file: str, rate: str, protocol: Protocol) -> str:
    """What the protocol reports; upstream's swapped error rates with the unswapped below."""
    if file not in model.entries:
        return '<span class="missing">missing</span>'
    suffix = f".{rate}" if rate else ""
    values, place = dict(flat(model.entries[file])), f"{protocol}{suffix}"
    cell = _cell(values.get(place), model.intervals["files"][file].get(place))
    straight = values.get(f"paper_unswapped{suffix}")
    if protocol == "paper" and straight is not None:
        cell += f"<small>unswapped {straight:.3f}</small>"
    return cell


def _each(entries: Sequence[Mapping[str, Any]], of: Callable[[Mapping[str, Any]], str]) -> str:
    """What is the same of all models once; else of each, in their order."""
    told = [of(entry) for entry in entries]
    return told[0] if len(set(told)) == 1 else " / ".join(told)


def _items(entry: Mapping[str, Any]) -> str:
    return str(entry["n"])


def _baseline(entry: Mapping[str, Any]) -> str:
    if "chance" in entry:
        return f"chance {entry['chance']:.2f}"
    if "constant_median_baseline" in entry:
        return f"median {entry['constant_median_baseline']:.1f}"
    return ""


def modality_plot(scored: Sequence[ModelScores], protocol: Protocol) -> str:
    """The judge's score of question answering by modality: the gap between them."""
    rows: dict[str, list[Point]] = {}
    for number, model in enumerate(scored):
        bounds = model.intervals.get("aggregates", {}).get(protocol, {}).get("modality_AQA_gpt", {})
        for modality, value in model.aggregates[protocol]["modality_AQA_gpt"].items():
            if value is not None:
                low, high = bounds.get(modality) or (None, None)
                point = Point(model.name, colour(number), value, low, high)
                rows.setdefault(modality, []).append(point)
    if not rows:
        return "<p>No file of question answering was judged.</p>"
    plot = dots(rows, (LOWEST, HIGHEST), "judge's score, 1 to 5")
    return legend(scored) + plot


def abstention_plot(scored: Sequence[ModelScores], tasks: TaskFiles) -> str:
    """Shares of answers that name none or several labels, by closed task."""
    rows: dict[str, list[Point]] = {}
    for task in dict.fromkeys(spec.task for spec in tasks.values()):
        for number, model in enumerate(scored):
            if task not in model.abstentions:
                continue
            low, high = model.intervals.get("abstentions", {}).get(task) or (None, None)
            point = Point(model.name, colour(number), model.abstentions[task], low, high)
            rows.setdefault(task, []).append(point)
    if not rows:
        return "<p>No closed task was answered.</p>"
    return legend(scored) + dots(rows, (0, 1), "share of answers")


def coverage_section(
    scored: Sequence[ModelScores], tasks: TaskFiles, coverage: Mapping[str, Mapping[str, Any]]
) -> str:
    """Files that are there; and, for models whose training is declared, coverage against scores."""
    there = table(
        ["model", "files", "items", "missing"],
        [
            [
                escape(m.name),
                f"{len(m.entries)} of {len(tasks)}",
                str(m.items),
                escape(", ".join(m.missing)) or "none",
            ]
            for m in scored
        ],
        left=1,
    )
    if not coverage:
        return there + (
            "<p>What models were trained on is not declared. <code>--trained-on FILE</code> adds plots of "
            "task coverage against score and abstention, and means over unseen tasks and languages.</p>"
        )
    colours = {model.name: colour(number) for number, model in enumerate(scored)}
    plots = ""
    for key, title in (("score", "mean of tasks"), ("abstention", "abstention")):
        points = [
            (name, colours[name], one["coverage"], one[key])
            for name, one in coverage.items()
            if one[key] is not None
        ]
        plots += f"<figure>{scatter(points, 'share of tasks trained on', title)}</figure>"
    rows = [
        [
            escape(name),
            group.replace("_", " "),
            str(of["files"]),
            _cell(of["score"]),
            _share(of["abstention"]),
        ]
        for name, one in coverage.items()
        for group, of in one["groups"].items()
    ]
    heads = ["model", "files", "number", "score, 0 to 1", "abstention"]
    return there + f'<div class="pair">{plots}</div>' + table(heads, rows, left=2)


def confusion_section(scored: Sequence[ModelScores], tasks: TaskFiles) -> str:
    """Confusion matrices of each closed file: rows are references."""
    parts = []
    for file in tasks:
        matrices = [
            f"<h4>{escape(model.name)}</h4>{_matrix(*model.confusions[file])}"
            for model in scored
            if file in model.confusions
        ]
        if matrices:
            summary = f"<summary>{escape(tasks[file].task)}: {escape(file)}</summary>"
            parts.append(f"<details>{summary}{''.join(matrices)}</details>")
    return "".join(parts) or "<p>No closed task was answered.</p>"


def _matrix(labels: Sequence[str], counts: Sequence[Sequence[int]]) -> str:
    heads = ["", *map(escape, labels), NONE_OR_SEVERAL]
    rows = [
        [escape(label), *(_heat(count, sum(row)) for count in row)]
        for label, row in zip(labels, counts, strict=True)
    ]
    return table(heads, rows, left=1, kind="matrix")


def notes_section(scored: Sequence[ModelScores], tasks: TaskFiles) -> str:
    """Where protocols disagree, what is at chance, and what had to be repaired."""
    rows = [
        [escape(n.model) or "several", escape(n.file), escape(n.text)]
        for n in notes_of(scored, tasks)
    ]
    rows += [[escape(m.name), "reading", escape(note)] for m in scored for note in m.notes]
    if not rows:
        return "<p>Nothing to remark.</p>"
    return table(["model", "file", "remark"], rows, left=3, kind="notes")


def table(
    heads: Sequence[str], rows: Sequence[Sequence[str]], *, left: int, kind: str = "scores"
) -> str:
    """An HTML table that scrolls sideways by itself; `left` columns are text."""

    def line(cells: Sequence[str], tag: str) -> str:
        return "".join(
            f"<{tag}{'' if n < left else ' class=number'}>{cell}</{tag}>"
            for n, cell in enumerate(cells)
        )

    body = "".join(f"<tr>{line(row, 'td')}</tr>" for row in rows)
    head = f"<thead><tr>{line(heads, 'th')}</tr></thead>"
    return f'<div class="scroll"><table class="{kind}">{head}<tbody>{body}</tbody></table></div>'


def _columns(scored: Sequence[ModelScores], settings: Settings) -> list[str]:
    return [
        f"{escape(model.name)}<br><small>{PROTOCOL_NAMES[protocol]}</small>"
        for model in scored
        for protocol in settings.protocols
    ]


def _cell(value: float | None, bounds: Sequence[float] | None = None) -> str:
    if value is None:
        return "-"
    text = f"{value:.3f}"
    if bounds:
        text += f"<small>{bounds[0]:.3f} to {bounds[1]:.3f}</small>"
    return text


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _heat(count: int, total: int) -> str:
    share = 100 * count / total if total else 0
    return f'<span style="--heat:{share:.0f}%">{count or ""}</span>'
