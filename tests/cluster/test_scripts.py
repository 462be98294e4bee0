"""The shell scripts and the Dockerfile, without a cluster: what they would run, and what linters say."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from mmengine.config import Config

SCRIPTS = sorted(path for path in (ROOT / "launch" / "slurm").iterdir())
OURS = (
    "GPUS",
    "GPUS_PER_NODE",
    "CPUS_PER_TASK",
    "SRUN_ARGS",
    "MAX_RESTARTS",
    "TIMEOUT",
    "PYTHON",
    "SLURM_CPUS_PER_TASK",
)


def printed(*words: str, code: int = 0, **env: str) -> list[list[str]]:
    """What a script prints, in words."""
    kept = {name: value for name, value in os.environ.items() if name not in OURS}
    done = subprocess.run(["bash", *words], cwd=ROOT, env=kept | env, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    return [shlex.split(line) for line in (done.stdout or done.stderr).splitlines()]


@pytest.mark.parametrize(("tool", "files"), [("shellcheck", SCRIPTS), ("hadolint", [ROOT / "Dockerfile"])])
def test_linters_are_content(tool: str, files: list[Path]) -> None:
    program = Path(sys.executable).parent / tool
    found = subprocess.run([program, *files], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


def test_a_word_with_spaces_stays_one_word() -> None:
    words = ["a config; rm -rf x.py", "d.json", "work $(dirs)", "--cfg-options", "a.b=1"]
    (command,) = printed(
        "launch/slurm/run.sh", "--dry-run", *words, PYTHON="py", TIMEOUT="60", SRUN_ARGS="-v --mpi=none"
    )
    assert command[:4] == ["python3", "launch/restart.py", "--max-restarts", "3"]
    assert command[4:9] == ["srun", "--kill-on-bad-exit=1", "-v", "--mpi=none", "py"]
    assert command[9:12] == ["-u", "launch/train.py", words[0]]
    assert command[-7:] == ["--work-dir", words[2], "--resume", "--timeout", "60", *words[3:]]


@pytest.mark.parametrize("name", ["pretrain_core", "finetune_residual"])
def test_the_scripts_have_defaults_that_exist(name: str) -> None:
    (command,) = printed(f"launch/slurm/{name}.sbatch", "--dry-run", CPUS_PER_TASK="5")
    assert "--cpus-per-task=5" in command
    script = command.index("launch/train.py")
    assert all((ROOT / file).is_file() for file in (command[script], command[script + 1], command[script + 3]))


def test_a_config_needs_its_json_and_work_dir() -> None:
    (said,) = printed("launch/slurm/pretrain_core.sbatch", "--dry-run", "c.py", code=2)
    assert "CONFIG, JSON and WORK_DIR are needed, all three; it has c.py" in " ".join(said)


@pytest.mark.parametrize(("ranks", "images"), [({}, 32), ({"SLURM_NTASKS": "16"}, 64)])
def test_pretraining_has_the_published_images_in_a_step(ranks: dict[str, str], images: int) -> None:
    (command,) = printed("launch/slurm/pretrain_core.sbatch", "--dry-run", **ranks)
    assert command[-1] == f"train_dataloader.batch_size={images}"


def test_the_grid_has_one_element_for_each_config_of_the_paper() -> None:
    """Those are the ones with all four pipelines."""
    commands = printed("launch/slurm/grid.sbatch", "--dry-run", "--cfg-options", "randomness.seed=1")
    configs = [command[command.index("launch/train.py") + 1] for command in commands]
    whole = [str(path.relative_to(ROOT)) for path in (ROOT / "rmoe" / "configs").glob("*/*_intermediate_residual_*.py")]
    pipelines = ("dense", "moe", "residual", "intermediate_residual")
    assert sorted(configs) == sorted(
        path.replace("intermediate_residual", name) for path in whole for name in pipelines
    )
    assert all((ROOT / path).is_file() for path in configs)
    assert f"#SBATCH --array=0-{len(commands) - 1}%" in (ROOT / "launch" / "slurm" / "grid.sbatch").read_text()
    assert all(command[-1] == "randomness.seed=1" for command in commands)


def test_the_grid_has_the_recipes_images_in_a_step() -> None:
    for command in printed("launch/slurm/grid.sbatch", "--dry-run"):
        cfg = Config.fromfile(ROOT / command[command.index("launch/train.py") + 1])
        given = [int(word.rpartition("=")[2]) for word in command if word.startswith("train_dataloader.batch_size=")]
        assert 8 * [cfg.train_dataloader.batch_size, *given][-1] == cfg.card.batch


def test_openmmlabs_variables_size_the_job() -> None:
    script = "launch/slurm/finetune_residual.sbatch"
    sbatch, _ = printed("launch/slurm/submit.sh", "--dry-run", script, GPUS="16", GPUS_PER_NODE="4", CPUS_PER_TASK="5")
    sizes = ["--nodes=4", "--ntasks-per-node=4", "--gpus-per-node=4", "--cpus-per-task=5"]
    assert sbatch == ["sbatch", "--parsable", *sizes, script]
    assert "--nodes=1" in printed("launch/slurm/submit.sh", "--dry-run", script, GPUS="2")[0]
    (said,) = printed("launch/slurm/submit.sh", "--dry-run", script, GPUS="6", GPUS_PER_NODE="4", code=2)
    assert "GPUS 6 is not a multiple of GPUS_PER_NODE 4" in " ".join(said)
    for name, value in (("GPUS", "0"), ("GPUS", "all"), ("GPUS_PER_NODE", "08")):
        (said,) = printed("launch/slurm/submit.sh", "--dry-run", script, code=2, **{"GPUS": "8", name: value})
        assert f"{name} is {value}; it is a whole number, at least 1" in " ".join(said)


def test_options_of_sbatch_take_their_values_as_words() -> None:
    words = ["--partition", "gpu", "-A", "us", "launch/slurm/finetune_residual.sbatch", "c.py", "d.json", "work"]
    sbatch, training = printed("launch/slurm/submit.sh", "--dry-run", *words, GPUS="8")
    assert sbatch == ["sbatch", "--parsable", "--nodes=1", "--ntasks-per-node=8", "--gpus-per-node=8", *words]
    assert "c.py" in training
    (said,) = printed("launch/slurm/submit.sh", "--dry-run", "--partition", "gpu", code=2)
    assert "none of its words ends with .sbatch" in " ".join(said)


def test_the_chain_hands_the_core_on() -> None:
    whole = printed("launch/slurm/chain.sh", "--dry-run", "w", "a.py", "b.py", "c.py")
    assert ["sbatch" in command for command in whole] == [True, False] * 3
    assert [command[-1] for command in whole[2:]] == ["model.core=w/core"] * 2 + [
        "model.backbone.core=w/intermediate"
    ] * 2
    short = printed("launch/slurm/chain.sh", "--dry-run", "w", "a.py", "-", "c.py")
    assert len(short) == 4
    assert "--dependency=afterok:JOB_OF_core" in short[2]
    assert short[3][-1] == "model.backbone.core=w/core"


@pytest.mark.parametrize(
    ("code", "warned", "restarts", "ends"),
    [(0, False, 0, 0), (1, False, 0, 1), (2, True, 0, 85), (137, False, 1, 137), (85, False, 0, 85), (3, True, 0, 85)],
)
def test_what_is_restarted_and_what_is_requeued(
    tmp_path: Path, code: int, warned: bool, restarts: int, ends: int
) -> None:
    """A batch script with the training and `scontrol` replaced by words in a file; both are asked to leave together."""
    shutil.copytree(ROOT / "launch", tmp_path / "launch")
    (tmp_path / "bin").mkdir()
    warn = f"trap 'exit {code}' USR1; kill -USR1 $(ps -o ppid= $PPID); while :; do /bin/sleep 0.05; done;"
    fakes = {"scontrol": "", "sleep": "", "srun": warn if warned else f"exit {code}"}
    for name, line in fakes.items():
        (tmp_path / "bin" / name).write_text(f'#!/bin/bash\necho {name} "$@" >>{tmp_path}/said\n{line}\n')
        (tmp_path / "bin" / name).chmod(0o755)
    env = {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "PYTHON": "python", "MAX_RESTARTS": "1"}
    words = ["bash", "launch/slurm/run.sh", "c.py", "d.json", "work"]
    done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == ends, done.stderr
    said = (tmp_path / "said").read_text()
    assert ("scontrol requeue 7" in said) == (ends == 85)
    assert said.count("srun ") == 1 + restarts
