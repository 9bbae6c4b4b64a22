"""Train this recipe beside other tasks on one encoder (`common.run.joint`)."""

from pathlib import Path

import numpy as np
from datasets import Dataset
from transformers import AutoModelForQuestionAnswering, EvalPrediction
from transformers.trainer_utils import PredictionOutput

from common.errors import InputError
from common.models import LoadedModel, load_model
from common.run import write_json_lines
from common.run.joint import JointTask, scores_of
from common.training import Trainer
from common.tuning import TunedModel

from . import spans, train
from .augmenting import augmented
from .scoring import SquadScorer, unit_of
from .squad import load_questions

#: start and end
LABELS = ["LABEL_0", "LABEL_1"]


class Task(JointTask):
    """Find the answers to questions in texts."""

    score, pipeline, headline, usage = "f1", "question-answering", train.HEADLINE, train.USAGE

    def load(self) -> None:
        self.data, unlabeled = load_questions(self.data_args)
        if unlabeled is not None:
            raise InputError("test_file: the test rows have no answers; leave it out, and run predict after training")

    def texts(self, split: str) -> list[str]:
        return list(dict.fromkeys(self.data[split]["context"][:]))

    def model(self) -> LoadedModel:
        data_args = self.data_args
        loaded = load_model(
            AutoModelForQuestionAnswering,
            self.model_args,
            LABELS,
            data_args.max_seq_length,
            dropout=self.args.dropout,
        )
        cut = {name: getattr(data_args, name) for name in ("max_seq_length", "doc_stride", "max_question_length")}
        loaded.model.config.update(cut | {"max_answer_length": data_args.max_answer_length})
        self.how = {"tokenizer": loaded.tokenizer, **cut}
        columns = self.data["train"].column_names
        self.rows = self.data.map(
            train.encode, batched=True, with_indices=True, remove_columns=columns, fn_kwargs=self.how
        )
        spans.print_limits(self.rows["train"], len(self.data["train"]), data_args.max_answer_length)
        spans.answer_in_context(loaded.model)
        return loaded

    def trainer(self, tuned: TunedModel) -> Trainer:
        unit = unit_of(self.data_args.f1_unit, self.data["train"]["context"][:])
        self.scorers = {split: SquadScorer(rows, unit, self.args) for split, rows in self.data.items()}
        self.config = tuned.model.config

        def score(prediction: EvalPrediction, windows: Dataset) -> dict[str, float]:
            scorer, best = self.scorers["validation"], self.spans_of(prediction, windows)
            return scorer(best, scorer.best_threshold(best))

        train_rows = self.rows["train"], self.data["train"]
        return Trainer(
            model=tuned,
            args=self.args,
            train_dataset=augmented(*train_rows, train.encode, self.how, self.data_args, self.args),
            eval_dataset=self.rows["validation"],
            data_collator=spans.SpanCollator(tuned.tokenizer, tuned.pad_multiple),
            losses=spans.span_losses,
            preprocess_logits_for_metrics=spans.best_positions,
            compute_metrics=score,
        )

    def spans_of(self, output: EvalPrediction | PredictionOutput, windows: Dataset) -> spans.Spans:
        """Return the best spans of each question."""
        return spans.best_spans(np.stack(output.predictions), windows, self.data_args.max_answer_length)

    def test(self, trainer: Trainer, folder: Path | None) -> dict[str, dict[str, float]]:
        output = trainer.predict(self.rows["validation"], metric_key_prefix="eval")
        best = self.spans_of(output, self.rows["validation"])
        self.config.no_answer_threshold = threshold = self.scorers["validation"].best_threshold(best)
        found = {"eval": scores_of(output.metrics, "eval")}
        if "test" in self.rows:
            score, trainer.compute_metrics = trainer.compute_metrics, None  # scored below, with the tuned threshold
            output = trainer.predict(self.rows["test"], metric_key_prefix="test")
            trainer.compute_metrics = score
            scorer, best = self.scorers["test"], self.spans_of(output, self.rows["test"])
            found["test"] = scorer(best, threshold)
            if folder:
                write_json_lines(folder / "predictions_test.jsonl", scorer.predictions(best, threshold))
        return found
