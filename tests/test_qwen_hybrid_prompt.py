"""The hybrid prompt: text, leave-one-out, gradients, frozen weights, cache, ablations."""

from __future__ import annotations

import copy
import itertools
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import qwen_hybrid_prompt as hybrid
from batches import Batch
from language_model import ModelError, character_tokenizer
from qwen_hybrid_prompt import NoGradient, QwenHybridPrompt, build_qwen_prompt

ROOT = Path(hybrid.__file__).parent
N_CONTROL = 7
WIDTH = 24


def make_batch(tasks: list[list[tuple[tuple[int, int], tuple[int, int]]]], seed: int = 0) -> Batch:
    """Leave-one-out batch of random grids; ``tasks`` holds (input size, output size) per pair.

    What the prompt must not read is empty.
    """
    generator = torch.Generator().manual_seed(seed)
    sizes = list(itertools.chain.from_iterable(tasks))
    task = torch.tensor([n for n, pairs in enumerate(tasks) for _ in pairs])

    def grids(side: int) -> Tensor:
        height = max(pair[side][0] for pair in sizes)
        width = max(pair[side][1] for pair in sizes)
        out = torch.full((len(sizes), height, width), -1)
        for number, pair in enumerate(sizes):
            rows, cols = pair[side]
            out[number, :rows, :cols] = torch.randint(0, 10, (rows, cols), generator=generator)
        return out

    longest = max(len(pairs) for pairs in tasks)
    context = torch.full((len(sizes), max(longest - 1, 1)), -1)
    for query in range(len(sizes)):
        others = [c for c in range(len(sizes)) if c != query and task[c] == task[query]]
        context[query, : len(others)] = torch.tensor(others, dtype=torch.long)
    inputs, outputs = grids(0), grids(1)
    input_size = torch.tensor([pair[0] for pair in sizes])
    output_size = torch.tensor([pair[1] for pair in sizes])
    read: dict[str, Any] = {
        "demo_input": inputs,
        "demo_output": outputs,
        "demo_input_size": input_size,
        "demo_output_size": output_size,
        "own_input": inputs.clone(),
        "own_output": outputs.clone(),
        "own_input_size": input_size,
        "own_output_size": output_size,
        "demo_control": torch.rand(len(sizes), N_CONTROL, generator=generator),
        "demo_task": task,
        "query_task": task.clone(),
        "n_tasks": len(tasks),
        "context": context,
        "demo_rooms": [tuple(size) for size in output_size.tolist()],
        "most_seen": 1,
    }
    rest = {f.name: torch.zeros(0) for f in fields(Batch) if f.type == "torch.Tensor"}
    return Batch(**(rest | read))


def small_batch(seed: int = 0) -> Batch:
    """Two tasks, of three and of two demonstrations."""
    return make_batch(
        [[((3, 4), (2, 5)), ((4, 4), (4, 4)), ((2, 2), (6, 3))], [((5, 5), (1, 1))] * 2], seed
    )


def tiny(**settings: Any) -> QwenHybridPrompt:
    return build_qwen_prompt("tiny", **{"width": WIDTH, "n_control": N_CONTROL, **settings})


def pair_texts(module: QwenHybridPrompt, batch: Batch) -> list[str]:
    """What the language model reads for each pair, as text."""
    text = module._text(batch)
    return ["".join(module.table.texts[s] for s in row) for row in text.symbols.tolist()]


def scalar(module: QwenHybridPrompt, batch: Batch) -> Tensor:
    """A loss that weighs every prompt value differently."""
    tokens = module(batch).tokens
    weights = torch.linspace(-1, 1, tokens.numel()).reshape(tokens.shape).sin()
    return (tokens * weights).sum()


# ---- text ----------------------------------------------------------------------------------


def reference_text(batch: Batch, pair: int) -> str:
    """The text of a pair, written cell by cell."""
    text = ""
    for mark, grids, sizes in (
        ("I", batch.demo_input, batch.demo_input_size),
        ("O", batch.demo_output, batch.demo_output_size),
    ):
        rows, cols = sizes[pair].tolist()
        text += mark
        for row in range(rows):
            text += "".join(str(grids[pair, row, col].item()) for col in range(cols)) + "\n"
    return text


@pytest.mark.parametrize(
    "sizes",
    [
        [((1, 1), (1, 1))],
        [((30, 30), (30, 30))],
        [((1, 30), (30, 1)), ((1, 1), (30, 30)), ((7, 3), (2, 9))],
    ],
)
def test_text_is_digits_rows_and_marks(sizes: list[Any]) -> None:
    batch = make_batch([sizes])
    module = tiny()
    assert pair_texts(module, batch) == [reference_text(batch, p) for p in range(len(sizes))]
    prompt = module(batch)
    assert torch.isfinite(prompt.tokens).all()
    assert module.n_truncated == 0
    assert module.n_pairs == len(sizes)


def test_table_reads_back_as_the_text() -> None:
    batch = small_batch()
    module, tokenizer = tiny(), character_tokenizer()
    symbols = hybrid.encode_pairs(
        batch.demo_input, batch.demo_input_size, batch.demo_output, batch.demo_output_size
    )
    for pair, text in enumerate(pair_texts(module, batch)):
        ids = [module.table.ids[s] for s in symbols.symbols[pair, : symbols.lengths[pair]].tolist()]
        assert tokenizer.decode(ids) == text
        assert tokenizer.encode(text, add_special_tokens=False) == ids
    assert module.notes == ()


def test_a_long_pair_keeps_its_first_rows_and_is_counted() -> None:
    batch = make_batch([[((30, 30), (3, 30)), ((4, 4), (4, 4))]])
    module = tiny(max_tokens=200)
    texts = pair_texts(module, batch)
    # 3 rows of each are 2 + 6 * 31 = 188 tokens; a fourth input row would be 219.
    first = reference_text(batch, 0)
    start, output = first[1:].split("O")
    assert texts[0] == "I" + "\n".join(start.split("\n")[:3]) + "\nO" + output
    assert texts[1] == reference_text(batch, 1)
    module(batch)
    assert (module.n_pairs, module.n_truncated) == (2, 1)


@pytest.mark.parametrize("limit", [64, 65, 300, 1861, 1862])
def test_truncation_always_fits_and_is_maximal(limit: int) -> None:
    batch = make_batch([[((30, 30), (30, 30)), ((30, 1), (2, 30)), ((1, 1), (1, 1))]])
    fields = (batch.demo_input, batch.demo_input_size, batch.demo_output, batch.demo_output_size)
    text = hybrid.encode_pairs(*fields, limit)
    sizes = torch.cat([batch.demo_input_size, batch.demo_output_size], 1).tolist()
    for pair, (h_in, w_in, h_out, w_out) in enumerate(sizes):
        lengths = [
            2 + min(r, h_in) * (w_in + 1) + min(r, h_out) * (w_out + 1) for r in range(1, 31)
        ]
        fitting = [length for length in lengths if length <= limit]
        assert text.lengths[pair] == max(fitting)
        assert text.truncated[pair] == (max(lengths) > limit)


def test_too_small_limit_is_refused() -> None:
    with pytest.raises(ValueError, match="max_tokens must be at least 64, got 63"):
        tiny(max_tokens=63)


# ---- leave-one-out -------------------------------------------------------------------------


def test_own_output_changes_no_bit_of_the_own_prompt() -> None:
    batch = small_batch()
    module = tiny()
    before = module(batch)
    changed = copy.deepcopy(batch)
    # Another output of another, larger size: even the padding of the batch changes.
    changed.demo_output = torch.full((5, 30, 30), -1)
    changed.demo_output[:, :6, :5] = batch.demo_output
    changed.demo_output[0] = 7
    changed.demo_output_size[0] = 30
    changed.demo_control[0] += 0.5
    after = module(changed)
    same = (before.tokens == after.tokens).flatten(1).all(1)
    assert same.tolist() == [True, False, False, True, True]
    assert torch.equal(before.mask, after.mask)


def test_shape_mask_and_order_of_the_prompt() -> None:
    batch = small_batch()
    module = tiny()
    prompt = module(batch)
    assert prompt.tokens.shape == (5, 1 + 2 * 5, WIDTH)
    assert prompt.tokens.dtype == torch.float32
    assert prompt.mask.sum(1).tolist() == [11, 11, 11, 6, 6]
    pairs = module.read(batch)
    assert torch.equal(prompt.tokens[1, 1:6], pairs[0])
    assert torch.equal(prompt.tokens[1, 6:11], pairs[2])
    assert prompt.tokens[3, 6:].abs().max() == 0
    mean = prompt.tokens[3, :6].mean(0)
    torch.testing.assert_close(prompt.summary[3], mean)


def test_query_without_context_still_has_one_token() -> None:
    prompt = tiny()(make_batch([[((3, 3), (3, 3))]]))
    assert prompt.mask.sum(1).tolist() == [1]
    assert torch.isfinite(prompt.summary).all()


def test_batch_without_demonstrations() -> None:
    batch = small_batch()
    for field in ("demo_input", "demo_output", "demo_input_size", "demo_output_size"):
        setattr(batch, field, getattr(batch, field)[:0])
    batch.demo_control, batch.demo_task = batch.demo_control[:0], batch.demo_task[:0]
    batch.context = torch.full((5, 2), -1)
    for mode in hybrid.MODES:
        assert tiny(mode=mode)(batch).mask.sum(1).tolist() == [1] * 5


def test_extended_masks_and_zeroes() -> None:
    prompt = tiny()(small_batch())
    more = torch.ones(5, 2, WIDTH)
    mask = torch.tensor([[True, False]] * 5)
    longer = prompt.extended(more, mask)
    assert longer.tokens.shape[1] == prompt.tokens.shape[1] + 2
    assert longer.mask[:, -2:].tolist() == mask.tolist()
    assert longer.tokens[:, -1].abs().max() == 0
    assert prompt.extended(more).mask[:, -2:].all()
    with pytest.raises(ValueError, match="do not extend a prompt of 5 queries"):
        prompt.extended(more[:3])


# ---- training ------------------------------------------------------------------------------


def test_gradient_reaches_every_parameter_and_weights_move() -> None:
    batch = small_batch()
    module = tiny()
    before = {key: value.clone() for key, value in module.named_parameters()}
    groups = [{"params": module.lm_parameters()}, {"params": module.head_parameters()}]
    assert sum(len(group["params"]) for group in groups) == len(before)
    optimizer = torch.optim.SGD(groups, lr=0.1)
    scalar(module, batch).backward()
    for key, parameter in module.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.abs().max() > 0, key
    optimizer.step()
    for key, parameter in module.named_parameters():
        assert not torch.equal(parameter, before[key]), key


def test_frozen_backbone_stays_and_is_not_saved() -> None:
    batch = small_batch()
    module = tiny(train="frozen", seed=3)
    assert module.lm_parameters() == []
    assert not module.train().backbone.training
    reference = module.frozen_reference()
    before = {key: value.clone() for key, value in module.named_parameters()}
    optimizer = torch.optim.SGD(module.head_parameters(), lr=0.1)
    scalar(module, batch).backward()
    optimizer.step()
    for key, parameter in module.named_parameters():
        assert torch.equal(parameter, before[key]) == key.startswith("backbone."), key
    state = module.persistent_state_dict()
    assert state
    assert not any(key.startswith("backbone.") for key in state)

    fresh = tiny(train="frozen", seed=3)
    assert fresh.frozen_reference() == reference
    fresh.load_persistent_state_dict(state)
    assert torch.equal(fresh(batch).tokens, module(batch).tokens)
    assert tiny(train="frozen", seed=4).frozen_reference() != reference


def test_persistent_state_names_the_key_that_differs() -> None:
    module = tiny()
    assert module.frozen_reference() is None
    state = module.persistent_state_dict()
    assert any(key.startswith("backbone.") for key in state)
    with pytest.raises(ModelError, match=r"'control\.0\.bias' has shape"):
        tiny(n_control=N_CONTROL + 1).load_persistent_state_dict(state)
    state["extra"] = torch.zeros(1)
    with pytest.raises(ModelError, match="'extra' is unknown here"):
        module.load_persistent_state_dict(state)
    del state["extra"], state["start_token"]
    with pytest.raises(ModelError, match="'start_token' is missing from the checkpoint"):
        module.load_persistent_state_dict(state)


def test_built_from_the_seed_alone() -> None:
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    first = tiny(seed=5).state_dict()
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(2)
    again = tiny(seed=5).state_dict()
    other = tiny(seed=torch.Generator().manual_seed(6)).state_dict()
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["start_token"], other["start_token"])
    key = "backbone.embed_tokens.weight"
    assert not torch.equal(first[key], other[key])


def test_training_and_evaluation_read_the_same() -> None:
    batch, module = small_batch(), tiny()
    assert torch.equal(module.train()(batch).tokens, module.eval()(batch).tokens)


def test_autocast_and_recomputed_activations() -> None:
    batch = small_batch()
    plain, recomputed = tiny(), tiny(gradient_checkpointing=True)
    losses = [scalar(module, batch) for module in (plain, recomputed)]
    for loss in losses:
        loss.backward()
    assert torch.equal(*losses)
    pairs = zip(plain.parameters(), recomputed.parameters(), strict=True)
    for one, other in pairs:
        assert one.grad is not None
        torch.testing.assert_close(one.grad, other.grad)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        tokens = plain(batch).tokens
    assert tokens.dtype == torch.float32
    assert (tokens - plain(batch).tokens).abs().max() < 0.1


def test_lora_without_peft_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ModelError, match="pip install peft"):
        tiny(train="lora")


# peft asks transformers for a property by its old name.
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_lora_trains_adapters_only() -> None:
    pytest.importorskip("peft")
    batch, module = small_batch(), tiny(train="lora")
    names = [key for key, p in module.backbone.named_parameters() if p.requires_grad]
    assert names
    assert all("lora" in key for key in names)
    scalar(module, batch).backward()
    assert sum(float(p.grad.abs().sum()) for p in module.lm_parameters() if p.grad is not None) > 0
    state = module.persistent_state_dict()
    assert any("lora" in key for key in state)
    assert len(state) == len(names) + len(module.head_parameters())
    tiny(train="lora").load_persistent_state_dict(state)


# Under LoRA nothing before the first block is trained; the hook sees its outputs all the same.
@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("train", ["full", "lora"])
def test_a_hook_on_the_first_block_sees_the_gradient(train: str) -> None:
    if train == "lora":
        pytest.importorskip("peft")
    batch, module = small_batch(), tiny(train=train)
    seen: list[bool] = []
    block: Any = module.transformer.layers[0]  # type: ignore[index]
    assert type(block).__name__.endswith("DecoderLayer")
    block.register_forward_hook(lambda m, x, y: seen.append(False))
    block.register_full_backward_hook(lambda m, gin, gout: seen.append(True))
    scalar(module, batch).backward()
    assert seen[0] is False
    assert seen[-1] is True
    assert not any(key.startswith("transformer") for key in module.state_dict())


# ---- import ------------------------------------------------------------------------------


def test_import_is_light() -> None:
    program = "import sys, qwen_hybrid_prompt; print('transformers' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout.strip() == "False"


# ---- cache ---------------------------------------------------------------------------------


def lm_has_gradient(module: QwenHybridPrompt, batch: Batch) -> bool:
    module.zero_grad(set_to_none=True)
    scalar(module, batch).backward()
    for parameter in module.project.parameters():
        assert parameter.grad is not None
        assert parameter.grad.abs().max() > 0
    return any(p.grad is not None for p in module.lm_parameters())


def test_cache_reads_afresh_every_nth_time() -> None:
    batch, module = small_batch(), tiny(cache_interval=3)
    fresh = module(batch).tokens
    assert [lm_has_gradient(module, batch) for _ in range(6)] == [False, False, True] * 2
    assert (module.cache.hits, module.cache.misses) == (5 * 4, 5 * 3)
    module.load_cache_state(tiny(cache_interval=3).cache_state())
    assert torch.equal(module(batch).tokens, fresh), "nothing was stepped: reuse changes no bit"
    assert torch.equal(module(batch).tokens, fresh)


def test_cache_key_is_the_pair_itself_whatever_the_view_and_evaluation_reads_afresh() -> None:
    batch, module = small_batch(), tiny(cache_interval=9)
    module(batch)
    another_view = copy.deepcopy(batch)
    another_view.demo_output = torch.where(batch.demo_output >= 0, 9 - batch.demo_output, -1)
    module(another_view)
    assert (module.cache.hits, module.cache.misses) == (5, 5)
    another_pair = copy.deepcopy(batch)
    another_pair.own_output[0, 0, 0] = (another_pair.own_output[0, 0, 0] + 1) % 10
    module(another_pair)
    assert (module.cache.hits, module.cache.misses) == (9, 6)
    with torch.no_grad():
        module.backbone.get_input_embeddings().weight.add_(1)  # type: ignore[operator]
    stale, now = module.train()(batch).tokens, module.eval()(batch).tokens
    assert not torch.equal(stale, now)
    assert len(module.cache) == 6


def test_why_the_language_model_has_no_gradient() -> None:
    batch, module = small_batch(), tiny(cache_interval=2)
    module(batch)
    assert module.without_gradient() is None
    module(batch)
    assert module.without_gradient() is NoGradient.REUSED
    for mode in ("null", "no_qwen"):
        module.mode = mode
        assert module.without_gradient() is NoGradient.NOT_RUN
    assert tiny(train="frozen").without_gradient() is NoGradient.FROZEN


def test_cache_is_bounded() -> None:
    module = tiny(cache_interval=5, cache_pairs=3)
    module(small_batch())
    assert len(module.cache) == 3


def test_cache_state_round_trip_continues_bit_for_bit(tmp_path: Path) -> None:
    def train(module: QwenHybridPrompt, batches: range) -> list[Tensor]:
        optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
        losses = []
        for number in batches:
            optimizer.zero_grad()
            loss = scalar(module, small_batch(seed=number % 2))
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return losses

    whole = tiny(cache_interval=4, cache_pairs=8)
    losses = train(whole, range(11))
    first = tiny(cache_interval=4, cache_pairs=8)
    train(first, range(5))
    torch.save([first.persistent_state_dict(), first.cache_state()], tmp_path / "state.pt")
    weights, cache = torch.load(tmp_path / "state.pt", weights_only=True)
    second = tiny(cache_interval=4, cache_pairs=8, seed=9)
    second.load_persistent_state_dict(weights)
    second.load_cache_state(cache)
    assert train(second, range(5, 11)) == losses[5:]
    pairs = zip(whole.parameters(), second.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    assert (second.cache.hits, second.cache.misses) == (whole.cache.hits, whole.cache.misses)
    assert second.n_pairs == whole.n_pairs


# ---- parts ---------------------------------------------------------------------------------


def test_a_batch_within_the_bound_is_read_as_ever_and_a_larger_one_in_parts() -> None:
    """Breaks: a bound that is not kept, parts that forget a pair or mix them up, or gradients that
    get lost in them."""
    batch = make_batch([[((9, 9), (9, 9))] * 4, [((3, 3), (3, 3))] * 3])
    modules = [tiny(read_tokens=most) for most in (None, 4 * 192 + 3 * 32, 400)]
    losses, calls, grads = [], [], []
    for module in modules:
        seen: list[tuple[int, ...]] = []
        module.backbone.register_forward_hook(
            lambda _, args, kwargs, out, seen=seen: seen.append(tuple(kwargs["input_ids"].shape)),
            with_kwargs=True,
        )
        loss = scalar(module, batch)
        calls.append(list(seen))
        loss.backward()
        losses.append(loss.detach())
        grads.append([p.grad for p in module.parameters() if p.grad is not None])
        if module is modules[2]:
            assert len(seen) == 2 * len(calls[2]), "each part once more in the backward pass"
    assert calls[0] == calls[1] == [(3, 32), (4, 192)]
    assert calls[2] == [(3, 32), (2, 192), (2, 192)]
    assert torch.equal(losses[0], losses[1])
    torch.testing.assert_close(losses[2], losses[0], atol=1e-5, rtol=1e-5)
    assert len(grads[2]) == len(grads[0]) > 0
    for one, other in zip(grads[0], grads[2], strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        modules[2](batch)


def test_parts_keep_the_activations_of_one_part_only() -> None:
    batch = make_batch([[((12, 12), (12, 12))] * 6])
    kept = []
    for most in (None, 400):
        module, sizes = tiny(read_tokens=most), [0]

        def pack(t: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes[0] += t.numel()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            module(batch)
        kept.append(sizes[0])
    assert kept[1] < 0.1 * kept[0]


def test_the_default_bound_is_beyond_what_the_tiny_model_reads_on_a_cpu() -> None:
    """So that no bit of a run with it changed by the bound: 16 queries a batch in evaluation, each
    with six demonstrations of two 30 x 30 grids."""
    module = tiny()
    assert module.read_tokens is not None
    assert module.read_tokens > 16 * 6 * 2048
    assert tiny(train="frozen").read_tokens is None


# ---- a frozen model's states ---------------------------------------------------------------


def calls_of(module: QwenHybridPrompt) -> list[int]:
    """Filled with the pairs of each forward of the language model, from now on."""
    calls: list[int] = []
    module.backbone.register_forward_hook(
        lambda _, args, kwargs, out: calls.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    return calls


def test_a_frozen_model_reads_each_pair_once_and_the_projections_learn() -> None:
    """Breaks: states read in a random view, kept behind trained parts, or not in evaluation."""
    batch, module = small_batch(), tiny(train="frozen")
    calls = calls_of(module)
    optimizer = torch.optim.SGD(module.head_parameters(), lr=0.1)
    tokens = []
    for _ in range(3):
        optimizer.zero_grad()
        scalar(module, batch).backward()
        for part in (module.pool, module.project):
            assert all(p.grad is not None and p.grad.abs().max() > 0 for p in part.parameters())
        optimizer.step()
        tokens.append(module(batch).tokens)
    assert calls == [1] * 5
    assert not torch.equal(tokens[0], tokens[1]), "trained parts work on what is kept"
    another_view = copy.deepcopy(batch)
    another_view.demo_output = torch.where(batch.demo_output >= 0, 9 - batch.demo_output, -1)
    module.eval()
    assert torch.equal(module(another_view).tokens, tokens[-1])
    assert len(calls) == 5
    another_pair = copy.deepcopy(batch)
    another_pair.own_output[0, 0, 0] = (another_pair.own_output[0, 0, 0] + 1) % 10
    assert not torch.equal(module(another_pair).tokens, tokens[-1])
    assert len(calls) == 6
    assert module.states is not None
    assert (module.states.misses, len(module.states)) == (6, 6)


@pytest.mark.parametrize("states_bytes", [0, 20_000])
def test_states_that_are_not_kept_give_the_same_bits(states_bytes: int) -> None:
    """Breaks: numbers that depend on what is kept, so that a resumed run is another one."""
    batches = [small_batch(seed) for seed in (0, 1, 0, 2, 1)]
    keeps, drops = tiny(train="frozen"), tiny(train="frozen", states_bytes=states_bytes)
    for batch in batches:
        assert torch.equal(keeps(batch).tokens, drops(batch).tokens)
        some = make_batch([[((5, 5), (1, 1))] * 2], 0)  # another composition of the batch
        drops(some)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(keeps(batches[0]).tokens, tiny(train="frozen")(batches[0]).tokens)
    assert drops.states is not None
    assert keeps.states is not None
    assert drops.states.n_bytes <= states_bytes < keeps.states.n_bytes
    kept = sum(t.numel() * t.element_size() for t in drops.states._entries.values())
    assert drops.states.n_bytes == kept
    assert (drops.states.hits > 0) == (states_bytes > 0)


def test_kept_states_stay_near_a_reading_without_them() -> None:
    """float16 and padding change the prompt by rounding alone."""
    batch, frozen, full = small_batch(), tiny(train="frozen"), tiny()
    torch.testing.assert_close(frozen(batch).tokens, full(batch).tokens, atol=3e-3, rtol=0)


def test_states_are_in_no_checkpoint_and_a_copy_shares_them() -> None:
    module = tiny(train="frozen", cache_interval=4)
    module(small_batch())
    state = module.cache_state()
    assert state["keys"].numel() == state["readings"].numel() == 0
    assert state["counts"].tolist() == [0, 0]
    assert copy.deepcopy(module).states is module.states
    assert tiny().states is None
    assert "up to" in module.description()
    assert "5 pairs read, 0 looked up" in module.states.description()  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="max_bytes must be >= 0"):
        tiny(train="frozen", states_bytes=-1)


# ---- ablations -----------------------------------------------------------------------------


def test_null_prompt_is_the_same_for_all() -> None:
    module = tiny(mode="null")
    prompt = module(small_batch())
    assert prompt.tokens.shape == (5, 1, WIDTH)
    assert torch.equal(prompt.tokens, module(small_batch(seed=1)).tokens)
    prompt.tokens.square().sum().backward()
    assert module.start_token.grad is not None


def test_no_qwen_leaves_control_only(monkeypatch: pytest.MonkeyPatch) -> None:
    batch, module = small_batch(), tiny(mode="no_qwen")

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("the LM ran")

    monkeypatch.setattr(module.backbone, "forward", never)
    tokens = module.read(batch)
    assert torch.equal(tokens[0, :4], tokens[1, :4])
    assert not torch.equal(tokens[0, 4], tokens[1, 4])
    scalar(module, batch).backward()
    assert module.type_tokens.grad is not None
    assert module.type_tokens.grad.abs().amax(1).min() > 0


def test_shuffled_shows_another_task() -> None:
    batch, module = small_batch(), tiny()
    pairs = module.read(batch)
    module.mode = "shuffled"
    prompt = module(batch)
    # Task 0 (pairs 0, 1, 2) sees task 1 (pairs 3, 4) and the other way round, as many as before.
    for query, shown in enumerate([[3, 4], [3, 4], [3, 4], [0], [0]]):
        assert prompt.mask[query].sum() == 1 + 5 * len(shown)
        expected = pairs[torch.tensor(shown)].flatten(0, 1)
        assert torch.equal(prompt.tokens[query, 1 : 1 + len(expected)], expected)
    alone = make_batch([[((3, 3), (3, 3))] * 3])
    assert module(alone).mask.sum(1).tolist() == [1, 1, 1]


# ---- speed ---------------------------------------------------------------------------------


def test_many_pairs_are_encoded_without_a_loop_over_cells() -> None:
    batch = make_batch([[((30, 30), (30, 30))] * 20])
    fields = (batch.demo_input, batch.demo_input_size, batch.demo_output, batch.demo_output_size)
    hybrid.encode_pairs(*fields)
    start = time.perf_counter()
    hybrid.encode_pairs(*fields)
    assert time.perf_counter() - start < 0.25  # 37 240 tokens; measured 2 ms
