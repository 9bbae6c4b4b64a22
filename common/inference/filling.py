"""Fill the masks in texts with a masked language model."""

from collections.abc import Iterator

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from common.data.tokens import ends_of, with_masks
from common.inference.predictor import token_batches
from common.speed import Speed
from common.speed.head import scores_of

#: the most probable tokens of a mask, with their probabilities
Fills = list[tuple[str, float]]


class Filler:
    """Fill the masks in texts with a model. The head computes only the masks."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, speed: Speed, max_length: int):
        self.model, self.tokenizer, self.speed = model, tokenizer, speed
        self.ends = ends_of(tokenizer)
        self.reader = with_masks(tokenizer)
        self.room = max_length - sum(map(len, self.ends))

    @torch.inference_mode()
    def __call__(self, texts: list[str], top: int, batch_tokens: int = 4096, bf16: bool = False) -> list[list[Fills]]:
        """Return the `top` tokens for each mask of each text.

        If a text is too long for the model, each mask gets a window of the tokens around the mask.

        Args:
            texts: texts with mask tokens.
            top: number of tokens per mask.
            batch_tokens: maximum tokens of a batch, padding included.
            bf16: whether to compute in bf16.
        """
        if not texts:
            return []
        self.model.eval()
        device = self.model.device
        rows, text_of_row = [], []  # (tokens, mask positions) of a window; index of its text
        for i, encoding in enumerate(self.reader.encode_batch_fast(texts, add_special_tokens=False)):
            for window in self._windows(encoding.ids):
                rows.append(window)
                text_of_row.append(i)
        fills_of_text: list[list[Fills]] = [[] for _ in texts]
        fills_of_row: dict[int, list[Fills]] = {}
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
            fills = iter(
                [self._decoded(*pair) for pair in zip(best.indices.tolist(), best.values.tolist(), strict=True)]
            )
            for i in batch:
                fills_of_row[i] = [next(fills) for _ in rows[i][1]]
        for i, text in enumerate(text_of_row):
            fills_of_text[text] += fills_of_row[i]
        return fills_of_text

    def _decoded(self, ids: list[int], probs: list[float]) -> Fills:
        words = [str(self.tokenizer.decode([i])).strip() or str(self.tokenizer.convert_ids_to_tokens(i)) for i in ids]
        return [(word, round(prob, 4)) for word, prob in zip(words, probs, strict=True)]

    def _windows(self, ids: list[int]) -> Iterator[tuple[list[int], list[int]]]:
        """Yield tokens with special tokens, and mask positions: a whole text, or a window for each mask."""
        before, after = self.ends
        masks = [i for i, token in enumerate(ids) if token == self.tokenizer.mask_token_id]
        if len(ids) <= self.room:
            yield [*before, *ids, *after], [len(before) + i for i in masks]
            return
        for i in masks:
            start = min(max(0, i - self.room // 2), len(ids) - self.room)
            yield [*before, *ids[start : start + self.room], *after], [len(before) + i - start]
