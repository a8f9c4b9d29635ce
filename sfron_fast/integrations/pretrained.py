"""Models and tokenizers of Hugging Face's folders for the command: loaded, given adapters, saved
whole.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import require
from .texts import Texts


def load_tokenizer(path: str) -> Any:
    """The tokenizer of a folder, or of a name on the Hub.

    Raises:
        ValueError: there is none.
    """
    from transformers import AutoTokenizer

    here = Path(path)
    there = here.is_dir() or not (here.exists() or here.is_absolute())
    require(there, "model", "a folder with a model, or a name on the Hub", f"no folder at {path}")
    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"model: expected a folder with a tokenizer, found {error}") from error


def load_model(path: str, dtype: str, device: str) -> Any:
    """The causal language model of a folder, or of a name on the Hub, in eval mode.

    Raises:
        ValueError: there is none.
    """
    from transformers import AutoModelForCausalLM

    kind = getattr(torch, dtype)
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=kind)
    except (OSError, ValueError) as error:
        raise ValueError(f"model: expected a causal language model, found {error}") from error
    return model.to(device)


def check_fits(model: Any, sets: Mapping[str, Texts]) -> None:
    """Refuse texts that the model cannot read.

    Raises:
        ValueError: a token that it has no embedding of, or more tokens than it has positions; with
            file and line.
    """
    known = model.get_input_embeddings().weight.shape[0]
    places = getattr(model.config, "max_position_embeddings", None)
    for name, texts in sets.items():
        for line, (ids, _) in zip(texts.lines, texts.rows, strict=True):
            place, last, count = f"{name}, line {line}", max(ids), len(ids)
            require(last < known, place, f"tokens below {known}", last, "is the tokenizer its own?")
            fits = places is None or count <= places
            require(fits, place, f"at most the model's {places} tokens", count, "lower max_length")


def with_lora(model: Any, rank: int, seed: int) -> Any:
    """The model with fresh LoRA adapters on all linear layers but the head; alpha is 2 rank, no
    dropout. Only they are trained.
    """
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    return get_peft_model(model, config)


def with_checkpointing(model: Any) -> None:
    """Activations are computed again in the backward pass. The form with hooks, as the older one
    (``use_reentrant=True``) gives adapters no gradient.
    """
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def save(model: nn.Module, tokenizer: Any, folder: Path) -> None:
    """A folder that ``from_pretrained`` reads: config, generation config, weights, tokenizer.

    Adapters are merged into the weights: beside the old weights, one who takes them off has the
    old model again.
    """
    plain: Any = model.merge_and_unload() if hasattr(model, "merge_and_unload") else model  # type: ignore[operator]
    config = plain.config
    tied = getattr(config, "tie_word_embeddings", False)
    shared = plain.get_input_embeddings().weight is getattr(
        plain.get_output_embeddings(), "weight", None
    )
    require(shared or not tied, "model", "tied embeddings, as its config says", "two")
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
