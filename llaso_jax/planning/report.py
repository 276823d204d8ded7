"""A plan for people: text for the terminal, a picture of the memory, and a page with both that needs no network."""

import base64
import io
import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from llaso_jax.planning.hardware import GIB
from llaso_jax.planning.plan import Plan
from llaso_jax.sharding.report import aligned

Refusals = Mapping[str, str]
"""Why meshes were not possible."""

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
img { max-width: 100% } pre { overflow-x: auto }
"""


def plan_text(plan: Plan) -> str:
    """Everything that a plan says, as lines."""
    bounds = plan.bounds
    lines = [
        f"{plan.recipe}, stage {plan.stage!r} on {plan.topology}, mesh {plan.mesh} ({plan.devices} devices)",
        f"{plan.rows} rows of {plan.sequence_length} positions and {plan.chunks_per_row} chunks at a time, "
        f"{plan.accumulation} micro-batches a step, remat {plan.remat}",
        "",
        f"memory of a device at its peak: {plan.peak_hbm_bytes / GIB:.2f} GiB of "
        f"{plan.device.hbm_bytes / GIB:.2f} ({plan.hbm_share:.0%})",
        *(
            f"  {owner:<22} {size / GIB:8.3f} GiB  {size / plan.peak_hbm_bytes:4.0%}"
            for owner, size in plan.hbm_by_owner.items()
        ),
        "",
        f"FLOPs of a step, all devices: {plan.analytic_flops / 1e12:.1f} T by the formulas, "
        f"{plan.counted_flops / 1e12:.1f} T in the program ({plan.counted_flops / plan.analytic_flops:.3f} of them)",
        "",
        "bytes that a device sends in a step",
        *(
            f"  {axis:<12} {kind:<20} {sent / 1e9:10.3f} GB"
            for axis, kinds in plan.collectives.items()
            for kind, sent in kinds.items()
        ),
        *(["  none"] if not plan.collectives else []),
        "",
        f"a step takes at least {bounds.seconds:.3f} s, bound by {bounds.binding}: compute {bounds.compute:.3f} s, "
        f"hbm {bounds.hbm:.3f} s, interconnect {bounds.interconnect:.3f} s",
        f"  MFU at most {plan.mfu_bound:.1%}",
        f"  operation by operation {plan.predicted_step_seconds:.3f} s: {plan.samples_per_second:.2f} samples/s; "
        + ", ".join(f"{name} corpus {hours:.0f} h" for name, hours in plan.hours.items()),
        f"compiled in {plan.compile_seconds:.0f} s",
    ]
    return "\n".join(lines) + "\n"


def comparison_text(plans: Sequence[Plan], refusals: Refusals) -> str:
    """One line for each mesh, the fastest first; then those that were not possible, and why."""
    header = ("mesh", "rows", "GiB", "of HBM", "MFU <=", "bound by", "samples/s", "compiled, s")
    rows = [header, *(_row(plan) for plan in plans)]
    lines = aligned(rows) + [f"{mesh}: {reason}" for mesh, reason in refusals.items()]
    return "\n".join(lines) + "\n"


def _row(plan: Plan) -> tuple[str, ...]:
    return (
        plan.mesh,
        f"{plan.rows} x {plan.accumulation}",
        f"{plan.peak_hbm_bytes / GIB:.2f}",
        f"{plan.hbm_share:.0%}",
        f"{plan.mfu_bound:.1%}",
        plan.bounds.binding,
        f"{plan.samples_per_second:.1f}",
        f"{plan.compile_seconds:.0f}",
    )


def write_report(folder: Path, plans: Sequence[Plan], refusals: Refusals) -> None:
    """plan.json, plan.png and plan.html of plans, the best first.

    plan.json holds the first plan's numbers, and under `meshes` those of all, or why they are not possible.
    """
    folder.mkdir(parents=True, exist_ok=True)
    meshes: list[dict[str, Any]] = [plan.to_json() for plan in plans]
    meshes += [{"mesh": mesh, "reason": reason} for mesh, reason in refusals.items()]
    content = {**plans[0].to_json(), "meshes": meshes}
    (folder / "plan.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    picture = draw_memory(plans)
    (folder / "plan.png").write_bytes(picture)
    (folder / "plan.html").write_text(_page(plans, refusals, picture), encoding="utf-8")


def draw_memory(plans: Sequence[Plan]) -> bytes:
    """A PNG: the peak of every plan by owner, and the memory there is."""
    from matplotlib.figure import Figure  # without pyplot: no global state, no display

    figure = Figure(figsize=(9, 1.6 + 0.45 * len(plans)), layout="constrained")
    axes = figure.subplots()
    names = [plan.mesh for plan in plans]
    left = [0.0] * len(plans)
    for number, owner in enumerate(plans[0].hbm_by_owner):
        sizes = [plan.hbm_by_owner[owner] / GIB for plan in plans]
        axes.barh(names, sizes, left=left, label=owner, color=f"C{number}")
        left = [before + size for before, size in zip(left, sizes, strict=True)]
    axes.axvline(plans[0].device.hbm_bytes / GIB, color="black", linestyle="--", label="memory")
    axes.invert_yaxis()
    axes.set_xlabel("GiB on each device at its peak")
    axes.legend(fontsize=7, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def _page(plans: Sequence[Plan], refusals: Refusals, picture: bytes) -> str:
    best = plans[0]
    title = escape(f"{best.recipe}, stage {best.stage} on {best.topology}")
    image = base64.b64encode(picture).decode()
    return (
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{title}</title>\n<style>{_STYLE}</style>\n'
        f"<h1>{title}</h1>\n"
        f'<img alt="memory of a device by owner" src="data:image/png;base64,{image}">\n'
        f"<h2>Meshes</h2>\n<pre>{escape(comparison_text(plans, refusals))}</pre>\n"
        f"<h2>{escape(best.mesh)}</h2>\n<pre>{escape(plan_text(best))}</pre>\n</html>\n"
    )
