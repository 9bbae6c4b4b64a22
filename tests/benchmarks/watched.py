"""Run an unmodified program, a recipe or a stock script, and write its measurements.

    python -m tests.benchmarks.watched measured.json recipes.ner.train --output_dir outputs/x

Calls `main(argv)` of the module. If `main` returns a function, that function is called too, outside the job. For a
program with a Trainer, the file has these values in seconds, MiB and counts:

- `imported`, `trainer`, `first_step`, `ended`: times of `time.monotonic`, a clock that all processes share
- `preparation`: from `main` to the Trainer without model loading: reading, checking and tokenizing the data
- `evaluated_before`: the part of `preparation` for evaluations before the first step
- `training`: from the first step to the last, without evaluations: `seconds`, `rows`, `sub_tokens` (no padding),
  `operations` (`tests.benchmarks.operations`)
- `evaluations`: the same for each `evaluate` and `predict` of the Trainer, with its scores and its `prefix`
- `rate`: operations per second of matrix products in the training `precision` on its `device`, measured at the end
- `predict`: seconds in `common.inference.predictor.predict_file`
- `resident_mib`: memory of a recipe at the start of each phase of its `run.json`
- `peak_mib`, and `peak_gpu_mib` on a GPU: peak memory of the process
"""

import importlib
import json
import platform
import resource
import sys
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

#: functions that load or make a model, besides `from_pretrained`
LOADERS = ("resolve_model", "load_model", "load_encoder_decoder")


class Watch:
    """Measure a program while it runs; `found` is the content of the file."""

    def __init__(self):
        self.found: dict[str, Any] = {"evaluations": [], "evaluated_before": 0.0, "peak_mib": 0}
        self._loading, self._loaded = 0, 0.0
        self._trainer = None

    def loads(self, function: Callable) -> Callable:
        """Wrap `function`; count its seconds as model loading."""

        @wraps(function)
        def timed(*args, **kwargs):
            self._loading += 1
            start = time.monotonic()
            try:
                return function(*args, **kwargs)
            finally:
                self._loading -= 1
                if not self._loading:
                    self._loaded += time.monotonic() - start

        return timed

    def notes_peak(self) -> None:
        """Record the peak memory; `Run.phase` resets the counter, and a reset must not lose the peak."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (1024**2 if sys.platform == "darwin" else 1024)
        self.found["peak_mib"] = max(peak, self.found["peak_mib"])
        import torch

        if torch.cuda.is_available():
            gpu = torch.cuda.max_memory_allocated() // 2**20
            self.found["peak_gpu_mib"] = max(gpu, self.found.get("peak_gpu_mib", 0))

    def makes(self, trainer_class: type) -> None:
        """Watch each Trainer created from now on."""
        make = trainer_class.__init__

        @wraps(make)
        def watched(trainer, *args, **kwargs):
            self.found.setdefault("trainer", time.monotonic())
            self.found.setdefault("preparation", time.monotonic() - self.found["imported"] - self._loaded)
            make(trainer, *args, **kwargs)
            self._watch(trainer)

        trainer_class.__init__ = watched

    def _watch(self, trainer) -> None:
        from transformers import TrainerCallback

        watch, self._trainer = self, trainer
        self._sums = self._size = self._began = None
        self._paused = 0.0

        class Steps(TrainerCallback):
            def on_step_begin(self, args, state, control, **kwargs):
                watch.found.setdefault("first_step", time.monotonic())

            def on_step_end(self, args, state, control, **kwargs):
                if watch._began is None:
                    watch._began = _now(args)
                elif state.global_step == state.max_steps:
                    watch._ends(trainer, _now(args))

        trainer.add_callback(Steps)
        trainer.training_step = self._counting(trainer, trainer.training_step)
        trainer.prediction_step = self._counting(trainer, trainer.prediction_step)
        trainer.evaluate = self._evaluating(trainer, trainer.evaluate, "eval")
        trainer.predict = self._evaluating(trainer, trainer.predict, "test")

    def _counting(self, trainer, step: Callable) -> Callable:
        from tests.benchmarks.operations import sizes

        training = step.__name__ == "training_step"
        encoder_decoder = trainer.model.config.is_encoder_decoder

        @wraps(step)
        def counted(model, inputs, *args, **kwargs):
            if training and self._began is not None:
                size = sizes(inputs, encoder_decoder)
                self._size = size if self._size is None else self._size + size
            if not training and self._sums is not None:
                self._sums = self._sums + sizes(inputs, encoder_decoder)
            return step(model, inputs, *args, **kwargs)

        return counted

    def _evaluating(self, trainer, function: Callable, prefix: str) -> Callable:
        @wraps(function)
        def timed(*args, **kwargs):
            if self._sums is not None:  # one of the methods calls the other
                return function(*args, **kwargs)
            self._sums = 0.0
            start = _now(trainer.args)
            output = function(*args, **kwargs)
            seconds = _now(trainer.args) - start
            sums, self._sums = self._sums, None
            metrics = output if isinstance(output, dict) else output.metrics
            self.found["evaluations"].append(
                {
                    "prefix": kwargs.get("metric_key_prefix", prefix),
                    "training": trainer.is_in_train,
                    "seconds": seconds,
                    "rows": float(sums[0]),
                    "sub_tokens": float(sums[1]),
                    "scores": {k: v for k, v in metrics.items() if isinstance(v, int | float)},
                }
            )
            if "first_step" not in self.found:
                self.found["evaluated_before"] += seconds
            elif self._began is not None:
                self._paused += seconds
            return output

        return timed

    def _ends(self, trainer, now: float) -> None:
        from tests.benchmarks.operations import operations

        self.found["training"] = {
            "seconds": now - self._began - self._paused,
            "rows": float(self._size[0]),
            "sub_tokens": float(self._size[1] + self._size[2]),
            "operations": operations(trainer.accelerator.unwrap_model(trainer.model), self._size),
        }

    def rate(self) -> None:
        """Measure the rate of matrix products in this process, after the Trainer ends."""
        if self._trainer is None:
            return
        import torch

        from tests.benchmarks.operations import matrix_rate

        args = self._trainer.args
        kind = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
        cpu = torch.cpu.get_capabilities().get("cpu_name", platform.machine())
        self.found |= {
            "precision": str(kind).removeprefix("torch."),
            "device": torch.cuda.get_device_name() if args.device.type == "cuda" else cpu,
            "rate": matrix_rate(kind, args.device),
        }


def _now(args) -> float:
    """Wait for the device of `args`, the arguments of a Trainer, and return the time."""
    if args.device.type == "cuda":
        import torch

        torch.cuda.synchronize()
    return time.monotonic()


def resident_mib() -> int | None:
    """Return the resident memory of this process on Linux."""
    status = Path("/proc/self/status")
    return int(status.read_text().split("VmRSS:")[1].split()[0]) // 1024 if status.exists() else None


def main() -> None:
    path, name, *argv = sys.argv[1:]
    watch = Watch()
    if not name.startswith("recipes."):
        import torch  # noqa: F401  (before `common`, which changes the environment of torch)
    program = importlib.import_module(name)
    from transformers import AutoTokenizer, PreTrainedModel

    for loaded in (PreTrainedModel, AutoTokenizer):
        loaded.from_pretrained = classmethod(watch.loads(loaded.from_pretrained.__func__))
    for module in (program, sys.modules.get("tests.benchmarks.stock")):
        for loader in LOADERS:
            if hasattr(module, loader):
                setattr(module, loader, watch.loads(getattr(module, loader)))
    predicts = getattr(program, "predict_file", None)
    if predicts is None:
        import transformers

        watch.makes(transformers.Trainer)
    else:

        def predict_file(*args, **kwargs):
            start = time.monotonic()
            count = predicts(*args, **kwargs)
            watch.found["predict"] = {"seconds": time.monotonic() - start, "rows": count}
            return count

        program.predict_file = predict_file
    if name.startswith("recipes."):
        outputs = importlib.import_module("common.run.run")
        reset = outputs.reset_peak_memory

        def noted() -> None:
            watch.notes_peak()
            watch.found.setdefault("resident_mib", []).append(resident_mib())
            reset()

        outputs.reset_peak_memory = noted
    from common.cli import command_line

    def measured() -> None:
        watch.found["imported"] = time.monotonic()
        afterwards = program.main(argv)
        watch.found["ended"] = time.monotonic()
        watch.notes_peak()
        watch.rate()
        if callable(afterwards):
            afterwards()
        Path(path).write_text(json.dumps(watch.found, indent=1), encoding="utf-8")

    if name.startswith("recipes."):
        command_line(measured)
    else:  # stock: `configure_allocator` does not run in this process
        measured()


if __name__ == "__main__":
    main()
