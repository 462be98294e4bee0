"""Defines the upper bound: a mixture of 8 experts, each of which is a network of its own from the start.

Top-1, the capacity and the place of the experts are those of Swin-MoE, whose published runs have 8 to 32 of them; the
softmax before the choice, the gate's noise and the weights of its losses are those of V-MoE (arXiv 2106.05974).

Configs take this key out of what they inherit and put it into their backbone: moe=_base_.pop("upper_bound").
"""

upper_bound = dict(
    num_experts=8,
    top_k=1,
    residual="experts",
    expert_init="random",
    combine="softmax",
    capacity_factor=1.25,
    noise=1.0,
    losses=dict(importance=0.005, load=0.005),
    ep_size=8,
)
