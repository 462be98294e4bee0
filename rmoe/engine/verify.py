"""A self-check to run on one's own machines, through the launcher that will train:

    deepspeed [launcher flags] launch/verify.py        or: srun … python launch/verify.py, python -m rmoe.engine.verify

A network with two small residual mixtures, one whose tokens choose an expert and one whose experts all enter, is
trained for two steps on every expert placement that the processes allow, and compared with plain PyTorch on the whole
batch. A table says what passed, by how much; the exit code is 0 if all did, 1 if not.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import groups
from deepspeed.utils import logger as deepspeed_logger
from rich.console import Console
from rich.table import Table
from timm.layers import Mlp
from torch import Tensor, nn

from rmoe.config import ResidualMoEConfig
from rmoe.engine.checkpoint import files, resharding
from rmoe.engine.checkpoint.files import Layout
from rmoe.engine.clipping import mend_clipping
from rmoe.engine.command import folder_name, seconds
from rmoe.engine.lock import make_folder
from rmoe.engine.optim import param_groups
from rmoe.engine.processes import join, set_place
from rmoe.errors import UserError, run_guarded
from rmoe.moe.layer import ResidualMoE
from rmoe.moe.records import collect
from rmoe.moe.state import global_state_dict, load_global_state_dict, local_experts, roles

WIDTH, EXPERTS, STEPS = 16, 8, 2
LR, DECAY, CLIP = 1.0, 0.05, 0.05
STAGES = (0, 1, 2)
TOLERANCE = 1e-5  # float32, sums in another order
_MOE: dict[str, Any] = {"num_experts": EXPERTS, "rank": 4, "train_core": False, "noise": 0.0, "gate_std": 1.0}
_MOE |= {"losses": {"importance": 0.01, "z": 0.001}}


class CheckFailed(Exception):
    """A check found what must not be; the message is the figure."""


@dataclass(frozen=True)
class Place:
    """Where experts live and what ZeRO splits."""

    ep_size: int
    stage: int

    def __str__(self) -> str:
        return f"ep_size {self.ep_size}, ZeRO {self.stage}"


@dataclass(frozen=True)
class Trained:
    """A model after `STEPS` steps, and the norm of its gradient before clipping in each of them."""

    engine: Any
    norms: list[float]
    before: dict[str, Tensor]
    after: dict[str, Tensor]


def build(ep_size: int) -> nn.Module:
    """Returns a network with two mixtures; its weights do not depend on where experts live."""
    torch.manual_seed(0)
    mixtures = [
        ResidualMoE(Mlp(WIDTH, 2 * WIDTH), ResidualMoEConfig.from_dict({**_MOE, "top_k": top_k, "ep_size": ep_size}))
        for top_k in (1, "all")
    ]
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), *mixtures, nn.Linear(WIDTH, 3)).to(device())


def device() -> torch.device:
    """Returns the device of this process."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Returns the global batch of a step: tokens [16 · processes, C] float32 and labels [16 · processes] int64."""
    generator = torch.Generator().manual_seed(step)
    tokens = 16 * dist.get_world_size()
    x = torch.randn(tokens, WIDTH, generator=generator)
    return x.to(device()), torch.randint(3, (tokens,), generator=generator).to(device())


def initialise(place: Place) -> Any:
    """Returns DeepSpeed's engine on `build`, as training makes it."""
    # Not Adam, which would hide a gradient of the wrong scale.
    model = build(place.ep_size)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.SGD(param_groups(model, LR, DECAY), momentum=0.9),
        config={
            "train_micro_batch_size_per_gpu": 16,
            "gradient_clipping": CLIP,
            "zero_optimization": {"stage": place.stage},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 10**15,
        },
    )
    mend_clipping(engine)
    return engine


def step(engine: Any, number: int) -> float:
    """Makes one step on this process's part of the global batch; returns the norm of the gradient."""
    x, labels = (part.chunk(dist.get_world_size())[dist.get_rank()] for part in batch(number))
    engine.backward(_loss(engine, x, labels))
    engine.step()
    return float(engine.get_global_grad_norm())


def _loss(network: Callable[[Tensor], Tensor], x: Tensor, labels: Tensor) -> Tensor:
    with collect() as records:
        loss = nn.functional.cross_entropy(network(x), labels)
    return loss + records.loss()


def train(place: Place) -> Trained:
    """Trains for `STEPS` steps at `place`."""
    engine = initialise(place)
    before = _copied(engine.module)
    norms = [step(engine, number) for number in range(STEPS)]
    return Trained(engine, norms, before, _copied(engine.module))


def _copied(model: nn.Module) -> dict[str, Tensor]:
    return {key: x.clone() for key, x in global_state_dict(model).items()}


def reference() -> tuple[list[float], dict[str, Tensor]]:
    """Trains without DeepSpeed and other processes; returns the norms and weights that all placements must have."""
    model = build(1)
    optimizer = torch.optim.SGD(param_groups(model, LR, DECAY), momentum=0.9)
    parameters = [p for p in model.parameters() if p.requires_grad]
    norms = []
    for number in range(STEPS):
        loss = _loss(model, *batch(number))
        optimizer.zero_grad()
        loss.backward()
        norms.append(nn.utils.clip_grad_norm_(parameters, CLIP).item())
        optimizer.step()
    return norms, global_state_dict(model)


@dataclass(frozen=True)
class Result:
    """The result of one check: what it looked at, whether all processes passed, and the figure or what went wrong."""

    name: str
    passed: bool
    figure: str


def run(folder: Path) -> list[Result]:
    """Runs all checks; every process calls it and gets the same.

    Args:
        folder: for a checkpoint, on a file system that all processes share; it is removed again.
    """
    results = [_result("groups", check_groups)]
    if not results[0].passed:
        return results  # nothing else can be trusted
    places = [Place(ep_size, stage) for ep_size, stage in product(ep_sizes(), STAGES)]
    norms, weights = reference()
    trained: dict[Place, Trained] = {}
    for place in places:
        results.append(_result(f"gradients: {place}", check_training, place, weights, trained))
        if (one := trained.get(place)) is not None:
            results.append(_result(f"clip norm: {place}", check_norms, one.norms, norms))
            results.append(_result(f"frozen and trained: {place}", check_frozen, one))
    for place, other in zip(places, [*places[1:], places[0]], strict=True):
        if (one := trained.get(place)) is not None:
            name = f"checkpoint: {place} → {other}"
            results.append(_result(name, check_checkpoint, one.engine, other, folder / "step"))
    for ep_size in ep_sizes():
        if (one := trained.get(Place(ep_size, STAGES[0]))) is not None:
            name = f"evaluation, uneven batches: ep_size {ep_size}"
            results.append(_result(name, check_evaluation, one.engine.module))
    return results


def _result(name: str, check: Callable[..., str], *given: Any) -> Result:
    """Runs a check; where it failed on some process, it failed."""
    try:
        passed, figure = True, check(*given)
    except CheckFailed as failure:
        passed, figure = False, str(failure)
    except Exception as error:  # whatever a broken installation raises is its result
        passed, figure = False, f"{type(error).__name__}: {error}"
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, (passed, figure))
    failed = [f"process {rank}: {text}" for rank, (ok, text) in enumerate(everywhere) if not ok]
    return Result(name, not failed, failed[0] if failed else figure)


def ep_sizes() -> list[int]:
    """Returns those that divide the processes and the experts."""
    return [n for n in range(1, EXPERTS + 1) if dist.get_world_size() % n == 0 and EXPERTS % n == 0]


def check_groups() -> str:
    """Checks that every process is there, and that groups have the members that checkpoints count on."""
    world, rank = dist.get_world_size(), dist.get_rank()
    total = torch.tensor([float(rank)], device=device())
    dist.all_reduce(total)
    if total.item() != world * (world - 1) / 2:
        raise CheckFailed(f"the sum of ranks is {total.item():g}, not {world * (world - 1) / 2:g}")
    hosts: list[Any] = [None] * world
    dist.all_gather_object(hosts, socket.gethostname())
    for ep_size in ep_sizes():
        build(ep_size)
    for ep_size in ep_sizes():  # no more communication: a process may fail alone
        if ep_size == 1:
            continue
        name, first = f"ep_size_{ep_size}", rank // ep_size * ep_size
        wanted = {
            "expert": (groups._get_expert_parallel_group(name), [*range(first, first + ep_size)]),
            "replica": (groups._get_expert_data_parallel_group(name), [*range(rank % ep_size, world, ep_size)]),
        }
        for kind, (group, members) in wanted.items():
            if (found := dist.get_process_group_ranks(group)) != members:
                raise CheckFailed(f"ep_size {ep_size}: {kind} group {found}, not {members}")
    return f"processes {world}, hosts {len(set(hosts))}, {dist.get_backend()}, ep_size {ep_sizes()}"


def check_training(place: Place, wanted: Mapping[str, Tensor], trained: dict[Place, Trained]) -> str:
    """Trains at `place`, which joins `trained`, and looks at the weights."""
    trained[place] = train(place)
    return check_weights(trained[place].after, wanted)


def check_weights(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> str:
    """Checks that the weights of a placement are those of the reference after the same steps."""
    if found.keys() != wanted.keys():
        raise CheckFailed(f"other weights: {sorted(found.keys() ^ wanted.keys())}")
    worst = max(wanted, key=lambda key: _distance(found[key], wanted[key]))
    return _within(_distance(found[worst], wanted[worst]), f" in {worst}")


def check_norms(found: Sequence[float], wanted: Sequence[float]) -> str:
    """Checks that the norm that clipping uses is that of the whole model's gradient."""
    if min(wanted) <= CLIP:
        raise CheckFailed(f"clipping at {CLIP} is not active: norms {wanted}")
    return _within(max(abs(a - b) for a, b in zip(found, wanted, strict=True)), f" of {max(wanted):.3g}")


def check_frozen(trained: Trained) -> str:
    """Checks that cores are bit-identical after training, and gates and residuals are not."""
    role = roles(trained.engine.module)
    core = [name for name in role if role[name] == "core"]
    if moved := [name for name in core if not torch.equal(trained.before[name], trained.after[name])]:
        raise CheckFailed(f"{moved[0]} is frozen and has changed")
    others = [name for name in trained.after if name not in core]
    if still := [name for name in others if torch.equal(trained.before[name], trained.after[name])]:
        raise CheckFailed(f"{still[0]} is trained and has not changed")
    return f"{len(core)} frozen, {len(others)} trained"


def check_checkpoint(engine: Any, other: Place, path: Path) -> str:
    """Checks that one placement loads what another saved, optimizer included, and that both go on alike."""
    layout = Layout(dist.get_world_size(), other.ep_size, EXPERTS, 16, 1, 0)
    tensors, about = resharding.gather_tensors(engine)
    files.write_checkpoint(path, tensors, about, {}, STEPS, layout)
    if files.newest_intact(path.parent, lambda harm: None) != path:
        raise CheckFailed(f"{path} is not there")
    resumed = initialise(other)
    resharding.restore_tensors(resumed, files.Tensors(path), about)
    for one in (engine, resumed):
        step(one, STEPS)
    return check_weights(global_state_dict(resumed.module), global_state_dict(engine.module))


@torch.no_grad()
def check_evaluation(model: nn.Module) -> str:
    """Checks that processes may run different numbers of batches: nothing hangs, and the answers are the same."""
    whole, rank, worst = build(1).eval(), dist.get_rank(), 0.0
    load_global_state_dict(whole, global_state_dict(model))
    with local_experts(model.eval()):
        for number in range(1 + rank):
            x = batch(number)[0][: 5 + rank + number]
            worst = max(worst, _distance(model(x), whole(x)))
    return _within(worst, f", up to {dist.get_world_size()} batches")


def _distance(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


def _within(distance: float, where: str) -> str:
    text = f"|Δ| {distance:.1e}{where}"
    if not distance <= TOLERANCE:
        raise CheckFailed(f"{text}, more than {TOLERANCE:g}")
    return text


def show(results: Sequence[Result]) -> None:
    """Prints the table, and a line with the sum."""
    table = Table("check", "", "figure", title=f"rmoe verify, processes {dist.get_world_size()}, {device().type}")
    for one in results:
        table.add_row(one.name, "[green]PASS" if one.passed else "[red]FAIL", one.figure)
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(table)
    failed = [one.name for one in results if not one.passed]
    console.print(f"{len(results) - len(failed)} passed, {len(failed)} failed" + "".join(f"\n  {x}" for x in failed))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns 0 if every check passed, else 1."""
    words = argparse.ArgumentParser(prog="verify.py", description=__doc__.partition("\n")[0])
    words.add_argument(
        "--work-dir",
        type=folder_name,
        default=Path("work_dirs") / "verify",
        metavar="DIR",
        help="for a checkpoint, in a new folder there that is removed again, on a file system that all processes share "
        "(default: %(default)s)",
    )
    words.add_argument(
        "--timeout", type=seconds, default=300, metavar="SECONDS", help="of communication (default: 300)"
    )
    words.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # DeepSpeed's launcher passes it
    arguments = words.parse_args(argv)
    deepspeed_logger.setLevel(logging.ERROR)
    set_place()
    join(arguments.timeout)
    with fresh_folder(arguments.work_dir) as folder:
        results = run(folder)
        dist.barrier()
    if dist.get_rank() == 0:
        show(results)
    dist.destroy_process_group()
    return 0 if all(one.passed for one in results) else 1


@contextlib.contextmanager
def fresh_folder(parent: Path) -> Iterator[Path]:
    """Makes a new folder in `parent`, the same for all processes; removes it afterwards, and `parent` if that is new.

    Raises:
        UserError: it cannot be made.
    """
    made, said, existed = "", "", parent.exists()
    if dist.get_rank() == 0:
        try:
            make_folder(parent)
            made = tempfile.mkdtemp(prefix="verify_", dir=parent)
        except (OSError, UserError) as error:
            said = f"no folder can be made in {parent} ({error}); give another --work-dir"
    found: list[Any] = [(made, said)]
    dist.broadcast_object_list(found)
    made, said = found[0]
    if said:
        raise UserError(said)
    try:
        yield Path(made)
    finally:
        if dist.get_rank() == 0:
            shutil.rmtree(made, ignore_errors=True)
            if not existed:
                with contextlib.suppress(OSError):
                    parent.rmdir()


if __name__ == "__main__":
    run_guarded(main, "verify.py")
