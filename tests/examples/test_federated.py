"""Federated demonstrations: what clients say to each other, and small runs of both."""

import json
from collections import Counter

import networkx
import numpy
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.utils import parameters_to_vector

from examples.federated import data, processes
from examples.federated.certified import __main__ as certified
from examples.federated.ferrari import __main__ as ferrari
from examples.federated.processes import Neighbours, average, connected, run, strangers, without

CLIENTS = 5
GRAPH = networkx.Graph([(0, 1), (1, 2), (2, 3), (3, 0), (3, 4)])
SHARES = [0.1, 0.2, 0.3, 0.15, 0.25]


def values(rank):
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(6, generator=generator, dtype=torch.float64)


def model(rank):
    torch.manual_seed(rank)
    return nn.Linear(3, 2)


def talked(graph):
    """What one client's calls return, and what it has sent by then."""
    rank = dist.get_rank()
    mine = model(rank)
    average(mine, SHARES[rank])
    averaged = parameters_to_vector(mine.parameters()).detach()
    talk = Neighbours(graph)
    mixed = talk.mix(values(rank))
    after_one = Counter(talk.sent)
    whole = talk.total(values(rank))
    around = values(rank)
    for _ in range(60):
        around = talk.mix(around)
    return averaged, mixed, whole, around, after_one, talk.sent


def raising():
    raise ValueError(f"client {dist.get_rank()} refuses")


@pytest.fixture(scope="module")
def found():
    return run(CLIENTS, talked, GRAPH)


def test_fedavg_is_the_weighted_mean(found):
    parts = [parameters_to_vector(model(rank).parameters()).detach() for rank in range(CLIENTS)]
    expected = sum(share * part for share, part in zip(SHARES, parts, strict=True))
    for averaged, *_ in found:
        torch.testing.assert_close(averaged, expected)


def test_gossip_mixes_what_neighbours_have_and_keeps_the_mean(found):
    everyone = torch.stack([values(rank) for rank in range(CLIENTS)])
    matrix = torch.zeros(CLIENTS, CLIENTS, dtype=torch.float64)
    for a, b in GRAPH.edges:
        matrix[a, b] = matrix[b, a] = 0.5 / (1 + max(GRAPH.degree[a], GRAPH.degree[b]))
    matrix += torch.diag(1.0 - matrix.sum(1))
    mixed = torch.stack([each[1] for each in found])
    torch.testing.assert_close(mixed, matrix @ everyone)
    torch.testing.assert_close(mixed.mean(0), everyone.mean(0))
    for each in found:
        torch.testing.assert_close(each[3], everyone.mean(0), rtol=0, atol=0.05)


def test_the_total_is_the_sum_with_the_same_bits_for_all(found):
    everyone = torch.stack([values(rank) for rank in range(CLIENTS)])
    for each in found:
        torch.testing.assert_close(each[2], everyone.sum(0))
        assert torch.equal(each[2], found[0][2])


def test_messages_are_counted_and_go_to_neighbours(found):
    for rank, (*_, after_one, sent) in enumerate(found):
        assert after_one == dict.fromkeys(GRAPH.neighbors(rank), 1)
        assert set(sent) == set(GRAPH.neighbors(rank))
    sent = {rank: each[-1] for rank, each in enumerate(found)}
    # 61 rounds; up and down a tree
    assert sum(map(Counter.total, sent.values())) == 61 * 2 * len(GRAPH.edges) + 2 * (CLIENTS - 1)
    assert strangers(sent, GRAPH) == 0
    assert strangers(sent, without(GRAPH, 4)) == sent[3][4] + sent[4].total()


def test_what_a_client_raises_ends_all():
    with pytest.raises(Exception, match="refuses"):
        run(2, raising)


def test_a_drawn_graph_is_connected_without_the_leaver():
    for seed in range(5):
        tried = []

        def draw(number, tried=tried):
            tried.append(number)
            return networkx.gnp_random_graph(6, 0.35, number)

        graph = connected(draw, seed, 0)
        assert networkx.is_connected(graph)
        assert networkx.is_connected(without(graph, 0))
        assert tried == list(range(1000 * seed, 1000 * seed + len(tried)))


def test_a_file_of_images_is_read_and_shrunk(tmp_path):
    images = numpy.full((3, 28, 28), 255, dtype=numpy.uint8)
    images[:, 1::2] = 0
    numpy.savez(tmp_path / "some.npz", images=images, labels=numpy.array([3, 1, 2], "uint8"))
    found, labels = data.load(tmp_path / "some.npz")
    assert found.shape == (3, 1, 14, 14)
    assert found.eq(0.5).all()
    assert labels.tolist() == [3, 1, 2]
    trained, tested = data.split(100, 3)
    assert sorted(trained.tolist() + tested.tolist()) == list(range(100))
    assert len(tested) == 20


def test_a_small_run_of_ferrari_is_written(tmp_path, monkeypatch):
    whole = ferrari.federation

    def small(images, labels, seed):
        return whole(images[:240], labels[:240], seed)._replace(rounds=2, more=1, epochs=1)

    monkeypatch.setattr(ferrari, "CLIENTS", 3)
    monkeypatch.setattr(ferrari, "federation", small)
    ferrari.main(["--seed", "3", "--out", str(tmp_path)])
    found = json.loads((tmp_path / "seed3.json").read_text())
    assert found["verdict"] in ("PASS", "FAIL", "NOT SHOWN")
    assert {"before", "retrained", "Ferrari", "without CE", "CE alone"} < set(
        found["facts"]["rows"]
    )
    assert (tmp_path / "ferrari.png").exists()


def test_a_small_run_of_certified_is_written(tmp_path, monkeypatch):
    whole = certified.settings

    def small(images, labels, seed):
        return {"ring": whole(images[:300], labels[:300], seed)["ring"]._replace(tolerance=5e-3)}

    monkeypatch.setattr(certified, "CLIENTS", 4)
    monkeypatch.setattr(certified, "settings", small)
    certified.main(["--seed", "3", "--out", str(tmp_path)])
    found = json.loads((tmp_path / "seed3.json").read_text())
    met = {claim["text"]: claim["met"] for claim in found["claims"]}
    assert met["that distance by its certified bound"]
    assert met["messages between clients that are no neighbours"]
    ring = found["facts"]["messages"]["ring"]
    assert set(ring["neighbours"]) == {"0-1", "1-2", "2-3", "0-3"}
    assert found["facts"]["cases"]["ring, client"]["ratio"] < 0.5
    assert (tmp_path / "certified.png").exists()


def test_the_clock_adds_up(monkeypatch):
    times = iter([1.0, 3.0, 10.0, 10.5])
    monkeypatch.setattr(processes, "process_time", lambda: next(times))
    clock = processes.Clock()
    for _ in range(2):
        with clock.charged("work"):
            pass
    assert clock.seconds == {"work": 2.5}
