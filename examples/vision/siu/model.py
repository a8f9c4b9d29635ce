"""The model: convolutions make 16 vectors of an image, a small Llama reads them, then the words."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from .words import END, IDS, LONGEST, PAD, WORDS

WIDTH, LAYERS, HEADS, INNER, ACROSS = 64, 3, 4, 160, 4
PATCHES = ACROSS * ACROSS


class ImageText(nn.Module):
    """Logits [rows, tokens, words] of ``input_ids`` int64 [rows, tokens] and ``pixel_values``
    [rows, 1, side, side]; rows with ``sees`` False [rows] have no image.
    """

    def __init__(self, side: int) -> None:
        super().__init__()
        step = side // ACROSS
        self.eye = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, WIDTH, step, stride=step),
        )
        self.llm = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(WORDS),
                hidden_size=WIDTH,
                num_hidden_layers=LAYERS,
                num_attention_heads=HEADS,
                num_key_value_heads=HEADS,
                intermediate_size=INNER,
                max_position_embeddings=PATCHES + LONGEST,
                tie_word_embeddings=False,
                bos_token_id=None,
                eos_token_id=IDS[END],
                pad_token_id=IDS[PAD],
            )
        )

    def get_output_embeddings(self) -> nn.Module:
        """The head, which gets no adapter."""
        return self.llm.lm_head

    def joined(self, input_ids: Tensor, pixel_values: Tensor, sees: Tensor) -> dict[str, Tensor]:
        """What the Llama is given: image, then words; a row without image attends to none."""
        image = self.eye(pixel_values).flatten(2).transpose(1, 2)
        words = self.llm.get_input_embeddings()(input_ids)
        attends = [sees.unsqueeze(1).expand(-1, PATCHES), torch.ones_like(input_ids).bool()]
        both = torch.cat([image, words], 1)
        return {"inputs_embeds": both, "attention_mask": torch.cat(attends, 1).long()}

    def forward(self, input_ids: Tensor, pixel_values: Tensor, sees: Tensor) -> Tensor:
        given = self.joined(input_ids, pixel_values, sees)
        hidden = self.llm.model(**given, use_cache=False).last_hidden_state
        return self.llm.lm_head(hidden[:, PATCHES:])

    @torch.no_grad()
    def told(self, input_ids: Tensor, most: int, **image: Tensor) -> list[list[int]]:
        """What it says after these words, greedily: at most so many tokens a row."""
        settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": most}
        return self.llm.generate(**self.joined(input_ids, **image), **settings).tolist()


def make_model(seed: int, side: int) -> ImageText:
    """Random weights from ``seed``."""
    torch.manual_seed(seed)
    return ImageText(side)
