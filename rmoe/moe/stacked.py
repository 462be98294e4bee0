"""The parameters of a layer's experts, of those that this process holds, and their names in a state dict."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rmoe.config import ResidualMoEConfig
from rmoe.moe.experts import KINDS, OF_A, Network, Residuals

EXPERT_KEY = "deepspeed_experts."  # what DeepSpeed calls its experts in a state dict


class StackedExperts(nn.Module):
    """Holds Δ of the experts of this process, one stacked parameter for each tensor of a network.

    In its state dict every expert stands alone, under the names that DeepSpeed gives its experts; what experts share
    (`shared_a`) stands there under its own name.

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
        self.scale = 1.0 if config.alpha is None else config.alpha / config.rank**0.5
        with torch.no_grad():
            every = self.kind.initial(config, core)
        self.shared = OF_A if config.shared_a else ()
        for name, x in every._asdict().items():
            part = x if name in self.shared else x[start : start + local]
            self.register_parameter(name, nn.Parameter(part.clone()))
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
        return self.kind(*(getattr(self, name) for name in self.kind._fields)).scaled(self.scale)

    def own(self) -> dict[str, nn.Parameter]:
        """Returns by name the parameters of which each expert has its own, stacked; they are saved expert by expert."""
        return {name: parameter for name, parameter in self.named_parameters() if name not in self.shared}

    def _pieces(self, name: str, x: Tensor) -> dict[str, Tensor]:
        """Returns a parameter as it stands in a state dict."""
        return {name: x} if name in self.shared else {f"{EXPERT_KEY}{e}.{name}": one for e, one in enumerate(x)}

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        for name, parameter in self._parameters.items():
            stacked = parameter if keep_vars else parameter.detach()  # type: ignore[union-attr]
            destination.update({prefix + key: x for key, x in self._pieces(name, stacked).items()})  # type: ignore[arg-type]

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
        for name, parameter in list(self.named_parameters()):
            pieces = {prefix + key: x for key, x in self._pieces(name, parameter.detach()).items()}
            known.update(pieces)
            found = {key: state_dict[key] for key in pieces if key in state_dict}
            missing_keys += [key for key in pieces if key not in found]
            wrong = [key for key, x in found.items() if x.shape != pieces[key].shape]
            error_msgs += [
                f"{key}: {tuple(found[key].shape)} in the file, {tuple(pieces[key].shape)} here" for key in wrong
            ]
            if parameter.is_meta and not assign:
                error_msgs.append(f"{prefix}{name} is on the meta device: use assign=True, or to_empty() first")
            elif not wrong and assign and len(found) == len(pieces):
                stacked = torch.stack([found[key].detach() for key in pieces]).view_as(parameter)
                self.register_parameter(name, nn.Parameter(stacked, requires_grad=parameter.requires_grad))
            elif not wrong:
                for key, x in found.items():
                    pieces[key].copy_(x)
        self._mark()
        unexpected_keys += [key for key in state_dict if strict and key.startswith(prefix) and key not in known]
