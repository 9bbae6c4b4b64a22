"""Find the entities in a file of texts with a model saved by `train`.

    make predict RECIPE=ner MODEL=outputs/ner INPUT=texts.jsonl OUTPUT=entities.jsonl
    python -m recipes.ner.predict --model outputs/ner --input texts.txt --output entities.jsonl

The input has rows of {"text": ...} or {"tokens": [...]}, is a .txt file with one text per line, or has any format of
`train`. The output has the same rows in the same order. Each row gets `entities`, a list of {label, text, start, end,
score}; if the input has this column, the list is named `predicted_entities`. `start` and `end` are characters of the
text, or of the tokens joined by spaces. `score` is the mean probability of the tags of the entity's words. Memory use
does not grow with the file.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from transformers import AutoModelForTokenClassification, PretrainedConfig

from common.cli import command_line, parse
from common.data import Row
from common.data.columns import Columns as SavedColumns
from common.data.files import FileReader
from common.errors import tell
from common.inference.predictor import DomainPredictArguments, InputRows, Predictor, predict_file
from common.models.load import load_config, resolve_model

from .arguments import TAGS, WORDS
from .conll import Columns
from .reading import file_reader
from .tagging import entity_spans, stitch, word_spans
from .texts import check_row, in_columns, text_of
from .train import encode


@dataclass
class NerPredictArguments(DomainPredictArguments):
    model: str | None = field(
        default=f"outputs/{Path(__file__).resolve().parent.name}",
        metadata={"help": "folder that train saved, or a hub id"},
    )
    conll_word_column: str | None = field(
        default=None, metadata={"help": "column of the word in CoNLL files; default: as in training"}
    )
    conll_tag_column: str | None = field(
        default=None, metadata={"help": "column of the tag in CoNLL files; default: as in training"}
    )

    def check_input(self) -> None:
        """Raise `InputError` unless `--input` is a file or a folder of brat."""
        if not Path(self.input).is_dir():
            super().check_input()


ARGUMENTS = (NerPredictArguments,)


class Tagger(Predictor):
    """Tag words with a saved model, in windows cut as in training.

    `batch_tokens` limits the tokens of a batch, padding included.
    """

    def __init__(self, model: str, batch_tokens: int = 4096, precision: str = "auto", speed: str = "auto", **more):
        super().__init__(
            AutoModelForTokenClassification, "ForTokenClassification", model, batch_tokens, precision, speed, **more
        )
        self.doc_stride = getattr(self.config, "doc_stride", self.max_length // 4)
        #: whether each word has a tag of its own, such as a part of speech
        self.single_words = getattr(self.config, "tag_scheme", "iob2") == "none"
        #: returns the entities of a sequence of tags
        self.spans = word_spans if self.single_words else entity_spans

    def __call__(self, sentences: list[list[str]]) -> list[tuple[list[str], list[float]]]:
        """Return, for each list of words, the tag of each word and the probability of the tag."""
        if not sentences:
            return []
        cut = {"max_seq_length": self.max_length, "doc_stride": self.doc_stride}
        windows = encode({"tokens": sentences}, range(len(sentences)), self.tokenizer, self.config.label2id, **cut)
        tags: list = [None] * len(windows["input_ids"])
        scores = tags.copy()
        for batch, logits in self.logits(windows):
            best = logits.softmax(-1).max(-1)
            for i, row_scores, row_tags in zip(batch, best.values.tolist(), best.indices.tolist(), strict=True):
                tags[i], scores[i] = [self.labels[tag] for tag in row_tags], row_scores
        return list(zip(stitch(windows, tags), stitch(windows, scores), strict=True))


def reader_for(args: NerPredictArguments, config: PretrainedConfig) -> FileReader:
    """Return the function that reads files in the way that the model's training files were read."""
    trained = getattr(config, "conll_columns", (None, None))
    conll = Columns(args.conll_word_column or trained[0], args.conll_tag_column or trained[1])
    labels, sentences = set(config.id2label.values()), getattr(config, "sentences", None)
    return file_reader(conll, (WORDS, TAGS), args, predicting=True, sentences=sentences, labels=labels)


def with_entities(
    rows: list[Row], tagger: Tagger, column: str = "entities", columns: SavedColumns | None = None
) -> Iterator[Row]:
    """Yield the rows with their entities in `column`."""
    texts = [text_of(in_columns(row, columns) if columns else row) for row in rows]
    tagged = tagger([[row.text[start:end] for start, end in row.words] for row in texts if row.words])
    results = iter(tagged)
    for row, found in zip(rows, texts, strict=True):
        tags, scores = next(results) if found.words else ([], [])
        entities = []
        for label, first, last in tagger.spans(tags):
            start, end = found.words[first][0], found.words[last - 1][1]
            score = round(sum(scores[first:last]) / (last - first), 4)
            text = found.text[start:end]
            entities.append({"label": label, "text": text, "start": start, "end": end, "score": score})
        yield row | {column: entities}


def main(argv: list[str] | None = None) -> int:
    (args,) = parse(ARGUMENTS, argv, __doc__)
    config = load_config(resolve_model(args.model))
    read = reader_for(args, config)
    column = "entities"

    def check(row: Row) -> Iterator[str]:
        nonlocal column
        column = "predicted_entities" if "entities" in row else column
        yield from check_row(in_columns(row, columns))

    columns = SavedColumns(config, tokens=(WORDS,))
    rows = InputRows(args, check, read)
    if column != "entities":
        tell(f"{args.input}: has a column entities, which is kept; the predictions are in {column}")
    tagger = Tagger(args.model, **args.settings())
    return predict_file(args, lambda some: with_entities(some, tagger, column, columns), rows)


if __name__ == "__main__":
    command_line(main)
