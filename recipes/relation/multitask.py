"""Train this recipe beside other tasks on one encoder (`common.run.joint`)."""

from pathlib import Path

from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification, EvalPrediction
from transformers.trainer_utils import PredictionOutput

from common.data import domains
from common.data.labels import label_counts
from common.errors import InputError
from common.models import LoadedModel, load_model
from common.run.joint import JointTask
from common.training import Trainer, label_losses
from common.tuning import TunedModel

from . import markers, scoring, train
from .reading import load_pairs, related_types


class Task(JointTask):
    """Classify the relation of two mentions."""

    score, pipeline, headline, usage = "micro_f1", "token-classification", train.HEADLINE, train.USAGE

    def load(self) -> None:
        self.data, unlabeled, self.relations, self.no_relation = load_pairs(self.data_args)
        if unlabeled is not None:
            raise InputError("test_file: the test rows have no labels; leave it out, and run predict after training")

    def texts(self, split: str) -> list[str]:
        return list(dict.fromkeys(self.data[split]["text"][:]))

    def labels_in(self, split: str) -> set[str]:
        return set(label_counts(self.data, "label")[split])

    def model(self) -> LoadedModel:
        data_args, length, dropout = self.data_args, self.data_args.max_seq_length, self.args.dropout
        self.at_markers = data_args.pooling == "markers"
        kind = AutoModelForTokenClassification if self.at_markers else AutoModelForSequenceClassification
        names = markers.output_names(self.relations) if self.at_markers else self.relations
        loaded = load_model(kind, self.model_args, names, length, dropout=dropout)
        names = list(loaded.model.config.id2label.values())
        self.relations = markers.relations_of(names) if self.at_markers else names
        marks = markers.Markers(markers.types_of(self.data["train"]) if data_args.typed_markers else [])
        marks.add(loaded)
        settings = {"pooling": data_args.pooling, "relations": self.relations, "no_relation": self.no_relation}
        settings |= {"types": marks.types, "pairs": related_types(self.data["train"], self.no_relation)}
        settings["max_distance"] = data_args.max_distance
        loaded.model.config.update({"relation": settings, "max_seq_length": length})
        how = {"tokenizer": loaded.tokenizer, "marks": marks, "relations": self.relations, "max_seq_length": length}
        columns = self.data["train"].column_names
        self.rows = self.data.map(train.encode, batched=True, remove_columns=columns, fn_kwargs=how)
        markers.report_cut([split["cut"][:] for split in self.rows.values()], length)
        if self.at_markers:
            markers.score_at_markers(loaded.model)
        return loaded

    def trainer(self, tuned: TunedModel) -> Trainer:
        self.scorer = scoring.Scorer(self.relations, self.no_relation)

        def score(prediction: EvalPrediction, rows: Dataset) -> dict[str, float]:
            return domains.by_domain(rows, lambda select: self.scorer(select(prediction)), self.args)

        return Trainer(
            model=tuned,
            args=self.args,
            train_dataset=self.rows["train"],
            eval_dataset=self.rows["validation"],
            data_collator=markers.PairCollator(tuned.tokenizer, self.at_markers, tuned.pad_multiple),
            losses=label_losses,
            preprocess_logits_for_metrics=lambda logits, labels: logits.float(),
            compute_metrics=score,
        )

    def write(self, folder: Path, output: PredictionOutput) -> None:
        self.scorer.write(str(folder), self.data["test"], output)
