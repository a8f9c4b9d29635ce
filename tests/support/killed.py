"""Runs that SIGKILL ends at random moments, each life a process: the program and what it runs.

`python killed.py JOB FOLDER KILLS` forks lives of the job one after another, kills KILLS of them,
lets the last one finish, and prints how many were killed and how many of those died inside a write.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
import torch._dynamo  # torch imports it at the first optimizer step: once here, not in each life
from models import EVERYTHING, build, random_mask
from runs import RECIPES, loaders
from runs import run as run_recipe
from torch import nn

import sfron_fast as sf
from sfron_fast.data.endless import EndlessLoader, random_state, set_random_state
from sfron_fast.runs.folder import save_whole

STEPS = 60
SAVES = 40


def loop(kind, folder=None, told=lambda: None):
    """A training loop as a user writes it: forget and retain steps, a schedule, dropout, a
    checkpoint after each.
    """
    torch.manual_seed(11)
    model = build("dropout")
    optimizer = kind(
        model.named_parameters(), lr=0.1, saliency=random_mask(model), **EVERYTHING[kind]
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    sources = [
        EndlessLoader(loader, name)
        for loader, name in zip(loaders("own"), ("retain", "forget"), strict=True)
    ]
    parts = {
        "model": model,
        "optimizer": optimizer,
        "schedule": schedule,
        "retain": sources[0],
        "forget": sources[1],
    }
    path, done = folder and folder / "run.pt", 0
    if folder and path.exists():
        saved = torch.load(path, weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        set_random_state(saved["random"])
        done = saved["done"]
    for step in range(done, STEPS):
        inputs, labels = sources[not optimizer.mid_cycle].next()
        loss = nn.functional.cross_entropy(model(inputs), labels)
        optimizer.zero_grad()
        (loss if optimizer.mid_cycle else -loss).backward()
        (optimizer.step if optimizer.mid_cycle else optimizer.forget_step)()
        schedule.step()
        if folder:
            states = {name: part.state_dict() for name, part in parts.items()}
            save_whole({**states, "random": random_state(), "done": step + 1}, path)
            told()
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}


def unlearn(name, folder=None, told=lambda: None):
    """A run of ``unlearn`` that saves after every step."""

    def save_and_tell(state, path):
        save_whole(state, path)
        told()

    sf.runs.run.save_whole = save_and_tell
    try:
        return {"model": run_recipe(RECIPES[name], "noisy", folder).model.state_dict()}
    finally:
        sf.runs.run.save_whole = save_whole


def content(i):
    """The i-th state of ``writer``."""
    return {"i": i, "weights": torch.full((100_000,), float(i)), "text": [str(i)] * 1000}


def writer(folder, told):
    """Writes one file over and over; the first life that finds ``SAVES`` of them is done."""
    path, i = folder / "file.pt", 0
    if path.exists():
        found = torch.load(path, weights_only=True)
        i = found["i"]
        assert torch.equal(found["weights"], content(i)["weights"])
        assert found["text"] == content(i)["text"]
    while i < SAVES:
        i += 1
        save_whole(content(i), path)
        told()
    return content(i)


JOBS = {
    "sgd": lambda *a: loop(sf.SFRonSGD, *a),
    "adamw": lambda *a: loop(sf.SFRonAdamW, *a),
    "official": lambda *a: unlearn("official", *a),
    "paper": lambda *a: unlearn("paper", *a),
    "writer": writer,
}


class Life:
    """One process with the job in it. After each checkpoint it tells so, and waits to be let on."""

    def __init__(self, job, folder):
        self.told, tell = os.pipe()
        wait, self.let = os.pipe()
        self.id = os.fork()
        if self.id:
            os.close(tell)
            os.close(wait)
            return
        code = 1
        try:
            os.close(self.let)
            result = JOBS[job](folder, lambda: os.write(tell, b".") and os.read(wait, 1))
            torch.save(result, folder / "result.pt")
            code = 0
        finally:
            os._exit(code)

    def go_on(self):
        """Until the next checkpoint; False if there is none left."""
        if not os.read(self.told, 1):
            return False
        os.write(self.let, b".")
        return True

    def end(self):
        os.close(self.told)
        os.close(self.let)
        return os.waitpid(self.id, 0)[1]


def main(job, folder, kills):
    random.seed(job)
    killed = inside = 0
    while True:
        life, checkpoints = Life(job, folder), random.randrange(4)
        if killed == kills:
            checkpoints = sys.maxsize
        # seconds: in a step, or in what comes before the first
        alive, within = True, 0.004 if checkpoints else 0.1
        while alive and checkpoints:
            alive, checkpoints = life.go_on(), checkpoints - 1
        if alive:
            time.sleep(random.random() * within)
            os.kill(life.id, signal.SIGKILL)
        status = life.end()
        if os.WIFSIGNALED(status):
            killed += 1
            inside += any(f".{life.id}." in p.name for p in folder.iterdir())
        elif os.WEXITSTATUS(status):
            return 1
        else:
            print(killed, inside)
            return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])))
