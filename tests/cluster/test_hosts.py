"""Two hosts, each a network namespace, with DeepSpeed's launcher on both: started by hand, and by pdsh."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from json import loads
from pathlib import Path

import pytest
from conftest import ROOT, process_env, run_processes
from fault_injection import MARK
from toy import write_config, write_json

from rmoe.engine import faults
from rmoe.engine.ports import free_port

sys.path.append(str(Path(__file__).parent))
import packages

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.distributed, pytest.mark.timeout(600)]
TIMEOUT, SLACK = 6.0, 20.0  # seconds
START = 200.0  # seconds until the first step, on a busy machine
MOE = {"num_experts": 4, "top_k": 1, "rank": 2, "ep_size": 2}
DEEPSPEED = Path(sys.executable).parent / "deepspeed"
# As pdsh calls it: options, host, command. A login there has nothing of the environment here.
SSH = """#!/bin/bash
while [[ $1 == -* ]]; do if [[ $1 == -o ]]; then shift; fi; shift; done
exec ip netns exec "$1" env -i PATH="$PATH" HOME="$HOME" bash -c "${*:2}"
"""


def ip(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", *words], capture_output=True, text=True)


@pytest.fixture
def hosts() -> Iterator[list[tuple[str, str, str]]]:
    """Name, network device and address of two hosts."""
    number = os.getpid() % 14000  # 10.200 to 10.254
    found = [(f"rmoe{number}-{i}", f"rm{number}", f"10.{200 + number // 256}.{number % 256}.{i}") for i in (1, 2)]
    if os.geteuid() or not shutil.which("ip", path="/usr/sbin:/sbin:/usr/bin"):
        pytest.skip("network namespaces need root and iproute2")
    try:
        for name, _, _ in found:
            if (made := ip("netns", "add", name)).returncode:
                pytest.skip(f"no network namespaces here: {made.stderr.strip()}")
        (a, link_a, _), (b, link_b, _) = found
        ip("link", "add", link_a, "netns", a, "type", "veth", "peer", "name", link_b, "netns", b)
        for name, link, address in found:
            ip("-n", name, "addr", "add", f"{address}/24", "dev", link)
            ip("-n", name, "link", "set", "lo", "up")
            made = ip("-n", name, "link", "set", link, "up")
            assert made.returncode == 0, made.stderr
        yield found
    finally:
        for name, _, _ in found:
            ip("netns", "delete", name)


def test_the_link_is_cut(hosts: list[tuple[str, str, str]], tmp_path: Path) -> None:
    """`deepspeed --no_ssh` on each host; five steps are made together, then both ends wait, and end in time."""
    hooks = [{"type": "fault_injection.MishapHook", "kind": "cut", "at": 5}]
    config = write_config(tmp_path / "run.py", {"model.moe": MOE, "custom_hooks": hooks})
    json = write_json(tmp_path / "run.json", 2)
    (tmp_path / "hostfile").write_text("".join(f"{name} slots=1\n" for name, _, _ in hosts))
    deepspeed = [DEEPSPEED, "--hostfile", tmp_path / "hostfile", "--no_ssh"]
    deepspeed += ["--master_addr", hosts[0][2], "--master_port", str(free_port())]
    train = [ROOT / "launch" / "train.py", config, "--deepspeed_config", json, "--work-dir", tmp_path / "run"]
    children: list[subprocess.Popen[bytes]] = []
    try:
        for rank, (name, link, _) in enumerate(hosts):
            words = ["ip", "netns", "exec", name, *deepspeed, "--node_rank", rank, *train, "--timeout", TIMEOUT]
            env = process_env(tmp_path, GLOO_SOCKET_IFNAME=link, MISHAP_LINK=link)
            with open(tmp_path / f"{rank}.log", "wb") as log:
                line = [str(word) for word in words]
                children.append(subprocess.Popen(line, env=env, stdout=log, stderr=log, start_new_session=True))
        deadline = time.monotonic() + START
        while not (tmp_path / "run" / MARK).exists():
            assert time.monotonic() < deadline, (tmp_path / "0.log").read_text()[-4000:]
            time.sleep(0.2)
        for child in children:
            assert child.wait(timeout=START) != 0
        seconds = time.time() - float((tmp_path / "run" / MARK).read_text())
    finally:
        for child in children:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
    assert TIMEOUT < seconds < TIMEOUT + SLACK
    for rank in range(2):
        lines = (tmp_path / f"{rank}.log").read_text().splitlines()
        said = [line for line in lines if "rmoe: error:" in line]
        assert len(said) == 1, lines[-40:]
        assert f"rank {rank} on" in said[0]
        assert "ends after step 5: all ranks wait for each other" in said[0]
        assert f"exits with return code = {faults.FAULT}" in "\n".join(lines)


def test_pdsh_starts_the_ranks(hosts: list[tuple[str, str, str]], tmp_path: Path) -> None:
    """One `deepspeed` for both hosts, with ssh replaced by a way into the namespaces."""
    if reason := packages.missing(["pdsh"], "pdsh"):
        pytest.skip(reason)
    config = write_config(tmp_path / "run.py", {"model.moe": MOE})
    json = write_json(tmp_path / "run.json", 2)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "ssh").write_text(SSH)
    (tmp_path / "bin" / "ssh").chmod(0o755)
    (tmp_path / "hostfile").write_text("".join(f"{name} slots=1\n" for name, _, _ in hosts))
    there = process_env(tmp_path, GLOO_SOCKET_IFNAME=hosts[0][1])
    passed = ("GLOO_SOCKET_IFNAME", "OMP_NUM_THREADS", "DS_ACCELERATOR", "TORCH_EXTENSIONS_DIR")
    (tmp_path / ".deepspeed_env").write_text("".join(f"{name}={there[name]}\n" for name in passed))
    words = [DEEPSPEED, "--hostfile", tmp_path / "hostfile", "--master_addr", hosts[0][2]]
    words += ["--master_port", free_port(), ROOT / "launch" / "train.py", config]
    words += ["--deepspeed_config", json, "--work-dir", tmp_path / "run", "--timeout", TIMEOUT]
    env = {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "HOME": str(tmp_path)}
    run_processes(tmp_path, list(map(str, words)), 0, env=env, timeout=START)
    assert loads((tmp_path / "run" / "cost.json").read_text())["devices"] == 2
    assert (tmp_path / "run" / "model.safetensors").exists()
