"""comparison.html: two models side by side, in one file."""

from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template

from llaso_jax.evaluation.comparison import Comparison, Difference, ItemPair
from llaso_jax.evaluation.report.sections import table
from llaso_jax.evaluation.tables import OVERALL, PROTOCOL_NAMES, difference_cells

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
        files=_files(result) + _told("left out of all means", _reasons(result)),
        notes=_told("remarks", result.notes),
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
    return [escape(cell) for cell in difference_cells(difference, result)]


def _reasons(result: Comparison) -> list[str]:
    return [f"{file}: {reason}" for file, reason in result.left_out.items()]


def _told(title: str, lines: Sequence[str]) -> str:
    """A list with its title; "" without lines."""
    if not lines:
        return ""
    return f"<h3>{title}</h3><ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>"


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
