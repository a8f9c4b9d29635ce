"""Clients as processes of one gloo group on this machine, one thread each.

With a server (FedAvg) they average by ``all_reduce``. Without one each talks with its neighbours in
a graph and with nobody else, by messages that are counted where they are sent.
"""

import multiprocessing
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from time import process_time
from typing import Any

import networkx
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters


def run(clients: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """``function(*args)`` in each of so many processes; what each returned, by rank.

    The function stands at the top of a module other than ``__main__``. Rank and size are
    ``torch.distributed``'s. What one client raises ends all.
    """
    # forked from a server that has imported what all would; optimizers and torch.func want dynamo
    shared = ["torch._dynamo", "sfron_fast", function.__module__]
    multiprocessing.set_forkserver_preload(shared)
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(
            _client, (clients, folder, function, args), clients, start_method="forkserver"
        )
        paths = [Path(folder) / f"{rank}.pt" for rank in range(clients)]
        return [torch.load(path, weights_only=False) for path in paths]


def _client(
    rank: int, clients: int, folder: str, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    meeting = f"file://{folder}/meeting"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=clients)
    found = function(*args)
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


class Clock:
    """CPU seconds of this process, all its threads, by what they were spent on."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()

    @contextmanager
    def charged(self, name: str) -> Iterator[None]:
        """What runs inside is added to ``name``."""
        begun = process_time()
        try:
            yield
        finally:
            self.seconds[name] += process_time() - begun


# --- with a server --------------------------------------------------------------------------------


@torch.no_grad()
def average(model: nn.Module, weight: float) -> None:
    """FedAvg: each client's parameters times its ``weight``, summed over all, in place."""
    flat = parameters_to_vector(model.parameters()) * weight
    dist.all_reduce(flat)
    vector_to_parameters(flat, model.parameters())


# --- without --------------------------------------------------------------------------------------


class Neighbours:
    """One client of a connected graph, whose nodes are ranks: all it can say is said to neighbours.

    Every client of the graph makes the same calls in the same order.
    """

    def __init__(self, graph: networkx.Graph) -> None:
        self.rank, self.graph = dist.get_rank(), graph
        self.peers = sorted(graph.neighbors(self.rank))
        self.sent: Counter[int] = Counter()  # messages, by the rank they went to
        # Metropolis weights, symmetric and doubly stochastic, halfway to the identity: (I + Q) / 2
        degree = graph.degree
        self.weights = {
            peer: 0.5 / (1 + max(degree[self.rank], degree[peer])) for peer in self.peers
        }
        root = min(graph)
        tree = networkx.bfs_tree(graph, root, sort_neighbors=sorted)
        self.parent = next(iter(tree.predecessors(self.rank)), None)
        self.children = sorted(tree.successors(self.rank))

    def mix(self, values: Tensor) -> Tensor:
        """One round of gossip: the weighted mean of what this client and its neighbours have."""
        found = {peer: torch.empty_like(values) for peer in self.peers}
        work = [dist.irecv(found[peer], peer) for peer in self.peers]
        work += [self._send(values, peer) for peer in self.peers]
        for each in work:
            each.wait()
        mixed = values * (1.0 - sum(self.weights.values()))
        for peer, theirs in found.items():
            mixed.add_(theirs, alpha=self.weights[peer])
        return mixed

    def total(self, values: Tensor) -> Tensor:
        """The sum over all clients, the same bits for each: up a spanning tree, and down again."""
        found, theirs = values.clone(), torch.empty_like(values)
        for child in self.children:
            dist.recv(theirs, child)
            found += theirs
        if self.parent is not None:
            self._send(found, self.parent).wait()
            dist.recv(found, self.parent)
        for work in [self._send(found, child) for child in self.children]:
            work.wait()
        return found

    def _send(self, values: Tensor, peer: int) -> Any:
        self.sent[peer] += 1
        return dist.isend(values, peer)


def strangers(sent: Mapping[int, Counter[int]], graph: networkx.Graph) -> int:
    """Messages between clients that are no neighbours, of what each has sent, by rank."""
    return sum(
        messages
        for rank, counts in sent.items()
        for peer, messages in counts.items()
        if not graph.has_edge(rank, peer)
    )


def connected(draw: Callable[[int], networkx.Graph], seed: int, leaver: int) -> networkx.Graph:
    """The first graph, of draws numbered from 1000 ``seed`` on, that is connected, and stays so
    when the leaver is gone.
    """
    graphs = map(draw, count(1000 * seed))
    both = networkx.is_connected
    return next(graph for graph in graphs if both(graph) and both(without(graph, leaver)))


def without(graph: networkx.Graph, leaver: int) -> networkx.Graph:
    """The graph that is left when one client is gone."""
    return graph.subgraph([node for node in graph if node != leaver])
