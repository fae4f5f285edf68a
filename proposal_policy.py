"""The choice among proposed answers: which explanation of the demonstrations the agent should
answer with.

A small network scores every proposal of a query, and keeping the agent's own answer, by what is
known without the query's output. It learns from groups of draws (advantage against the group's
other members), from hindsight (cross-entropy towards the best) and how likely each candidate is
exact. It knows nothing of rules or files and draws only from a generator it is given.
Import: ``from proposal_policy import ProposalPolicy``; ``choose`` before, ``learn`` after.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from grid_parts import COLOURS
from hypotheses import N_PROPOSAL_FACTS, PROPOSAL_FACTS
from ranks import Draws, draw_numbers

RELATION = (
    "is_kept", "same_size", "same_cells", "same_grid", "log_probability", "own_probability",
    "own_least", "recalled", "recall_known",
)  # fmt: skip
N_GROUP = 4  # draws a query, of which the first is carried out
HINDSIGHT_WEIGHT = 0.5
ENTROPY_WEIGHT = 0.01
REWARD_SCALE = 5.0  # as the other policy's
# Where learning starts: how likely an answer is exact by verdict, measured on demonstrations as
# queries (benchmarks/bench_hypotheses.py --leave_one_out: 42 of 47, 21 of 32, 5 of 20 and 13 of 97;
# untried and own are guesses).
PRIOR = {"full": 0.9, "half": 0.65, "some": 0.25, "none": 0.1, "untried": 0.03}
OWN_PRIOR = 0.2
_CELLS = PROPOSAL_FACTS.index("cells_right")
ARM_FACTS = slice(PROPOSAL_FACTS.index("arm_0"), N_PROPOSAL_FACTS)


@dataclass(frozen=True)
class Candidates:
    """What may be chosen for Q queries; number 0 is the agent's own answer, 1.. are proposals.

    facts (Q, A, N_PROPOSAL_FACTS), relation (Q, A + 1, len(RELATION)), state (Q, S), mask
    (Q, A + 1) bool.
    """

    facts: Tensor
    relation: Tensor
    state: Tensor
    mask: Tensor


@dataclass(frozen=True)
class Choice:
    """What was chosen, detached.

    drawn (Q, N_GROUP) long, or (Q, 1) without chance: numbers of candidates, the first is carried
    out; chance (Q, A + 1) float32 that each is exact.
    """

    candidates: Candidates
    drawn: Tensor
    chance: Tensor

    @property
    def taken(self) -> Tensor:
        """(Q,) long: 0 = the agent's own answer stays."""
        return self.drawn[:, 0]


@torch.no_grad()
def candidates_of(
    proposed: Tensor,
    size: Tensor,
    facts: Tensor,
    own: Tensor,
    own_logits: Tensor,
    state: Tensor,
    recalled: Tensor,
) -> Candidates:
    """Candidates from a batch's proposals and the agent's own answer.

    proposed (Q, A, H, W) uint8, above 9 outside; size (Q, A, 2), 0 = none; facts (Q, A, F);
    own (Q, H, W) colours, -1 outside; own_logits (Q, H, W, 10) log-probabilities; state (Q, S);
    recalled (Q, arms) how often each arm was right for tasks alike, negative where unknown.
    """
    n, n_offered = size.shape[:2]
    colour = proposed.long()
    inside = colour < COLOURS
    n_cells = inside.flatten(2).sum(-1)
    own_inside = own >= 0
    own_cells = own_inside.flatten(1).sum(-1, keepdim=True)
    same = ((own[:, None] == colour) & inside).flatten(2).sum(-1)
    share = same / torch.maximum(n_cells, own_cells).clamp(min=1)
    picked = own_logits.gather(-1, colour.clamp(max=COLOURS - 1).permute(0, 2, 3, 1))
    picked = picked.permute(0, 3, 1, 2).contiguous()  # summed in an order that A does not change
    picked = (picked * inside).flatten(2).sum(-1) / n_cells.clamp(min=1)
    best = own_logits.amax(-1)
    sure = (best * own_inside).flatten(1).sum(-1) / own_cells.squeeze(1).clamp(min=1)
    least = best.masked_fill(~own_inside, 0.0).flatten(1).amin(-1)
    shape_of_own = own_inside.any(2).sum(1), own_inside.any(1).sum(1)
    same_size = (size == torch.stack(shape_of_own, -1)[:, None]).all(-1)
    mask = functional.pad((size > 0).all(-1), (1, 0), value=True)
    relation = torch.zeros(n, n_offered + 1, len(RELATION), device=size.device)
    relation[:, 0, 0] = 1.0
    relation[:, 1:, 1] = same_size.float()
    relation[:, 1:, 2] = share
    relation[:, 1:, 3] = (share == 1.0).float()
    relation[:, 1:, 4] = picked.clamp(-5.0, 0.0) / 5.0
    relation[:, 0, 1:4] = 1.0
    relation[:, 0, 4] = sure.clamp(-5.0, 0.0) / 5.0
    relation[:, :, 5] = sure.exp()[:, None]
    relation[:, :, 6] = least.exp()[:, None]
    known = (recalled >= 0).any(-1, keepdim=True)
    by_arm = facts[..., ARM_FACTS] * recalled.clamp(min=0)[:, None]
    relation[:, 1:, 7] = by_arm.amax(-1)
    relation[:, 1:, 8] = known.float()
    relation = relation * mask.unsqueeze(-1)
    return Candidates(facts, relation, state.float(), mask)


def acceptable(facts: Tensor, own_score: Tensor | None) -> Tensor:
    """Which proposals may replace the agent's own answer at prediction, (Q, A) bool.

    facts (Q, A, F). Accepted where the demonstrations, each predicted from the others, come out
    better than by the agent: mean share of right cells above own_score (Q,), or all of them exact.
    own_score None or NaN: not measured, only the latter.
    """
    full = facts[..., 0] > 0
    if own_score is None:
        return full
    return full | (facts[..., _CELLS] > own_score[:, None])


def _log_odds(p: float) -> float:
    return math.log(p / (1.0 - p))


# Weights that the linear part starts from; those beside the log-odds keep the order of rule_list
# where verdicts tie.
START = {
    **{verdict: _log_odds(p) for verdict, p in PRIOR.items()},
    "is_kept": _log_odds(OWN_PRIOR), "rank": -4.0, "explains": 0.5, "n_rules": -1.0, "n_arms": 2.0,
}  # fmt: skip


class ProposalPolicy(nn.Module):
    """Scores candidates; has its own optimizer, stepped in `learn` alone.

    state_width: of `Candidates.state`. generator (CPU) draws the initial weights.
    """

    def __init__(
        self,
        state_width: int,
        *,
        hidden: int = 48,
        lr: float = 3e-3,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.candidate = nn.Linear(N_PROPOSAL_FACTS + len(RELATION), hidden)
        self.context = nn.Linear(state_width, hidden)
        self.out = nn.Linear(hidden, 2)  # preference, and log-odds of being exact
        for layer in (self.candidate, self.context, self.out):
            bound = 1.0 / math.sqrt(layer.in_features)
            nn.init.uniform_(layer.weight, -bound, bound, generator=generator)
            nn.init.zeros_(layer.bias)
        # Beside the hidden layer a linear one, which starts from verdicts and ranks (START).
        self.wide = nn.Linear(N_PROPOSAL_FACTS + len(RELATION), 2, bias=False)
        with torch.no_grad():
            self.out.weight.mul_(0.1)
            self.wide.weight.zero_()
            for name, odds in START.items():
                self.wide.weight[:, (*PROPOSAL_FACTS, *RELATION).index(name)] = odds
        self.optimizer = torch.optim.Adam(self.parameters(), lr=lr)

    def forward(self, candidates: Candidates) -> tuple[Tensor, Tensor]:
        """(log-probabilities of choosing, log-odds of being exact), both (Q, A + 1) float32."""
        facts = functional.pad(candidates.facts.float(), (0, 0, 1, 0))
        seen = torch.cat([facts, candidates.relation], dim=-1)
        x = functional.silu(self.candidate(seen) + self.context(candidates.state).unsqueeze(1))
        preference, sure = (self.out(x) + self.wide(seen)).unbind(-1)
        return preference.masked_fill(~candidates.mask, -1e4).log_softmax(-1), sure

    @torch.no_grad()
    def choose(
        self,
        candidates: Candidates,
        generator: Draws | None = None,
        *,
        mode: str = "on",
        deterministic: bool = False,
        allowed: Tensor | None = None,
    ) -> Choice:
        """A group of candidates a query, drawn from `generator`; deterministic: the preferred one.

        mode "on": as the network prefers; "random": all alike; "off": the agent's own.
        allowed (Q, A) bool: proposals that may be taken. Raises ValueError where a generator is
        needed and missing.
        """
        with torch.autocast(candidates.state.device.type, enabled=False):
            log_p, sure = self(candidates)
        mask = candidates.mask
        if allowed is not None:
            mask = torch.cat([mask[:, :1], mask[:, 1:] & allowed], dim=1)
        if mode == "random":
            log_p = torch.zeros_like(log_p)
        if mode == "off":
            log_p = torch.zeros_like(log_p)
            mask = torch.zeros_like(mask)
            mask[:, 0] = True
        log_p = log_p.masked_fill(~mask, -1e4)
        if deterministic and mode != "random":
            drawn = log_p.argmax(-1, keepdim=True)
        else:
            if generator is None:
                raise ValueError("sampling needs a torch.Generator (or deterministic=True)")
            drawn = draw_numbers(log_p.softmax(-1), N_GROUP, generator)
        return Choice(candidates, drawn, sure.sigmoid())

    def learn(self, choice: Choice, rewards: Tensor, exact: Tensor) -> dict[str, Tensor]:
        """One step of the own optimizer.

        rewards (Q, A + 1) of every candidate, 0 for the agent's own; exact (Q, A + 1) bool. Groups
        and queries whose rewards do not differ teach no choice. Returns 0-dim tensors:
        proposal_loss, proposal_entropy, group_zero_frac, proposal_best_frac (share of queries whose
        first draw was a best one), proposal_sure_loss.
        """
        candidates, drawn = choice.candidates, choice.drawn
        rewards = torch.where(candidates.mask, rewards.detach().float(), 0.0)
        with torch.enable_grad(), torch.autocast(rewards.device.type, enabled=False):
            log_p, sure = self(candidates)
            won = rewards.gather(1, drawn)
            n = drawn.shape[1]
            live = won.amax(1) > won.amin(1)
            advantage = (won - won.mean(1, keepdim=True)) * (n / max(1, n - 1))
            gained = (REWARD_SCALE * advantage * log_p.gather(1, drawn)).mean(1)
            best = rewards.masked_fill(~candidates.mask, -math.inf).amax(1, keepdim=True)
            is_best = candidates.mask & (rewards == best)
            differ = (candidates.mask & ~is_best).any(1)
            share = is_best.float() / is_best.sum(1, keepdim=True)
            hindsight = -(share * log_p).sum(1)
            entropy = -(log_p.exp() * log_p).sum(1)
            n_live, n_differ = live.sum().clamp(min=1), differ.sum().clamp(min=1)
            choosing = -(gained * live).sum() / n_live
            choosing = choosing + HINDSIGHT_WEIGHT * (hindsight * differ).sum() / n_differ
            sureness = functional.binary_cross_entropy_with_logits(
                sure, exact.float(), reduction="none"
            )
            sure_loss = (sureness * candidates.mask).sum() / candidates.mask.sum()
            loss = choosing - ENTROPY_WEIGHT * entropy.mean() + sure_loss
            self.optimizer.zero_grad(set_to_none=True)
            if bool(torch.isfinite(loss)):
                loss.backward()
                nn.utils.clip_grad_norm_(self.parameters(), 1.0)
                self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        first_is_best = is_best.gather(1, drawn[:, :1]).squeeze(1)
        return {
            "proposal_loss": choosing.detach(),
            "proposal_sure_loss": sure_loss.detach(),
            "proposal_entropy": entropy.detach().mean(),
            "group_zero_frac": 1.0 - live.float().mean(),
            "proposal_best_frac": first_is_best.float().mean(),
        }
