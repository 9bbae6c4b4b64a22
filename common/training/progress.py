"""Report the progress of training: a bar on a terminal, lines elsewhere, and one line for each evaluation."""

import sys
import time

from tqdm import tqdm
from transformers import TrainerCallback

from common.errors import tell

#: minimum seconds between two lines without a terminal
SECONDS_BETWEEN_LINES = 30.0


class Progress(TrainerCallback):
    """Print the losses, the score that picks the best checkpoint, and the position in the run.

    All other metrics are in the files of the run and in its final table.
    """

    def __init__(self) -> None:
        self.bar: tqdm | None = None
        self.evaluation: tqdm | None = None
        self.last_line = 0.0
        self.training = False

    def on_train_begin(self, args, state, control, **kwargs):
        self.last_line, self.training = time.monotonic(), True
        if shows_bars(args, state):
            self.bar = tqdm(
                total=state.max_steps, initial=state.global_step, unit="step", dynamic_ncols=True, leave=False
            )

    def on_step_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        if not shows_bars(args, state) or not hasattr(eval_dataloader, "__len__"):
            return
        if self.evaluation is None:
            self.evaluation = tqdm(total=len(eval_dataloader), unit="batch", dynamic_ncols=True, leave=False)
        self.evaluation.update()

    def on_log(self, args, state, control, logs=None, **kwargs):
        losses = {name: value for name, value in logs.items() if name.startswith("loss")}
        if not losses:
            return
        if self.bar is not None:
            self.bar.set_postfix({name: f"{value:.4g}" for name, value in losses.items()})
        elif time.monotonic() - self.last_line >= SECONDS_BETWEEN_LINES:
            self.last_line = time.monotonic()
            shown = ", ".join(f"{name} {value:.4g}" for name, value in losses.items())
            tell(f"step {state.global_step} of {state.max_steps}: {shown}")

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        self.end_evaluation()
        best = (args.metric_for_best_model or "loss").removeprefix("eval_")
        names = dict.fromkeys(("loss", best))
        shown = ", ".join(f"{name} {metrics[f'eval_{name}']:.4g}" for name in names if f"eval_{name}" in metrics)
        if shown:
            if self.bar is not None:
                self.bar.clear()
            tell(f"{self.evaluated(args, state)}: validation {shown}")
            if self.bar is not None:
                self.bar.refresh()

    def evaluated(self, args, state) -> str:
        """Return in words which weights the present evaluation is of."""
        if self.training:
            return f"epoch {state.epoch:.4g}, step {state.global_step}"
        if not state.global_step:
            return "before training"
        if args.load_best_model_at_end and state.best_global_step:
            return f"best checkpoint, step {state.best_global_step}"
        return f"after training, step {state.global_step}"

    def on_predict(self, args, state, control, metrics=None, **kwargs):
        self.end_evaluation()

    def on_train_end(self, args, state, control, **kwargs):
        self.training = False
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def end_evaluation(self) -> None:
        """Remove the bar of an evaluation."""
        if self.evaluation is not None:
            self.evaluation.close()
            self.evaluation = None


def shows_bars(args, state) -> bool:
    """Return whether progress bars are shown: on a terminal, in the main process, without `--disable_tqdm`."""
    return state.is_world_process_zero and not args.disable_tqdm and sys.stderr.isatty()
