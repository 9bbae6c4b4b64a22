"""Train this recipe beside other tasks on one encoder (`common.run.joint`)."""

from dataclasses import fields
from pathlib import Path

from datasets import Dataset
from transformers import AutoModel, EvalPrediction
from transformers.trainer_utils import PredictionOutput

from common.errors import InputError
from common.models import LoadedModel, ScratchArguments, load_model
from common.run import write_json_lines
from common.run.joint import JointTask
from common.tuning import TunedModel

from . import index, losses, pairs, scoring, steps, train, vectors
from .reading import identities_of, load_pairs


class Task(JointTask):
    """Turn texts into vectors: search, duplicates, similarity."""

    score, pipeline, headline, usage = "ndcg@10", "sentence-similarity", scoring.RANKED, train.USAGE
    refused = ("teacher", *(field.name for field in fields(ScratchArguments)))

    def load(self) -> None:
        steps.check_arguments(self.args, ScratchArguments())
        if self.args.world_size > 1:  # the queries of a step see the passages of all processes, and one may have none
            raise InputError("this recipe does not work beside other tasks in several processes; remove GPUS=")
        self.data, unlabeled, self.corpus = load_pairs(self.data_args)
        if unlabeled is not None:
            raise InputError("test_file: the test rows have no gold values; leave it out")
        self.kind = self.data_args.rows
        self.score = scoring.MAIN[self.kind]

    def texts(self, split: str) -> list[str]:
        rows = self.data[split]
        return [
            text for name in ("query", "positive", "text", "text_pair") if name in rows.features for text in rows[name]
        ]

    def model(self) -> LoadedModel:
        args, length = self.args, self.data_args.max_seq_length
        loaded = load_model(AutoModel, self.model_args, None, length, dropout=args.dropout)
        loaded = vectors.without_pooler(loaded)
        prefixes = args.query_prefix, args.passage_prefix
        self.reading = vectors.chosen(loaded, args.pooling, *prefixes, self.model_args.model_revision)
        loaded.model.config.update({"max_seq_length": length} | vectors.saved(self.reading))
        self.judges = {
            split: scoring.judge_of(self.kind, rows, self.corpus, self.reading, args)
            for split, rows in self.data.items()
            if split != "train"
        }
        self.rows = {
            split: pairs.encoded_rows(loaded.tokenizer, judge.texts, judge.labels, length)
            for split, judge in self.judges.items()
        }
        self.rows["train"] = pairs.training_rows(loaded.tokenizer, self.data["train"], self.kind, self.reading, length)
        return loaded

    def trainer(self, tuned: TunedModel) -> steps.Trainer:
        def score(prediction: EvalPrediction, evaluated: Dataset) -> dict[str, float]:
            split = "test" if evaluated is self.rows.get("test") else "validation"
            return self.judges[split](prediction.predictions)

        ranking = self.kind == "ranking"
        known = identities_of(self.data["train"]) if ranking else None
        return steps.Trainer(
            model=vectors.without_pooler(tuned),
            args=self.args,
            train_dataset=self.rows["train"],
            eval_dataset=self.rows["validation"],
            data_collator=pairs.TextCollator(tuned.tokenizer, tuned.pad_multiple),
            losses=losses.loss_of(self.kind, known, self.args.temperature),
            preprocess_logits_for_metrics=losses.reduced_for(self.kind),
            compute_metrics=score,
            reading=self.reading,
            in_batch=ranking,
            max_seq_length=self.data_args.max_seq_length,
        )

    def write(self, folder: Path, output: PredictionOutput) -> None:
        write_json_lines(folder / "predictions_test.jsonl", self.judges["test"].report(output.predictions))

    def finish(self) -> None:
        if self.kind == "ranking":
            index.write_for(self.args, self.corpus)
