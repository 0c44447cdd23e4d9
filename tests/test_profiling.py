"""From chapter 3 on: counted FLOPs, the groups of a profile, and a compiled step that is the same step."""
import json
import os
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import warm
from chapters import TRAINED, expect_error, load_chapter, run_here

PROFILED = [name for name in TRAINED if hasattr(load_chapter(name), "profiling")]
pytestmark = pytest.mark.parametrize("chapter", PROFILED, indirect=True)


# torch's counter knows addmm, but not that it may write into its first argument.
IN_PLACE = {torch.ops.aten.addmm_: lambda table, a, b, **_: 2 * a[0] * a[1] * b[1]}


def configs(chapter):
    small = chapter.model.ModelConfig(vocab_size=70, hidden_size=48, intermediate_size=80, num_hidden_layers=3,
                                      num_attention_heads=6, num_key_value_heads=2, head_dim=16)
    return [small, replace(small, tie_word_embeddings=False),
            replace(small, num_key_value_heads=6, num_hidden_layers=1)]


def batch_of(chapter, lengths, vocab_size=70):
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(vocab_size, (length + 1,), generator=generator).tolist() for length in lengths]
    return chapter.data.packed_sequence_collate_fn([(document[:-1], document[1:]) for document in ids])


# ------------------------------------------------------------------------------------------------------- flops.py

def test_counted_flops_equal_those_of_torch(chapter, monkeypatch):
    """torch's counter knows the plain formula, but not what an operator of our own does inside: so by the plain
    formula.
    """
    monkeypatch.setattr(chapter.attention, "grouped_attention", lambda q, k, v, cu_seqlens: [torch.cat(
        [F.scaled_dot_product_attention(*stack, is_causal=True, enable_gqa=True).transpose(1, 2).flatten(0, 1)
         for stack in chapter.custom_ops.stacks(cu_seqlens, q, k, v)])])
    for config in configs(chapter):
        batch = batch_of(chapter, (3, 9, 9, 20))
        model = chapter.model.Transformer(config)
        # The way forward alone is counted without gradients: from chapter 4 on the loss makes its gradient on the way
        # forward.
        with FlopCounterMode(display=False) as forward, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
            chapter.train.loss_sum(model, batch)
        with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as both, sdpa_kernel(SDPBackend.MATH):
            chapter.train.loss_sum(model, batch).backward()
        counted = chapter.flops.step_flops(config, batch.cu_seqlens)
        assert sum(pair[0] for pair in counted.values()) == forward.get_total_flops()
        assert sum(map(sum, counted.values())) == both.get_total_flops()


def test_counted_parameters_are_the_models(chapter):
    for config in configs(chapter):
        assert chapter.flops.num_parameters(config) == chapter.model.Transformer(config).num_parameters()


def test_bytes_grow_as_they_must(chapter):
    """The optimizer reads and writes 28 bytes a parameter whatever T is; what goes over tokens grows with them."""
    config = configs(chapter)[0]
    one, two = chapter.flops.step_bytes(config, 100), chapter.flops.step_bytes(config, 200)
    assert one["optimizer"] == two["optimizer"] == 28 * chapter.flops.num_parameters(config)
    assert two["norms and elementwise"] == 2 * one["norms and elementwise"] and two["loss"] == 2 * one["loss"]
    assert one["matmul"] < two["matmul"] < 2 * one["matmul"]   # the weights are read once


# --------------------------------------------------------------------------------------------------- profiling.py

def event(name, parent=None, shapes=()):
    return SimpleNamespace(name=name, cpu_parent=parent, input_shapes=shapes)


def test_events_belong_to_the_group_a_person_would_name(chapter):
    step = event("ProfilerStep#5")
    attention = event("chapter_03_profiling::grouped_attention", step)
    for expected, found in {
            "matmul": event("aten::mm", event("aten::linear", step), [[64, 32], [32, 16]]),
            "loss head": event("aten::mm", event("aten::linear", step), [[64, 32], [32, 70]]),
            "matmul ": event("aten::mm", event("aten::linear", step), [[70, 32], [32, 16]]),   # as many tokens as words
            "norms and elementwise ": event("aten::mul", event("MmBackward0", step)),          # a recomputed layer
            "attention": event("aten::mm", attention, [[4, 4], [4, 4]]),
            "optimizer": event("aten::mul_", event("Optimizer.step#AdamW.step", step)),
            "norms and elementwise": event("aten::mul", step),
            "data": event("aten::cat", event("data", step)),
            "Python and waiting": step}.items():
        assert chapter.profiling.group(found, head=[32, 64, 70]) == expected.strip(), found.name


def test_a_profile_sums_to_the_step_and_changes_nothing(chapter, text_file, tmp_path, monkeypatch):
    monkeypatch.setattr(chapter.flops, "best_time", lambda work, device, seconds=0: 1e-3)   # no time for ceilings
    for name, steps in {"WAIT": 1, "WARMUP": 1, "ACTIVE": 3, "STEPS": 5}.items():
        monkeypatch.setattr(chapter.profiling, name, steps)
    arguments = ("--data", text_file, *chapter.quick, "--steps", 6)
    printed = run_here(chapter.train, *arguments, "--profile", "--out", tmp_path / "on")
    run_here(chapter.train, *arguments, "--out", tmp_path / "off")
    weights = [load_file(tmp_path / run / "model.safetensors") for run in ("on", "off")]
    assert all(torch.equal(weight, weights[1][name]) for name, weight in weights[0].items())

    profile = tmp_path / "on" / "profile"
    steps = json.loads((profile / "steps.json").read_text())
    assert sum(steps["measured"].values()) == pytest.approx(steps["step"], rel=0.03)
    assert set(steps["measured"]) == set(chapter.profiling.ORDER) and min(steps["measured"].values()) > 0
    assert all(name in printed for name in chapter.profiling.ORDER)
    trace, = profile.glob("*.pt.trace.json")
    names = [found.get("name", "") for found in json.loads(trace.read_text())["traceEvents"]]
    assert len({name for name in names if name.startswith("ProfilerStep#")}) == chapter.profiling.ACTIVE
    assert all((profile / picture).stat().st_size > 5_000 for picture in ("memory.png", "roofline.png"))
    assert not (tmp_path / "off" / "profile").exists()


def test_a_profile_that_no_step_would_end_is_refused(chapter, text_file, tmp_path, call):
    expect_error(call(chapter.train, "--data", text_file, "--profile", "--steps", 20, "--out", tmp_path),
                 "--profile needs 23 steps, not 20")
    run = ("--data", text_file, *chapter.quick, "--out", tmp_path)
    run_here(chapter.train, *run, "--steps", 3)
    with pytest.raises(chapter.cli.InputError, match="--profile needs 23 steps, not 21"):   # so many are left
        run_here(chapter.train, *run, "--steps", 24, "--profile", "--resume")


# -------------------------------------------------------------------------------------------------- torch.compile

def test_a_filled_batch_has_the_same_loss_and_gradients(chapter):
    torch.manual_seed(0)
    model = chapter.model.Transformer(configs(chapter)[0])
    batch = batch_of(chapter, (3, 9, 9, 20))
    filled = chapter.data.fill(batch, 64)
    assert len(filled.input_ids) == len(filled.targets) == len(filled.position_ids) == filled.cu_seqlens[-1] == 64
    assert filled.cu_seqlens.dtype == torch.int32
    expected, loss = chapter.train.loss_sum(model, batch), chapter.train.loss_sum(model, filled)
    torch.testing.assert_close(loss, expected)
    for a, b in zip(torch.autograd.grad(expected, model.parameters()), torch.autograd.grad(loss, model.parameters())):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert chapter.data.fill(filled, 64).cu_seqlens.equal(filled.cu_seqlens)


def test_packs_are_sorted_by_length(chapter, text_file):
    documents = chapter.data.read_text(text_file)
    windows, _ = chapter.data.tokenize(documents, chapter.make_tokenizer(documents), 48)
    packs = chapter.data.training_packs(windows, 256, seed=0)
    for _ in range(5):
        lengths = [len(input_ids) for input_ids, _ in next(packs)]
        assert lengths == sorted(lengths) and len(lengths) > 1


COMPILED = """
import torch, torch._dynamo
from data import fill, packed_sequence_collate_fn
from model import ModelConfig, Transformer
from train import loss_sum
torch.manual_seed(0)
model = Transformer(ModelConfig(vocab_size=70, hidden_size=32, intermediate_size=48, num_hidden_layers=1, head_dim=16))
compiled = torch.compile(loss_sum, fullgraph=True)
graphs = []
for lengths in [(3, 9, 20), (5, 5, 5, 30), (1, 2, 3, 4, 5), (60,), (7, 7, 7, 7, 7, 7, 7)]:
    documents = [torch.randint(70, (2, length)).tolist() for length in lengths]
    batch = fill(packed_sequence_collate_fn(documents), 64)
    expected, loss = loss_sum(model, batch), compiled(model, batch)
    torch.testing.assert_close(loss, expected)
    for a, b in zip(torch.autograd.grad(expected, model.parameters()), torch.autograd.grad(loss, model.parameters())):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
assert graphs[1] == graphs[-1] <= 2, graphs
"""


def test_compiled_equals_eager_and_compiles_no_more_after_two_batches(chapter, compiled_kernels):
    """In a process of its own: the compiler looks modules up by their names."""
    done = warm.run("-c", COMPILED, cwd=chapter.folder, env=os.environ
                    | {"TORCHINDUCTOR_CACHE_DIR": str(compiled_kernels)})
    assert done.returncode == 0, done.stderr
