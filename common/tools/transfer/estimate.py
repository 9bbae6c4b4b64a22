"""Estimate the seconds of runs, from a short measurement of this machine and from the runs that have ended."""

import statistics
import time
from functools import cache, partial

import torch
from transformers import AutoModel, PretrainedConfig

from common.args import DEFAULT_ENCODER
from common.errors import quiet
from common.hardware import native_bf16
from common.models import ScratchArguments, resolve_model
from common.models.load import load_config
from common.models.new import set_size
from common.tools.runner import share
from common.tools.transfer.chains import Random, Run

#: seconds of a run without its training: imports, reading, saving
START_UP = 8.0
#: cost of a row that is evaluated, and of a row whose encoder is frozen, beside one that is trained
EVALUATED = 0.3
#: characters of a token, about
CHARACTERS = 4.5


class Estimate:
    """Tell how many seconds runs take; `learn` corrects it by runs that have ended.

    Args:
        at_once: number of runs that share the machine.
    """

    def __init__(self, at_once: int = 1):
        self.token_seconds = cache(partial(measure, at_once=at_once))
        self._ratios: dict[str, list[float]] = {}

    def seconds(self, run: Run) -> float:
        """Return the seconds that a run is going to take."""
        known = self._ratios.get(run.task.recipe) or [one for ratios in self._ratios.values() for one in ratios]
        return self._by_size(run) * (statistics.median(known) if known else 1.0)

    def learn(self, run: Run, seconds: float) -> None:
        """Take the seconds of a run that has ended into account."""
        self._ratios.setdefault(run.task.recipe, []).append(seconds / self._by_size(run))

    def _by_size(self, run: Run) -> float:
        task, rows = run.task, run.task.rows
        texts = rows.texts
        longest = task.longest
        tokens = statistics.fmean(min(len(text) / CHARACTERS + 2, 4 * longest) for text in texts[:500])
        validation, test = rows.evaluated
        args = task.args
        if run.only_scores:
            work = EVALUATED * (validation + test)
        else:
            batch = args.per_device_train_batch_size * args.gradient_accumulation_steps
            count = _number(run.words, "--max_train_samples") or len(texts)
            given = _number(run.words, "--num_train_epochs") or args.num_train_epochs
            epochs = args.passes(int(count)) if given is None else given
            evaluations = args.usual_epochs if given is None else epochs
            steps = _number(run.words, "--max_steps") or args.max_steps
            if steps > 0:
                epochs = evaluations = steps * batch / count
            frozen = "--tuning head" in " ".join(run.words)
            work = epochs * (EVALUATED if frozen else 1) * count
            work += EVALUATED * (evaluations * validation + validation + test)
        return START_UP + work * tokens * self.token_seconds(*_model_of(run))


def _number(words: tuple[str, ...], name: str) -> float | None:
    """Return the last value of an argument, which counts."""
    return next((float(words[i + 1]) for i in reversed(range(len(words))) if words[i] == name), None)


def _model_of(run: Run) -> tuple[str, str | None]:
    """Return the checkpoint whose architecture a run has, the default encoder for a new model, and `--model_size`."""
    first = next(run.chain())
    task = first.task
    name = first.start.model if isinstance(first.start, Random) else task.model.model_name_or_path
    size = next((part.model_size for part in task.parsed if isinstance(part, ScratchArguments)), None)
    return DEFAULT_ENCODER if task.new or not name else name, size


def measure(model: str, size: str | None = None, at_once: int = 1) -> float:
    """Return the seconds of a token in training on this machine when it is idle, from three steps of the encoder.

    On a CPU they are the time of the threads that one of `at_once` runs gets, which other processes do not change.
    """
    config: PretrainedConfig = load_config(resolve_model(model))
    if size:
        set_size(config, size)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with quiet():
        encoder = AutoModel.from_config(config, dtype=torch.float32).to(device).train()
    ids = torch.ones(16, 32, dtype=torch.long, device=device)
    more = {"decoder_input_ids": ids} if config.is_encoder_decoder else {}
    times, threads = [], int(share(at_once, 0).get("OMP_NUM_THREADS", torch.get_num_threads()))
    for _ in range(3):
        begin, used = time.perf_counter(), time.process_time()
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=native_bf16(device.type == "cpu")):
            encoder(input_ids=ids, **more)[0].float().mean().backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        of_threads = (time.process_time() - used) / threads
        times.append(of_threads if device.type == "cpu" else time.perf_counter() - begin)
    return min(times) / ids.numel()


def minutes(seconds: float) -> str:
    """Return a time for people."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 100 * 60:
        return f"{seconds / 60:.0f} minutes"
    return f"{seconds / 3600:.1f} hours"
