"""Say in sentences, each by a rule, what the numbers show. Effects that are not sure are said to be so."""

from collections.abc import Sequence

from common.tools.transfer.findings import Cell, Comparison, Findings
from common.tools.transfer.plan import JOINT, KINDS, Rows, Source


def sentences(findings: Findings) -> list[str]:
    """Return the sentences of a report, in the order of targets and sources."""
    plan, found = findings.chains.plan, []
    for target in plan.targets:
        for source in plan.sources:
            cells = [
                cell
                for rows in target.rows
                if (cell := findings.cells.get((target.name, source.name, rows))) is not None and cell.score is not None
            ]
            if cells and source.name != plan.baseline:
                found += _of_source(findings, source, target.name, cells)
    return found + _of_forgetting(findings) + _of_sequence(findings) + _of_signs(findings)


def lead(source: Source) -> str:
    """Return how a sentence names a source."""
    if source.kind in ("scratch", "frozen") and source.name == source.kind:
        return KINDS[source.kind]
    return f"{KINDS[source.kind]} ({source.name})" if not source.stages else f"{KINDS[source.kind]} {source.name}"


def number(comparison: Comparison) -> str:
    """Return an effect with half the width of its interval, in points."""
    return f"{comparison.effect.mean:+.1f} ± {comparison.effect.half_width:.1f}"


def _at(rows: Rows) -> str:
    return "all rows" if rows is None else f"{rows:,} rows"


def _of_sequence(findings: Findings) -> list[str]:
    """Return a sentence for each method and bound of the sequence."""
    found = []
    for method, one in findings.sequence.items():
        average = f"{one.average.mean:.1f} ± {one.average.half_width:.1f}"
        if one.forgetting is None:
            bound = "All tasks trained together" if method == JOINT else "A model for each task"
            found.append(f"{bound} ({method}): average accuracy {average}.")
        else:
            lost = f"{one.forgetting.mean:.1f} ± {one.forgetting.half_width:.1f}"
            found.append(
                f"After the sequence, {method} has an average accuracy of {average} and forgets {lost} points."
            )
    return found


def _listed(cells: Sequence[Cell]) -> str:
    parts = [f"{_at(cell.place[2])} ({number(cell.gain)})" for cell in cells if cell.gain]
    return " and ".join(filter(None, [", ".join(parts[:-1]), parts[-1]]))


def _of_source(findings: Findings, source: Source, target: str, cells: list[Cell]) -> list[str]:
    name, found = lead(source), []
    zero = next((cell for cell in cells if cell.place[2] == 0 and cell.score), None)
    if zero and zero.score:
        score = findings.score_names[target]
        found.append(
            f"{name} reaches {score} {zero.score.mean:.1f} ± {zero.score.half_width:.1f} on {target} without a row of "
            "it."
        )
    compared = [cell for cell in cells if cell.gain is not None]
    helps = [cell for cell in compared if cell.gain and cell.gain.sure and cell.gain.effect.mean > 0]
    hurts = [cell for cell in compared if cell.gain and cell.gain.sure and cell.gain.effect.mean < 0]
    unsure = [cell for cell in compared if cell.gain and not cell.gain.sure]
    if helps or hurts:
        parts = [f"helps {target} at {_listed(helps)}"] if helps else []
        if hurts:
            parts.append(f"hurts {'it' if helps else target} at {_listed(hurts)}")
        sentence = f"{name} {', and '.join(parts)}"
        found.append(f"{sentence}; at {_listed(unsure)} no effect is sure." if unsure else f"{sentence}.")
    elif unsure and len(findings.chains.plan.seeds) == 1:
        found.append(f"{name}: on {target} at {_listed(unsure)}; with one seed, no effect is called sure.")
    elif unsure:
        found.append(f"{name} has no sure effect on {target}: at {_listed(unsure)}.")
    for cell in helps:
        if cell.net is None:
            continue
        place = f"On {target} at {_at(cell.place[2])}"
        baseline = findings.chains.plan.baseline
        if cell.net.sure and cell.net.effect.mean > 0:
            found.append(
                f"{place}, {source.name} also beats {baseline} trained for the same minutes ({number(cell.net)})."
            )
        else:
            found.append(
                f"{place}, it is not sure that {source.name} beats {baseline} trained for the same minutes "
                f"({number(cell.net)})."
            )
    return found


def _of_forgetting(findings: Findings) -> list[str]:
    found = []
    for one in findings.forgetting:
        change = f"{one.before:.1f} to {one.after:.1f}, {number(one.change)}"
        if one.change.sure and one.change.effect.mean < 0:
            found.append(f"After {target_of(one.target, one.rows)}, {one.source} is partly forgotten ({change}).")
        elif one.change.sure:
            found.append(f"After {target_of(one.target, one.rows)}, {one.source} is better than before ({change}).")
        else:
            found.append(f"After {target_of(one.target, one.rows)}, no loss on {one.source} is sure ({change}).")
    return found


def target_of(target: str, rows: Rows) -> str:
    """Return a target with its number of training rows."""
    return f"{target} ({_at(rows)})"


def _of_signs(findings: Findings) -> list[str]:
    """Say for each target at its largest number of rows whether the ranking of all signs chose well."""
    found = []
    for target in findings.chains.plan.targets:
        rows = target.rows[-1]
        correlation, lost = findings.worth.get((target.name, rows), {}).get("rank", (None, None))
        ranked = {name: signs["rank"] for name, signs in findings.signs.get(target.name, {}).items()}
        known = {name: rank for name, rank in ranked.items() if rank is not None}
        measured = {name for name in known if (cell := findings.cells.get((target.name, name, rows))) and cell.score}
        if lost is None:
            continue
        first = max(measured, key=lambda name: known[name])
        chosen = "the best of them" if lost == 0 else "not the best of them"
        text = f"The signs ranked {first} first for {target_of(target.name, rows)}: {chosen}"
        if lost:
            text += f", at a loss of {100 * lost:.1f} % of its score"
        found.append(text + (f"; rank correlation {correlation:+.2f}." if correlation is not None else "."))
    return found


def limits(findings: Findings) -> list[str]:
    """Return what the plan does not show."""
    plan, tasks = findings.chains.plan, findings.chains.tasks
    seeds = len(plan.seeds)
    models = sorted(findings.chains.encoders())
    sizes = ", ".join(f"{name} {task.rows.evaluated[1]:,}" for name, task in tasks.items())
    found = [
        f"{'One encoder' if len(models) == 1 else 'Encoders'}: {', '.join(models)}. Larger or other encoders may gain "
        "less or more.",
        f"{seeds} seed{'s' * (seeds > 1)}: " + (
            "the spread over seeds is unknown, so nothing is called sure." if seeds == 1
            else "effects smaller than the intervals can exist unseen; more seeds narrow them."
        ),
        f"Test rows: {sizes}. The rows are taken as a random sample of those to come.",
        "Fewer training rows are the same random sample for each seed; another sample may behave otherwise.",
        "All runs have the arguments of the plan; none is tuned for a source, except by what the plan says.",
    ]  # fmt: skip
    if gains := sum(cell.gain is not None for cell in findings.cells.values()):
        found.append(
            "All comparisons of a kind are one family: an effect is called sure if p < 0.05 after Holm's correction "
            f"over {gains} gains."
        )
    if not plan.equal_cost:
        found.append(
            "Equal cost was not measured (equal_cost: false): a source may only gain by its additional minutes."
        )
    return found + findings.chains.notes
