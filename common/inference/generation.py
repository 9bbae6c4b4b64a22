"""Generate texts with a saved encoder-decoder, and return the best outputs with their log-probabilities."""

from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForSeq2SeqLM, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from common.data.language_codes import encode_sources
from common.errors import InputError
from common.hardware import accelerator, native_bf16
from common.inference.predictor import PredictArguments, load_saved, token_batches
from common.inference.search import shrinking_search
from common.models.decoding import decoded, forced_ids, generating, padded
from common.models.encoder_decoder import load_seq2seq_tokenizer
from common.models.load import load_config, resolve_model
from common.models.sizes import pad_multiple

#: a generated text, its log-probability, its number of tokens, and whether it ends with the end token
Output = tuple[str, float, int, bool]
#: limits on memory: scores of the vocabulary in one step of the search, and at once when outputs are scored
SCORES_OF_STEP, SCORES_TOGETHER = 2**24, 2**22


@dataclass
class SearchArguments(PredictArguments):
    """Define the arguments of a `predict` that generates."""

    num_beams: int | None = field(default=None, metadata={"help": "beams of the search; default: as in training"})
    length_penalty: float | None = field(
        default=None, metadata={"help": "length penalty of the search; default: as in training"}
    )
    n_best: int = field(default=0, metadata={"help": "number of best outputs to write for each text"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_best < 0:
            raise InputError(f"--n_best {self.n_best}: must be at least 0")
        if self.num_beams is not None and self.num_beams < 1:
            raise InputError(f"--num_beams {self.num_beams}: must be at least 1")


class Generator:
    """A saved encoder-decoder with its search settings.

    Args:
        model: folder that train saved, or a hub id.
        batch_tokens: tokens of the sources in a batch, padding included.
        precision: "auto" generates in bfloat16 if the hardware computes it natively, as evaluations do.
        beams: beams of the search; None: as the model was saved.
        length_penalty: None: as the model was saved.
        prefix: text before each source.
        speed: see `--speed`.
        allow_special_tokens: whether special tokens in texts act as such; None: as in training.
    """

    def __init__(
        self,
        model: str,
        batch_tokens: int = 4096,
        precision: str = "auto",
        beams: int | None = None,
        length_penalty: float | None = None,
        prefix: str = "",
        speed: Literal["auto", "off"] = "auto",
        allow_special_tokens: bool | None = None,
    ):
        path = resolve_model(model)
        self.prefix = prefix
        self.tokenizer = load_seq2seq_tokenizer(model, allow_special_tokens=allow_special_tokens)
        self.device = accelerator()
        self.model: PreTrainedModel = load_saved(AutoModelForSeq2SeqLM, path).eval().to(self.device)
        self.max_length = load_config(path).max_source_length
        search = self.model.generation_config
        self.beams = search.num_beams if beams is None else beams
        self.batch_tokens = batch_tokens
        self.vocabulary = self.model.config.get_text_config().vocab_size
        # each beam of each text has a score for each token of the vocabulary
        self.rows = max(1, SCORES_OF_STEP // (self.beams * self.vocabulary))
        penalty = search.length_penalty if length_penalty is None else length_penalty
        self.search = {"num_beams": self.beams} | ({} if speed == "off" else {"custom_generate": shrinking_search})
        if self.beams > 1:
            self.search |= {"length_penalty": 1.0 if penalty is None else penalty, "early_stopping": False}
        self.bf16 = precision == "bf16" or (precision == "auto" and native_bf16(self.device.type == "cpu"))

    def check_n_best(self, n_best: int) -> None:
        """Raise `InputError` if the search has fewer beams than `n_best`."""
        if n_best > self.beams:
            raise InputError(
                f"--n_best {n_best}: exceeds the {self.beams} beams of the search; give --num_beams {n_best}"
            )

    def fits(self, text: str) -> bool:
        """Return whether `text` fits into the maximum source length."""
        (ids,) = encode_sources(self.tokenizer, self.prefix, [text])
        return len(ids) <= self.max_length

    def best(self, texts: list[str], n_best: int = 1) -> list[list[Output]]:
        """Return the `n_best` outputs of each text, best first. Every text must fit; a blank text has blank outputs."""
        rows = encode_sources(self.tokenizer, self.prefix, texts)
        results: list[list[Output]] = [[("", 0.0, 0, True)] * n_best for _ in texts]
        nonblank = [i for i, text in enumerate(texts) if text.strip()]
        forced = forced_ids(self.model)
        for batch in token_batches([len(rows[i]) for i in nonblank], self.batch_tokens, self.rows):
            batch = [nonblank[i] for i in batch]
            multiple = pad_multiple(self.max_length)
            ids = padded([rows[i] for i in batch], self.tokenizer.pad_token_id, multiple).to(self.device)
            mask = padded([[1] * len(rows[i]) for i in batch], 0, multiple).to(self.device)
            # under `inference_mode` autocast would cast the weights again at each step
            with torch.no_grad(), generating(self.model, torch.bfloat16 if self.bf16 else None):
                encoded = None  # peft encodes the source itself, with virtual tokens before it
                if isinstance(self.model, PreTrainedModel):
                    encoded = self.model.get_encoder()(input_ids=ids, attention_mask=mask).last_hidden_state
                outputs = self.model.generate(  # type: ignore[operator]  # `PreTrainedModel` does not declare it
                    input_ids=ids,
                    attention_mask=mask,
                    num_return_sequences=n_best,
                    **self.search,
                    **_encoder_outputs(encoded),
                )
                totals = self._log_probabilities(ids, mask, encoded, outputs, n_best)
            written, sizes, ended = decoded(outputs.cpu().numpy(), self.tokenizer, forced)
            for at, i in enumerate(batch):
                numbers = range(at * n_best, (at + 1) * n_best)
                results[i] = [(written[k], totals[k], sizes[k], ended[k]) for k in numbers]
        return results

    def _log_probabilities(
        self, ids: Tensor, mask: Tensor, encoded: Tensor | None, outputs: Tensor, n_best: int
    ) -> list[float]:
        """Return the log-probability of each output given its source, without length penalty."""
        inputs, labels = outputs[:, :-1], outputs[:, 1:]
        ends = (labels == self.tokenizer.eos_token_id).long()
        counted = ends.cumsum(1) == ends  # nothing after the first end
        # the model does not choose its forced first tokens
        counted[:, : len(forced_ids(self.model))] = False
        source = torch.arange(len(outputs), device=ids.device) // n_best
        totals = []
        together = max(1, SCORES_TOGETHER // (labels.shape[1] * self.vocabulary))
        for part in torch.arange(len(outputs), device=ids.device).split(together):
            chosen = source[part]
            logits = self.model(
                **({"input_ids": ids[chosen]} if encoded is None else _encoder_outputs(encoded[chosen])),
                attention_mask=mask[chosen],
                decoder_input_ids=inputs[part],
                use_cache=False,
            ).logits
            losses = F.cross_entropy(logits.float().transpose(1, 2), labels[part], reduction="none")
            totals += (-losses * counted[part]).sum(1).tolist()
        return totals


def _encoder_outputs(encoded: Tensor | None) -> dict[str, BaseModelOutput]:
    """Return encoder outputs (rows, length, width) as an argument of the model; no argument if None."""
    return {} if encoded is None else {"encoder_outputs": BaseModelOutput(last_hidden_state=encoded)}
