"""A mixture of experts on one device: each token goes through the few experts that its router chooses.

Tokens of one expert run as one product, so that its weights are read once. A token's result does not depend on who
goes with it: products keep rows apart (`linear`), and the outputs of its experts are added one by one, in the order of
the experts' numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from springtide.engine import expert_kernels
from springtide.engine.jit import as_numpy, launch
from springtide.engine.layers import ACTIVATIONS
from springtide.engine.linear import Linear
from springtide.engine.models.config import Activation, Experts
from springtide.engine.models.decoder import Builder


class MixtureOfExperts:
    """`gate_up[e]` [2 * inner, hidden], gate above up, and `down[e]` [hidden, inner] are expert e's."""

    def __init__(
        self,
        experts: Experts,
        router: Linear,
        gate_up: Sequence[Linear],
        down: Sequence[Linear],
        activation: Activation = "silu",
    ) -> None:
        self._experts = experts
        self._router = router
        self._gate_up, self._down = gate_up, down
        self._activate = ACTIVATIONS[activation]

    def __call__(self, x: Tensor) -> Tensor:
        """[rows, hidden] -> [rows, hidden]"""
        chosen, weights = choose(self._router(x), self._experts)
        total = torch.zeros_like(x, dtype=torch.float32)
        for expert, picks in enumerate(_picks(chosen, self._experts.count)):
            if len(picks):
                rows = picks // self._experts.per_token
                outputs = self._down[expert](self._activate(self._gate_up[expert](x[rows])))
                total[rows] += weights.view(-1, 1)[picks] * outputs
        return total.to(x.dtype)

    def products(self) -> dict[str, Linear]:
        return {"router": self._router, "expert_gate_up": self._gate_up[0], "expert_down": self._down[0]}


def choose(scores: Tensor, experts: Experts) -> tuple[Tensor, Tensor]:
    """From the router's `scores` [rows, experts] to each row's experts, best first, int64 [rows, per_token], and their
    weights, float32 of the same shape. Of equal scores that of the lower number wins."""
    chosen = torch.empty(len(scores), experts.per_token, dtype=torch.int64)
    weights = torch.empty(len(scores), experts.per_token, dtype=torch.float32)
    work = scores.numel() * experts.per_token
    launch(expert_kernels.choose_experts, work, as_numpy(scores), experts.renormalise, chosen.numpy(), weights.numpy())
    return chosen, weights


def _picks(chosen: Tensor, count: int) -> Sequence[Tensor]:
    """For each expert the places in `chosen`, counted row by row, where it stands."""
    flat = chosen.flatten()
    return torch.split(flat.argsort(stable=True), flat.bincount(minlength=count).tolist())


def separate_experts(
    build: Builder,
    within: str = "mlp.",
    *,
    router: str = "gate",
    gate: str = "gate_proj",
    up: str = "up_proj",
    down: str = "down_proj",
    bias: bool = False,
    activation: Activation = "silu",
) -> MixtureOfExperts:
    """A mixture from a checkpoint in which each expert has matrices of its own, below `{within}experts.{number}.`."""
    experts, hidden = build.layer.experts, build.config.hidden_size
    assert experts is not None
    inner, places = experts.intermediate_size, [f"{within}experts.{number}." for number in range(experts.count)]
    return MixtureOfExperts(
        experts,
        build.linear(within, {router: experts.count}, hidden, bias=bias),
        [build.linear(place, {gate: inner, up: inner}, hidden, bias=bias) for place in places],
        [build.linear(place, {down: hidden}, inner, bias=bias) for place in places],
        activation,
    )
