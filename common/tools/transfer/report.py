"""Write the report of a plan: transfer.md, transfer.json, and transfer.html with a heat map and curves."""

import html
import io
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from common.errors import printable
from common.run.report import STYLE
from common.tools.runner import keep
from common.tools.transfer.chains import shown
from common.tools.transfer.findings import Cell, Comparison, Findings
from common.tools.transfer.plan import ALONE, JOINT, Rows
from common.tools.transfer.sentences import limits, number, sentences
from common.tools.transfer.signs import SIGNS

#: colours that people with any colour vision can tell apart (Okabe and Ito 2008)
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
MARKERS = "os^vDP*X"
#: colours of the heat map: losses orange, gains blue; both differ in lightness from white for all colour vision
LOSS, GAIN = (230, 97, 1), (33, 102, 172)
#: mark of a sure effect
MARK = "●"


@dataclass
class Section:
    """A part of the report.

    Attributes:
        title: its title.
        text: paragraphs before the table.
        header: names of the columns; the first column is text, the others are numbers.
        rows: the cells.
        colours: for each row the gain that colours each cell but the first; empty for a table without colours.
    """

    title: str
    text: list[str] = field(default_factory=list)
    header: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)
    colours: list[list[Comparison | None]] = field(default_factory=list)


def write(findings: Findings, folder: Path, argv: str) -> list[Path]:
    """Write the three files; `argv` is the command. Return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    plan = findings.chains.plan
    about = f"{', '.join(findings.machines()) or 'nothing trained'}; {datetime.now(UTC):%Y-%m-%d}; `{argv}`"
    parts = sections(findings)
    paths = [folder / f"transfer.{ending}" for ending in ("md", "json", "html")]
    keep(paths[0], markdown(plan.title, about, parts))
    keep(paths[1], json.dumps(as_json(findings, about), indent=1, allow_nan=False))
    keep(paths[2], page(plan.title, about, parts, curves(findings)))
    return paths


def sections(findings: Findings) -> list[Section]:
    """Return the parts of the report that have something to say."""
    plan, found = findings.chains.plan, []
    if findings.cells and any(cell.scores for cell in findings.cells.values()):
        found.append(Section("In words", [f"- {sentence}" for sentence in sentences(findings)] or ["- No effect yet."]))
        legend = f"In points, with the half width of the 95 % interval. {MARK}: sure, p < 0.05 after Holm's correction."
        found.append(_matrix(findings, "gain", f"Gain over {plan.baseline}", legend))
        if any(cell.over_scratch for cell in findings.cells.values()):
            found.append(_matrix(findings, "over_scratch", "Gain over random weights", legend))
        found.append(
            _matrix(findings, "score", "Scores", "Mean over the seeds, with the half width of the 95 % interval.")
        )
        found += [_efficiency(findings), _equal_cost(findings), _forgetting(findings), *_sequence(findings)]
    found += [_signs(findings), _worth(findings)]
    if any(cell.score for cell in findings.cells.values()):
        found.append(Section("What this does not show", [f"- {limit}" for limit in limits(findings)]))
    return [section for section in found if section.rows or not section.header]


def _columns(findings: Findings) -> list[tuple[str, Rows]]:
    return [(target.name, rows) for target in findings.chains.plan.targets for rows in target.rows]


def _matrix(findings: Findings, key: str, title: str, legend: str) -> Section:
    names = {target: f"{target} ({score})" for target, score in findings.score_names.items()}
    columns = [
        column
        for column in _columns(findings)
        if any(
            getattr(cell, key) is not None for place, cell in findings.cells.items() if (place[0], place[2]) == column
        )
    ]
    section = Section(title, [legend], ["source", *(f"{names[target]}, {shown(rows)}" for target, rows in columns)])
    for source in findings.chains.plan.sources:
        cells = [findings.cells.get((target, source.name, rows)) for target, rows in columns]
        if not any(cell is not None and (getattr(cell, key) is not None or cell.error) for cell in cells):
            continue
        section.rows.append([source.name, *(_text(cell, key) for cell in cells)])
        if key != "score":
            section.colours.append([None if cell is None else getattr(cell, key) for cell in cells])
    return section


def _text(cell: Cell | None, key: str) -> str:
    value = None if cell is None else getattr(cell, key)
    if value is None:
        return "" if cell is None or not cell.error else "failed" if cell.error != "not trained yet" else "…"
    if isinstance(value, Comparison):
        return f"{number(value)} {MARK}" if value.sure else number(value)
    return f"{value.mean:.1f} ± {value.half_width:.1f}"


def _efficiency(findings: Findings) -> Section:
    text = (
        f"Rows that a source needs for the score of {findings.chains.plan.baseline} at a number of rows, by "
        "interpolation over the logarithm of the rows, with the 95 % interval. ≤: at the fewest trained; "
        ">: at no number that was trained."
    )
    section = Section("Label efficiency", [text], ["target, source", *()])
    levels = sorted({level for needed in findings.needed.values() for level in needed})
    section.header += [f"score at {level:,} rows" for level in levels]
    for (target, source), needed in findings.needed.items():
        trained = [place for place, cell in findings.cells.items() if cell.score and place[:2] == (target, source)]
        rows = [findings.size(place[0], place[2]) for place in trained]
        cells = [_needed(needed[level], min(rows), max(rows)) if level in needed else "" for level in levels]
        section.rows.append([f"{target}, {source}", *cells])
    return section


def _needed(values: tuple[float, float, float], least: int, most: int) -> str:
    texts = [
        f"> {most:,}" if value == np.inf else f"≤ {least:,}" if value <= least else f"{value:,.0f}" for value in values
    ]
    return texts[0] if len(set(texts)) == 1 else f"{texts[0]} ({texts[1]} to {texts[2]})"


def _equal_cost(findings: Findings) -> Section:
    baseline = findings.chains.plan.baseline
    text = f"Gains beside that of training {baseline} for the minutes of the source and of the target together."
    header = ["source", "gain", f"{baseline}, same minutes", "difference", "seconds", "seconds, same minutes"]
    section = Section("Equal cost", [text], header)
    for (target, source, rows), cell in findings.cells.items():
        if cell.longer is None or cell.net is None or cell.gain is None:
            continue
        seconds = ["" if value is None else f"{value:.0f}" for value in (cell.seconds, cell.longer_seconds)]
        name = f"{source}, {target}, {shown(rows)}"
        section.rows.append([name, *(_marked(one) for one in (cell.gain, cell.longer, cell.net)), *seconds])
    return section


def _marked(one: Comparison) -> str:
    return f"{number(one)} {MARK}" if one.sure else number(one)


def _forgetting(findings: Findings) -> Section:
    text = (
        "Score of the source's own test rows before and after the target was learned: with the trained head of the "
        "target if both have one task and one set of labels, else with the head of the source on the weights of the "
        "target."
    )
    section = Section("Forgetting", [text], ["source, after target", "before", "after", "change"])
    for one in findings.forgetting:
        name = f"{one.source} ({one.score}), after {one.target}, {shown(one.rows)}"
        section.rows.append([name, f"{one.before:.1f}", f"{one.after:.1f}", _marked(one.change)])
    return section


def _sequence(findings: Findings) -> list[Section]:
    """Return what each method of the sequence has learned, and the scores after each task."""
    sequence = findings.chains.plan.sequence
    if sequence is None:
        return []
    text = (
        f"Learned one after the other: {', '.join(sequence.order)}. Average accuracy: mean score of all tasks then. "
        "Forgetting: loss from the best earlier score of a task to that at the end. Backward transfer: gain from the "
        f"score right after a task to that at the end. {JOINT}: all tasks trained together. {ALONE}: a model a task."
    )
    header = ["method", "average accuracy", "forgetting", "backward transfer"]
    section = Section("Sequence", [text], header)
    each = Section("Sequence, task by task", ["Scores after each task."], ["method, after", *sequence.order])
    for method, one in findings.sequence.items():
        effects = (one.average, one.forgetting, one.backward)
        cells = ["" if e is None else f"{e.mean:.1f} ± {e.half_width:.1f}" for e in effects]
        section.rows.append([method, *cells])
        for k in sorted({k for k, _ in one.scores}):
            name = method if one.forgetting is None else f"{method}, {sequence.order[k]}"
            scores = [one.scores.get((k, j)) for j in range(len(sequence.order))]
            each.rows.append([name, *("" if score is None else f"{score:.1f}" for score in scores)])
    return [section, each]


def _signs(findings: Findings) -> Section:
    text = "Signs that need no training; more promises more. rank: mean of the relative ranks, 1 for the first."
    section = Section("Prediction", [text], ["target, source", *SIGNS, "rank"])
    for target, sources in findings.signs.items():
        ordered = sorted(sources, key=lambda name: -(sources[name].get("rank") or 0.0))
        for source in ordered:
            values = [sources[source].get(sign) for sign in (*SIGNS, "rank")]
            cells = ["" if value is None else f"{value:.3f}" for value in values]
            section.rows.append([f"{target}, {source}", *cells])
    return section


def _worth(findings: Findings) -> Section:
    text = (
        "Rank correlation of each sign with the measured scores of the sources, and regret at 1: the share of the best "
        "score that is lost by taking the source that the sign ranks first."
    )
    section = Section("What the prediction was worth", [text], ["target", *SIGNS, "rank"])
    for (target, rows), of_signs in findings.worth.items():
        cells = []
        for sign in (*SIGNS, "rank"):
            correlation, lost = of_signs.get(sign, (None, None))
            parts = [] if correlation is None else [f"{correlation:+.2f}"]
            cells.append(", ".join([*parts, *([] if lost is None else [f"{100 * lost:.1f} %"])]))
        section.rows.append([f"{target}, {shown(rows)}", *cells])
    return section


# Markdown


def markdown(title: str, about: str, parts: Sequence[Section]) -> str:
    """Return the report in Markdown."""
    lines = [f"# {_escaped(title)}", "", about, ""]
    for part in parts:
        lines += [f"## {_escaped(part.title)}", "", *(_escaped(line) for line in part.text), ""]
        if part.rows:
            lines += ["| " + " | ".join(map(_escaped, part.header)) + " |"]
            lines += ["| --- |" + " ---: |" * (len(part.header) - 1)]
            lines += ["| " + " | ".join(map(_escaped, row)) + " |" for row in part.rows] + [""]
    return "\n".join(lines)


def _escaped(text: str) -> str:
    return printable(text).replace("|", "\\|").replace("<", "&lt;")


# HTML


def page(title: str, about: str, parts: Sequence[Section], pictures: dict[str, str]) -> str:
    """Return the report as a page without scripts; `pictures` are SVG by title."""
    style = (
        STYLE
        + "\nth { width: auto; } .n { text-align: right; } td.n { white-space: nowrap; } td.sure { font-weight: bold; }"
    )
    head = f'<!DOCTYPE html>\n<html><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
    body = [f"{head}<style>{style}</style></head><body>", f"<h1>{html.escape(title)}</h1>"]
    about = re.sub("`(.*)`", r"<code>\1</code>", html.escape(printable(about)))
    body.append(f"<p>{about}</p>")
    for number_of_part, part in enumerate(parts):
        body.append(f"<h2>{html.escape(part.title)}</h2>")
        items = [line.removeprefix("- ") for line in part.text if line.startswith("- ")]
        body += [f"<p>{html.escape(printable(line))}</p>" for line in part.text if not line.startswith("- ")]
        if items:
            body.append("<ul>" + "".join(f"<li>{html.escape(printable(item))}</li>" for item in items) + "</ul>")
        if part.rows:
            body.append(_table(part))
        if number_of_part == 1:
            body += [f"<h3>{html.escape(name)}</h3>{picture}" for name, picture in pictures.items()]
    return "\n".join(body) + "\n</body></html>\n"


def _table(part: Section) -> str:
    largest = max((abs(one.effect.mean) for row in part.colours for one in row if one is not None), default=0.0)
    first, *numbers = map(html.escape, part.header)
    lines = [f"<tr><th>{first}</th>" + "".join(f'<th class="n">{name}</th>' for name in numbers) + "</tr>"]
    for i, row in enumerate(part.rows):
        cells = [f"<td>{html.escape(printable(row[0]))}</td>"]
        for j, text in enumerate(row[1:]):
            one = part.colours[i][j] if part.colours else None
            sure = ' class="n sure"' if MARK in text else ' class="n"'
            cells.append(f"<td{sure}{colour(one, largest)}>{html.escape(text)}</td>")
        lines.append("<tr>" + "".join(cells) + "</tr>")
    return "<table>" + "\n".join(lines) + "</table>"


def colour(one: Comparison | None, largest: float) -> str:
    """Return the style of a cell of the heat map: from orange over white to blue, by the gain."""
    if one is None or not largest:
        return ""
    share = one.effect.mean / largest
    end = GAIN if share > 0 else LOSS
    red, green, blue = (round(255 + (value - 255) * abs(share) * 0.8) for value in end)
    text = "#fff" if 0.3 * red + 0.6 * green + 0.1 * blue < 130 else "#000"
    return f' style="background: rgb({red},{green},{blue}); color: {text}"'


def curves(findings: Findings) -> dict[str, str]:
    """Return for each target a picture (SVG) of the scores of its sources by number of rows, with intervals."""
    pictures = {}
    for target in findings.chains.plan.targets:
        figure = Figure(figsize=(7.5, 4.2), layout="constrained")
        axes = figure.add_subplot()
        drawn = 0
        for number_of_source, source in enumerate(findings.chains.plan.sources):
            cells = [findings.cells.get((target.name, source.name, rows)) for rows in target.rows]
            points = [
                (findings.size(target.name, cell.place[2]), cell.score.mean, cell.score.half_width)
                for cell in cells
                if cell is not None and cell.score is not None
            ]
            if points:
                rows, means, widths = zip(*points, strict=True)
                colour_of, marker = PALETTE[number_of_source % 8], MARKERS[number_of_source % 8]
                line = "-" if number_of_source < 8 else "--"
                look = f"{marker}{line}"
                axes.errorbar(rows, means, yerr=widths, fmt=look, color=colour_of, capsize=3, label=source.name)
                drawn += 1
        if not drawn:
            continue
        axes.set_xscale("symlog", linthresh=10)
        sizes = [findings.size(target.name, rows) for rows in target.rows]
        axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
        axes.minorticks_off()
        axes.set(xlabel="training rows", ylabel=f"{findings.score_names[target.name]}, mean and 95 % interval")
        figure.legend(loc="outside right upper")
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg")
        pictures[f"{target.name}: score by training rows"] = (
            buffer.getvalue().partition("<svg")[1] + (buffer.getvalue().partition("<svg")[2])
        )
    return pictures


# JSON


def as_json(findings: Findings, about: str) -> dict[str, Any]:
    """Return all numbers of the report. Scores are in points; infinite numbers of rows are the text "more"."""
    plan = findings.chains.plan
    cells = [
        {"target": place[0], "source": place[1], "kind": plan.source(place[1]).kind, "rows": place[2]}
        | {"score_name": findings.score_names[place[0]], "seeds": list(plan.seeds), "scores": cell.scores}
        | {"score": cell.score and asdict(cell.score), "seconds": cell.seconds, "longer_seconds": cell.longer_seconds}
        | {
            key: one and one.plain()
            for key in ("gain", "over_scratch", "longer", "net")
            for one in [getattr(cell, key)]
        }
        | {"error": cell.error}
        for place, cell in findings.cells.items()
    ]
    forgetting = [
        {"source": one.source, "target": one.target, "rows": one.rows, "score_name": one.score}
        | {"before": one.before, "after": one.after, "change": one.change.plain()}
        for one in findings.forgetting
    ]
    needed = [
        {"target": target, "source": source, "score_at": level}
        | {key: "more" if v == np.inf else v for key, v in zip(("rows", "low", "high"), values, strict=True)}
        for (target, source), levels in findings.needed.items()
        for level, values in levels.items()
    ]
    worth = [
        {"target": target, "rows": rows, "sign": sign, "rank_correlation": values[0], "regret_at_1": values[1]}
        for (target, rows), of_signs in findings.worth.items()
        for sign, values in of_signs.items()
    ]
    sequence = {
        method: {"average_accuracy": asdict(one.average)}
        | {"forgetting": one.forgetting and asdict(one.forgetting)}
        | {"backward_transfer": one.backward and asdict(one.backward)}
        | {"scores": [{"learned": k + 1, "task": j + 1, "score": score} for (k, j), score in one.scores.items()]}
        for method, one in findings.sequence.items()
    }
    return {
        "title": plan.title,
        "about": about,
        "baseline": plan.baseline,
        "sentences": sentences(findings),
        "limits": limits(findings),
        "cells": cells,
        "label_efficiency": needed,
        "forgetting": forgetting,
        "sequence": sequence,
        "signs": findings.signs,
        "worth_of_signs": worth,
    }
