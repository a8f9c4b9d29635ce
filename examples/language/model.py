"""The model: a Llama of 1.97 million weights."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from .tokens import VOCABULARY

WIDTH, LAYERS, HEADS, INNER, LONGEST = 192, 4, 6, 512, 64


def make_model(
    tokenizer: PreTrainedTokenizerFast,
    seed: int,
    *,
    heads: int = HEADS,
    vocabulary: int = VOCABULARY,
) -> LlamaForCausalLM:
    """Random weights from ``seed``; the head is tied to the embedding."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            intermediate_size=INNER,
            max_position_embeddings=LONGEST,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
