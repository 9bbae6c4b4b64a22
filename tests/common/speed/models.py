"""Build tiny models of many model types, with random weights and without dropout."""

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    BertConfig,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    PreTrainedModel,
)

VOCABULARY = 200
SIZES = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64,
    "vocab_size": VOCABULARY, "max_position_embeddings": 64, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2,
}  # fmt: skip
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
#: arguments of some model types, besides or instead of `SIZES`
OWN = {
    "distilbert": {"dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 64, "vocab_size": VOCABULARY, "dropout": 0.0}
    | {"attention_dropout": 0.0},
    "gpt2": SIZES | {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
    "modernbert": SIZES | {"cls_token_id": 0, "sep_token_id": 2},
    "gemma": SIZES | {"head_dim": 8, "num_key_value_heads": 2},
    "mistral": SIZES | {"num_key_value_heads": 2},
    "qwen2": SIZES | {"num_key_value_heads": 2},
    "qwen3": SIZES | {"head_dim": 8, "num_key_value_heads": 2},
    "xglm": {"d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 64, "vocab_size": VOCABULARY}
    | {"max_position_embeddings": 64, "dropout": 0.0, "attention_dropout": 0.0, "pad_token_id": 1},
}
MASKED = (
    "albert", "bert", "camembert", "data2vec-text", "deberta", "deberta-v2", "distilbert", "electra", "ernie",
    "megatron-bert", "modernbert", "mpnet", "rembert", "roberta", "roberta-prelayernorm", "xlm-roberta",
    "xlm-roberta-xl",
)  # fmt: skip
CAUSAL = (
    "biogpt", "bloom", "gemma", "gpt2", "gpt_neox", "llama", "mistral", "olmo2", "phi", "qwen2", "qwen3", "smollm3",
    "xglm",
)  # fmt: skip
SEQ2SEQ = ("bart", "m2m_100", "marian", "mbart", "mt5", "pegasus", "t5")
PAIRS = {
    "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "d_model": 16,
    "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "vocab_size": VOCABULARY, "max_position_embeddings": 64,
    "dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0, "pad_token_id": 1, "encoder_layerdrop": 0.0,
    "decoder_layerdrop": 0.0,
}  # fmt: skip
T5 = {
    "d_model": 16, "d_kv": 8, "num_layers": 2, "num_heads": 2, "d_ff": 24, "vocab_size": VOCABULARY, "pad_token_id": 1,
    "dropout_rate": 0.0, "decoder_start_token_id": 1,
}  # fmt: skip


def language_model(kind: str) -> PreTrainedModel:
    """Build a tiny language model of a model type; "encoder-decoder" is a warm-started pair of BERT."""
    torch.manual_seed(0)
    if kind == "encoder-decoder":
        sides = BertConfig(**SIZES | NO_DROPOUT), BertConfig(**SIZES | NO_DROPOUT, is_decoder=True)
        sides[1].add_cross_attention = True
        config = EncoderDecoderConfig.from_encoder_decoder_configs(*sides)
        config.pad_token_id, config.decoder_start_token_id = 1, 0
        return EncoderDecoderModel(config=config)
    if kind in SEQ2SEQ:
        return AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(kind, **(T5 if "t5" in kind else PAIRS)))
    auto_class = AutoModelForMaskedLM if kind in MASKED else AutoModelForCausalLM
    return auto_class.from_config(AutoConfig.for_model(kind, **OWN.get(kind, SIZES | NO_DROPOUT)))
