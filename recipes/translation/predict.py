"""Translate a file of sentences or documents with a model that `train` saved.

    make predict RECIPE=translation MODEL=outputs/translation INPUT=texts.jsonl OUTPUT=translated.jsonl
    python -m recipes.translation.predict --model outputs/translation --input t.txt --output t.jsonl --n_best 3

The input is JSON Lines of {"text": ...}, of {"translation": {"en": ...}} with the model's source language, or a .txt
file with a text a line. The output has the same rows in the same order, each with `predicted`, `score` (mean
log-probability of its sub-tokens), `pieces` (how many a text too long for the model was split into, by line and
sentence) and `ended` (false where a translation was cut off at the greatest length). Memory does not grow with the
file.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import AutoModelForSeq2SeqLM, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from common.args import native_bf16, parse
from common.data import Row, check_file
from common.encoder_decoder import load_seq2seq_tokenizer
from common.errors import InputError, command_line
from common.inference import PredictArguments, load_saved, predict_file, token_batches
from common.models import load_config, resolve_model
from common.seq2seq import finished_ids, generating, padded

from .languages import Direction, set_direction
from .sentences import joined, pieces

WRITTEN = ("predicted", "score", "pieces", "ended", "n_best")


@dataclass
class TranslationPredictArguments(PredictArguments):
    model: str | None = field(
        default=f"outputs/{Path(__file__).resolve().parent.name}",
        metadata={"help": "folder that train saved"},
    )
    num_beams: int | None = field(default=None, metadata={"help": "hypotheses kept; as in training when not given"})
    length_penalty: float | None = field(default=None, metadata={"help": "the same for the length penalty"})
    n_best: int = field(default=0, metadata={"help": "write so many of the best translations of each text"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_best < 0 or (self.num_beams is not None and self.num_beams < 1):
            raise InputError("--n_best must be at least 0, and --num_beams at least 1")


ARGUMENTS = (TranslationPredictArguments,)


class Translator:
    """A saved model that translates texts of any length. `batch_tokens` bounds a batch, padding included.

    `beams` and `length_penalty` take the place of those that the model was saved with. Generates in float32 on a CPU,
    as the training's evaluation does, and in bfloat16 on GPUs that compute it (`precision`).
    """

    def __init__(
        self,
        model: str,
        batch_tokens: int = 4096,
        precision: str = "auto",
        beams: int | None = None,
        length_penalty: float | None = None,
    ):
        path = resolve_model(model)
        config = load_config(path)
        if not isinstance(getattr(config, "translation", None), dict):
            raise InputError(f"--model {model}: names no languages; name a folder that recipes.translation.train saved")
        self.way = Direction(**config.translation)
        self.tokenizer = load_seq2seq_tokenizer(model)
        self.device = torch.accelerator.current_accelerator() or torch.device("cpu")
        self.model = load_saved(AutoModelForSeq2SeqLM, path).to(self.device).eval()
        set_direction(self.tokenizer, self.model, self.way)
        self.max_length, self.batch_tokens = config.max_source_length, batch_tokens
        search = self.model.generation_config
        self.beams = search.num_beams if beams is None else beams
        penalty = search.length_penalty if length_penalty is None else length_penalty
        self.search = {"num_beams": self.beams} | ({"length_penalty": penalty or 1.0} if self.beams > 1 else {})
        if self.beams > 1:
            self.search["early_stopping"] = False
        self.bf16 = precision == "bf16" or (precision == "auto" and native_bf16(self.device.type == "cpu"))

    def __call__(self, texts: list[str], n_best: int = 1) -> list[list[Row]]:
        """For each text its best translations, the best first: `predicted`, `score`, `pieces` and `ended`.

        Of a text in several pieces the second best is the second best of each piece, and so on.
        """
        if n_best > self.beams:
            raise InputError(f"--n_best {n_best}: needs as many --num_beams")
        if not texts:
            return []
        cut = [pieces(text, self._fits) for text in texts]
        flat = [piece for of_text in cut for piece, _ in of_text]
        found = iter(self._translate(flat, n_best))
        results = []
        for of_text in cut:
            own = [next(found) for _ in of_text]  # pieces x n_best x (text, log-probability, sub-tokens, ended)
            options = []
            for rank in range(n_best):
                best = [piece[rank] for piece in own]
                options.append(
                    {
                        "predicted": joined([text for text, *_ in best], of_text),
                        "score": round(sum(total for _, total, *_ in best) / max(1, sum(n for *_, n, _ in best)), 4),
                        "pieces": len(of_text),
                        "ended": all(ended for *_, ended in best),
                    }
                )
            results.append(options)
        return results

    def _fits(self, text: str) -> bool:
        prefixed = self.way.source_prefix + text
        return len(self.tokenizer(prefixed, verbose=False)["input_ids"]) <= self.max_length

    def _translate(self, texts: list[str], n_best: int) -> list[list[tuple[str, float, int, bool]]]:
        rows = self.tokenizer([self.way.source_prefix + text for text in texts], verbose=False)["input_ids"]
        found: list = [[("", 0.0, 0, True)] * n_best for _ in texts]  # a blank text has a blank translation
        asked = [i for i, text in enumerate(texts) if text.strip()]
        for batch in token_batches([len(rows[i]) for i in asked], self.batch_tokens):
            batch = [asked[i] for i in batch]
            ids = padded([rows[i] for i in batch], self.tokenizer.pad_token_id).to(self.device)
            mask = padded([[1] * len(rows[i]) for i in batch], 0).to(self.device)
            with torch.inference_mode(), generating(self.model, self.bf16):
                outputs = self.model.generate(
                    input_ids=ids, attention_mask=mask, num_return_sequences=n_best, **self.search
                )
                totals = self._log_probabilities(ids, mask, outputs, n_best)
            forced = self.model.generation_config.forced_bos_token_id
            ended = [finished_ids(row, self.tokenizer.eos_token_id, forced) for row in outputs.cpu().numpy()]
            decoded = self.tokenizer.batch_decode(
                [row for row, _ in ended], skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
            for at, i in enumerate(batch):
                own = range(at * n_best, (at + 1) * n_best)
                found[i] = [(decoded[k].strip(), totals[k], len(ended[k][0]) + ended[k][1], ended[k][1]) for k in own]
        return found

    def _log_probabilities(self, ids: torch.Tensor, mask: torch.Tensor, outputs: torch.Tensor, n_best: int) -> list:
        """Log-probability of each output given its source, by the model alone: no penalty, and no share of beams."""
        plain = isinstance(self.model, PreTrainedModel)  # else peft puts virtual tokens in front of the source
        if plain:
            encoded = self.model.get_encoder()(input_ids=ids, attention_mask=mask).last_hidden_state
        eos, totals = self.tokenizer.eos_token_id, []
        for k, row in enumerate(outputs):  # one at a time: all logits of a batch could be gigabytes
            ends = torch.nonzero(row[1:] == eos)
            size = int(ends[0]) + 1 if len(ends) else len(row) - 1
            source = slice(k // n_best, k // n_best + 1)
            begun = {"encoder_outputs": BaseModelOutput(last_hidden_state=encoded[source])} if plain else {}
            logits = self.model(
                **(begun or {"input_ids": ids[source]}),
                attention_mask=mask[source],
                decoder_input_ids=row[None, :size],
                use_cache=False,
            ).logits[0]
            picked = logits.float().log_softmax(-1).gather(1, row[1 : size + 1, None])
            # a token that the model was made to begin with is none of its choices
            forced = self.model.generation_config.forced_bos_token_id is not None
            totals.append(float(picked[int(forced) :].sum()))
        return totals


def source_of(row: Row, source_lang: str) -> str | None:
    """The text of an input row; None where it has none."""
    found = row.get("text")
    if found is None and isinstance(row.get("translation"), dict):
        found = row["translation"].get(source_lang)
    return found if isinstance(found, str) else None


def check_row(row: Row, source_lang: str) -> Iterator[str]:
    """A sentence for each thing that is wrong with an input row."""
    for name in WRITTEN:
        if name in row:
            yield f'has "{name}" already, which would be lost; rename that column'
    if source_of(row, source_lang) is None:
        yield (
            f'needs "text" (a text) or "translation" with "{source_lang}"; columns here: '
            f"{', '.join(map(str, row)) or 'none'}"
        )


def with_translations(rows: list[Row], translator: Translator, n_best: int = 0) -> Iterator[Row]:
    """The rows, each with its translation, and `n_best` of them where asked for."""
    texts = [source_of(row, translator.way.source_lang) for row in rows]
    for row, options in zip(rows, translator(texts, max(1, n_best)), strict=True):
        yield row | options[0] | ({"n_best": options} if n_best else {})


def main(argv: list[str] | None = None) -> int:
    (args,) = parse(ARGUMENTS, argv, __doc__)
    translator = Translator(args.model, args.batch_tokens, args.precision, args.num_beams, args.length_penalty)
    if args.n_best > translator.beams:
        raise InputError(f"--n_best {args.n_best}: needs as many --num_beams")
    check_file(args.input, lambda row: check_row(row, translator.way.source_lang), args.max_chars)
    return predict_file(args, lambda rows: with_translations(rows, translator, args.n_best))


if __name__ == "__main__":
    command_line(main)
