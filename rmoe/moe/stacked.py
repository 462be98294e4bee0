"""The parameters of a layer's experts, of those that this process holds, and their names in a state dict."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rmoe.config import ResidualMoEConfig
from rmoe.moe.experts import OF_A, Network, Residuals
from rmoe.moe.kinds import FIXED, KINDS, SHARED, Sparse

EXPERT_KEY = "deepspeed_experts."  # what DeepSpeed calls its experts in a state dict


class StackedExperts(nn.Module):
    """Holds Δ of the experts of this process, one stacked parameter for each tensor of a network.

    In its state dict every expert stands alone, under the names that DeepSpeed gives its experts; what experts share
    (`shared_a`, the support of sparse residuals) stands there under its own name.

    Args:
        config: of the layer.
        core: the dense network, whose shapes, device and dtype the experts have.
        start: global id of the first expert of this process.
    """

    def __init__(self, config: ResidualMoEConfig, core: Network, start: int) -> None:
        super().__init__()
        local = config.num_experts // config.ep_size
        # Drawn for all experts, so that an expert's weights do not depend on where it lives.
        self.kind = KINDS[config.residual]
        self.scale = config.scale
        with torch.no_grad():
            every = self.kind.initial(config, core)
        self.shared = (*SHARED, *(OF_A if config.shared_a else ()))
        for name, x in every._asdict().items():
            part = x if name in self.shared else x[start : start + local]
            part = part.clone(memory_format=torch.contiguous_format) if isinstance(x, Tensor) else part
            if isinstance(x, Tensor) and x.is_floating_point():
                self.register_parameter(name, nn.Parameter(part, requires_grad=name not in FIXED))
            elif isinstance(x, Tensor):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)
        self.group_name, self.spread = f"ep_size_{config.ep_size}", config.ep_size > 1
        self._mark()

    def _mark(self) -> None:
        """Gives parameters that only some processes hold the marks by which DeepSpeed knows experts."""
        for parameter in self.parameters() if self.spread else ():
            parameter.allreduce = False  # type: ignore[attr-defined]
            parameter.group_name = self.group_name  # type: ignore[attr-defined]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._mark()  # copies of a parameter lose its attributes

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        moved = super()._apply(*args, **kwargs)
        self._mark()  # so do those that leave the meta device
        return moved

    def residuals(self) -> Residuals:
        """Returns Δ of the experts of this process, stacked."""
        return self._kept().scaled(self.scale)

    def _kept(self) -> Any:
        return self.kind(*(getattr(self, name) for name in self.kind._fields))

    def _tensors(self) -> dict[str, Tensor]:
        """Returns by name what is saved, stacked."""
        return {**dict(self.named_parameters()), **dict(self.named_buffers())}

    def own(self) -> dict[str, nn.Parameter]:
        """Returns by name the parameters of which each expert has its own, stacked; they are saved expert by expert."""
        return {name: parameter for name, parameter in self.named_parameters() if name not in self.shared}

    def _pieces(self, name: str, x: Tensor) -> dict[str, Tensor]:
        """Returns a parameter as it stands in a state dict."""
        return {name: x} if name in self.shared else {f"{EXPERT_KEY}{e}.{name}": one for e, one in enumerate(x)}

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        for name, x in self._tensors().items():
            stacked = x if keep_vars else x.detach()
            destination.update({prefix + key: piece for key, piece in self._pieces(name, stacked).items()})

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        known, assign = set[str](), local_metadata.get("assign_to_params_buffers", False)
        for name, held in self._tensors().items():
            pieces = {prefix + key: x for key, x in self._pieces(name, held.detach()).items()}
            known.update(pieces)
            found = {key: state_dict[key] for key in pieces if key in state_dict}
            missing_keys += [key for key in pieces if key not in found]
            wrong = [key for key, x in found.items() if x.shape != pieces[key].shape]
            error_msgs += [
                f"{key}: {tuple(found[key].shape)} in the file, {tuple(pieces[key].shape)} here" for key in wrong
            ]
            if held.is_meta and not assign:
                error_msgs.append(f"{prefix}{name} is on the meta device: use assign=True, or to_empty() first")
            elif not wrong and assign and len(found) == len(pieces):
                stacked = torch.stack([found[key].detach() for key in pieces]).view_as(held)
                is_parameter = isinstance(held, nn.Parameter)
                setattr(self, name, nn.Parameter(stacked, held.requires_grad) if is_parameter else stacked)
            elif not wrong:
                for key, x in found.items():
                    pieces[key].copy_(x)
        self._mark()
        if isinstance(kept := self._kept(), Sparse) and not kept.places1_S.is_meta:
            kept.check()
        unexpected_keys += [key for key in state_dict if strict and key.startswith(prefix) and key not in known]
