"""Completing prompts with a causal language model: for predictions, and for a look before and after training."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from common.errors import printable, quiet, tell
from common.speed.padding_free import leaves_out_padding

from .texts import beginning


class Completer:
    """Completes prompts by a model, several of like length at a time."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, max_length: int):
        self.model, self.tokenizer, self.max_length = model, tokenizer, max_length
        self.start = beginning(tokenizer)

    @torch.inference_mode()
    def __call__(
        self, prompts: list[str], new_tokens: int, temperature: float = 0.0, top_p: float = 1.0, rows: int = 16
    ) -> list[str]:
        """For each prompt what the model goes on with, of at most `new_tokens` sub-tokens.

        At `temperature` 0 the best sub-token each time; else drawn from the global random state, out of the best that
        together have probability `top_p`. Of a prompt that leaves no room in the model only the end is read.
        """
        room = max(1, self.max_length - new_tokens)
        encoded = self.tokenizer(prompts, add_special_tokens=False)["input_ids"] if prompts else []
        ids = [(self.start + row)[-room:] for row in encoded]
        found = [""] * len(ids)
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        drawing = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0} if temperature else {}
        config = GenerationConfig(
            max_new_tokens=min(new_tokens, self.max_length - 1),
            pad_token_id=self.tokenizer.pad_token_id,
            eos_token_id=self.tokenizer.eos_token_id,
            **({"do_sample": False} | drawing),
        )
        self.model.eval()
        with quiet(), _with_a_cache(self.model):
            for first in range(0, len(order), rows):
                batch = order[first : first + rows]
                longest = max(len(ids[i]) for i in batch)
                inputs = torch.full((len(batch), longest), self.tokenizer.pad_token_id)
                attention = torch.zeros_like(inputs)
                for j, i in enumerate(batch):
                    inputs[j, longest - len(ids[i]) :] = torch.tensor(ids[i])
                    attention[j, longest - len(ids[i]) :] = 1
                inputs, attention = inputs.to(self.model.device), attention.to(self.model.device)
                output = self.model.generate(inputs, attention_mask=attention, generation_config=config)
                for i, row in zip(batch, output[:, longest:].tolist(), strict=True):
                    found[i] = self.tokenizer.decode(row, skip_special_tokens=True)
        return found


@contextmanager
def _with_a_cache(model: PreTrainedModel) -> Iterator[None]:
    """Within it the model keeps keys and values; layers that leave padding out do not go together with that."""
    packed, cached = leaves_out_padding(model), model.config.use_cache
    model.config.use_cache = True
    if packed:
        model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        model.config.use_cache = cached
        if packed:
            model.set_attn_implementation("packed")


def prompts_from(rows: dict[str, list], count: int = 5, words: int = 8) -> list[str]:
    """Prompts out of the rows of a split: their prompts, or the first words of texts that go on after them."""
    texts = rows["prompt"] if "prompt" in rows else rows["text"]
    chance = np.random.default_rng(0)
    found = []
    for i in chance.permutation(len(texts)):
        cut = texts[i].split()
        if "prompt" in rows and cut:
            found.append(texts[i])
        elif "prompt" not in rows and len(cut) > 2 * words:
            found.append(" ".join(cut[:words]))
        if len(found) == count:
            break
    return found


def compare_completions(prompts: list[str], before: list[str], after: list[str]) -> list[dict]:
    """The prompts with what the model went on with before and after training; printed too."""
    if prompts:
        tell("\nhow the model goes on, the best sub-token each time, before and after training")
    for prompt, old, new in zip(prompts, before, after, strict=True):
        tell(printable(prompt, 200))
        tell(f"  before  {printable(old, 160)}")
        tell(f"  after   {printable(new, 160)}")
    return [{"prompt": p, "before": old, "after": new} for p, old, new in zip(prompts, before, after, strict=True)]
