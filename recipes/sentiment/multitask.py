"""Train this recipe beside other tasks on one encoder (`common.run.joint`)."""

from dataclasses import fields
from pathlib import Path

from datasets import Dataset
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding, EvalPrediction

from common.data.labels import label_counts
from common.errors import InputError
from common.models import LoadedModel, load_model
from common.models.pooling import pool
from common.run.joint import JointTask, scores_of
from common.training.probe import start_at_probe
from common.tuning import TunedModel

from . import scoring, texts, train, windows
from .arguments import FewShotArguments
from .augmenting import augmented
from .labels import load_labeled


class Task(JointTask):
    """Classify texts or text pairs."""

    score, pipeline, headline, usage = "macro_f1", "text-classification", train.HEADLINE, train.USAGE
    refused = ("semi", "unlabeled_file", *(field.name for field in fields(FewShotArguments)))

    def load(self) -> None:
        self.data, unlabeled, self.multi_label, self.labels = load_labeled(self.data_args)
        if unlabeled is not None:
            raise InputError("test_file: the test rows have no labels; leave it out, and run predict after training")

    def texts(self, split: str) -> list[str]:
        rows = self.data[split]
        return [text for name in ("text", "text_pair") if name in rows.column_names for text in rows[name]]

    def labels_in(self, split: str) -> set[str]:
        return set(label_counts(self.data, "label")[split])

    def model(self) -> LoadedModel:
        length = self.data_args.max_seq_length
        loaded = load_model(
            AutoModelForSequenceClassification, self.model_args, self.labels, length, dropout=self.args.dropout
        )
        pool(loaded, self.model_args)
        config, reading = loaded.model.config, self.data_args.reading()
        self.labels = list(config.id2label.values())
        config.problem_type = "multi_label_classification" if self.multi_label else "single_label_classification"
        config.update(reading)
        self.how = {"tokenizer": loaded.tokenizer, "label2id": config.label2id}
        self.how |= {"multi_label": self.multi_label, "reading": reading}
        columns = self.data["train"].column_names
        self.rows = self.data.map(train.encode, batched=True, remove_columns=columns, fn_kwargs=self.how)
        windows.report_long(self.rows, **reading)
        labels = self.rows["train"]["labels"][:]
        self.weights = texts.class_weights(self.args.class_weights, labels, self.labels, self.multi_label)
        start_at_probe(loaded, self.rows, self.model_args, self.args, self.weights, self.multi_label)
        return loaded

    def trainer(self, tuned: TunedModel) -> windows.Trainer:
        self.scorer = scoring.Scorer(self.labels, self.multi_label, self.args)
        self.config = tuned.model.config

        def score(prediction: EvalPrediction, rows: Dataset) -> dict[str, float]:
            return self.scorer.by_domain(rows, prediction, self.scorer.thresholds(prediction))

        train_rows = self.rows["train"], self.data["train"]
        return windows.Trainer(
            model=tuned,
            args=self.args,
            train_dataset=augmented(*train_rows, train.encode, self.how, self.data_args, self.args),
            eval_dataset=self.rows["validation"],
            data_collator=DataCollatorWithPadding(tuned.tokenizer, pad_to_multiple_of=tuned.pad_multiple),
            losses=texts.loss_with(self.weights, self.multi_label),
            preprocess_logits_for_metrics=lambda logits, labels: logits.float(),
            compute_metrics=score,
            multi_label=self.multi_label,
        )

    def test(self, trainer: windows.Trainer, folder: Path | None) -> dict[str, dict[str, float]]:
        output = trainer.predict(self.rows["validation"], metric_key_prefix="eval")
        found, thresholds = {"eval": scores_of(output.metrics, "eval")}, self.scorer.thresholds(output)
        if self.multi_label:
            self.config.thresholds = thresholds
        if "test" in self.rows:
            output = trainer.predict(self.rows["test"], metric_key_prefix="test")
            of_rows = self.scorer.by_domain(self.rows["test"], output, thresholds)
            found["test"] = scores_of(output.metrics, "test") | of_rows
            if folder:
                self.scorer.write(folder, self.data["test"], output, thresholds)
        return found
