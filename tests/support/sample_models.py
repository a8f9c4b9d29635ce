"""Models of every known function and layout, for the Fisher of samples, and their judge."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

CLASSES, TOKENS = 5, 20


def by_loops(model, batches, loss=F.cross_entropy):
    """The mean of squared gradients, each sample alone, in fp64."""
    model = model.double().eval()
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    total = {n: torch.zeros_like(p) for n, p in named.items()}
    samples = 0
    for x, y in batches:
        x = x.double() if x.is_floating_point() else x
        for i in range(len(y)):
            model.zero_grad()
            loss(model(x[i : i + 1]), y[i : i + 1]).backward()
            for name, p in named.items():
                if p.grad is not None:
                    total[name] += p.grad**2
            samples += 1
    return {n: t / samples for n, t in total.items()}


def tokens_loss(output, target):
    """Of every token."""
    return F.cross_entropy(output.flatten(0, 1), target.flatten())


def images(*shape, sizes=(4, 3, 1)):
    """Batches of images, the last of one; labels."""
    generator = torch.Generator().manual_seed(3)
    return [
        (
            torch.randn(n, *shape, generator=generator),
            torch.randint(CLASSES, (n,), generator=generator),
        )
        for n in sizes
    ]


def sentences(length, labels=CLASSES, each=False, sizes=(4, 2)):
    """Batches of token ids; a label for each sample, or for each token."""
    generator = torch.Generator().manual_seed(4)
    return [
        (
            torch.randint(TOKENS, (n, length), generator=generator),
            torch.randint(labels, (n, length) if each else (n,), generator=generator),
        )
        for n in sizes
    ]


class Convolutions(nn.Module):
    """Strides, dilations, groups, padding by name, 1 x 1; an activation in place."""

    def __init__(self) -> None:
        super().__init__()
        self.grouped = nn.Conv2d(4, 8, 3, padding="same", dilation=2, groups=2)
        self.normal = nn.GroupNorm(2, 8)
        self.depthwise = nn.Conv2d(8, 8, (3, 2), stride=(2, 1), padding=(0, 1), groups=8)
        self.norm = nn.BatchNorm2d(8)
        self.pointwise = nn.Conv2d(8, 6, 1, stride=2, bias=False)
        self.active, self.head = nn.ReLU(inplace=True), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.active(self.normal(self.grouped(x)))
        return self.head(self.pointwise(self.active(self.norm(self.depthwise(x)))).mean((2, 3)))


class OtherRanks(nn.Module):
    """Convolutions of one and three dimensions, circular padding, channels that are groups."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv1d(3, 4, 3, padding=1, padding_mode="circular")
        self.normal = nn.InstanceNorm1d(4, affine=True)
        self.tracked = nn.InstanceNorm1d(4, affine=True, track_running_stats=True)
        self.three = nn.Conv3d(1, 2, (3, 2, 1), stride=(1, 2, 1))
        self.head = nn.Linear(2, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.tracked(torch.tanh(self.normal(self.one(x))))
        return self.head(torch.tanh(self.three(x[:, None, :, :, None])).mean((2, 3, 4)))


class Vision(nn.Module):
    """A class token, places and a scale that are parameters; torch's own attention."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, 16))
        self.places = nn.Parameter(torch.randn(1, 5, 16))
        self.scale = nn.Parameter(0.1 * torch.randn(16))
        layer = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.patches(x).flatten(2).transpose(1, 2)
        all_of_them = torch.cat([self.token.expand(len(x), -1, -1), patches], 1) + self.places
        return self.head(self.layers(all_of_them * (1.0 + self.scale.to(x.dtype)))[:, 0])


class PlacesFirst(nn.Module):
    """[positions, samples, width], as torch's transformers have it by default; cross-attention."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(TOKENS, 16, padding_idx=3)
        self.gain, self.offset = (
            nn.Parameter(torch.randn(1, 16)),
            nn.Parameter(torch.ones(1, 1, 16)),
        )
        layer = nn.TransformerEncoderLayer(16, 2, 32, 0.0)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(16, 2, 32, 0.0), 1)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids.t()) * self.gain + self.offset.expand(1, len(ids), -1)
        return self.head(self.decoder(x, self.encoder(x))[0])


class Tied(nn.Module):
    """Head and embedding of one weight, a layer used twice, checkpoints; places from one row."""

    def __init__(self, reentrant: bool = False, checkpoints: bool = True) -> None:
        super().__init__()
        self.reentrant, self.checkpoints = reentrant, checkpoints
        self.tokens, self.places = nn.Embedding(TOKENS, 16), nn.Embedding(9, 16)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.RMSNorm(16), nn.Linear(16, 16), nn.GELU()) for _ in range(2)
        )
        self.shared, self.norm = nn.Linear(16, 16), nn.LayerNorm(16)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.places(torch.arange(ids.shape[1]))
        for block in self.blocks:
            if self.checkpoints:
                x = x + checkpoint(self._block, block, x, use_reentrant=self.reentrant)
            else:
                x = x + self._block(block, x)
        return F.linear(self.norm(x), self.tokens.weight)

    def _block(self, block: nn.Module, x: Tensor) -> Tensor:
        return self.shared(block(x))


class ByHand(nn.Module):
    """Weights that lie [in, out], transposed by hand, a low-rank adapter, a frozen layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(0.5 * torch.randn(6, 8))
        self.second = nn.Parameter(0.5 * torch.randn(8, 8))
        self.offset = nn.Parameter(torch.randn(8))
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.lora_a = nn.Parameter(torch.randn(2, 8))
        self.lora_b = nn.Parameter(torch.randn(8, 2))
        self.gain = nn.Parameter(torch.randn(8))
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(torch.addmm(self.offset, x @ self.first, self.second))
        x = self.frozen(x) + x @ self.lora_a.T @ self.lora_b.t()
        return self.head(x * self.gain.view(1, 8))


class Windows(nn.Module):
    """Windows before samples, [windows * samples, 4, width]: as many places as samples in one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inside = nn.Conv2d(3, 8, 1), nn.Linear(8, 8)
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        n, width, height, across = x.shape
        x = x.view(n, width, height // 2, 2, across // 2, 2).permute(2, 4, 0, 3, 5, 1)
        x = self.norm(torch.tanh(self.inside(x.reshape(-1, 4, width))))
        return self.head(x.view(-1, n, 4, width).mean((0, 2)))


class SeveralShapes(nn.Module):
    """One vector multiplied as [1, n] and added as [n], one bias of two layers, one matrix there
    and back.
    """

    def __init__(self) -> None:
        super().__init__()
        self.there, self.other = nn.Linear(6, 6, bias=False), nn.Linear(6, 6)
        self.bias = self.other.bias
        self.gain, self.head = nn.Parameter(torch.randn(6)), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(torch.tanh(self.there(x)), self.there.weight.t(), self.bias)
        return self.head(torch.tanh(self.other(x * self.gain.unsqueeze(0) + self.gain)))
