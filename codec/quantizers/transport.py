"""Optimal transport between latents and the entries of a codebook: every entry gets its share of all the latents.

Shapes: N latents of this process, C entries, d dims. Latents weigh alike. Those of all processes count as one batch, so
every process must call these functions alike, with N = 0 where it has none.

Entropic transport divides the latents' mass among the entries so that each gets a given share, at a low cost, the mean
square distance over dims: P minimises <P, cost> + s KL(P | product of the shares). Its smoothness s is `epsilon` times
half the range of all costs, which makes one epsilon fit the residuals of every stage. Sinkhorn's iterations find it.

Memory: 20 N C bytes at the peak, 250 MB for 12,000 latents and 1024 entries.

Source: Cuturi, "Sinkhorn distances" (2013); Asano et al., "Self-labelling via simultaneous clustering and
representation learning" (2020), for equal shares as pseudo-labels; Zhan et al., "Learning discrete representations via
constrained clustering for effective and efficient dense retrieval" (RepCONC, 2022), and as published,
https://github.com/jingtaozhan/RepCONC, for the scale of costs; Vuong et al., "Vector quantized Wasserstein
auto-encoder" (VQ-WAE, 2023), for transport as a loss.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed
from torch import Tensor
from torch.distributed import ReduceOp

# Scaled costs span 2 / epsilon. From this value on no factor below leaves the range of float64, exp(-708) to exp(709),
# however uneven the latents are: with column factors of at most 1, all lie within exp(2 / epsilon) times N C.
LEAST_EPSILON = 0.003


@dataclass(frozen=True)
class Plan:
    """A transport plan P [N, C] in factors: rows * exp((cheapest - costs) / scale) * columns. All float64.

    Every latent's mass is given away exactly, whatever the number of iterations; the shares of entries are what
    iterations bring nearer to those that were asked for. `potentials_C` is the derivative of the cost with respect to
    these shares, up to a constant. `value` is the dual estimate of the entropic cost, a lower bound of it.
    """

    kernel_NC: Tensor
    row_factors_N: Tensor
    column_factors_C: Tensor
    potentials_C: Tensor
    value: Tensor

    def codes(self) -> Tensor:
        """The entry that gets most of each latent, int64 [N]; the lowest of equal ones."""
        return (self.kernel_NC * self.column_factors_C).max(dim=1).indices

    def mass(self) -> Tensor:
        """P itself [N, C], whose sum over all processes is 1."""
        return (self.kernel_NC * self.column_factors_C).mul_(self.row_factors_N[:, None])


@torch.no_grad()
def plan_transport(
    latents_Nd: Tensor, entries_Cd: Tensor, shares_C: Tensor, *, epsilon: float, num_iterations: int
) -> Plan:
    """The entropic plan from latents to entries, whose shares are positive and add up to 1; no gradient."""
    if epsilon < LEAST_EPSILON or num_iterations < 1:
        raise ValueError(f"epsilon must be at least {LEAST_EPSILON} and num_iterations positive")
    with torch.autocast(latents_Nd.device.type, enabled=False):
        costs_NC = torch.addmm(entries_Cd.square().sum(1), latents_Nd, entries_Cd.t(), alpha=-2)
        costs_NC.add_(latents_Nd.square().sum(1, keepdim=True)).div_(latents_Nd.shape[1])
        # The costs of an entry to latents and of a latent to entries may be shifted as one likes: they need no centre.
        none = costs_NC.new_full((1,), -torch.inf)
        dearest = torch.cat([none, costs_NC.flatten().max(0, keepdim=True).values if len(costs_NC) else none]).max()
        cheapest_N = costs_NC.min(1).values
        range_2 = _reduced(torch.stack([dearest, -torch.cat([-none, cheapest_N]).min()]), ReduceOp.MAX).double()
        scale = epsilon * (range_2.sum() / 2).clamp_min(1e-20)
        kernel_NC = costs_NC.neg_().add_(cheapest_N[:, None]).double().div_(scale).exp_()

        shares_C, total = shares_C.double(), _reduced(range_2.new_full((), len(latents_Nd)))
        mass_of_one = 1.0 / total.clamp_min(1.0)
        row_factors_N = mass_of_one.expand(len(latents_Nd))
        ratios_C = torch.ones_like(shares_C)
        for _ in range(num_iterations):
            reached_C = _reduced(kernel_NC.t() @ row_factors_N)
            ratios_C = 1.0 / reached_C.clamp_min(1e-300)  # 0 where there are no latents at all
            ratios_C = ratios_C / ratios_C.max()
            row_factors_N = mass_of_one / (kernel_NC @ (shares_C * ratios_C))
        potentials_C = scale * ratios_C.log()
        potentials_N = scale * (row_factors_N / mass_of_one).log() + cheapest_N
        value = _reduced(potentials_N.sum()) * mass_of_one + (shares_C * potentials_C).sum()
    return Plan(kernel_NC, row_factors_N, shares_C * ratios_C, potentials_C, value)


def balanced_codes(latents_Nd: Tensor, entries_Cd: Tensor, *, epsilon: float, num_iterations: int) -> Tensor:
    """Codes int64 [N] that use all entries about equally, at a low cost: the most likely entry of each latent's plan.

    As epsilon falls and iterations grow, they become the equal division of least cost.
    """
    shares_C = _uniform(entries_Cd)
    return plan_transport(latents_Nd, entries_Cd, shares_C, epsilon=epsilon, num_iterations=num_iterations).codes()


def transport_loss(
    latents_Nd: Tensor, entries_Cd: Tensor, shares_C: Tensor, *, epsilon: float, num_iterations: int
) -> Tensor:
    """The entropic cost of bringing the latents to the entries, a scalar with gradients to all three.

    The gradient is that of the cost under the plan as it stands, and for the shares the potentials: by the envelope
    theorem that is exact where the iterations have converged, and costs no backward pass through them. Unlike the
    nearest entry's, it reaches every entry.

    In all processes the value is that of all latents; gradients are scaled so that their mean over processes is right.
    """
    plan = plan_transport(
        latents_Nd.detach(), entries_Cd.detach(), shares_C.detach(), epsilon=epsilon, num_iterations=num_iterations
    )
    with torch.autocast(latents_Nd.device.type, enabled=False):
        mass_NC = plan.mass().to(latents_Nd.dtype)
        # Of sum P |z - e|^2, whose terms with z are sum_n p_n |z_n|^2 - 2 z_n . sum_c P_nc e_c; those with e likewise.
        latents_part = mass_NC.sum(1) @ latents_Nd.square().sum(1)
        latents_part = latents_part - 2 * (latents_Nd * (mass_NC @ entries_Cd.detach())).sum()
        entries_part = mass_NC.sum(0) @ entries_Cd.square().sum(1)
        entries_part = entries_part - 2 * (entries_Cd * (mass_NC.t() @ latents_Nd.detach())).sum()
        own = (latents_part + entries_part) * (_num_processes() / latents_Nd.shape[1])
        leading = own + shares_C @ plan.potentials_C.to(shares_C.dtype)
        return plan.value.to(latents_Nd.dtype) + (leading - leading.detach())


def _uniform(entries_Cd: Tensor) -> Tensor:
    return entries_Cd.new_full((len(entries_Cd),), 1.0 / len(entries_Cd))


def _reduced(values: Tensor, op: ReduceOp.RedOpType = ReduceOp.SUM) -> Tensor:
    """Of all processes, in place."""
    if _num_processes() > 1:
        torch.distributed.all_reduce(values, op)
    return values


def _num_processes() -> int:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return 1
    return torch.distributed.get_world_size()
