"""Seconds of a step, by hand and by what must hold of any machine."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rmoe.reporting.estimate import Estimate, share_out
from rmoe.reporting.machines import GPUS, Cluster, Gpu
from rmoe.reporting.traffic import messages
from rmoe.reporting.work import Setting, Work

GPU = Gpu(half=2e12, tf32=1e12, bandwidth=1e10, memory=80e9, peers=1e9, watts=700)
WORK = Work(
    setting=Setting(processes=4, ep_size=1, zero=2, micro_batch=1, image_size=(8, 8)),
    flops=0,
    # Of 1 TFLOP/s and 10 GB/s: a product of 1 s, three that move what takes 1 s each, one that is even.
    operators={(10**12, 10**9): 1, (10**9, 10**10): 3, (0, 0): 7, (10**12, 10**10): 1},
    activations=0,
    together=(0, 0),
    parameters=None,  # type: ignore[arg-type]
    averaged=False,
    shared=4 * 10**9,
    shared_trained=4 * 10**9,
    shared_reduced=4 * 10**9,
    experts=0,
    experts_trained=0,
    layers=0,
    sent_tokens=0,
    sent_experts=0,
)


@pytest.fixture(autouse=True)
def whole_bandwidth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rmoe.reporting.estimate._BANDWIDTH_SHARE", 1.0)


def spread(cluster: Cluster, work: Work = WORK, **setting: Any) -> Estimate:
    return share_out(replace(work, setting=replace(work.setting, **setting)), cluster)


def test_seconds_by_hand() -> None:
    cluster = Cluster(GPU, per_node=4, share=1.0)
    seconds = share_out(WORK, cluster).seconds
    assert seconds.compute == pytest.approx(1 + 3 + 1)
    assert share_out(WORK, replace(cluster, share=0.5)).seconds.compute == pytest.approx(2 + 3 + 2)
    assert spread(cluster, precision="bfloat16").seconds.compute == pytest.approx(0.5 + 3 + 1)
    assert seconds.optimizer == pytest.approx(7 * 0.1)  # a quarter of 4 GB, moved seven times
    assert spread(cluster, zero=0).seconds.optimizer == pytest.approx(7 * 0.4)
    # An all-reduce of 4 GB among four, and the gathering of the weights: 1.5 and 0.75 times as much at 1 GB/s.
    assert seconds.communication == pytest.approx(6 + 3, rel=1e-3)
    assert spread(cluster, zero=0).seconds.communication == pytest.approx(6, rel=1e-3)
    assert seconds.step == pytest.approx(5 + 0.7 + 9, rel=1e-3)
    assert seconds.communication_share == pytest.approx(9 / 14.7, rel=1e-3)


def test_one_gpu_neither_sends_nor_waits() -> None:
    seconds = spread(Cluster(GPU), processes=1).seconds
    assert (seconds.communication, seconds.hidden, seconds.communication_share) == (0, 0, 0)


def test_what_is_hidden_is_a_share_of_the_reduction_and_no_more_than_the_backward_pass() -> None:
    cluster = Cluster(GPU, per_node=4, share=1.0)
    reduced = next(one for one in messages(WORK) if one.kind == "reduce_gradients").seconds(cluster)
    assert share_out(WORK, cluster).seconds.hidden == 0
    assert share_out(WORK, replace(cluster, overlap=0.25)).seconds.hidden == pytest.approx(reduced / 4)
    assert share_out(WORK, replace(cluster, overlap=1.0)).seconds.hidden == pytest.approx(5 / 2)


def test_without_a_cluster_there_are_h100s_in_one_node() -> None:
    found = share_out(WORK)
    assert (found.cluster.gpu, found.cluster.nodes, found.cluster.per_node) == (GPUS["h100"], 1, 4)


@given(
    nodes=st.sampled_from([1, 2, 4]),
    ep_size=st.sampled_from([1, 2, 4]),
    link=st.floats(1e6, 1e9),
    share=st.floats(0.01, 1),
    overlap=st.floats(0, 1),
    more=st.floats(1, 10),
)
def test_a_better_machine_is_not_slower(
    nodes: int, ep_size: int, link: float, share: float, overlap: float, more: float
) -> None:
    work = replace(WORK, experts=10**9, experts_trained=10**9, sent_tokens=10**8, sent_experts=10**8, layers=2)
    cluster = Cluster(GPU, nodes, 4 // nodes, link, share, overlap)

    def seconds(**better: Any) -> Any:
        return spread(replace(cluster, **better), work, ep_size=ep_size).seconds

    now, near = seconds(), 1 + 1e-12
    assert seconds(link=more * link).step <= now.step * near
    assert seconds(overlap=min(1.0, more * overlap)).step <= now.step * near
    # What is hidden is bounded by what is computed, so the step as a whole may stay as it is.
    assert seconds(share=min(1.0, more * share)).step <= now.step * near
    faster = replace(GPU, bandwidth=more * GPU.bandwidth, peers=more * GPU.peers, tf32=more * GPU.tf32)
    assert seconds(gpu=faster).step <= now.step * near
    assert seconds(nodes=1, per_node=4).communication <= now.communication * near
