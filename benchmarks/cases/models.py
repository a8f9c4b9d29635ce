"""Two models that people unlearn, for whole cycles: ResNet-18 (CIFAR stem), a small decoder."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Two 3 x 3 convolutions and a shortcut."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(after)
        same = before == after and stride == 1
        shortcut = (
            [] if same else [nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after)]
        )
        self.shortcut = nn.Sequential(*shortcut)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, before, h, w] -> [batch, after, h / stride, w / stride]."""
        inside = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(inside + self.shortcut(x))


class ResNet18(nn.Module):
    """For images [batch, 3, 32, 32]; width 64 is the paper's model, 11.2M weights."""

    def __init__(self, classes: int = 10, width: int = 64) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        blocks, before = [], width
        for stage in range(4):
            for stride in (1 if stage == 0 else 2, 1):
                blocks.append(Block(before, width << stage, stride))
                before = width << stage
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(before, classes)

    def features(self, x: Tensor) -> Tensor:
        """Before the last layer [batch, 8 width]."""
        return self.blocks(F.relu(self.norm(self.conv(x)))).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Logits [batch, classes]."""
        return self.head(self.features(x))


class Decoder(nn.Module):
    """A causal transformer over token ids."""

    def __init__(self, vocabulary: int, width: int, layers: int, length: int) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        shape = (width, width // 64, 4 * width)
        layer = nn.TransformerEncoderLayer(*shape, 0.0, F.gelu, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(
            layer, layers, nn.LayerNorm(width), enable_nested_tensor=False
        )
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        """Ids [batch, length] -> logits [batch, length, vocabulary]."""
        length = ids.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length, device=ids.device)
        x = self.tokens(ids) + self.places(torch.arange(length, device=ids.device))
        return self.head(self.layers(x, mask=mask, is_causal=True))
