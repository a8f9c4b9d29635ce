"""Parameter lists shaped like real models; only the shapes matter to a list kernel."""

from collections.abc import Callable, Iterator
from math import prod

Shape = tuple[int, ...]


def resnet18(width: int = 64, classes: int = 10) -> list[Shape]:
    """ResNet-18 with the CIFAR stem; width 64 is the paper's (11.2M in 62 tensors), 96: 25.1M."""

    def shapes() -> Iterator[Shape]:
        yield from ((width, 3, 3, 3), (width,), (width,))
        before = width
        for stage in range(4):
            channels = width << stage
            for block in range(2):
                yield from ((channels, before, 3, 3), (channels,), (channels,))
                yield from ((channels, channels, 3, 3), (channels,), (channels,))
                if block == 0 and stage > 0:
                    yield from ((channels, before, 1, 1), (channels,), (channels,))
                before = channels
        yield from ((classes, before), (classes,))

    return list(shapes())


def dit_xl2(hidden: int = 1152, depth: int = 28) -> list[Shape]:
    """What is trained of DiT-XL/2 with 1,000 classes: 674,834,720 weights in 291 tensors."""
    linear = _linear
    shapes: list[Shape] = [
        *linear(hidden, 4, 2, 2),
        *linear(hidden, 256),
        *linear(hidden, hidden),
        (1001, hidden),
    ]
    for _ in range(depth):
        shapes += [*linear(3 * hidden, hidden), *linear(hidden, hidden)]
        shapes += [
            *linear(4 * hidden, hidden),
            *linear(hidden, 4 * hidden),
            *linear(6 * hidden, hidden),
        ]
    return [*shapes, *linear(32, hidden), *linear(2 * hidden, hidden)]


def _linear(outputs: int, inputs: int, *kernel: int) -> list[Shape]:
    """Weight and bias of a linear layer, or of a convolution with a kernel."""
    return [(outputs, inputs, *kernel), (outputs,)]


def _norm(channels: int) -> list[Shape]:
    return [(channels,), (channels,)]


def swin_t(classes: int = 200, width: int = 96) -> list[Shape]:
    """Swin-T of torchvision: 27,673,154 weights in 173 tensors with 200 classes."""
    shapes = [*_linear(width, 3, 4, 4), *_norm(width)]
    for stage, depth in enumerate((2, 2, 6, 2)):
        c, heads = width << stage, 3 << stage
        if stage:
            shapes += [(c, 2 * c), *_norm(2 * c)]
        for _ in range(depth):
            shapes += [*_norm(c), (13 * 13, heads), *_linear(3 * c, c), *_linear(c, c), *_norm(c)]
            shapes += [*_linear(4 * c, c), *_linear(c, 4 * c)]
    return [*shapes, *_norm(8 * width), *_linear(classes, 8 * width)]


def _residual(before: int, after: int, embedding: int) -> list[Shape]:
    """A residual block of a diffusion U-Net: two convolutions, the time embedding between them."""
    shapes = [*_norm(before), *_linear(after, before, 3, 3), *_linear(after, embedding)]
    shapes += [*_norm(after), *_linear(after, after, 3, 3)]
    return shapes + (_linear(after, before, 1, 1) if before != after else [])


def _unet(
    width: int,
    stages: tuple[int, ...],
    embedding: int,
    attention: Callable[[int], list[Shape]],
    where: set[int],
    image: int,
) -> list[Shape]:
    """Two residual blocks a stage down, three up, with ``attention`` in the stages ``where``."""
    widths = [width * m for m in stages]
    last = len(widths) - 1
    shapes = [
        *_linear(width, image, 3, 3),
        *_linear(4 * width, width),
        *_linear(4 * width, 4 * width),
    ]
    now, skips = width, [width]
    for stage, c in enumerate(widths):
        for _ in range(2):
            shapes += _residual(now, c, embedding) + (attention(c) if stage in where else [])
            now = c
            skips.append(c)
        if stage < last:
            shapes += _linear(c, c, 3, 3)
            skips.append(c)
    shapes += [*_residual(now, now, embedding), *attention(now), *_residual(now, now, embedding)]
    for stage in range(last, -1, -1):
        c = widths[stage]
        for _ in range(3):
            shapes += _residual(now + skips.pop(), c, embedding) + (
                attention(c) if stage in where else []
            )
            now = c
        if stage:
            shapes += _linear(c, c, 3, 3)
    return [*shapes, *_norm(width), *_linear(image, width, 3, 3)]


def ddpm_unet(width: int = 128) -> list[Shape]:
    """The DDPM U-Net for CIFAR-10, conditional on 10 classes: 38,632,323 weights in 334 tensors."""
    classes = [(10, width), (width,), *_linear(4 * width, width), *_linear(4 * width, 4 * width)]

    def attention(channels: int) -> list[Shape]:
        return [*_norm(channels), *4 * _linear(channels, channels, 1, 1)]

    # time and class embedding, side by side
    return classes + _unet(width, (1, 2, 2, 2), 8 * width, attention, {1}, 3)


def sd14_unet(width: int = 320, context: int = 768) -> list[Shape]:
    """Stable Diffusion 1.4's U-Net: 859,520,964 weights in 686 tensors."""

    def transformer(c: int) -> list[Shape]:
        shapes = [*_norm(c), *_linear(c, c, 1, 1)]
        for inputs in (c, context):
            shapes += [*_norm(c), (c, c), (c, inputs), (c, inputs), *_linear(c, c)]
        return [*shapes, *_norm(c), *_linear(8 * c, c), *_linear(c, 4 * c), *_linear(c, c, 1, 1)]

    return _unet(width, (1, 2, 4, 4), 4 * width, transformer, {0, 1, 2}, 4)


def llama(hidden: int, layers: int, between: int, values: int, vocabulary: int) -> list[Shape]:
    """A decoder of the Llama family, its head tied; ``values``: width of keys and values."""
    layer = [(hidden, hidden), (values, hidden), (values, hidden), (hidden, hidden)]
    layer += [(between, hidden), (between, hidden), (hidden, between), (hidden,), (hidden,)]
    return [(vocabulary, hidden), *layer * layers, (hidden,)]


def llama_1b() -> list[Shape]:
    """Llama-3.2-1B: 1,235,814,400 weights in 146 tensors."""
    return llama(2048, 16, 8192, 512, 128_256)


def small_tensors(count: int = 4000, elements: int = 64) -> list[Shape]:
    """Many tiny tensors: host overhead and nothing else."""
    return [(elements,)] * count


def weights(shapes: list[Shape]) -> int:
    return sum(prod(s) for s in shapes)
