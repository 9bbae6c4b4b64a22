"""Train this recipe beside other tasks on one encoder (`common.run.joint`)."""

from pathlib import Path

from datasets import Dataset
from transformers import AutoModelForTokenClassification, DataCollatorForTokenClassification, EvalPrediction
from transformers.trainer_utils import PredictionOutput

from common.data import label_names
from common.errors import InputError
from common.models import LoadedModel, load_model
from common.run import write_json_lines
from common.run.joint import JointTask
from common.training import Trainer, label_losses
from common.training.probe import start_at_probe
from common.tuning import TunedModel

from . import scoring, train
from .augmenting import augmented
from .reading import load_tagged


class Task(JointTask):
    """Tag words."""

    score, pipeline, headline, usage = "f1", "token-classification", ("precision", "recall", "f1"), train.USAGE
    refused = ("semi", "unlabeled_file")

    def load(self) -> None:
        self.data, unlabeled, self.scheme = load_tagged(self.data_args)
        if unlabeled is not None:
            raise InputError("test_file: the test rows have no tags; leave it out, and run predict after training")

    def texts(self, split: str) -> list[str]:
        return [" ".join(words) for words in self.data[split]["tokens"][:]]

    def labels_in(self, split: str) -> set[str]:
        return {tag for tags in self.data[split]["ner_tags"] for tag in tags} - {"O"}

    def model(self) -> LoadedModel:
        names, length = label_names(self.data, "ner_tags"), self.data_args.max_seq_length
        loaded = load_model(AutoModelForTokenClassification, self.model_args, names, length, dropout=self.args.dropout)
        config = loaded.model.config
        cut = {"max_seq_length": length, "doc_stride": self.data_args.doc_stride}
        scheme = "none" if self.scheme.name == "none" else "iob2"
        config.update(cut | {"tag_scheme": scheme, "sentences": self.data_args.sentence_column_name})
        config.conll_columns = [self.data_args.conll_word_column, self.data_args.conll_tag_column]
        self.how = {"tokenizer": loaded.tokenizer, "label2id": config.label2id, **cut}
        columns = self.data["train"].column_names
        self.rows = self.data.map(
            train.encode, batched=True, with_indices=True, remove_columns=columns, fn_kwargs=self.how
        )
        start_at_probe(loaded, self.rows, self.model_args, self.args)
        self.metric = scoring.StrictSeqeval(scheme, keep_in_memory=True)
        self.labels = list(config.id2label.values())
        return loaded

    def trainer(self, tuned: TunedModel) -> Trainer:
        def score(prediction: EvalPrediction, windows: Dataset) -> dict[str, float]:
            predicted = scoring.predicted_tags(windows, prediction.predictions, self.labels)
            gold = scoring.gold_tags(windows, self.labels)
            return scoring.by_domain(self.metric, windows, predicted, gold, self.args)

        train_rows = self.rows["train"], self.data["train"]
        return Trainer(
            model=tuned,
            args=self.args,
            train_dataset=augmented(*train_rows, train.encode, self.how, self.scheme, self.data_args, self.args),
            eval_dataset=self.rows["validation"],
            data_collator=DataCollatorForTokenClassification(tuned.tokenizer, pad_to_multiple_of=tuned.pad_multiple),
            losses=label_losses,
            preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
            compute_metrics=score,
        )

    def write(self, folder: Path, output: PredictionOutput) -> None:
        predicted = scoring.predicted_tags(self.rows["test"], output.predictions, self.labels)
        write_json_lines(folder / "predictions_test.jsonl", scoring.compare(self.data["test"], predicted))
