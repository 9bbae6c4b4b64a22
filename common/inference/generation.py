"""A saved encoder-decoder that writes texts: for each its best outputs, with their log-probabilities."""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForSeq2SeqLM, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from common.errors import InputError
from common.hardware import native_bf16
from common.inference.predictor import PredictArguments, load_saved, token_batches
from common.inference.search import shrinking_search
from common.models.decoding import decoded, forced_ids, generating, padded
from common.models.encoder_decoder import load_seq2seq_tokenizer
from common.models.load import load_config, resolve_model

#: a text that was generated, its log-probability, its number of sub-tokens, and whether it came to its end
Output = tuple[str, float, int, bool]
#: scores of the vocabulary that a step of the search has, and that exist at a time when outputs are scored
SCORES_OF_STEP, SCORES_TOGETHER = 2**24, 2**22


@dataclass
class SearchArguments(PredictArguments):
    """Arguments of a predict that generates."""

    num_beams: int | None = field(default=None, metadata={"help": "hypotheses kept; as in training when not given"})
    length_penalty: float | None = field(default=None, metadata={"help": "the same for the length penalty"})
    n_best: int = field(default=0, metadata={"help": "write so many of the best outputs for each text"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_best < 0:
            raise InputError(f"--n_best {self.n_best}: must be at least 0")
        if self.num_beams is not None and self.num_beams < 1:
            raise InputError(f"--num_beams {self.num_beams}: must be at least 1")


class Generator:
    """A saved model and how it searches. A batch has up to `batch_tokens` of sources, padding included.

    `beams` and `length_penalty` take the place of those that the model was saved with. `prefix` is put in front of each
    source. Generates in bfloat16 where the machine computes it (`precision`), as evaluations do.
    """

    def __init__(
        self,
        model: str,
        batch_tokens: int = 4096,
        precision: str = "auto",
        beams: int | None = None,
        length_penalty: float | None = None,
        prefix: str = "",
    ):
        path = resolve_model(model)
        self.prefix = prefix
        self.tokenizer = load_seq2seq_tokenizer(model)
        self.device = torch.accelerator.current_accelerator() or torch.device("cpu")
        self.model = load_saved(AutoModelForSeq2SeqLM, path).to(self.device).eval()
        self.max_length = load_config(path).max_source_length
        search = self.model.generation_config
        self.beams = search.num_beams if beams is None else beams
        self.batch_tokens = batch_tokens
        self.vocabulary = self.model.config.get_text_config().vocab_size
        # each beam of each text has a score for each sub-token of the vocabulary
        self.rows = max(1, SCORES_OF_STEP // (self.beams * self.vocabulary))
        penalty = search.length_penalty if length_penalty is None else length_penalty
        self.search = {"num_beams": self.beams}
        if self.beams > 1:
            self.search |= {"length_penalty": 1.0 if penalty is None else penalty, "early_stopping": False}
        self.bf16 = precision == "bf16" or (precision == "auto" and native_bf16(self.device.type == "cpu"))

    def check_n_best(self, n_best: int) -> None:
        """Raise `InputError` unless the search keeps `n_best` hypotheses."""
        if n_best > self.beams:
            raise InputError(f"--n_best {n_best}: needs as many --num_beams")

    def fits(self, text: str) -> bool:
        """Whether the model reads `text` as a whole."""
        return len(self.tokenizer(self.prefix + text, verbose=False)["input_ids"]) <= self.max_length

    def best(self, texts: list[str], n_best: int = 1) -> list[list[Output]]:
        """For each of `texts`, all of which fit, its `n_best` outputs, the best first. What is blank stays blank."""
        rows = self.tokenizer([self.prefix + text for text in texts], verbose=False)["input_ids"] if texts else []
        found: list[list[Output]] = [[("", 0.0, 0, True)] * n_best for _ in texts]
        asked = [i for i, text in enumerate(texts) if text.strip()]
        forced = forced_ids(self.model)
        for batch in token_batches([len(rows[i]) for i in asked], self.batch_tokens, self.rows):
            batch = [asked[i] for i in batch]
            ids = padded([rows[i] for i in batch], self.tokenizer.pad_token_id).to(self.device)
            mask = padded([[1] * len(rows[i]) for i in batch], 0).to(self.device)
            # not `inference_mode`, in which autocast would cast the weights anew at each step
            with torch.no_grad(), generating(self.model, torch.bfloat16 if self.bf16 else None):
                encoded = None  # peft puts virtual tokens in front of the source, and so encodes it itself
                if isinstance(self.model, PreTrainedModel):
                    encoded = self.model.get_encoder()(input_ids=ids, attention_mask=mask).last_hidden_state
                outputs = self.model.generate(
                    input_ids=ids,
                    attention_mask=mask,
                    num_return_sequences=n_best,
                    custom_generate=shrinking_search,
                    **self.search,
                    **_begun(encoded),
                )
                totals = self._log_probabilities(ids, mask, encoded, outputs, n_best)
            written, sizes, ended = decoded(outputs.cpu().numpy(), self.tokenizer, forced)
            for at, i in enumerate(batch):
                own = range(at * n_best, (at + 1) * n_best)
                found[i] = [(written[k], totals[k], sizes[k], ended[k]) for k in own]
        return found

    def _log_probabilities(
        self, ids: Tensor, mask: Tensor, encoded: Tensor | None, outputs: Tensor, n_best: int
    ) -> list[float]:
        """Log-probability of each output given its source, by the model alone: no penalty, and no share of beams."""
        inputs, labels = outputs[:, :-1], outputs[:, 1:]
        ends = (labels == self.tokenizer.eos_token_id).long()
        counted = ends.cumsum(1) == ends  # nothing after the first end
        # a token that the model was made to begin with is none of its choices
        counted[:, : len(forced_ids(self.model))] = False
        source = torch.arange(len(outputs), device=ids.device) // n_best
        totals = []
        together = max(1, SCORES_TOGETHER // (labels.shape[1] * self.vocabulary))
        for part in torch.arange(len(outputs), device=ids.device).split(together):
            own = source[part]
            logits = self.model(
                **({"input_ids": ids[own]} if encoded is None else _begun(encoded[own])),
                attention_mask=mask[own],
                decoder_input_ids=inputs[part],
                use_cache=False,
            ).logits
            losses = F.cross_entropy(logits.float().transpose(1, 2), labels[part], reduction="none")
            totals += (-losses * counted[part]).sum(1).tolist()
        return totals


def _begun(encoded: Tensor | None) -> dict[str, BaseModelOutput]:
    """Argument of a model whose encoder has given `encoded`, (rows, length, width); none without it."""
    return {} if encoded is None else {"encoder_outputs": BaseModelOutput(last_hidden_state=encoded)}
