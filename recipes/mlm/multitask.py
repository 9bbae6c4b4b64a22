"""Train this recipe beside other tasks on one encoder (`common.run.joint`)."""

from dataclasses import fields

from datasets import DatasetDict
from transformers import AutoModelForMaskedLM

from common import data
from common.errors import InputError
from common.models import LoadedModel, ScratchArguments, load_model
from common.run.joint import JointTask
from common.training import LanguageTrainer, losses_at_labels
from common.tuning import TunedModel

from . import masking, train
from .heads import start_as_identity


class Task(JointTask):
    """Fill in masked tokens of unlabelled texts."""

    score, pipeline, headline, usage = "accuracy", "fill-mask", ("loss", "perplexity", "accuracy"), train.USAGE
    refused = (
        *("objective", "streaming", "shuffle_buffer", "stream_shares", "forgetting_file"),
        *("batch_ramp_start", "batch_ramp_steps", *(field.name for field in fields(ScratchArguments))),
    )

    def load(self) -> None:
        self.corpus = data.open_corpus(self.data_args, self.args)
        self.data = self.corpus.texts

    def load_texts(self, texts: DatasetDict) -> None:
        self.corpus, self.data = data.Corpus(texts), texts

    def texts(self, split: str) -> list[str]:
        return self.data[split]["text"][:]

    def model(self) -> LoadedModel:
        loaded = load_model(
            AutoModelForMaskedLM, self.model_args, None, self.data_args.max_seq_length, dropout=self.args.dropout
        )
        if loaded.tokenizer.mask_token is None:
            name = self.model_args.model_name_or_path
            raise InputError(f"{name}: no mask token; give an encoder as --model_name_or_path")
        start_as_identity(loaded)
        loaded.model.config.max_seq_length = self.data_args.max_seq_length
        self.rows, self.packing = train.encode(self.corpus, loaded, self.data_args, self.args)
        return loaded

    def trainer(self, tuned: TunedModel) -> LanguageTrainer:
        args, data_args, tokenizer = self.args, self.data_args, tuned.tokenizer
        shares = data_args.mask_replaced, data_args.mask_random
        masker = masking.Masker(tokenizer, data_args.masking, data_args.mlm_probability, *shares)
        batches = masking.MaskedBatches(masker, tokenizer.pad_token_id, args.seed, self.packing, tuned.pad_multiple)
        return LanguageTrainer(
            model=tuned,
            args=args,
            train_dataset=self.rows["train"],
            eval_dataset=self.rows["validation"],
            data_collator=batches,
            losses={"labels": losses_at_labels},
        )
