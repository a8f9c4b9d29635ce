"""Tiny language models from configs, and token sequences; nothing is downloaded."""

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from sfron_fast import SaliencyMask

VOCABULARY, LENGTH = 32, 9


def gpt(dtype=torch.float64, dropout=0.0, seed=0, length=LENGTH, layers=2, width=16):
    """Not a Llama: its norms compute in fp32 whatever the dtype."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=length,
        n_embd=width,
        n_layer=layers,
        n_head=2,
        initializer_range=0.3,
        attn_pdrop=dropout,
        embd_pdrop=dropout,
        resid_pdrop=dropout,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config).to(dtype)


def letters():
    """A tokenizer of single characters, for texts in small letters and digits."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    known = {
        character: place for place, character in enumerate(["</s>", "?", *" ehofst0123456789"])
    }
    coder = Tokenizer(models.WordLevel(known, unk_token="?"))
    coder.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=coder, eos_token="</s>")


def sequences(count, seed=1):
    """Token sequences; some of the first labels of each are none (-100)."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(VOCABULARY, (count, LENGTH), generator=generator)
    prompts = torch.randint(1, LENGTH - 2, (count, 1), generator=generator)
    labels = tokens.masked_fill(torch.arange(LENGTH) < prompts, -100)
    return [{"input_ids": x, "labels": y} for x, y in zip(tokens, labels, strict=True)]


def half(model, seed=2):
    """A mask of half of the trainable weights."""
    generator = torch.Generator().manual_seed(seed)
    trainable = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    return SaliencyMask.from_bool(
        {n: torch.rand(p.shape, generator=generator) < 0.5 for n, p in trainable}
    )


def arguments(folder, **more):
    """Of a Trainer that runs on the CPU, says nothing and saves nothing."""
    from transformers import TrainingArguments

    quiet = {"use_cpu": True, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
    return TrainingArguments(str(folder), **{**quiet, "dataloader_pin_memory": False, **more})
