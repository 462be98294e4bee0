"""Swin-MoE's checkpoints (microsoft/Swin-Transformer on Tutel): files of each process become one state and back.

A process writes its own experts to `NAME.pth.rank0`, `NAME.pth.rank1`, …, stacked, as
`layers.2.blocks.1.mlp._moe_layer.experts.batched_fc1_w` [E/P, H, C], `batched_fc2_w` [E/P, H, C], `batched_fc1_bias`
[E/P, H] and `batched_fc2_bias` [E/P, C] (older ones [E/P, 1, …]). All other weights stand in `NAME.pth.master`, or in
every file. Where processes are more than experts, each holds 1/S of the hidden units of one, and consecutive ones share
it. Files do not say whose they are: what can be told of missing and mixed-up ones is told.

Shape suffixes: E experts, H hidden width, C model width, P processes, S processes that share an expert.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from rmoe.errors import UserError
from rmoe.moe.stacked import EXPERT_KEY

State = dict[str, Tensor]
Converted = dict[str, list[str]]

LAYER = "._moe_layer."
_FIELDS = {
    "batched_fc1_w": "w1_EHC",
    "batched_fc1_bias": "b1_EH",
    "batched_fc2_w": "w2_ECH",
    "batched_fc2_bias": "b2_EC",
}
_STACKED = re.compile(rf"(.*{re.escape(LAYER)})experts\.({'|'.join(_FIELDS)})")
_OURS = re.compile(rf"(.*)\.deepspeed_moe\.experts\.{re.escape(EXPERT_KEY)}(\d+)\.(\w+)")
_ROUTER, _COUNT = "gates.0.wg.weight", "_num_global_experts"
_PART = re.compile(r"(.+)\.(?:rank(\d+)|master)")


def rank_files(path: Path) -> tuple[dict[int, Path], Path | None] | None:
    """Returns the files of a checkpoint by rank and the file of what all share, if there is one.

    Args:
        path: `NAME.pth`, where there is no such file, or one of the files themselves. None where `path` is neither.

    Raises:
        UserError: a rank is missing, or two files are of one.
    """
    if match := _PART.fullmatch(path.name):
        path = path.with_name(match[1])
    elif path.exists():
        return None
    ranks: dict[int, Path] = {}
    try:
        siblings = sorted(path.parent.iterdir())
    except OSError:
        return None
    for file in siblings:
        match = _PART.fullmatch(file.name)
        if match and match[1] == path.name and match[2]:
            other = ranks.setdefault(int(match[2]), file)
            if other != file:
                raise UserError(f"{other} and {file.name} are both of rank {match[2]}; remove either")
    if not ranks:
        return None
    if missing := [rank for rank in range(max(ranks)) if rank not in ranks]:
        raise UserError(
            f"{path} has files of {len(ranks)} ranks up to {max(ranks)}, without rank {_listed(missing)}; "
            "bring the missing files to the others"
        )
    master = path.with_name(f"{path.name}.master")
    return dict(sorted(ranks.items())), master if master.is_file() else None


def merge(path: Path, ranks: Sequence[Mapping[str, Tensor]], master: Mapping[str, Tensor] | None) -> State:
    """Returns one state of all processes' files: stacked experts under their global ids, and all else once.

    Args:
        path: for messages.
        ranks: what the files hold, in the order of ranks.
        master: what all processes share, where it has a file of its own.

    Raises:
        UserError: the files are not of one training, one is there twice, or they hold not as many experts as the gates
            choose from.
    """
    experts = [{key: x for key, x in state.items() if _STACKED.fullmatch(key)} for state in ranks]
    shared = dict(master or ())
    for rank, state in enumerate(ranks):
        for key in state.keys() - experts[rank].keys():
            if not _same(shared.setdefault(key, state[key]), state[key]):
                raise UserError(
                    f"{path}.rank{rank} has another '{key}' than the files before it; all ranks of one training share "
                    "it: bring files of one checkpoint together"
                )
    _check_alike(path, experts)
    merged = shared | {key: torch.cat([state[key] for state in experts]) for key in experts[0]}
    for prefix in sorted({match[1] for key in experts[0] if (match := _STACKED.fullmatch(key))}):
        _join_shards(path, prefix, merged, len(ranks))
        _check_copies(path, f"{prefix}experts.batched_fc1_w", experts, merged[f"{prefix}experts.batched_fc1_w"])
    return merged


def _check_alike(path: Path, experts: Sequence[Mapping[str, Tensor]]) -> None:
    first = experts[0]
    if not first:
        raise UserError(f"{path}.rank0 holds no experts of Swin-MoE (no '…{LAYER}experts.batched_fc1_w')")
    for rank, state in enumerate(experts):
        if wrong := sorted(first.keys() ^ state.keys()):
            raise UserError(f"{path}.rank{rank} has other experts than rank 0: {_listed(wrong)} is in one of them")
        for key in first:
            if not state[key].ndim or (state[key].shape, state[key].dtype) != (first[key].shape, first[key].dtype):
                raise UserError(
                    f"'{key}' is {tuple(state[key].shape)} in {path}.rank{rank} and {tuple(first[key].shape)} in "
                    "rank 0; all ranks of one training have as many experts of one size: bring its files together"
                )


def _check_copies(path: Path, weight: str, experts: Sequence[Mapping[str, Tensor]], merged: Tensor) -> None:
    """Refuses files that are copies of another one; but all experts may be equal, as after sparse upcycling."""
    if len(merged) > 1 and all(torch.equal(one, merged[0]) for one in merged[1:]):
        return
    for rank, state in enumerate(experts):
        if (twin := next((i for i in range(rank) if torch.equal(experts[i][weight], state[weight])), None)) is not None:
            raise UserError(
                f"{path}.rank{rank} and rank {twin} hold the same experts; one is a copy of the other: bring the "
                f"file of rank {rank} or {twin} again"
            )


def _join_shards(path: Path, prefix: str, merged: State, ranks: int) -> None:
    """Brings the experts of a layer into the shapes of one process, where several processes share an expert."""
    many = _num_experts(prefix, merged)
    first, _ = _weights(prefix, merged)
    names = [f"{prefix}experts.{field}" for field in _FIELDS if f"{prefix}experts.{field}" in merged]
    here = len(first)
    if here != many and (here != ranks or ranks % many):
        raise UserError(
            f"the {ranks} files of {path} hold {here} experts of '{prefix.rstrip('.')}', whose gate chooses from "
            f"{many}; bring the files of all ranks of one training together"
        )
    for name in names:
        x = merged[name]
        merged[name] = x.reshape(many, -1, x.shape[-1]) if name.endswith("_w") else x.reshape(many, -1)
    if (bias := f"{prefix}experts.batched_fc2_bias") in merged:  # shards of it are padded
        merged[bias] = merged[bias][:, : merged[f"{prefix}experts.batched_fc2_w"].shape[-1]]


def _num_experts(prefix: str, state: Mapping[str, Tensor]) -> int:
    if any(key.startswith(f"{prefix}gates.0.") and key.endswith("sim_matrix") for key in state):
        raise UserError(
            f"'{prefix}gates.0' is a cosine router, and rmoe's gates are linear; give a Swin-MoE checkpoint whose "
            "name is without 'cosine_router'"
        )
    router = state.get(f"{prefix}{_ROUTER}")
    if router is None or router.ndim != 2 or not len(router):
        raise UserError(f"the checkpoint lacks '{prefix}{_ROUTER}' [experts, width]; bring the .master file to it")
    return len(router)


def to_ours(state: Mapping[str, Tensor]) -> tuple[State, Converted]:
    """Returns a merged state whose other names are timm's with experts and gates as a mixture of ours has them.

    Swin-MoE computes its relative position biases by a small network (`cpb_mlp`) of a fixed table of coordinates: its
    values become timm's table. Dense networks without a last bias get zeros.

    Raises:
        UserError: a cosine router, or weights that do not belong together.
    """
    found, converted = dict(state), Converted()
    for prefix in sorted({match[1] for key in state if (match := _STACKED.fullmatch(key))}):
        many, block = _num_experts(prefix, state), prefix.removesuffix(LAYER)
        first, second = _weights(prefix, state)
        if first.shape[:2] != second.shape[:2] or len(first) != many:
            raise UserError(
                f"the experts of '{prefix.rstrip('.')}' are {tuple(first.shape)} and {tuple(second.shape)}, for {many} "
                "that the gate chooses from; both begin with [experts, hidden]: bring the files of all ranks of one "
                "training together"
            )
        for field, name in _FIELDS.items():
            x = found.pop(f"{prefix}experts.{field}", None)
            if x is None:
                x = first.new_zeros(many, first.shape[1] if field == "batched_fc1_bias" else second.shape[2])
            x = x.mT if field == "batched_fc2_w" else x.reshape(many, -1) if field.endswith("_bias") else x
            for e in range(many):
                found[f"{block}.deepspeed_moe.experts.{EXPERT_KEY}{e}.{name}"] = x[e].contiguous()
        found[f"{block}.gate.weight"] = found.pop(f"{prefix}{_ROUTER}")
        if (bias := found.pop(f"{prefix}gates.0.wg.bias", None)) is not None:
            found[f"{block}.gate.bias"] = bias
        found.pop(f"{prefix}{_COUNT}", None)
        converted.setdefault("experts under global ids", []).append(block)
    for key in [key for key in state if key.endswith(".attn.cpb_mlp.0.weight")]:
        attn = key.removesuffix("cpb_mlp.0.weight")
        found[f"{attn}relative_position_bias_table"] = _position_table(attn, found)
        converted.setdefault("position biases computed", []).append(attn.rstrip("."))
    for key in [key for key in found if key.endswith(".mlp.fc2.weight")]:
        lacking = f"{key.removesuffix('weight')}bias"
        if lacking not in found:
            found[lacking] = found[key].new_zeros(len(found[key]))
            converted.setdefault("zeros for biases that it lacks", []).append(lacking)
    return found, converted


def _weights(prefix: str, state: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    first, second = (state.get(f"{prefix}experts.batched_fc{i}_w") for i in (1, 2))
    if first is None or second is None or first.ndim != 3 or second.ndim != 3:
        shapes = ["not there" if x is None else tuple(x.shape) for x in (first, second)]
        raise UserError(
            f"of the experts of '{prefix.rstrip('.')}', batched_fc1_w is {shapes[0]} and batched_fc2_w {shapes[1]}; "
            "both have three dimensions: give the checkpoint as Swin-MoE wrote it"
        )
    return first, second


def _position_table(attn: str, state: State) -> Tensor:
    """Returns timm's table [(2h-1)(2w-1), heads], and takes from `state` the network that computes it."""
    names = [f"cpb_mlp.{key}" for key in ("0.weight", "0.bias", "2.weight")]
    parts = [state.pop(f"{attn}{name}", None) for name in (*names, "relative_coords_table")]
    try:
        w1, b1, w2, coords = (x.double() for x in parts)  # type: ignore[union-attr]
        return ((coords.reshape(-1, 2) @ w1.mT + b1).relu() @ w2.mT).to(parts[0].dtype)  # type: ignore[union-attr]
    except (AttributeError, RuntimeError) as error:
        raise UserError(
            f"'{attn}cpb_mlp' and '{attn}relative_coords_table' do not belong together, or are not all there; give "
            "the checkpoint as Swin-MoE wrote it"
        ) from error


def to_theirs(state: Mapping[str, Tensor]) -> tuple[State, list[str]]:
    """Returns Swin-MoE's names, stacked, for a Swin mixture of ours with timm's names, and what a user must know.

    Raises:
        UserError: there are no experts that are networks of their own.
    """
    found, notes = dict[str, Tensor](), list[str]()
    experts = dict[str, dict[str, dict[int, Tensor]]]()
    for key, x in state.items():
        if match := _OURS.fullmatch(key):
            experts.setdefault(match[1], {}).setdefault(match[3], {})[int(match[2])] = x
        else:
            key = re.sub(r"^layers\.(\d+)\.downsample\.", lambda m: f"layers.{int(m[1]) - 1}.downsample.", key)
            found[re.sub(r"^head\.fc\.", "head.", key)] = x
    kinds = [set(fields) == set(_FIELDS.values()) for fields in experts.values()]
    if not experts or not all(kinds) or any(f"{block}.core.fc1.weight" in found for block in experts):
        raise UserError(
            "the checkpoint holds no experts that are networks of their own, which are all that Swin-MoE has; give "
            "a mixture with residual='experts'"
        )
    for block, fields in experts.items():
        for theirs, ours in _FIELDS.items():
            x = torch.stack([fields[ours][e] for e in sorted(fields[ours])])
            found[f"{block}{LAYER}experts.{theirs}"] = (x.mT if ours == "w2_ECH" else x).contiguous()
        found[f"{block}{LAYER}{_ROUTER}"] = found.pop(f"{block}.gate.weight")
        found[f"{block}{LAYER}{_COUNT}"] = torch.tensor(len(fields["w1_EHC"]))
        bias, choice = (found.pop(f"{block}.gate.{name}", None) for name in ("bias", "choice_bias"))
        if bias is not None and bias.any():
            found[f"{block}{LAYER}gates.0.wg.bias"] = bias
            notes.append(
                f"'{block}{LAYER}gates.0.wg.bias' is not zero: Tutel's router needs bias=True to compute the same"
            )
        if choice is not None and choice.any():
            notes.append(f"'{block}.gate.choice_bias' (of balance_rate) is left out: Tutel's router has none")
    return found, notes


def split(state: Mapping[str, Tensor], ranks: int) -> tuple[list[State], State]:
    """Returns the experts of each of `ranks` processes, as `merge` takes them, and what all share.

    Raises:
        UserError: neither divides the other, the number of experts and that of processes, or the hidden width does not
            divide into so many parts.
    """
    shared = {key: x for key, x in state.items() if not _STACKED.fullmatch(key)}
    parts = [State() for _ in range(ranks)]
    for key, x in state.items():
        if not _STACKED.fullmatch(key):
            continue
        many, share = len(x), ranks // len(x)
        if many % ranks and ranks % many:
            raise UserError(
                f"{many} experts cannot be spread over {ranks} files; use a divisor or a multiple of {many}"
            )
        if share > 1:
            if x.shape[1] % share and not key.endswith("fc2_bias"):
                raise UserError(f"'{key}' has {x.shape[1]} hidden units, which {share} files cannot share; use fewer")
            x = torch.nn.functional.pad(x, (0, -x.shape[1] % share)) if key.endswith("fc2_bias") else x
            x = x.unflatten(1, (share, -1)).flatten(0, 1)
        for part, own in zip(parts, x.chunk(ranks), strict=True):
            part[key] = own.clone()
    return parts, shared


def _same(x: Tensor, y: Tensor) -> bool:
    return x.shape == y.shape and x.dtype == y.dtype and torch.equal(x, y)


def _listed(items: Sequence[object]) -> str:
    return ", ".join(map(str, items[:3])) + (f" and {len(items) - 3} more" if len(items) > 3 else "")
