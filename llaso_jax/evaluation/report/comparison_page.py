"""comparison.html: two models side by side, in one file."""

from html import escape
from pathlib import Path
from string import Template

from llaso_jax.evaluation.comparison import Comparison, Difference, ItemPair
from llaso_jax.evaluation.report.sections import table
from llaso_jax.evaluation.tables import OVERALL, PROTOCOL_NAMES

HERE = Path(__file__).parent
COMPARISON_FILE = "comparison.html"


def write_comparison(folder: Path, result: Comparison, *, judge: str) -> None:
    """Write the page of a comparison into `folder`; judge: who judged free answers, and how well."""
    page = Template((HERE / "comparison.html").read_text(encoding="utf-8"))
    text = page.substitute(
        style=(HERE / "style.css").read_text(encoding="utf-8"),
        a=escape(result.a),
        b=escape(result.b),
        protocol=PROTOCOL_NAMES[result.protocol],
        judge=escape(judge),
        overall=_table(result, [*result.overall, *result.tasks]),
        files=_files(result),
        items="".join(_items(result, file) for file in result.files),
    )
    (folder / COMPARISON_FILE).write_text(text, encoding="utf-8")


def _table(result: Comparison, differences: list[Difference]) -> str:
    heads = ["", result.a, result.b, "difference", "interval", "p", "better"]
    rows = [[escape(OVERALL.get(d.name, d.name)), *_cells(result, d)] for d in differences]
    return table([escape(head) for head in heads], rows, left=1)


def _files(result: Comparison) -> str:
    heads = [
        "file",
        result.a,
        result.b,
        "difference",
        "interval",
        "p",
        "better",
        "won / lost / tied",
    ]
    rows = []
    for file, compared in result.files.items():
        name = escape(file).replace("_", "_<wbr>")
        if compared.reworded:
            name += f"<small>{compared.reworded} items asked in other words</small>"
        counts = f"{compared.wins} / {compared.losses} / {compared.ties}"
        rows.append([name, *_cells(result, compared.difference), counts])
    return table([escape(head) for head in heads], rows, left=1)


def _cells(result: Comparison, difference: Difference) -> list[str]:
    bounds, p_value = "-", "-"
    if difference.low is not None and difference.high is not None:
        bounds = f"{difference.low:+.3f} to {difference.high:+.3f}"
    if difference.p_value is not None:
        p_value = f"{difference.p_value:.3f}"
    better = {"a": result.a, "b": result.b, "": "undecided"}[difference.better]
    change = f"{difference.b - difference.a:+.3f}"
    return [f"{difference.a:.3f}", f"{difference.b:.3f}", change, bounds, p_value, escape(better)]


def _items(result: Comparison, file: str) -> str:
    pairs = result.files[file].examples
    if not pairs:
        return ""
    cards = "".join(_card(result, pair) for pair in pairs)
    return f"<details><summary>{escape(file)}</summary>{cards}</details>"


def _card(result: Comparison, pair: ItemPair) -> str:
    winner = result.b if pair.b_score > pair.a_score else result.a
    sides = "".join(
        f"<div><b>{escape(name)}</b><p>{escape(text.strip()) or '(empty)'}</p></div>"
        for name, text in ((result.a, pair.a), (result.b, pair.b))
    )
    return (
        f'<article class="item"><h3>record {pair.number}: {escape(winner)} is better</h3>'
        f"<dl><dt>asked</dt><dd>{escape(pair.instruction)}</dd>"
        f'<dt>reference</dt><dd>{escape(pair.reference)}</dd></dl><div class="pair">{sides}</div></article>'
    )
