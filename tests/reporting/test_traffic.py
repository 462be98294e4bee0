"""Seconds of what is sent, by hand: ten-gigabyte links, round latencies."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rmoe.errors import UserError
from rmoe.reporting import traffic
from rmoe.reporting.machines import GPUS, Cluster, Gpu, find_gpu
from rmoe.reporting.traffic import Message, messages, others
from rmoe.reporting.work import Setting, Work

GPU = Gpu(half=100e12, tf32=50e12, bandwidth=1e12, memory=80e9, peers=100e9, watts=700)
GIGABYTE = 1e9


@pytest.fixture(autouse=True)
def latencies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("LATENCY", 1e-3), ("LATENCY_INSIDE", 1e-2), ("LATENCY_BETWEEN", 1e-1)):
        monkeypatch.setattr(traffic, name, value)


def cluster(nodes: int, per_node: int, link: float = 10e9) -> Cluster:
    return Cluster(GPU, nodes, per_node, link)


def work(**changes: object) -> Work:
    base = Work(
        setting=Setting(processes=16, ep_size=1, zero=2, micro_batch=1, image_size=(8, 8)),
        flops=0,
        operators={},
        activations=0,
        together=(0, 0),
        parameters=None,  # type: ignore[arg-type]
        averaged=False,
        shared=400,
        shared_trained=400,
        shared_reduced=400,
        experts=1600,
        experts_trained=1600,
        layers=2,
        sent_tokens=0,
        sent_experts=0,
    )
    return replace(base, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("size", "apart", "place"),
    [
        (16, 1, (16, 8, 1)),  # everyone, two nodes of eight: one ring, which leaves each node once
        (8, 1, (8, 8, 1)),  # a node's own
        (2, 8, (2, 1, 8)),  # the same place on each node: eight rings on one link
        (4, 4, (4, 2, 4)),
        (2, 1, (2, 2, 4)),
        (3, 1, (3, 1, 8)),  # three do not divide eight: some groups lie on two nodes
        (5, 3, (5, 1, 8)),
    ],
)
def test_where_a_group_lies(size: int, apart: int, place: tuple[int, int, int]) -> None:
    found = cluster(2, 8).place(size, apart)
    assert (found.size, found.inside, found.sharing) == place


def test_a_ring_is_as_fast_as_its_slowest_hop() -> None:
    ring = Message("reduce_gradients", GIGABYTE, 3, 16, 1)
    inside = replace(ring, processes=8)
    # 100 GB/s within a node, and 3 doublings for each of the calls.
    assert inside.seconds(cluster(1, 8)) == pytest.approx(0.01 + 3 * (1e-3 + 3e-2))
    # 10 GB/s between two: the ring leaves each node once.
    assert ring.seconds(cluster(2, 8)) == pytest.approx(0.1 + 3 * (1e-3 + 3e-2 + 1e-1))
    # A link that is faster than NVLink does not help.
    assert ring.seconds(cluster(2, 8, 1e12)) == pytest.approx(0.01 + 3 * (1e-3 + 3e-2 + 1e-1))


def test_rings_beside_one_another_share_the_link_of_a_node() -> None:
    # Experts spread over the eight of a node: eight rings of two go through one link.
    ring = Message("reduce_gradients", GIGABYTE, 1, 2, 8)
    assert ring.seconds(cluster(2, 8)) == pytest.approx(8 * 0.1 + 1e-3 + 1e-1)


def test_tokens_go_to_every_other_process_alike() -> None:
    sent = Message("all_to_all", 15 * GIGABYTE, 5, 16, 1)
    # 7 of 15 stay on the node: 7 GB at 100 GB/s; eight GPUs send 8 GB each through 10 GB/s.
    assert sent.seconds(cluster(2, 8)) == pytest.approx(8 * 8 / 10 + 5 * (1e-3 + 3e-2 + 1e-1))
    inside = replace(sent, processes=8)
    assert inside.seconds(cluster(2, 8)) == pytest.approx(0.15 + 5 * (1e-3 + 3e-2))


def test_one_process_sends_nothing() -> None:
    assert messages(work(setting=Setting(processes=1, ep_size=1))) == []
    assert Message("small", 5.0, 3, 1, 1).seconds(cluster(1, 1)) == 0


def by_kind(found: list[Message]) -> dict[tuple[str, int], Message]:
    keys = [(one.kind, one.apart) for one in found]
    assert len(set(keys)) == len(keys)
    return dict(zip(keys, found, strict=True))


def test_what_a_step_sends_at_each_zero_stage() -> None:
    spread = Setting(processes=16, ep_size=4, zero=2)
    found = by_kind(messages(work(setting=spread)))
    assert found["reduce_gradients", 1].sent == 2 * 15 / 16 * 400
    # A quarter of the experts on each, in the four processes with the same ones.
    assert found["reduce_gradients", 4] == Message("reduce_gradients", 2 * 3 / 4 * 400, 1, 4, 4)
    assert found["gather_weights", 1].sent == 15 / 16 * 400
    assert found["gather_weights", 4].sent == 3 / 4 * 400
    assert found["small", 1].calls == 3
    at_zero = by_kind(messages(work(setting=replace(spread, zero=0))))
    assert not any(kind == "gather_weights" for kind, _ in at_zero)


def test_experts_that_nobody_else_holds_are_not_reduced() -> None:
    found = by_kind(messages(work(setting=Setting(processes=16, ep_size=16))))
    assert ("reduce_gradients", 16) not in found


def test_frozen_parts_send_nothing() -> None:
    frozen = work(shared_trained=0, shared_reduced=0, experts_trained=0)
    assert {one.kind for one in messages(frozen)} == {"small"}


def test_what_travels_for_the_experts_sake() -> None:
    spread = Setting(processes=16, ep_size=4)
    tokens = by_kind(messages(work(setting=spread, sent_tokens=100)))["all_to_all", 1]
    assert (tokens.sent, tokens.calls, tokens.processes) == (4 * 3 / 4 * 100, 2 * 5, 4)
    weights = by_kind(messages(work(setting=spread, sent_experts=1600)))["gather_experts", 1]
    assert (weights.sent, weights.calls, weights.processes) == (2 * 3 / 4 * 1600, 2 * 2, 4)
    alone = messages(work(setting=Setting(processes=16, ep_size=1), sent_tokens=100, sent_experts=100))
    assert {one.kind for one in alone} == {"small", "reduce_gradients", "gather_weights"}


def test_gradients_go_in_buckets() -> None:
    big = work(shared_trained=8 * traffic.BUCKET_BYTES, shared_reduced=4 * traffic.BUCKET_BYTES + 1, experts_trained=0)
    found = by_kind(messages(big))
    assert found["reduce_gradients", 1].calls == 5
    # The lower precision is of gradients alone: weights are gathered as they are.
    assert found["gather_weights", 1].sent == others(16) * 8 * traffic.BUCKET_BYTES


MESSAGES = st.builds(
    Message,
    kind=st.sampled_from(["all_to_all", "gather_experts", "reduce_gradients"]),
    sent=st.floats(0, 1e12),
    calls=st.integers(1, 50),
    processes=st.integers(2, 64),
    apart=st.integers(1, 64),
)


@given(MESSAGES, st.integers(1, 16), st.integers(1, 16), st.floats(1e6, 1e13), st.floats(1, 100))
def test_more_link_is_not_slower_and_more_bytes_are_not_faster(
    message: Message, nodes: int, per_node: int, link: float, factor: float
) -> None:
    seconds = message.seconds(cluster(nodes, per_node, link))
    assert 0 < seconds < float("inf")
    assert message.seconds(cluster(nodes, per_node, factor * link)) <= seconds
    assert replace(message, sent=factor * message.sent).seconds(cluster(nodes, per_node, link)) >= seconds
    assert replace(message, calls=message.calls + 1).seconds(cluster(nodes, per_node, link)) >= seconds


def test_the_nearest_gpu_is_named() -> None:
    assert find_gpu("H100") == GPUS["h100"]
    with pytest.raises(UserError, match=r"--gpu is 'h10'; did you mean 'h100'\? known: a100, b200, h100"):
        find_gpu("h10")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"link": float("nan")}, "--link is nan; it is a positive number of GB/s"),
        ({"link": 0.0}, "--link is 0; it is a positive"),
        ({"link": -1e9}, "--link is -1; it is a positive"),
        ({"link": float("inf")}, "--link is inf"),
        ({"share": 0.0}, "--share is 0; it is more than 0 and at most 1"),
        ({"share": 40.0}, "--share is 40; it is more than 0 and at most 1"),
        ({"share": float("nan")}, "--share is nan"),
        ({"overlap": 1.5}, "--overlap is 1.5; it is 0"),
        ({"overlap": float("nan")}, "--overlap is nan"),
    ],
)
def test_what_no_cluster_has(values: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Cluster(GPU, **values)


def test_every_gpu_is_plausible() -> None:
    """Half precision is twice TF32 to rounding, and a FLOP costs much less than a byte."""
    for name, gpu in GPUS.items():
        assert gpu.half / gpu.tf32 == pytest.approx(2, rel=0.03), name
        assert 100 < gpu.half / gpu.bandwidth < 500, name
        assert gpu.peers < gpu.bandwidth, name
        assert gpu.peak("float32") == gpu.tf32 < gpu.peak("bfloat16") == gpu.peak("float16"), name
