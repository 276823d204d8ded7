"""report.html: everything in one file."""

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from llaso_jax.evaluation.report import sections
from llaso_jax.evaluation.report.browser import browser_data
from llaso_jax.evaluation.report.robustness_section import robustness_section
from llaso_jax.evaluation.scoring import ModelScores, Settings
from llaso_jax.evaluation.tasks import TaskFiles

HERE = Path(__file__).parent
REPORT_FILE = "report.html"


def write_page(
    folder: Path,
    scored: Sequence[ModelScores],
    tasks: TaskFiles,
    settings: Settings,
    *,
    judge: Mapping[str, Any],
    coverage: Mapping[str, Mapping[str, Any]],
    robustness: Mapping[str, Any],
    audio_root: Path | None,
    limit: int | None,
) -> None:
    """Write the report of all models into `folder`; limit: questions of each file, if not all were asked."""
    protocol = settings.protocols[-1]
    data = browser_data(scored, tasks, audio_root, folder)
    page = Template((HERE / "page.html").read_text(encoding="utf-8"))
    text = page.substitute(
        style=(HERE / "style.css").read_text(encoding="utf-8"),
        script=(HERE / "page.js").read_text(encoding="utf-8"),
        judge=escape(judge_line(judge)),
        facts=_facts(scored, settings, judge, limit),
        agreement=_agreement(judge),
        overall=sections.overall_table(scored, tasks, settings),
        radar=sections.task_radar(scored, tasks, protocol),
        tasks=sections.task_table(scored, tasks, settings),
        files=sections.file_table(scored, tasks, settings),
        modality=sections.modality_plot(scored, protocol),
        abstention=sections.abstention_plot(scored, tasks),
        coverage=sections.coverage_section(scored, tasks, coverage),
        robustness=robustness_section(robustness, judge_line(judge)),
        confusion=sections.confusion_section(scored, tasks),
        notes=sections.notes_section(scored, tasks),
        # "</script" would end the element that holds the data, and "<!--" with "<script" hide its end.
        data=json.dumps(data, ensure_ascii=False).replace("<", "\\u003c"),
    )
    (folder / REPORT_FILE).write_text(text, encoding="utf-8")


def judge_line(judge: Mapping[str, Any]) -> str:
    """Who judged, with the agreement of a judge that stands in for another."""
    name = judge.get("name") or "none"
    return f"{name}; agreement {judge['agreement']}" if judge.get("agreement") else name


def _agreement(judge: Mapping[str, Any]) -> str:
    """The held-out agreement of a judge that stands in for another, for each model; "" of any other judge."""
    if "held_out" not in judge:
        return ""
    names = ("pairs", "pearson", "spearman", "mean_absolute_error", "judge", "local")
    rows = [
        [escape(model), str(row["pairs"]), *(f"{row[name]:.2f}" for name in names[1:])]
        for model, row in judge["held_out"].items()
    ]
    heads = [
        "left out, with its family",
        "pairs",
        "Pearson's r",
        "Spearman's rho",
        "mean absolute error",
    ]
    heads += ["judge's mean", "local mean"]
    return (
        "<details><summary>Agreement of the local judge with the published one, model by model</summary>"
        f"{sections.table(heads, rows, left=1)}</details>"
    )


def _facts(
    scored: Sequence[ModelScores],
    settings: Settings,
    judge: Mapping[str, Any],
    limit: int | None,
) -> str:
    bootstrap = settings.bootstrap
    heard = [(m.name, m.audio_seconds) for m in scored if m.audio_seconds is not None]
    normalizers = sorted({name for m in scored for name in m.normalizers.values()})
    facts = {
        "models": ", ".join(m.name for m in scored),
        "questions asked": f"the first {limit} of each file (--limit)" if limit else "",
        "judge of free answers": judge_line(judge),
        "intervals": f"{bootstrap.confidence:.0%}, {bootstrap.samples} bootstrap draws, seed {bootstrap.seed}"
        if bootstrap.samples
        else "none",
        "normalisers": ", ".join(normalizers),
        "audio heard": ", ".join(f"{name} {seconds / 3600:.2f} h" for name, seconds in heard),
    }
    rows = (f"<dt>{key}</dt><dd>{escape(value)}</dd>" for key, value in facts.items() if value)
    return f"<dl>{''.join(rows)}</dl>"
