"""Train on few rows: draw them, and train the encoder before the head is fitted (`--few_shot`)."""

from collections import Counter
from collections.abc import Callable

import numpy as np
from datasets import Dataset, DatasetDict

from common.args import ClassifierArguments, TrainingArguments
from common.errors import InputError, tell
from common.hardware import sharding
from common.models.load import LoadedModel
from common.models.structure import transformer_of
from common.run import Run
from common.training.probe import last_linear
from common.tuning import TuningArguments

from . import contrastive, prompt
from .arguments import FewShotArguments, SentimentDataArguments

#: most classes in a message
SHOWN = 5


def draw(rows: Dataset, shots: int | None, seed: int) -> Dataset:
    """Return `shots` rows of each class, drawn at random by `seed`, in their order in `rows`; all rows for None.

    A row with several labels counts for each of them: rows are drawn until each class has `shots` rows.

    Raises:
        InputError: a class has fewer rows.
    """
    if shots is None:
        return rows
    labels = [{label} if isinstance(label, str) else set(label) for label in rows["label"][:]]
    counts = Counter(label for of_row in labels for label in of_row)
    few = [f"{name} ({count})" for name, count in sorted(counts.items()) if count < shots]
    if few:
        more = f", ... and {len(few) - SHOWN:,} more" if len(few) > SHOWN else ""
        raise InputError(
            f"--shots {shots}: classes with fewer training rows: {', '.join(few[:SHOWN])}{more}; add rows, or give "
            f"--shots {min(counts.values())}"
        )
    drawn: Counter[str] = Counter()
    kept = []
    for row in np.random.default_rng(seed).permutation(len(labels)).tolist():
        if any(drawn[label] < shots for label in labels[row]):
            drawn.update(labels[row])
            kept.append(row)
    return rows.select(sorted(kept))


def prepare(
    loaded: LoadedModel,
    run: Run,
    few: FewShotArguments,
    model_args: ClassifierArguments,
    data_args: SentimentDataArguments,
    tuning: TuningArguments,
    args: TrainingArguments,
) -> Callable[[DatasetDict], None]:
    """Return the training of the encoder that `--few_shot` asks for: a function of the encoded rows.

    Under `prompt` the tokenizer of `loaded` then reads each text in the pattern.

    Args:
        loaded: the classifier; the returned function trains its encoder in place.
        run: records the seconds.
        few: method, steps and rate; without a method the function does nothing.
        model_args: names the checkpoint, and says how the head starts.
        data_args: length of a row, and whether rows are pairs.
        tuning: which weights fine-tuning trains afterwards.
        args: see `steps.train_steps`.

    Raises:
        InputError: the method does not work with the model, the labels or the other arguments; or the encoder has no
            MLM head, or pattern or words do not fit it.
    """
    if few.few_shot is None:
        return lambda rows: None
    asked = f"--few_shot {few.few_shot}"
    if tuning.method != "full":
        raise InputError(f"{asked}: trains all weights; leave {tuning.asked} out")
    if sharding():
        raise InputError(f"{asked}: does not work under {sharding()}; launch with common/launch/multi_gpu.yaml")
    if model_args.head_init == "random" and args.num_train_epochs == 0:
        raise InputError(
            f"{asked}: leaves the head at random weights; leave --head_init out, or give --num_train_epochs 5"
        )
    layer = last_linear(loaded.model)
    new = [weight for name, weight in loaded.model.named_parameters() if name in loaded.new_parameters]
    if layer is None or not any(weight is layer.weight for weight in new):
        name = model_args.model_name_or_path
        raise InputError(f"{asked}: {name} already classifies these labels, or has no linear head; give an encoder")
    settings = {"steps": few.few_shot_steps, "rate": few.few_shot_learning_rate, "args": args}
    if few.few_shot == "contrastive":

        def train(rows: DatasetDict) -> None:
            with run.phase("first stage"):
                contrastive.train_encoder(loaded, rows["train"], **settings)

        return train
    if loaded.model.config.problem_type == "multi_label_classification":
        raise InputError(f"{asked}: fills in one word a row, but rows have several labels; give --few_shot contrastive")
    if model_args.allow_special_tokens:
        raise InputError("--allow_special_tokens true: a text may bring a second mask into a pattern; leave it out")
    tokenizer = prompt.with_pattern(loaded.tokenizer, few.pattern, pair=data_args.text_pair_column_name is not None)
    words = prompt.words_of(list(loaded.model.config.id2label.values()), few.verbalizer, tokenizer)
    prompted = prompt.load_prompted(model_args, tokenizer, words, data_args.max_seq_length, args.speed)
    loaded.tokenizer = tokenizer

    def train(rows: DatasetDict) -> None:
        with run.phase("first stage"):
            prompt.train_prompted(prompted, rows["train"], **settings)
            decided = prompted.probabilities(rows["validation"], bool(args.bf16)).argmax(-1)
        accuracy = np.mean(decided == np.array(rows["validation"]["labels"][:]))
        tell(f"prompt training: the MLM head fills in the right word for {accuracy:.1%} of the validation rows")
        weights = transformer_of(prompted.model).state_dict()
        transformer_of(loaded.model).load_state_dict(weights, strict=False)  # an MLM has no pooler

    return train
