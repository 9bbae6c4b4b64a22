"""Train the runs of a plan in processes of their own; keep their results in a folder that plans and machines share."""

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, set_seed

from common.errors import InputError, quiet, tell
from common.models import resolve_model
from common.models.load import load_config
from common.run.fingerprint import differences
from common.tools import runner
from common.tools.transfer.chains import Chains, Random, Run, kept_by, time_factors
from common.tools.transfer.claims import Claim, claim, end_orphan, is_ours, is_stale
from common.tools.transfer.estimate import Estimate, minutes
from common.training.checkpoints import STAGING

#: seconds between two looks for runs that other machines have finished
POLL = 2.0


class Store:
    """The folder with the results, predictions and models of runs, by their keys."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._results: dict[str, dict[str, Any]] = {}
        self._looked: dict[str, float] = {}  # key -> when its file was read, or was not there

    def output(self, run: Run) -> Path:
        """Return the output folder of a run."""
        return self.folder / "runs" / run.key

    def _file(self, run: Run) -> Path:
        return self.folder / "runs" / f"{run.key}.json"

    def claim_file(self, run: Run) -> Path:
        """Return the file by which a process claims a run."""
        return self.folder / "runs" / f"{run.key}.claim"

    def result(self, run: Run, fresh: bool = False) -> dict[str, Any] | None:
        """Return the measurements of a finished run, or its `error`; None for a run that has not ended.

        `fresh` looks at the folder again, else it is looked at every `POLL` seconds for what may still come: a result,
        or a better one than an error.
        """
        known = self._results.get(run.key)
        if not fresh:
            if known is not None and "error" not in known:
                return known
            if time.monotonic() - self._looked.get(run.key, -POLL) < POLL:
                return known
        self._looked[run.key] = time.monotonic()
        try:
            self._results[run.key] = json.loads(self._file(run).read_text(encoding="utf-8"))
        except FileNotFoundError:
            self._results.pop(run.key, None)
        return self._results.get(run.key)

    def keep(self, run: Run, result: dict[str, Any]) -> None:
        """Write the result of a run."""
        self._results[run.key] = result
        runner.keep(self._file(run), json.dumps(result, indent=1))

    def begin(self, run: Run) -> None:
        """Remove the result of a run that is trained again, and the model that was made for it."""
        self._results.pop(run.key, None)
        self._file(run).unlink(missing_ok=True)
        shutil.rmtree(self.made_for(run), ignore_errors=True)

    def forget(self, run: Run) -> None:
        """Remove a run, so that it is trained again from its beginning."""
        self.begin(run)
        shutil.rmtree(self.output(run), ignore_errors=True)

    def has_model(self, run: Run) -> bool:
        """Return whether the trained model of a run is there."""
        for _, folders, files in os.walk(self.output(run)):  # which ignores folders that vanish meanwhile
            folders[:] = [name for name in folders if not name.startswith(("checkpoint-", STAGING))]
            if any(name.endswith(".safetensors") for name in files):
                return True
        return False

    def made_for(self, run: Run) -> Path:
        """Return the folder of the random or grafted model that a run starts from, which no other run reads."""
        return self.folder / "models" / run.key

    def model_of(self, run: Run) -> Path:
        """Return the folder of the model that a run starts from; make a random or a grafted one."""
        start = run.start
        if isinstance(start, Run):
            return self.output(start)
        assert start is not None
        folder = self.made_for(run)
        if not folder.exists():
            part = folder.with_suffix(f".{time.time_ns()}")
            part.mkdir(parents=True)
            if isinstance(start, Random):
                random_checkpoint(start, part)
            else:
                graft(self.output(start.head), self.output(start.body), part)
            part.rename(folder)
        return folder

    def drop_checkpoints(self, run: Run) -> None:
        """Remove the checkpoints of a run that has ended; four times the size of its model, which stays."""
        for path in self.output(run).glob("checkpoint-*"):
            shutil.rmtree(path)

    def drop_model(self, run: Run) -> None:
        """Remove the model of a run; its result and predictions stay."""
        runner.remove_weights(self.output(run))

    def shared(self) -> bool:
        """Return whether other processes train runs in this folder."""
        return any(not is_ours(file) and not is_stale(file) for file in (self.folder / "runs").glob("*.claim"))


def random_checkpoint(start: Random, folder: Path) -> None:
    """Write a checkpoint with the configuration and tokenizer of a model, and random weights."""
    base = Path(resolve_model(start.model))
    weights = ("*.safetensors*", "*.bin", "*.pt", "*.h5", "*.msgpack", "*.onnx", ".git*", "checkpoint-*")
    shutil.copytree(base, folder, ignore=shutil.ignore_patterns(*weights), dirs_exist_ok=True)
    set_seed(start.seed)
    with quiet():
        model = AutoModel.from_config(load_config(str(base)), dtype=torch.float32)
        model.save_pretrained(folder)


def graft(head: Path, body: Path, folder: Path) -> None:
    """Write a model with the head in folder `head`, and the weights of the encoder in folder `body`.

    Raises:
        InputError: the two have no weights in common.
    """
    ignored = shutil.ignore_patterns("*.safetensors*", "checkpoint-*", ".lock", "*.jsonl", "*.png")
    shutil.copytree(head, folder, ignore=ignored, dirs_exist_ok=True)
    with torch.device("meta"), quiet():
        prefix = AutoModel.from_config(load_config(str(body))).base_model_prefix
    new, trained = _weights(head), _weights(body)
    ours, theirs = _of_encoder(new, prefix), _of_encoder(trained, prefix)
    shared = {
        name: trained[theirs[bare]]
        for bare, name in ours.items()
        if bare in theirs and new[name].shape == trained[theirs[bare]].shape
    }
    if not shared:
        raise InputError(f"{head} and {body}: have no weights of an encoder in common")
    save_file(new | shared, folder / "model.safetensors", {"format": "pt"})


def _of_encoder(weights: dict[str, torch.Tensor], prefix: str) -> dict[str, str]:
    """Return the name of each weight of the encoder without `prefix` -> its name; an encoder alone has no prefix."""
    prefixed = {name.removeprefix(f"{prefix}."): name for name in weights if name.startswith(f"{prefix}.")}
    return prefixed or {name: name for name in weights}


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for path in sorted(folder.glob("*.safetensors")) for name, value in load_file(path).items()}


@dataclass
class Work:
    """The runs of a plan that are left, and the progress.

    Attributes:
        store: the folder.
        chains: the runs.
        estimate: tells the seconds of a run.
        at_once: number of runs at a time.
        budget: most seconds of training of this call; None for no limit.
        fresh: all runs are left, also those that have ended, until `forget` removes them.
        report: prints a result.
    """

    store: Store
    chains: Chains
    estimate: Estimate
    at_once: int = 1
    budget: float | None = None
    fresh: bool = False
    report: Callable[[Run, dict[str, Any]], str] = field(default=lambda run, result: "")
    spent: float = 0.0
    _claims: dict[str, Claim] = field(default_factory=dict)
    _begun: dict[str, float] = field(default_factory=dict)
    _made_with: dict[str, dict[str, Any]] = field(default_factory=dict)
    _failed: set[str] = field(default_factory=set)
    _postponed: list[Run] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.runs = self.chains.runs()

    def next_phase(self) -> "Work":
        """Return the work of the same chains after runs were added to them."""
        return replace(self, _claims={}, _begun={})

    def forget(self) -> None:
        """Remove all runs, so that they are trained again.

        Raises:
            InputError: other processes train runs in the folder.
        """
        if self.store.shared():
            raise InputError(
                f"--fresh: another process trains runs in {self.store.folder}; wait for it, or give another --folder"
            )
        for run in self.runs:
            self.store.forget(run)
        self.fresh = False

    def failed(self) -> list[Run]:
        """Return the runs that have failed in this call."""
        return [run for run in self.runs if run.key in self._failed]

    def exhausted(self) -> bool:
        """Return whether the budget is spent."""
        return self.budget is not None and self.spent >= self.budget

    def longer_seconds(self) -> float:
        """Return the estimated seconds of the runs that spend the minutes of the sources on the baseline."""
        if not self.chains.plan.equal_cost:
            return 0.0
        factors = time_factors(self.chains, self.estimate.seconds)
        baseline = self.chains.plan.baseline
        distinct = {(target, rows, factor) for (target, _, rows), factor in factors.items()}
        runs = [(self.chains.cells[target, baseline, rows], factor) for target, rows, factor in distinct]
        return sum(factor * self.estimate.seconds(run) for of_cell, factor in runs for run in of_cell) / self.at_once

    def left(self) -> list[Run]:
        """Return the runs that must still be trained, also those whose model another run needs and that is gone."""
        wanted: set[str] = set()
        for run in reversed(self.runs):  # a run follows the runs that it needs
            if run.key in wanted or not self._done(run):
                wanted |= {run.key, *(need.key for need in run.needs() if not self.store.has_model(need))}
        return [run for run in self.runs if run.key in wanted]

    def _done(self, run: Run) -> bool:
        result = self.store.result(run)
        if result is None or self.fresh:
            return False
        return "error" not in result or run.key in self._failed

    def _ready(self, run: Run) -> bool:
        return all(
            self._done(need) and need.key not in self._failed and self.store.has_model(need) for need in run.needs()
        )

    def _blocked(self, run: Run) -> bool:
        """Return whether this run or one that it needs has failed."""
        return run.key in self._failed or any(self._blocked(need) for need in run.needs())

    def jobs(self) -> Iterator[runner.Job | None]:
        """Yield the next run that can start; None while all that are left wait for others."""
        while left := [run for run in self.left() if not self._blocked(run)]:
            if self.exhausted():
                return
            free = [run for run in left if run.key not in self._claims and self._ready(run)]
            job = next((run for run in free if self._take(run)), None)
            if job is not None:
                yield job, self._starter(job)
                continue
            if not self._claims:
                time.sleep(POLL)  # another machine has the rest
            yield None

    def _take(self, run: Run) -> bool:
        """Claim a run; return whether this process shall train it."""
        taken = claim(self.store.claim_file(run))
        if taken is None:
            return False
        self.store.result(run, fresh=True)
        if run.key not in {other.key for other in self.left()}:  # another machine finished it meanwhile
            taken.release()
            return False
        self._claims[run.key] = taken
        return True

    def _starter(self, run: Run) -> Callable[[int], runner.Child]:
        def begin(slot: int) -> runner.Child:
            folder = self.store.output(run)
            end_orphan(folder)
            self.store.begin(run)
            words = [*run.task.words, *run.words]
            if run.start is not None:
                model = str(self.store.model_of(run))
                words += ["--model_name_or_path", model, *(["--after", model] if kept_by(run.words) else [])]
            self._begun[run.key] = time.monotonic()
            words += ["--seed", str(run.seed)]
            return runner.start(run.task.recipe, words, folder, run.gpus, self.at_once, slot)

        return begin

    def run(self, made_with: dict[str, dict[str, Any]]) -> None:
        """Train all runs that are left; `made_with` has the fingerprint of each task by its identity."""
        self._made_with = made_with
        try:
            for run, child in runner.in_turn(self.jobs(), self.at_once):
                self._ended(run, child)
            self._clean([])
        finally:
            for taken in self._claims.values():
                taken.release()
            self._claims.clear()

    def _ended(self, run: Run, child: runner.Child) -> None:
        seconds = time.monotonic() - self._begun.pop(run.key)
        result = child.outcome()
        about = {"recipe": run.task.recipe, "words": [*run.task.words, *run.words], "seed": run.seed}
        about |= {"label": run.label, "at_once": self.at_once, "seconds": seconds}
        self.store.keep(run, about | {"made_with": self._made_with.get(run.identity)} | result)
        self._claims.pop(run.key).release()
        self.spent += seconds / self.at_once
        if "error" in result:
            self._failed.add(run.key)
        else:
            self.estimate.learn(run, seconds)
            self.store.drop_checkpoints(run)
            shutil.rmtree(self.store.made_for(run), ignore_errors=True)
            self._clean([run, *run.needs()])
        self._tell(run, result)

    def _clean(self, runs: Sequence[Run]) -> None:
        """Remove the models that no run needs any more, of `runs` and of those that were postponed before."""
        self._postponed += runs
        if self.store.shared():  # what the plan of another process needs is unknown
            return
        needed = {need.key for other in self.left() for need in other.needs()} | self.chains.kept()
        for run in self._postponed:
            if run.key not in needed and run.key not in self._claims:
                self.store.drop_model(run)
        self._postponed.clear()

    def _tell(self, run: Run, result: dict[str, Any]) -> None:
        left = self.left()
        rest = sum(self.estimate.seconds(other) for other in left if not self._blocked(other)) / self.at_once
        outcome = result.get("error") or self.report(run, result)
        about = f"; about {minutes(rest)} left" if left and "error" not in result else ""
        tell(f"{len(self.runs) - len(left)} of {len(self.runs)}: {run.label}: {outcome}{about}")

    def changes(self, made_with: dict[str, dict[str, Any]]) -> list[list[str]]:
        """Return the names of what changed since each finished run was made."""
        finished = [(run, result) for run in self.runs if (result := self.store.result(run)) is not None]
        now = {run.key: made_with.get(run.identity) for run, _ in finished}
        return [
            differences(result.get("made_with") or {}, now[run.key] or {})
            for run, result in finished
            if "error" not in result and not self.fresh
        ]
