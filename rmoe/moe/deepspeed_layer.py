"""The layer as DeepSpeed's engine knows it, so that ZeRO and clipping see which parameters only some processes hold."""

from __future__ import annotations

from deepspeed.moe.layer import MoE

from rmoe.moe.exchange import make_expert_groups
from rmoe.moe.layer import ResidualMoE


class SpreadResidualMoE(ResidualMoE, MoE):
    """Is a `ResidualMoE` whose residuals are spread over processes.

    It is never constructed, a layer becomes one: the constructor of `MoE` would build a gate of its own and a copy of
    the core for each expert.

    The engine asks of every `MoE` that experts of it are trained, and reduces the gradients of experts apart from all
    others; a layer whose experts are fixed, or are all in every process, stays an ordinary module.
    """

    # Switches of DeepSpeed's own mixture, whose residual is a dense network beside one expert (arXiv 2201.05596).
    use_residual = enable_expert_tensor_parallelism = False

    def _create_process_groups(self, use_data_before_expert_parallel_: bool = False) -> None:
        make_expert_groups(self.ep_size)
