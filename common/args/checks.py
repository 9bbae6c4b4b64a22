"""Check arguments of several groups together, and say how a resumed run treats changed values."""

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, get_args

from common.args.data import DataArguments, GroupedDataArguments
from common.args.model import ModelArguments
from common.args.scores import MEAN, WORST, score_of_rows
from common.args.training import TrainingArguments
from common.errors import InputError

#: file of the importance of each weight in a model folder, for `--keep ewc`
FISHER = "fisher/fisher.safetensors"
Resume = Literal["fixed", "splits_step", "incidental"]


def resume_rules(groups: Iterable[type[Any]]) -> dict[str, Resume]:
    """Return argument -> rule for a changed value when a run resumes; see `common.args`.

    A field that a subclass redeclares, for example with another default, keeps the rule of its parent.

    Raises:
        ValueError: a field has an unknown value of `resume`.
    """
    rules: dict[str, Resume] = {}
    for group in groups:
        for name in group.__dataclass_fields__:
            declared = (base.__dict__.get("__dataclass_fields__", {}).get(name) for base in group.__mro__)
            rule = next((f.metadata["resume"] for f in declared if f and "resume" in f.metadata), None)
            if rule is not None:
                rules[name] = rule
            if rule not in (None, *get_args(Resume)):
                raise ValueError(f"{group.__name__}.{name}: resume is {rule!r}; use {', '.join(get_args(Resume))}")
    return rules


def check_together(args: TrainingArguments, data_args: DataArguments, groups: Iterable[Any]) -> None:
    """Raise `InputError` for an argument that needs another one of another group.

    Args:
        args: the arguments of the training.
        data_args: the arguments of the data.
        groups: the other dataclasses of arguments, that of the model among them.
    """
    grouped = data_args if isinstance(data_args, GroupedDataArguments) else None
    _check_domains(args, grouped)
    after = next((part.after for part in groups if isinstance(part, ModelArguments)), None)
    if args.keep != "none" and after is None:
        raise InputError(f"--keep {args.keep}: needs the model that learned before; name it by --after")
    rows = grouped and grouped.replay_file
    if rows and args.keep not in ("ewc", "replay"):
        raise InputError("--replay_file: needs --keep replay, or --keep ewc; add one of them")
    if args.keep == "replay" and grouped and not rows:
        raise InputError("--keep replay: needs old rows; name their file by --replay_file")
    if args.keep == "ewc" and not rows and not Path(after or "", FISHER).is_file():
        remedy = ", or name its rows by --replay_file" if grouped else ""
        raise InputError(f"--keep ewc: {after} has no {FISHER}; train it with --save_fisher true{remedy}")


def _check_domains(args: TrainingArguments, grouped: GroupedDataArguments | None) -> None:
    if grouped and grouped.domain_column is not None:
        return
    metric = (args.metric_for_best_model or "").removeprefix("eval_")
    asked = f"--metric_for_best_model {metric}" if metric.startswith((MEAN, WORST)) else None
    if grouped and args.domain_temperature is not None:
        asked = f"--domain_temperature {args.domain_temperature:g}"
    if asked:
        remedy = "name their column by --domain_column" if grouped else "leave it out"
        raise InputError(f"{asked}: the rows have no domains; {remedy}")


def check_best_metric(args: TrainingArguments, metrics: Iterable[str]) -> None:
    """Raise `InputError` unless `--metric_for_best_model` names the loss, one of `metrics`, or one over domains.

    `mean_domain_SCORE` and `worst_domain_SCORE` are the mean and the worst of a score over the domains.
    """
    name = "loss" if args.metric_for_best_model is None else args.metric_for_best_model.removeprefix("eval_")
    known = ["loss", *metrics]
    if (name if name == "loss" else score_of_rows(name)) not in known or score_of_rows(name) == "loss" != name:
        nearest = difflib.get_close_matches(name.lower(), known, n=1)
        classes = tuple(one.removesuffix("support") for one in known if one.endswith("_support"))
        overall = ", ".join(one for one in known if not one.startswith(classes))
        of_each = f", and those of each label or type, such as {classes[0]}f1" if classes else ""
        hint = f"; did you mean {nearest[0]}?" if nearest else f"; known: {overall}{of_each}"
        raise InputError(f"--metric_for_best_model {name}: no such score{hint}")
