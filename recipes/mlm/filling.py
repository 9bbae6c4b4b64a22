"""What a masked language model puts in the place of masks: to predict, and to look at before and after training."""

import re
from collections.abc import Iterator

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from common.data.corpus import ends_of, sentences_of
from common.errors import printable, tell
from common.inference.predictor import token_batches
from common.speed import Speed
from common.speed.head import scores_of

#: for one mask the sub-tokens that fit best, each with its probability
Fills = list[tuple[str, float]]
_WORD = re.compile(r"[^\W\d_]{5,}")


class Filler:
    """Fills the masks in texts by a model; its head computes at the masks only."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, speed: Speed, max_length: int):
        self.model, self.tokenizer, self.speed = model, tokenizer, speed
        self.ends = ends_of(tokenizer)
        self.room = max_length - sum(map(len, self.ends))

    @torch.inference_mode()
    def __call__(self, texts: list[str], top: int, batch_tokens: int = 4096, bf16: bool = False) -> list[list[Fills]]:
        """For each text and each mask token in it the `top` sub-tokens.

        Of a text that is too long for the model each mask is filled from the sub-tokens around it.
        """
        if not texts:
            return []
        self.model.eval()
        device = self.model.device
        rows, places = [], []  # sub-tokens of a window; the text it is from
        for i, ids in enumerate(self.tokenizer(texts, add_special_tokens=False)["input_ids"]):
            for window in self._windows(ids):
                rows.append(window)
                places.append(i)
        found: list[list[Fills]] = [[] for _ in texts]
        of_row: dict[int, list[Fills]] = {}
        for batch in token_batches([len(ids) for ids, _ in rows], batch_tokens):
            longest = max(len(rows[i][0]) for i in batch)
            ids = torch.full((len(batch), longest), self.tokenizer.pad_token_id)
            attention, chosen = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
            for j, i in enumerate(batch):
                ids[j, : len(rows[i][0])] = torch.tensor(rows[i][0])
                attention[j, : len(rows[i][0])] = 1
                chosen[j, rows[i][1]] = True
            ids, attention, chosen = ids.to(device), attention.to(device), chosen.to(device)
            with (
                self.speed.at_labels(ids.masked_fill(~chosen, -100), scores=True),
                torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16),
            ):
                logits = scores_of(self.model(input_ids=ids, attention_mask=attention))
            logits = logits[chosen] if logits.shape[:2] == chosen.shape else logits[0]
            best = logits.float().softmax(-1).topk(top)
            fills = iter([self._named(*pair) for pair in zip(best.indices.tolist(), best.values.tolist(), strict=True)])
            for i in batch:
                of_row[i] = [next(fills) for _ in rows[i][1]]
        for i, place in enumerate(places):
            found[place] += of_row[i]
        return found

    def _named(self, ids: list[int], chances: list[float]) -> Fills:
        words = [self.tokenizer.decode([i]).strip() or self.tokenizer.convert_ids_to_tokens(i) for i in ids]
        return [(word, round(chance, 4)) for word, chance in zip(words, chances, strict=True)]

    def _windows(self, ids: list[int]) -> Iterator[tuple[list[int], list[int]]]:
        """Sub-tokens with special ones, and where the masks to fill are: all of a text, or one in a window of it."""
        before, after = self.ends
        masks = [i for i, token in enumerate(ids) if token == self.tokenizer.mask_token_id]
        if len(ids) <= self.room:
            yield [*before, *ids, *after], [len(before) + i for i in masks]
            return
        for i in masks:
            start = min(max(0, i - self.room // 2), len(ids) - self.room)
            yield [*before, *ids[start : start + self.room], *after], [len(before) + i - start]


def sentences_with_a_gap(texts: list[str], tokenizer: PreTrainedTokenizerFast, count: int = 5) -> list[tuple[str, str]]:
    """Sentences of `texts` with a word masked that is one sub-token, and that word. The same for the same texts."""
    chance = np.random.default_rng(0)
    found: list[tuple[str, str]] = []
    for i in chance.permutation(len(texts)):
        sentences = [s for s in sentences_of(texts[i]) if 6 <= len(s.split()) <= 25 and len(s) <= 160]
        if not sentences:
            continue
        sentence = sentences[chance.integers(len(sentences))]
        encoding = tokenizer.backend_tokenizer.encode(sentence, add_special_tokens=False)
        whole = {tuple(span) for span in encoding.offsets} | {(a + 1, b) for a, b in encoding.offsets}
        words = [m for m in _WORD.finditer(sentence) if m.span() in whole]
        if words:
            word = words[chance.integers(len(words))]
            gap = f"{sentence[: word.start()]}{tokenizer.mask_token}{sentence[word.end() :]}"
            found.append((gap, word.group()))
        if len(found) == count:
            break
    return found


def compare_fills(gaps: list[tuple[str, str]], before: list[list[Fills]], after: list[list[Fills]]) -> list[dict]:
    """The sentences with what stood in the gap, and what the model put there before and after training; printed too."""
    rows = []
    if gaps:
        tell("\nwhat the model puts into the gap, best first, before and after training")
    for (text, word), (old,), (new,) in zip(gaps, before, after, strict=True):
        tell(f"{printable(text)}  ({printable(word)})")
        for name, fills in (("before", old), ("after", new)):
            tell(f"  {name:7} {', '.join(printable(fill) for fill, _ in fills)}")
        rows.append({"text": text, "word": word, "before": old, "after": new})
    return rows
