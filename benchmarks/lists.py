"""Parameter lists shaped like real models; only the shapes matter to a list kernel."""

from collections.abc import Iterator

Shape = tuple[int, ...]


def resnet18(width: int = 64, classes: int = 10) -> list[Shape]:
    """ResNet-18 with the CIFAR stem; width 64 is the paper's (11.2M in 62 tensors), 96 has 25.1M."""

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

    def linear(outputs: int, inputs: int) -> list[Shape]:
        return [(outputs, inputs), (outputs,)]

    shapes: list[Shape] = [(hidden, 4, 2, 2), (hidden,), *linear(hidden, 256), *linear(hidden, hidden), (1001, hidden)]
    for _ in range(depth):
        shapes += [*linear(3 * hidden, hidden), *linear(hidden, hidden)]
        shapes += [*linear(4 * hidden, hidden), *linear(hidden, 4 * hidden), *linear(6 * hidden, hidden)]
    return [*shapes, *linear(32, hidden), *linear(2 * hidden, hidden)]


def small_tensors(count: int = 4000, elements: int = 64) -> list[Shape]:
    """Many tiny tensors: host overhead and nothing else."""
    return [(elements,)] * count
