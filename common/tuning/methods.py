"""List the methods of `--tuning`: trained parameters, saved form, and default learning rate.

Every method also trains the new head of a task and all other parameters that the checkpoint lacks.

Saved form:
- `plain`: an ordinary checkpoint.
- `merged`: the trained parameters are added to the weights, and the folder holds an ordinary checkpoint of the same
  architecture. `adapter/` holds the trained parameters alone, for peft.
- `apart`: the trained parameters cannot be merged. `base/` holds the model, `adapter/` the trained parameters; the
  `predict` of each recipe loads both.

Unsupported combinations (rejected before training):
- `head` if the head is tied to the input embeddings (GPT-2, BART, T5): no parameter would be trained.
- `bias` in a model without biases (T5, Llama).
- `ia3` and `houlsby` adapters if attention does not use the `AttentionInterface` of transformers (DeBERTa, MPNet, LED,
  BLOOM, GPT-Neo).
- `prefix` if attention takes no external keys and values (DistilBERT, ALBERT, MPNet, ModernBERT, DeBERTa).
- `domains` in an encoder-decoder.
- `prefix`, `prompt`, `ptuning` if virtual tokens and text exceed the positions of the model; with a head that finds the
  last token by its id (GPT-2 as a classifier); with a head that virtual tokens cannot be hidden from (OPT).
- `--lora_target_modules` or `--peft_config` that adapts weights which two layers share (a tied head, embeddings).
- All methods but `full` for a new model, and under FSDP or DeepSpeed.
"""

import difflib
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from common.errors import InputError


class Method(NamedTuple):
    """A tuning method. `rate` multiplies the learning rate that the recipe has for `full`."""

    trains: str
    saved: Literal["plain", "merged", "apart"]
    rate: float


#: Each rate is measured on the sample of `ner` (common/tools/RESULTS.md, "Learning rates"): the lowest rate with an F1
#: within 0.03 of the best F1 of the method.
METHODS = {
    "full": Method("all weights", "plain", 1),
    "head": Method("the head", "plain", 100),
    "top": Method("the last k layers (top:k) and the head", "plain", 3),
    "gradual": Method(
        "the head, and one more layer from the top each epoch (Howard and Ruder 2018, arXiv:1801.06146)", "plain", 3
    ),
    "bias": Method("biases (BitFit, Ben Zaken et al. 2022, arXiv:2106.10199)", "plain", 30),
    "layernorm": Method("weights and biases of the norms", "plain", 20),
    "lora": Method("low-rank updates of queries and values (Hu et al. 2021, arXiv:2106.09685)", "merged", 20),
    "rslora": Method("lora, scaled by alpha / sqrt(rank) (Kalajdzievski 2023, arXiv:2312.03732)", "merged", 20),
    "dora": Method("lora, and the norm of each column (Liu et al. 2024, arXiv:2402.09353)", "merged", 20),
    "pissa": Method(
        "lora, initialised with the principal components (Meng et al. 2024, arXiv:2404.02948)", "merged", 30
    ),
    "adalora": Method(
        "lora on all linear layers, with adaptive ranks (Zhang et al. 2023, arXiv:2303.10512)", "merged", 20
    ),
    "ia3": Method(
        "factors on keys, values and inner feed-forward activations (Liu et al. 2022, arXiv:2205.05638)", "merged", 50
    ),
    "vera": Method(
        "two scaling vectors for each pair of shared random matrices (Kopiczko et al. 2024, arXiv:2310.11454)",
        "merged",
        150,
    ),
    "prefix": Method("keys and values before those of each layer (Li and Liang 2021, arXiv:2101.00190)", "apart", 150),
    "prompt": Method("embeddings before the text (Lester et al. 2021, arXiv:2104.08691)", "apart", 50),
    "ptuning": Method(
        "embeddings before the text, from a small network (Liu et al. 2021, arXiv:2103.10385)", "apart", 10
    ),
    "adapter": Method("bottleneck layers between frozen layers (Houlsby et al. 2019, arXiv:1902.00751)", "apart", 20),
    "domains": Method(
        "all weights, and an adapter for each domain of --domain_column, mixed by a gate in texts of unknown domain "
        "(Gururangan et al. 2022, arXiv:2108.05036)",
        "apart",
        1,
    ),
}
LOW_RANK = ("lora", "rslora", "dora", "pissa", "adalora", "vera")
PROMPTS = ("prefix", "prompt", "ptuning")
#: argument -> the methods that take it
ONLY = {
    "lora_r": LOW_RANK,
    "lora_alpha": tuple(method for method in LOW_RANK if method != "vera"),
    "lora_dropout": LOW_RANK,
    "lora_target_modules": LOW_RANK,
    "adapter_reduction": ("adapter", "domains"),
    "adapter_placement": ("adapter",),
    "num_virtual_tokens": PROMPTS,
}
#: methods that work with weights quantised to 4 or 8 bits
ON_QUANTIZED = ("lora", "rslora")


@dataclass
class TuningArguments:
    """Choose the trained parameters. `python -m common.tuning.methods` lists the methods."""

    _argument_group_name = "tuning"

    tuning: str | None = field(
        default=None,
        metadata={"help": f"full (default), {', '.join(m for m in METHODS if m != 'full')}", "resume": "fixed"},
    )
    lora_r: int | None = field(
        default=None,
        metadata={
            "help": "rank of the low-rank methods (8; vera 256); without --tuning it selects lora",
            "resume": "fixed",
        },
    )
    lora_alpha: float | None = field(
        default=None,
        metadata={"help": "scale of the low-rank update; default: twice the rank (rslora: 8, pissa: the rank)"},
    )
    lora_dropout: float = field(default=0.1, metadata={"help": "dropout before the low-rank matrices"})
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={
            "help": "linear layers to adapt, such as: query value, or all-linear; default: queries and values",
            "resume": "fixed",
        },
    )
    adapter_reduction: int = field(
        default=16,
        metadata={
            "help": "for adapter and domains: width of the model divided by the width of the adapter",
            "resume": "fixed",
        },
    )
    adapter_placement: Literal["pfeiffer", "houlsby"] = field(
        default="pfeiffer",
        metadata={
            "help": "for adapter: one per layer, or one after attention and one after feed-forward",
            "resume": "fixed",
        },
    )
    num_virtual_tokens: int = field(
        default=20, metadata={"help": "for prefix, prompt and ptuning: number of virtual tokens", "resume": "fixed"}
    )
    layerwise_lr_decay: float | None = field(
        default=None,
        metadata={"help": "with full: learning rate of a layer divided by that of the layer above", "resume": "fixed"},
    )
    peft_config: str | None = field(
        default=None, metadata={"help": "YAML file with `peft_type`, for any other method of peft", "resume": "fixed"}
    )
    quantize: Literal["4bit", "8bit"] | None = field(
        default=None,
        metadata={
            "help": "with lora or rslora: quantise the frozen weights to 4 or 8 bits (QLoRA; needs a GPU)",
            "resume": "fixed",
        },
    )

    def __post_init__(self) -> None:
        self.asked = f"--tuning {self.tuning}" if self.tuning else "--lora_r" if self.lora_r else "--peft_config"
        if self.peft_config and self.tuning:
            raise InputError("--peft_config: names its own method; leave --tuning out")
        self.tuning = self.tuning or ("peft" if self.peft_config else "lora" if self.lora_r is not None else "full")
        self.method, _, layers = self.tuning.partition(":")
        if self.method not in METHODS and not self.peft_config:
            nearest = difflib.get_close_matches(self.method, METHODS, n=1)
            more = f"; did you mean {nearest[0]}?" if nearest else f"; choose one of {', '.join(METHODS)}"
            raise InputError(f"--tuning {self.tuning}: no such method{more}")
        if (self.method == "top") != bool(layers) or (layers and not (layers.isdigit() and int(layers) > 0)):
            raise InputError(
                f"--tuning {self.tuning}: top takes a number of layers, such as top:2, and no other method does"
            )
        self.top = int(layers or 0)
        for name in ("lora_r", "adapter_reduction", "num_virtual_tokens"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise InputError(f"--{name} must be at least 1")
        if self.lora_alpha is not None and not self.lora_alpha > 0:
            raise InputError(f"--lora_alpha {self.lora_alpha}: must be above 0")
        for name, methods in ONLY.items():
            if getattr(self, name) != self.__dataclass_fields__[name].default and self.method not in methods:
                has = "is set by the file of --peft_config" if self.peft_config else f"{self.tuning} does not use it"
                raise InputError(f"--{name}: {has}; use it with --tuning {', '.join(methods)}")
        if self.layerwise_lr_decay is not None:
            if not 0 < self.layerwise_lr_decay <= 1:
                raise InputError(f"--layerwise_lr_decay {self.layerwise_lr_decay}: must be above 0 and at most 1")
            if self.method != "full":
                raise InputError(
                    f"--layerwise_lr_decay: needs all weights trained, not {self.tuning}; give --tuning full"
                )
        if self.quantize and self.method not in ON_QUANTIZED:
            raise InputError(
                f"--quantize {self.quantize}: works with {' and '.join(ON_QUANTIZED)} only; give --tuning lora"
            )

    def rate(self, full: float) -> float:
        """Return the default learning rate; `full` is the rate of the recipe for training all weights."""
        return full * (METHODS[self.method].rate if self.method in METHODS else METHODS["lora"].rate)

    def is_beside(self) -> bool:
        """Return whether the trained parameters are separate from the weights of the model."""
        return self.method not in METHODS or METHODS[self.method].saved != "plain"

    def check_pretrained(self, new: bool) -> None:
        """Raise `InputError` if the method would freeze weights of a new, untrained model."""
        if new and self.method != "full":
            raise InputError(
                f"{self.asked}: a new model has no pretrained weights; give --model_name_or_path, or --tuning full"
            )


if __name__ == "__main__":
    for name, method in METHODS.items():
        print(f"{name:10} {method.saved:7} rate x{method.rate:<4g} {method.trains}")
