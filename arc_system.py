"""The five modules of a run, built from one configuration, and the way data takes through them.

demonstrations -> prompt -> answer -> a proposal and a changed prompt -> answer. Training, test-time
training and prediction take the same pass, `System.answer_twice`, so what is scored is what was
trained. No losses, no files; targets enter `System.reward` alone.
`from arc_system import build_system`.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from arc_agent import AgentConfig, AgentOutput, ArcAgent, Proposal, Sight
from batches import Batch, Targets
from grid_accuracy_loss import (
    copied_share,
    resize_grids,
    resize_logits,
    size_mask,
    weighted_cell_mean,
)
from grid_features import N_CONTROL
from grid_parts import COLOURS, MAX_SIDE
from language_model import TINY
from loss_function import EFELoss, expected_steps
from policy_refined import PolicyInfo, RefinedPolicy
from proposal_policy import ARM_FACTS, Choice, acceptable, candidates_of
from qwen_hybrid_prompt import Prompt, QwenHybridPrompt, build_qwen_prompt, context_of_next_task
from ranks import Draws
from reward_shaping import Scores
from size_rules import N_INPUT_CANDIDATES, N_SIZE_CANDIDATES
from solver2 import Solver2

# At prediction, planning ends for a query whose expected share of right cells reaches this
# (measured on training demonstrations, see docs/LOG.md).
STOP_CONFIDENCE = 0.8
ONE_THREAD_WIDTH = 256  # channels of the agent, beside the tiny language model
IN_BLOCKS = ("blocks.", "encoder.", "demonstrations.")  # of the agent's weights: those of blocks


def takes_one_thread(qwen_model: str, width: int) -> bool:
    """Whether more than one CPU thread make no batch quicker: they wait for each other at every
    small operation (docs/PERFORMANCE.md). qwen_model: a name, a folder or a hub id, not "auto"."""
    return qwen_model == TINY and width <= ONE_THREAD_WIDTH


@dataclass(frozen=True)
class SystemConfig:
    """Everything that a user decides about which weights a run has; written to config.json, read
    by predict."""

    width: int = 96
    heads: int = 2
    blocks: int = 1
    encoder_blocks: int = 1
    planning_steps: int = 5
    n_tasks: int = 1000
    qwen_model: str = "tiny"
    qwen_train: str = "auto"
    qwen_cache_interval: int = 1
    demonstrations: str = "on"
    prompt: str = "full"
    policy: str = "on"
    memory: bool = True
    task_tokens: bool = True
    efe_extras: bool = True
    hard_cells: bool = True
    stop_confidence: float = STOP_CONFIDENCE
    seed: int = 0


@dataclass
class Reading:
    """What is computed of a batch before any answer: prompt, encoded cells, pooled pairs.

    batch: as the ablation switches leave it.
    """

    batch: Batch
    prompt: Prompt
    sight: Sight
    summary: Tensor  # (Q, width) of the demonstrations' own prompt, before memory and task tokens
    pair_summary: Tensor | None  # (C, width) each demonstration's tokens, pooled
    inverse: Tensor | None  # (Q, R, pointers) rule from output to input; None: not fitted


@dataclass
class Refinement:
    """What the policy changed: the prompt's tokens (Q, L, width) and mask (Q, L), the proposed
    answers that the agent is to consider (None: for no query), what it decided, and by what it
    looked for tasks alike: the queries' `fingerprint` (Q, N_CONTROL)."""

    tokens: Tensor
    mask: Tensor
    proposal: Proposal | None
    info: PolicyInfo
    choice: Choice
    fingerprint: Tensor


@dataclass
class Pass:
    """What one pass gives: the agent's own answer, what the policy changed, the answer that stands.

    after: `before` with the answers of the queries `again` exchanged, `before` itself where there
    are none. refinement: None with the policy off. again (n,) int64: numbers of the queries that
    took a proposal and answered again, asked: the reading of these alone. everyone: the batch has
    no proposals and every query answered again, with its changed prompt alone (in training);
    `again` is empty then.
    """

    before: AgentOutput
    after: AgentOutput
    refinement: Refinement | None
    again: Tensor
    everyone: bool
    asked: Reading | None = None


@dataclass
class Answered(Pass):
    """A prediction, with the backward model's log-probabilities (n, rows, cols, 10) given each of
    the two answers, of the queries `again` in their order; None where there are none."""

    backward_before: Tensor | None = None
    backward_after: Tensor | None = None


@dataclass
class Rewarded:
    """A pass beside the targets, on their canvas: what loss, policy, memory and log take from it.

    target (Q, rows, cols) int64, -1 outside, and everywhere if the query's canvas cannot hold it:
    such a target trains the size, not the cells. logits (steps, Q, rows, cols, 10) and shown
    (Q, rows, cols): the answer that stands, resized to the target. size_right (Q,) bool. hard (Q,):
    what the policy is paid for the change, parts: its four differences by name; soft (Q,): the
    same in expectation, with gradient.
    """

    target: Tensor
    logits: Tensor
    shown: Tensor
    size_right: Tensor
    hard: Tensor
    parts: Scores
    soft: Tensor


@dataclass
class System:
    """The five modules. `demonstrations`, `prompt` and `policy` are the ablation switches of the
    configuration."""

    config: SystemConfig
    agent: ArcAgent
    qwen: QwenHybridPrompt
    solver2: Solver2
    efe_loss: EFELoss
    policy_rl: RefinedPolicy

    @property
    def one_thread(self) -> bool:
        """`takes_one_thread` of this system."""
        return takes_one_thread(self.config.qwen_model, self.config.width)

    def modules(self) -> dict[str, nn.Module]:
        """By the names a checkpoint uses."""
        return {
            "agent": self.agent,
            "qwen": self.qwen,
            "solver2": self.solver2,
            "efe_loss": self.efe_loss,
            "policy_rl": self.policy_rl,
        }

    def train(self, mode: bool = True) -> System:
        for module in self.modules().values():
            module.train(mode)
        return self

    def trained_parts(self) -> dict[str, list[nn.Parameter]]:
        """Every tensor that the main loss trains, exactly once, by part of the system.

        solver2: without the table of task tokens, which is a part of its own; refinement: of the
        policy what the main loss trains (the rest learns in its own update); qwen: the language
        model's own, none where it is frozen; qwen_heads: the projections behind it.
        """
        tokens = self.solver2.task_tokens.weight
        parts = {
            "agent": list(self.agent.parameters()),
            "solver2": [p for p in self.solver2.parameters() if p is not tokens],
            "task_tokens": list(self.solver2.task_tokens.parameters()),
            "refinement": self.policy_rl.main_parameters(),
            "qwen_heads": self.qwen.head_parameters(),
            "qwen": self.qwen.lm_parameters(),
        }
        return {name: [p for p in part if p.requires_grad] for name, part in parts.items()}

    def parameter_groups(
        self,
        agent_lr: float,
        qwen_lr: float,
        task_lr_factor: float,
        muon: bool,
        eight_bit: bool = False,
    ) -> list[dict[str, Any]]:
        """The trained parts as groups for `MuonAdamW`, by learning rate and by kind of optimizer.

        Each has name, params, lr and base_lr; empty ones are left out. Task tokens learn
        `task_lr_factor` times as fast as the agent and do not decay. muon: the agent's hidden
        matrices (2D, inside blocks) are a group for Muon; embeddings, heads, gains and Qwen are
        AdamW's. eight_bit: Qwen's own weights with moments in eight bits.
        """
        parts = self.trained_parts()
        hidden = {
            id(p)
            for name, p in self.agent.named_parameters()
            if p.ndim == 2 and name.startswith(IN_BLOCKS) and "null" not in name
        }
        matrices = [p for p in parts["agent"] if muon and id(p) in hidden]
        others = [p for p in parts["agent"] if not (muon and id(p) in hidden)]
        task_lr = agent_lr * task_lr_factor
        groups: list[dict[str, Any]] = [
            {"name": "agent_matrices", "params": matrices, "lr": agent_lr, "muon": True},
            {"name": "agent", "params": others, "lr": agent_lr},
            {"name": "solver2", "params": parts["solver2"], "lr": agent_lr},
            {
                "name": "task_tokens",
                "params": parts["task_tokens"],
                "lr": task_lr,
                "weight_decay": 0.0,
            },
            {"name": "refinement", "params": parts["refinement"], "lr": agent_lr},
            {"name": "qwen_heads", "params": parts["qwen_heads"], "lr": qwen_lr},
            {"name": "qwen", "params": parts["qwen"], "lr": qwen_lr},
        ]
        if eight_bit:
            groups[-1]["eight_bit"] = True
        return [{**group, "base_lr": group["lr"]} for group in groups if group["params"]]

    def read(
        self, batch: Batch, keep_task: Tensor | None = None, *, backwards: bool = True
    ) -> Reading:
        """Demonstrations -> prompt and encoded cells. keep_task (Q,) bool: use the task tokens;
        backwards: fit the rule from output to input, too, without which no `backward` is made."""
        batch = self._ablate(batch)
        prompt = self.qwen(batch)
        summary, prompt_of_pairs = prompt.summary, prompt.pairs
        if keep_task is None:
            keep_task = torch.ones_like(batch.task_index, dtype=torch.bool)
        if not self.config.task_tokens:
            keep_task = torch.zeros_like(keep_task)
        tokens, mask = self.solver2.tokens(batch.task_index, batch.view_id, keep_task, summary)
        prompt = prompt.extended(tokens.to(prompt.tokens.dtype), mask)
        pairs = prompt_of_pairs.mean(1) if prompt_of_pairs is not None else None
        sight = self.agent.look(batch, self.agent.read_demonstrations(batch))
        inverse = self.agent.backward_model.fit(batch) if backwards else None
        return Reading(batch, prompt, sight, summary, pairs, inverse)

    def retrieved(self, reading: Reading) -> Tensor:
        """Share of the queries whose prompt holds something of the memory, 0-dim float32."""
        memory = self.solver2
        if not memory.use_memory:
            return torch.zeros((), device=reading.prompt.mask.device)
        return reading.prompt.mask[:, -memory.n_retrieved :].any(1).float().mean()

    def answer(
        self,
        reading: Reading,
        refinement: Refinement | None = None,
        *,
        steps: int | None = None,
        stop: float | None = None,
    ) -> AgentOutput:
        """The agent's planning steps, after a refinement if one is given. steps: so many (training;
        None: all); stop: the confidence at which a query's planning ends (prediction; None: not
        before the last)."""
        prompt, proposal = reading.prompt, None
        if refinement is not None:
            proposal = refinement.proposal
            prompt = dataclasses.replace(prompt, tokens=refinement.tokens, mask=refinement.mask)
            if proposal is not None:  # what is proposed is said in the prompt, too
                token = self.agent.proposal_token(proposal.facts).unsqueeze(1)
                prompt = prompt.extended(token.to(prompt.tokens.dtype), proposal.given[:, None])
        return self.agent.plan(
            reading.batch, reading.sight, prompt, steps=steps, stop=stop, proposal=proposal
        )

    def refine(
        self,
        reading: Reading,
        before: AgentOutput,
        generator: Draws | None,
        *,
        deterministic: bool = False,
        allowed: Tensor | None = None,
    ) -> Refinement:
        """The policy looks at the first answer, chooses among the proposals and changes the prompt.

        before: of all Q queries of the reading. generator: of its draws; deterministic: it takes
        what it prefers, and without --policy random needs none. allowed (Q, A) bool: the proposals
        it may choose, of the A that the batch has. Raises ValueError where it has to draw and there
        is no generator.
        """
        prompt, batch, policy = reading.prompt, reading.batch, self.policy_rl
        stats, mode = answer_stats(before), self.config.policy
        prints = fingerprint(batch)
        recalled = self.solver2.recall(prints, batch.task_index)
        candidates = candidates_of(
            batch.proposed,
            batch.proposed_size,
            batch.proposed_facts,
            before.grids(),
            before.logits[-1],
            policy.state(prompt.summary, stats),
            recalled,
        )
        choice = policy.proposals.choose(
            candidates, generator, mode=mode, deterministic=deterministic, allowed=allowed
        )
        tokens, info = policy.refine(
            prompt.tokens,
            prompt.mask,
            prompt.summary,
            stats,
            generator,
            mode,
            deterministic=deterministic,
        )
        proposal = proposal_of(batch, choice.taken)
        return Refinement(tokens, prompt.mask, proposal, info, choice, prints)

    def answer_twice(
        self,
        reading: Reading,
        generator: Draws | None,
        *,
        prompt_alone: bool = True,
        deterministic: bool = False,
        allowed: Tensor | None = None,
        steps: int | None = None,
        stop: float | None = None,
    ) -> Pass:
        """The one pass: the agent answers, the policy refines, who took a proposal answers again.

        generator, deterministic and allowed (Q, A) bool: of `refine`; steps and stop: of `answer`,
        for both answers.
        prompt_alone: what happens in a batch without any proposal. True (training): every query
        answers again with its changed prompt, and the first answer has no gradient, as the second
        one learns for it. False (prediction): the first answers stand. Elsewhere a first answer
        keeps its gradient, and it stands where no proposal was taken. Raises ValueError where the
        policy has to draw and there is no generator.
        """
        refining = self.config.policy != "off"
        everyone = prompt_alone and refining and not reading.batch.proposed.shape[1]
        with torch.set_grad_enabled(torch.is_grad_enabled() and not everyone):
            before = self.answer(reading, steps=steps, stop=stop)
        nobody = torch.zeros(0, dtype=torch.long, device=before.size.device)
        if not refining:
            return Pass(before, before, None, nobody, everyone)
        refinement = self.refine(
            reading, before, generator, deterministic=deterministic, allowed=allowed
        )
        if everyone:
            after = self.answer(reading, refinement, steps=steps, stop=stop)
            return Pass(before, after, refinement, nobody, everyone)
        again = nobody
        if refinement.proposal is not None:
            again = refinement.proposal.given.nonzero().squeeze(-1)
        if not len(again):
            return Pass(before, before, refinement, nobody, everyone)
        asked = rows_of(reading, again)
        second = self.answer(asked, rows_of(refinement, again), steps=steps, stop=stop)
        return Pass(before, put_rows(before, again, second), refinement, again, everyone, asked)

    def backward(self, reading: Reading, output: AgentOutput) -> Tensor:
        """The backward model's log-probabilities (Q, rows, cols, 10) over the inputs, given the
        agent's answer as it is, in probabilities. Gradient reaches answer and prompt; the backward
        model's weights never learn to excuse a wrong one."""
        colours = output.logits[-1].exp()
        return self._backward(reading, colours, output.size, learn=False)

    def backward_of(self, reading: Reading, grids: Tensor, size: Tensor) -> Tensor:
        """The same of grids (Q, H, W) with the given sizes (Q, 2). The backward model learns here:
        in training the grids are the true outputs, at prediction the answers handed in."""
        colours = one_hot(grids.long().clamp(min=0), COLOURS).float()
        return self._backward(reading, colours, size, learn=True)

    def _backward(self, reading: Reading, colours: Tensor, size: Tensor, *, learn: bool) -> Tensor:
        assert reading.inverse is not None, "read with backwards=True"
        summary = reading.prompt.summary
        return self.agent.backward_logits(
            reading.batch, colours, size, summary, reading.inverse, learn=learn
        )

    def backward_both(self, reading: Reading, passed: Pass) -> tuple[Tensor, Tensor]:
        """`backward` of the first answers, a constant, and of those that stand: each
        (Q, rows, cols, 10). A first answer that stands is read once."""
        before, again = passed.before, passed.again
        with torch.no_grad():
            if passed.everyone:
                first = self.backward(reading, before)
            elif passed.asked is not None:
                first = self.backward(passed.asked, rows_of(before, again))
        after = self.backward(reading, passed.after)
        if passed.everyone:
            return first, after
        both = after.detach()
        return (both.index_copy(0, again, first) if len(again) else both), after

    def reward(
        self,
        reading: Reading,
        passed: Pass,
        targets: Targets,
        backward: tuple[Tensor, Tensor] | None = None,
    ) -> Rewarded:
        """What the policy's change of the answers earned, beside the targets; see `Rewarded` for
        shapes.

        passed and targets: of the reading's Q queries. Answers of another size are resized to the
        target's: nearest for colours, bilinear for logits. d_size takes the sizes as the model
        itself predicted them. backward: from `backward_both`; without it d_rev is 0, and so is the
        soft reward. Raises nothing of its own: a wrong number of queries is torch's error.
        """
        before, after = passed.before, passed.after
        canvas = (targets.output.shape[1], targets.output.shape[2])
        target = targets.output.masked_fill(~targets.fits[:, None, None], -1)
        grids_before, grids_after = before.grids(), after.grids()
        shown = resize_grids(grids_after, after.size, targets.size, canvas)
        logits = resize_logits(after.logits, after.size, targets.size, canvas)
        inp, inp_size = reading.batch.query_input, reading.batch.query_input_size
        read_back: dict[str, Tensor] = {}
        if backward is not None:
            backward_before, backward_after = backward
            with torch.no_grad():
                logits_before = resize_logits(before.logits[-1], before.size, targets.size, canvas)
            copied_before = copied_share(before.logits[-1].exp(), before.size, inp, inp_size)
            copied_after = copied_share(after.logits[-1].exp(), after.size, inp, inp_size)
            read_back = {
                "reconstruction_before": backward_before.argmax(-1),
                "reconstruction_after": backward_after.argmax(-1),
                "copied_before": copied_before.detach(),
                "copied_after": copied_after.detach(),
            }
        hard, parts = self.policy_rl.compute_reward(
            grids_before,
            grids_after,
            target,
            inp,
            size_before=before.size,
            size_after=after.size,
            target_size=targets.size,
            **read_back,
        )
        soft = torch.zeros_like(hard)
        if backward is not None:
            soft, _ = self.policy_rl.soft_reward(
                logits_before,
                logits[-1],
                target,
                size_logits_before=before.size_logits,
                size_logits_after=after.size_logits,
                target_size=targets.size,
                backward_logits_before=backward_before,
                backward_logits_after=backward_after,
                inp=inp,
                copied_before=copied_before,
                copied_after=copied_after,
            )
        size_right = (after.size == targets.size).all(-1)
        return Rewarded(target, logits, shown, size_right, hard, parts, soft)

    @torch.no_grad()
    def predict(
        self,
        batch: Batch,
        generator: torch.Generator,
        *,
        own_score: Tensor | None = None,
        accept: bool = True,
    ) -> Answered:
        """The agent's own answer to a batch, and the refined one; for evaluation. A query's
        planning ends at the step whose confidence reaches `config.stop_confidence`. Only queries
        with an accepted proposal answer again.

        own_score (Q,): mean share of right cells of the agent's own answers to the demonstrations,
        each predicted from the others, NaN = not measured; accept=False takes what the policy
        prefers without asking the demonstrations.
        """
        reading = self.read(batch, backwards=False)  # few answer again: fitted for those
        allowed = acceptable(batch.proposed_facts, own_score) if accept else None
        stop = self.config.stop_confidence if self.config.stop_confidence < 1 else None
        passed = self.answer_twice(
            reading, generator, prompt_alone=False, deterministic=True, allowed=allowed, stop=stop
        )
        answered = Answered(**vars(passed))
        again = passed.again
        if passed.asked is not None:
            passed.asked.inverse = self.agent.backward_model.fit(passed.asked.batch)
            answered.backward_before, answered.backward_after = (
                self.backward_of(passed.asked, a.grids(), a.size)
                for a in (rows_of(passed.before, again), rows_of(passed.after, again))
            )
        return answered

    def _ablate(self, batch: Batch) -> Batch:
        """`demonstrations` off or shuffled takes them away from Qwen, from the agent's view of
        their cells and from the size rules, and the hypotheses fitted to them. What is left of them
        is the bound of the canvas. (`prompt` null or shuffled takes away the prompt tokens
        alone.)"""
        if self.config.demonstrations == "off":
            context = torch.full_like(batch.context, -1)
        elif self.config.demonstrations == "shuffled":
            context = context_of_next_task(batch)
        else:
            return batch
        # another task's context may hold more than any of the batch's own
        seen = context.shape[1] * max(rows * cols for rows, cols in batch.demo_rooms)
        candidates = batch.size_candidates.clone()
        candidates[..., N_INPUT_CANDIDATES:] = 0  # rules read off the demonstrations
        support = torch.zeros_like(batch.size_support)
        return dataclasses.replace(
            batch,
            context=context,
            most_seen=seen,
            size_candidates=candidates,
            size_support=support,
            proposed_size=torch.zeros_like(batch.proposed_size),
        )


def fingerprint(batch: Batch) -> Tensor:
    """Mean control features (Q, N_CONTROL) of each query's demonstrations; 0 without any. No colour
    permutation changes them."""
    seen = (batch.context >= 0).unsqueeze(-1)
    control = batch.demo_control[batch.context.clamp(min=0)] if len(batch.demo_control) else None
    if control is None:
        return torch.zeros(len(seen), N_CONTROL, device=seen.device)
    return (control * seen).sum(1) / seen.sum(1).clamp(min=1)


def arms_right(batch: Batch, prints: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What `Solver2.store_arms` keeps of a batch of n whole tasks: fingerprints (n, N_CONTROL),
    owners (n,) int64, and per arm the share (n, arms) of the task's queries for which it was right,
    -1 where it proposed nothing.

    prints (Q, N_CONTROL) of the queries; right (Q, A) bool, which proposals were exact.
    """
    by_arm = batch.proposed_facts[..., ARM_FACTS]  # (Q, A, arms)
    there = by_arm.amax(1)
    hit = (by_arm * right.unsqueeze(-1)).amax(1)
    n, index = batch.n_tasks, batch.query_task

    def total(x: Tensor) -> Tensor:
        return torch.zeros(n, x.shape[1], device=x.device).index_add(0, index, x.float())

    n_queries = total(torch.ones_like(index)[:, None]).clamp(min=1)
    tried = total(there)
    share = torch.where(tried > 0, total(hit) / tried.clamp(min=1), -1.0)
    owner = torch.full((n,), -1, dtype=torch.long, device=index.device)
    owner[index] = batch.task_index
    return total(prints) / n_queries, owner, share


def proposal_of(batch: Batch, taken: Tensor) -> Proposal | None:
    """The proposals chosen, taken (Q,): 0 = none, else number + 1; None where no query has any to
    choose from."""
    if not batch.proposed.shape[1]:
        return None
    row = torch.arange(len(taken), device=taken.device)
    number = (taken - 1).clamp(min=0)
    given = taken > 0
    size = batch.proposed_size[row, number] * given[:, None]
    colours = batch.proposed[row, number].long()
    colours = torch.where(given[:, None, None] & (colours < COLOURS), colours, -1)
    return Proposal(colours, size, batch.proposed_facts[row, number] * given[:, None])


_OUTPUT_AXES = {"logits": 1, "size_logits": 0, "size": 0, "confidence": 1, "n_steps": 0}


@overload
def rows_of(x: Reading, rows: Tensor) -> Reading: ...
@overload
def rows_of(x: Refinement, rows: Tensor) -> Refinement: ...
@overload
def rows_of(x: AgentOutput, rows: Tensor) -> AgentOutput: ...
def rows_of(
    x: Reading | Refinement | AgentOutput, rows: Tensor
) -> Reading | Refinement | AgentOutput:
    """The given queries (n,) of an AgentOutput, or what answering needs of a Reading or a
    Refinement."""
    if isinstance(x, AgentOutput):
        return AgentOutput(
            **{k: getattr(x, k).index_select(a, rows) for k, a in _OUTPUT_AXES.items()}
        )
    if isinstance(x, Refinement):
        p = x.proposal
        some = None if p is None else Proposal(p.colours[rows], p.size[rows], p.facts[rows])
        return dataclasses.replace(x, tokens=x.tokens[rows], mask=x.mask[rows], proposal=some)
    sight = Sight(*(getattr(x.sight, f.name)[rows] for f in dataclasses.fields(Sight)))
    prompt = Prompt(x.prompt.tokens[rows], x.prompt.mask[rows])
    inverse = None if x.inverse is None else x.inverse[rows]
    return Reading(x.batch.select(rows), prompt, sight, x.summary[rows], None, inverse)


def put_rows(whole: AgentOutput, rows: Tensor, some: AgentOutput) -> AgentOutput:
    """`whole` with the given queries' answers (n,) exchanged for those of `some`."""
    return AgentOutput(
        **{
            k: getattr(whole, k).index_copy(a, rows, getattr(some, k))
            for k, a in _OUTPUT_AXES.items()
        }
    )


@torch.no_grad()
def answer_stats(output: AgentOutput) -> Tensor:
    """The figures of an answer that the policy's state takes in, (Q, N_STATS) float32, all about
    0..1; no target needed.

    In order: last confidence, cell entropy / log 10, mean largest probability, share of cells
    changed by the last step, expected steps, rows / 30, cols / 30, size entropy / log 30. The means
    over cells are of those inside the predicted size, 0 where there are none.
    """
    logits, size, size_logits = output.logits, output.size, output.size_logits
    grids = torch.where(size_mask(size, logits.shape[2], logits.shape[3]), 0, -1)
    p = logits[-1].float().softmax(dim=-1)
    entropy = torch.special.entr(p).sum(dim=-1) / math.log(p.shape[-1])
    changed = (logits[-1].argmax(dim=-1) != logits[max(len(logits) - 2, 0)].argmax(dim=-1)).float()
    size_entropy = torch.special.entr(size_logits.float().softmax(dim=-1)).sum(dim=-1).mean(dim=-1)
    return torch.stack(
        [
            output.confidence[-1].float().sigmoid(),
            weighted_cell_mean(entropy, grids),
            weighted_cell_mean(p.amax(dim=-1), grids),
            weighted_cell_mean(changed, grids),
            expected_steps(output.confidence),
            size[:, 0].float() / MAX_SIDE,
            size[:, 1].float() / MAX_SIDE,
            size_entropy / math.log(size_logits.shape[-1]),
        ],
        dim=-1,
    )


def build_system(
    config: SystemConfig,
    device: Any = "cpu",
    *,
    offline: bool = False,
    weights: bool = True,
    revision: str | None = None,
) -> System:
    """Build the modules; weights are a pure function of `config.seed`. Raises ModelError.

    weights=False: shapes alone, all on torch's device "meta", unless the language model is `tiny`.
    revision: of a hub's language model, default its newest.
    """
    qwen_mode = "null" if config.demonstrations == "off" else config.prompt
    qwen = build_qwen_prompt(
        config.qwen_model,
        width=config.width,
        n_control=N_CONTROL,
        train=config.qwen_train,
        device=device,
        offline=offline,
        seed=config.seed,
        cache_interval=config.qwen_cache_interval,
        mode=qwen_mode,
        revision=revision,
        weights=weights,
    )
    device = qwen.start_token.device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        agent = ArcAgent(
            AgentConfig(
                width=config.width,
                heads=config.heads,
                blocks=config.blocks,
                encoder_blocks=config.encoder_blocks,
                n_steps=config.planning_steps,
                n_size_candidates=N_SIZE_CANDIDATES,
            )
        )
        # A shuffled prompt is another task's: kept in memory under this one's name, it could come
        # back to its own task and bring a query its own pair.
        use_memory = config.memory and "shuffled" not in (config.prompt, config.demonstrations)
        solver2 = Solver2(config.n_tasks, config.width, use_memory=use_memory)
        generator = torch.Generator().manual_seed(config.seed)
        policy_rl = RefinedPolicy(config.width, generator=generator)
    efe_loss = EFELoss(hard_cells=config.hard_cells, extras=config.efe_extras)
    modules = (agent, solver2, efe_loss, policy_rl)
    for module in modules:
        module.to(device)
    return System(config, agent, qwen, solver2, efe_loss, policy_rl)
