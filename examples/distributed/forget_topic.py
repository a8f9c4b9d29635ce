"""A sharded language model forgets one topic of CPython's documentation.

Run it from the project's root:

    torchrun --nproc-per-node 2 -m examples.distributed.forget_topic --folder /tmp/forget_topic

On GPUs where there are any. A small transformer is trained on the spot on the characters of
`pydoc_data.topics`, sharded with FSDP2, forgets `--topic`, and saves checkpoints with
torch.distributed.checkpoint. Stopped anywhere (`--stop 7`, or Ctrl-C) the same command goes on,
also with another number of processes. At the end the losses of the topic, of the others, and of
topics it never saw, which is where that of a forgotten one belongs.
"""

import argparse
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from pydoc_data.topics import topics

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler, Subset, TensorDataset

import sfron_fast as sf

CHARACTERS = 128  # ASCII; what is none becomes "?"
UNSEEN = 8  # every so many topics are kept from the model


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--folder", type=Path, required=True, help="checkpoints go here, and are found here"
    )
    parser.add_argument("--topic", default="import", help="what to forget")
    parser.add_argument("--epochs", type=int, default=20, help="of the training before")
    parser.add_argument("--cycles", type=int, default=40)
    parser.add_argument("--retain-steps", type=int, default=3)
    parser.add_argument(
        "--batch", type=int, default=32, help="sequences of a step, on all processes together"
    )
    parser.add_argument("--length", type=int, default=64, help="characters of a sequence")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--every", type=int, default=20, help="steps between checkpoints")
    parser.add_argument("--stop", type=int, help="stop after so many steps, as if interrupted")
    return parser.parse_args(arguments)


class Decoder(nn.Module):
    """A causal transformer over characters."""

    def __init__(self, vocabulary: int, width: int, layers: int, length: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.places = nn.Embedding(length, width)
        layer = nn.TransformerEncoderLayer(
            width, width // 64, 4 * width, 0.0, F.gelu, batch_first=True, norm_first=True
        )
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


class Data:
    """Windows of the topics: what is forgotten, what is retained, what the model never sees."""

    def __init__(self, topic: str, length: int) -> None:
        names = sorted(name for name, text in topics.items() if 2000 < len(text) < 9000)
        if topic not in names:
            raise SystemExit(f"--topic: expected one of {', '.join(names)}, found {topic}")
        others = [name for name in names if name != topic]
        unseen = others[::UNSEEN]
        self.forget = self._windows([topic], length)
        self.retain = self._windows([name for name in others if name not in unseen], length)
        self.unseen = self._windows(unseen, length)

    @staticmethod
    def _windows(names: list[str], length: int) -> TensorDataset:
        """Inputs and targets, int64 [windows, length] each; a target is the next character."""
        texts = [torch.tensor(list(topics[name].encode("ascii", "replace"))) for name in names]
        whole = torch.cat([text.unfold(0, length + 1, length) for text in texts])
        return TensorDataset(whole[:, :-1].contiguous(), whole[:, 1:].contiguous())

    def chance(self) -> float:
        """Loss of who knows how frequent each character is, and nothing else."""
        counts = Counter(self.retain.tensors[1].flatten().tolist())
        shares = torch.tensor(list(counts.values())) / counts.total()
        return -(shares * shares.log()).sum().item()


def next_character(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def sharded(width: int, length: int, device: torch.device) -> nn.Module:
    torch.manual_seed(0)  # the same weights on every rank
    model = Decoder(CHARACTERS, width, 2, length).to(device)
    for layer in model.layers.layers:
        fully_shard(layer)
    return fully_shard(model)


def train(
    model: nn.Module, data: TensorDataset, epochs: int, batch: int, device: torch.device
) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    sampler = DistributedSampler(data, drop_last=True)
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        for inputs, targets in DataLoader(
            data, batch // dist.get_world_size(), sampler=sampler, drop_last=True
        ):
            optimizer.zero_grad()
            next_character(model(inputs.to(device)), targets.to(device)).backward()
            optimizer.step()
        tell(f"trained {epoch + 1} of {epochs} epochs", end="\r")


def losses(model: nn.Module, data: Data, device: torch.device) -> dict[str, float]:
    """Of every set; each rank runs all batches, as the shards of the others need it."""
    found = {}
    for name in ("forget", "retain", "unseen"):
        with torch.no_grad():
            parts = [
                (len(y), next_character(model(x.to(device)), y.to(device)))
                for x, y in DataLoader(getattr(data, name), 256)
            ]
        found[name] = float(sum(n * loss for n, loss in parts)) / sum(n for n, _ in parts)
    model.reshard()  # without a backward the root stays gathered
    return found


def estimate_mask(model: nn.Module, data: Data, batch: int) -> sf.SaliencyMask:
    """Of both sets, each rank with its share of every batch."""
    rank, ranks = dist.get_rank(), dist.get_world_size()

    def share(part: TensorDataset) -> DataLoader:
        return DataLoader(Subset(part, range(rank, len(part), ranks)), batch // ranks)

    return sf.estimate_mask(
        model,
        forget=share(data.forget),
        retain=share(data.retain),
        loss_fn=next_character,
        group=dist.group.WORLD,
    )


class Run:
    """What a checkpoint holds: weights, moments, phase, and the place in the data."""

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, loader: sf.PairedLoader
    ) -> None:
        self.model, self.optimizer, self.loader = model, optimizer, loader

    def state_dict(self) -> dict:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer, "loader": self.loader.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )
        self.loader.load_state_dict(state["loader"])


def forget(run: Run, folder: Path, steps: int, every: int, device: torch.device) -> None:
    """Forget and retain steps up to step ``steps``."""
    model, optimizer, loader = run.model, run.optimizer, run.loader
    while loader.position < steps:
        for phase, (inputs, targets) in loader:
            optimizer.zero_grad()
            logits, targets = model(inputs.to(device)), targets.to(device)
            if phase == "forget":
                loss = sf.adaptive_cross_entropy(
                    logits, targets, inplace=True, group=dist.group.WORLD
                )
                (-loss).backward()
                optimizer.forget_step()
            else:
                with sf.step_in_backward(optimizer):
                    next_character(logits, targets).backward()
                optimizer.step()
            if loader.position % every == 0 or loader.position == steps:
                dcp.save({"run": run}, checkpoint_id=folder / f"step-{loader.position}")
            if loader.position == steps:
                return


def latest(folder: Path) -> Path | None:
    """The last checkpoint that is whole: its metadata are written at the end."""
    whole = [path for path in folder.glob("step-*") if (path / ".metadata").exists()]
    return max(whole, key=lambda path: int(path.name.removeprefix("step-")), default=None)


def tell(text: str, end: str = "\n") -> None:
    if dist.get_rank() == 0:
        print(text, end=end, flush=True)


def main(arguments: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    """Losses before and after, by set."""
    options = parse(arguments)
    gpu = torch.cuda.is_available()
    if not dist.is_initialized():
        dist.init_process_group("nccl" if gpu else "gloo")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    data, folder = Data(options.topic, options.length), options.folder
    model = sharded(options.width, options.length, device)
    if not (folder / "trained" / ".metadata").exists():
        seen = TensorDataset(
            *map(torch.cat, zip(data.forget.tensors, data.retain.tensors, strict=True))
        )
        train(model, seen, options.epochs, options.batch, device)
        dcp.save({"model": model}, checkpoint_id=folder / "trained")
    dcp.load({"model": model}, checkpoint_id=folder / "trained")
    before = losses(model, data, device)
    if not (folder / "mask.safetensors").exists():
        mask = estimate_mask(model, data, options.batch)
        if dist.get_rank() == 0:
            mask.save(folder / "mask.safetensors")
        dist.barrier()
    mask = sf.SaliencyMask.load(folder / "mask.safetensors")
    optimizer = sf.SFRonAdamW(
        model.named_parameters(),
        lr=1e-3,
        weight_decay=0.0,
        saliency=mask,
        max_norm=1.0,
        moments="separate",
        retain_steps=options.retain_steps,
        slow_lr=0.9,
    )
    loader = sf.PairedLoader(
        forget=data.forget,
        retain=data.retain,
        batch_size=options.batch,
        retain_steps=options.retain_steps,
    )
    run, found = Run(model, optimizer, loader), latest(folder)
    if found is not None:
        dcp.load({"run": run}, checkpoint_id=found)
        tell(f"resumed at step {loader.position}")
    total = options.cycles * (1 + options.retain_steps)
    forget(run, folder, min(total, options.stop or total), options.every, device)
    after = losses(model, data, device)
    tell(
        f"after step {loader.position} of {total}, loss a character; chance is {data.chance():.2f}"
    )
    for name, title in (
        ("forget", f"forget: {options.topic}"),
        ("retain", "other topics"),
        ("unseen", "never seen"),
    ):
        tell(f"{title:>20}: {before[name]:.3f} -> {after[name]:.3f}")
    return {"before": before, "after": after}


if __name__ == "__main__":
    main()
    dist.destroy_process_group()
