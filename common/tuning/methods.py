"""The methods of `--tuning`: what each trains, how it is saved, and how its learning rate compares with that of full.

Each trains the fresh head of a task as well, and whatever else the checkpoint did not have.

Saved `plain`: as any model. `merged`: what was trained is added into the weights, so that the folder holds a plain
model of the same architecture, and beside it `adapter/` what was trained alone, for peft. `apart`: it cannot be merged;
the folder has the model in `base/` and what was trained in `adapter/`, and each recipe's predict puts them together.

What cannot be had, and is told before training:
- `head` where the head is the input embeddings once more (GPT-2, BART, T5): nothing would be trained.
- `bias` in a model without biases (T5, Llama).
- `ia3` and `houlsby` adapters where attention does not go through transformers' `AttentionInterface` (DeBERTa, MPNet,
  LED, BLOOM, GPT-Neo).
- `prefix` where attention takes no keys and values from outside (DistilBERT, ALBERT, MPNet, ModernBERT, DeBERTa).
- `prefix`, `prompt`, `ptuning` with a head that looks for the last sub-token by its id (GPT-2 as a classifier), where
  virtual tokens and text exceed the positions of the model, and with a head they cannot be hidden from (OPT).
- what `--lora_target_modules` or `--peft_config` puts beside weights that two layers share (a tied head, embeddings).
- all but `full` for a new model, and under FSDP or DeepSpeed.
"""

import difflib
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from common.errors import InputError


class Method(NamedTuple):
    """`rate` is the default learning rate, as a multiple of the recipe's for `full`."""

    trains: str
    saved: Literal["plain", "merged", "apart"]
    rate: float


#: The rates are measured, on the sample of `ner` (common/README.md, "Learning rates"): of each method the lowest rate
#: whose F1 is within 0.03 of the method's best.
METHODS = {
    "full": Method("all weights", "plain", 1),
    "head": Method("the head; all else is frozen", "plain", 100),
    "top": Method("top:k, the last k layers and the head", "plain", 3),
    "gradual": Method(
        "a layer more from the top with each epoch (Howard and Ruder 2018, arXiv:1801.06146)", "plain", 3
    ),
    "bias": Method("biases (BitFit, Ben Zaken et al. 2022, arXiv:2106.10199)", "plain", 30),
    "layernorm": Method("the gains and biases of the norms", "plain", 20),
    "lora": Method("low-rank matrices beside queries and values (Hu et al. 2021, arXiv:2106.09685)", "merged", 20),
    "rslora": Method("the same, scaled by the root of the rank (Kalajdzievski 2023, arXiv:2312.03732)", "merged", 20),
    "dora": Method("the same, and the length of each column (Liu et al. 2024, arXiv:2402.09353)", "merged", 20),
    "pissa": Method("the same, begun from the principal components (Meng et al. 2024, arXiv:2404.02948)", "merged", 30),
    "adalora": Method(
        "the same in all layers' maps, ranks chosen on the way (Zhang et al. 2023, arXiv:2303.10512)", "merged", 20
    ),
    "ia3": Method(
        "a factor for each key, value and inner feed-forward number (Liu et al. 2022, arXiv:2205.05638)", "merged", 50
    ),
    "vera": Method(
        "two vectors a matrix between shared random ones (Kopiczko et al. 2024, arXiv:2310.11454)", "merged", 150
    ),
    "prefix": Method("keys and values in front of each layer's (Li and Liang 2021, arXiv:2101.00190)", "apart", 150),
    "prompt": Method("embeddings in front of the text (Lester et al. 2021, arXiv:2104.08691)", "apart", 50),
    "ptuning": Method("the same, made by a small network (Liu et al. 2021, arXiv:2103.10385)", "apart", 10),
    "adapter": Method("bottleneck layers between the frozen ones (Houlsby et al. 2019, arXiv:1902.00751)", "apart", 20),
}
LOW_RANK = ("lora", "rslora", "dora", "pissa", "adalora", "vera")
PROMPTS = ("prefix", "prompt", "ptuning")
#: arguments that only some methods take
ONLY = {
    "lora_r": LOW_RANK,
    "lora_alpha": tuple(method for method in LOW_RANK if method != "vera"),
    "lora_dropout": LOW_RANK,
    "lora_target_modules": LOW_RANK,
    "adapter_reduction": ("adapter",),
    "adapter_placement": ("adapter",),
    "num_virtual_tokens": PROMPTS,
}
#: methods that transform weights which are 4 or 8 bits short
ON_QUANTIZED = ("lora", "rslora")


@dataclass
class TuningArguments:
    """How much of the model is trained. `python -m common.tuning.methods` lists the methods."""

    _argument_group_name = "tuning"

    tuning: str | None = field(
        default=None,
        metadata={"help": f"full (default), {', '.join(m for m in METHODS if m != 'full')}", "resume": "fixed"},
    )
    lora_r: int | None = field(
        default=None,
        metadata={"help": "rank of lora and its like (8; vera 256); alone it means --tuning lora", "resume": "fixed"},
    )
    lora_alpha: float | None = field(
        default=None, metadata={"help": "scale; twice the rank when not given (rslora 8, pissa the rank)"}
    )
    lora_dropout: float = field(default=0.1, metadata={"help": "dropout in front of the low-rank matrices"})
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={
            "help": "maps to adapt, such as: query value, or all-linear; queries and values when not given",
            "resume": "fixed",
        },
    )
    adapter_reduction: int = field(
        default=16, metadata={"help": "of adapter: width of the model by that inside", "resume": "fixed"}
    )
    adapter_placement: Literal["pfeiffer", "houlsby"] = field(
        default="pfeiffer",
        metadata={
            "help": "of adapter: one a layer, or one behind attention and one behind the rest",
            "resume": "fixed",
        },
    )
    num_virtual_tokens: int = field(default=20, metadata={"help": "of prefix, prompt and ptuning", "resume": "fixed"})
    layerwise_lr_decay: float | None = field(
        default=None,
        metadata={"help": "with full: each layer learns at this share of the rate of the one above", "resume": "fixed"},
    )
    peft_config: str | None = field(
        default=None, metadata={"help": "YAML file with `peft_type`, for any other method of peft", "resume": "fixed"}
    )
    quantize: Literal["4bit", "8bit"] | None = field(
        default=None,
        metadata={
            "help": "with lora or rslora: hold the frozen weights in so few bits (QLoRA; a GPU)",
            "resume": "fixed",
        },
    )

    def __post_init__(self) -> None:
        self.asked = f"--tuning {self.tuning}" if self.tuning else "--lora_r" if self.lora_r else "--peft_config"
        if self.peft_config and self.tuning:
            raise InputError("--peft_config names its own method, so leave --tuning out")
        self.tuning = self.tuning or ("peft" if self.peft_config else "lora" if self.lora_r is not None else "full")
        self.method, _, layers = self.tuning.partition(":")
        if self.method not in METHODS and not self.peft_config:
            nearest = difflib.get_close_matches(self.method, METHODS, n=1)
            more = f"; did you mean {nearest[0]}?" if nearest else f"; known: {', '.join(METHODS)}"
            raise InputError(f"--tuning {self.tuning}: no such method{more}")
        if (self.method == "top") != bool(layers) or (layers and not (layers.isdigit() and int(layers) > 0)):
            raise InputError(f"--tuning {self.tuning}: top takes a number of layers, such as top:2, and no other does")
        self.top = int(layers or 0)
        for name in ("lora_r", "adapter_reduction", "num_virtual_tokens"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise InputError(f"--{name} must be at least 1")
        for name, methods in ONLY.items():
            if getattr(self, name) != self.__dataclass_fields__[name].default and self.method not in methods:
                has = "what --peft_config names has its own" if self.peft_config else f"{self.tuning} has none"
                raise InputError(f"--{name}: {has}; of use with --tuning {', '.join(methods)}")
        if self.layerwise_lr_decay is not None:
            if not 0 < self.layerwise_lr_decay <= 1:
                raise InputError(f"--layerwise_lr_decay {self.layerwise_lr_decay}: must be above 0 and at most 1")
            if self.method != "full":
                raise InputError(f"--layerwise_lr_decay: is of the layers' own weights, so not with {self.tuning}")
        if self.quantize and self.method not in ON_QUANTIZED:
            raise InputError(f"--quantize {self.quantize}: is for {' or '.join(ON_QUANTIZED)}; add --tuning lora")

    def rate(self, full: float) -> float:
        """The learning rate where the user gave none; `full` is the recipe's for training all weights."""
        return full * (METHODS[self.method].rate if self.method in METHODS else METHODS["lora"].rate)

    def is_beside(self) -> bool:
        """Whether what is trained is kept beside the model's own weights."""
        return self.method not in METHODS or METHODS[self.method].saved != "plain"

    def check_pretrained(self, new: bool) -> None:
        """Raise `InputError` where a new model, all of which is yet to be trained, would be held fast."""
        if new and self.method != "full":
            raise InputError(
                f"{self.asked}: a new model has nothing to adapt; give --model_name_or_path, or leave it out"
            )


if __name__ == "__main__":
    for name, method in METHODS.items():
        print(f"{name:10} {method.saved:7} rate x{method.rate:<4g} {method.trains}")
