"""Complete prompts with a causal language model, for predict and for samples before and after training."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from common.data.tokens import encodings
from common.errors import printable, quiet, tell
from common.speed.padding_free import leaves_out_padding

from .dialogues import DialogueEncoder, Message, end_ids, set_template
from .texts import beginning

#: a text to complete, or messages to answer
Prompt = str | list[Message]


class Completer:
    """Complete prompts in batches of similar length."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, max_length: int):
        self.model, self.tokenizer, self.max_length = model, tokenizer, max_length
        self.most_new = max(1, max_length // 2)  # the other half is for the prompt
        self.start = beginning(tokenizer)

    @torch.inference_mode()
    def __call__(
        self, prompts: list[Prompt], new_tokens: int, temperature: float = 0.0, top_p: float = 1.0, rows: int = 16
    ) -> list[str]:
        """Return one completion for each prompt, in the order of `prompts`.

        Args:
            prompts: texts to complete, or the messages of dialogues to answer. The model reads only the end of a prompt
                that is too long, after the token that starts every text. It does not read the last space of a text,
                because most tokenizers join a space with the word after it.
            new_tokens: maximum number of tokens in a completion; at most half of the tokens that the model takes.
            temperature: 0 decodes greedily; above 0 samples with the global random state.
            top_p: sample from the most probable tokens that sum to this probability.
            rows: prompts in a batch.
        """
        new_tokens = min(new_tokens, self.most_new)
        room = self.max_length - new_tokens
        ends = self.tokenizer.eos_token_id
        if not all(isinstance(prompt, str) for prompt in prompts):
            set_template(self.tokenizer)
            ends = end_ids(self.tokenizer)
        encoder = DialogueEncoder(self.tokenizer)
        encoded = [
            encodings(self.tokenizer, [prompt.removesuffix(" ")], offsets=False)[0].ids
            if isinstance(prompt, str)
            else encoder.prompt(prompt)
            for prompt in prompts
        ]
        ids = [self.start + row[max(0, len(row) - room + 1) :] for row in encoded]
        completions = [""] * len(ids)
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0} if temperature else {}
        config = GenerationConfig(
            max_new_tokens=new_tokens,
            pad_token_id=self.tokenizer.pad_token_id,
            eos_token_id=ends,
            **({"do_sample": False} | sampling),
        )
        self.model.eval()
        with quiet(), _use_cache(self.model):
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
                    completions[i] = self._decoded(ids[i], row)
                    if isinstance(prompts[i], str) and prompts[i].endswith(" "):
                        completions[i] = completions[i].removeprefix(" ")
        return completions

    def _decoded(self, prompt: list[int], completion: list[int]) -> str:
        """Return the text of `completion` after `prompt`; some tokenizers drop the first space of a text."""
        given, whole = (
            self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            for ids in (prompt, prompt + completion)
        )
        return whole[len(given) :]


@contextmanager
def _use_cache(model: PreTrainedModel) -> Iterator[None]:
    """Turn on the key-value cache; attention without padding does not support the cache."""
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


def prompts_from(rows: dict[str, list], count: int = 5, words: int = 8) -> list[Prompt]:
    """Choose `count` prompts from the rows of a split: their prompts, or the first `words` words of longer texts."""
    if "messages" in rows:
        drawn = np.random.default_rng(0).permutation(len(rows["messages"]))[:count]
        return [rows["messages"][i][:-1] for i in drawn if len(rows["messages"][i]) > 1]
    texts = rows["prompt"] if "prompt" in rows else rows["text"]
    rng = np.random.default_rng(0)
    prompts = []
    for i in rng.permutation(len(texts)):
        words_of_text = texts[i].split()
        if "prompt" in rows and words_of_text:
            prompts.append(texts[i])
        elif "prompt" not in rows and len(words_of_text) > 2 * words:
            prompts.append(" ".join(words_of_text[:words]))
        if len(prompts) == count:
            break
    return prompts


def compare_completions(prompts: list[Prompt], before: list[str], after: list[str]) -> list[dict]:
    """Print the completions before and after training, and return one row for each prompt."""
    if prompts:
        tell("\ngreedy completions before and after training")
    for prompt, old, new in zip(prompts, before, after, strict=True):
        tell(printable(prompt if isinstance(prompt, str) else prompt[-1]["content"], 200))
        tell(f"  before  {printable(old, 160)}")
        tell(f"  after   {printable(new, 160)}")
    rows = [{"prompt": prompt} if isinstance(prompt, str) else {"messages": prompt} for prompt in prompts]
    return [row | {"before": old, "after": new} for row, old, new in zip(rows, before, after, strict=True)]
