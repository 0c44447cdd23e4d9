"""Chapter 7's train.py --qat: the model that is trained is the model that quantize.py makes; nothing else of a run
changes.
"""
import copy
import json
import re

import pytest
import torch
from safetensors.torch import load_file

import warm
from chapters import expect_error, load_chapter, run_here
from test_layouts import train
from test_train import assert_same_run

NAME = "chapter-07-quantization"
chapter = load_chapter(NAME)
ALONE = chapter.parallel.mesh.ALONE
# Rows of 128: the group of int4. On two ranks of --tp o_proj's rows of 256 are cut into two groups.
SIZES = dict(vocab_size=301, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=8,
             num_key_value_heads=4, head_dim=32)
MOE = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=128)
QUICK = ("--batch-tokens", "100", "--device", "cpu")


def make_model(**changes):
    torch.manual_seed(0)
    return chapter.model.Transformer(chapter.model.ModelConfig(**SIZES | changes))


def make_batch(lengths=(3, 20, 41)):
    documents = [torch.randint(301, (length + 1,), generator=torch.Generator().manual_seed(length)).tolist()
                 for length in lengths]
    return chapter.data.packed_sequence_collate_fn([(ids[:-1], ids[1:]) for ids in documents])


def prepared(model, name):
    model = copy.deepcopy(model)
    chapter.qat.prepare(model, name, ALONE)
    return model


@torch.no_grad()
def with_rounded_weights(model, name):
    """A copy without any qat, whose weights are what the formats leave: every matrix but the routers of experts."""
    model = copy.deepcopy(model)
    bits, group = {"int8": (8, 0), "int4": (4, 128)}[name]
    for key, weight in model.named_parameters():
        table = "embed_tokens" in key or "lm_head" in key
        if weight.dim() == 2 and "mlp.gate.weight" not in key:
            format = chapter.integers.Format(8 if table else bits, 0 if table else group)
            weight.copy_(chapter.integers.rounded(weight, format))
    return model


@pytest.mark.parametrize("name, changes, precision, checkpointing", [
    ("int4", {}, "fp32", "none"), ("int8", {}, "fp32", "full"), ("int4", {}, "bf16", "selective"),
    ("int8", MOE, "fp32", "none"),
    ("int4", {"tie_word_embeddings": False}, "fp32", "none"), ("int4", {}, "bf16-pure", "none")])
def test_the_gradient_is_that_of_the_rounded_weights(name, changes, precision, checkpointing):
    """And the loss. To the last bit: it is the same computation."""
    model = make_model(**changes).to(torch.bfloat16 if precision == "bf16-pure" else torch.float32)
    found, expected = prepared(model, name), with_rounded_weights(model, name)
    losses, model.precision = [], precision
    for each in (found, expected):
        each.checkpointing = checkpointing
        each.precision = precision
        losses.append(chapter.train.loss_sum(each, make_batch()))
        losses[-1].backward()
    assert losses[0].equal(losses[1]) and not losses[0].equal(chapter.train.loss_sum(model, make_batch()))
    for (key, a), b in zip(found.named_parameters(), expected.parameters(), strict=True):
        assert a.grad.abs().sum() > 0 and a.grad.equal(b.grad), key


def test_parameters_keep_their_names_and_logits_are_rounded_too():
    model, batch = make_model(), make_batch()
    found = prepared(model, "int4")
    assert found.state_dict().keys() == model.state_dict().keys()
    assert found.lm_head.weight is found.model.embed_tokens.weight
    inputs = batch.input_ids, batch.position_ids, batch.cu_seqlens, batch.max_seqlen
    torch.testing.assert_close(found(*inputs), with_rounded_weights(model, "int4")(*inputs), rtol=0, atol=0)


def test_small_steps_add_up():
    """A step too small to change any integer is not lost: the optimizer changes the weights before rounding."""
    model = prepared(make_model(), "int4")
    weight, format = model.model.layers[0].mlp.up_proj.weight, chapter.integers.Format(4, 128)

    def integers():
        with torch.no_grad():
            scale, zero = chapter.integers.choose_scale(weight, format)
            return chapter.integers.to_integers(weight, scale, zero, format)
    first, before = integers(), weight.detach().clone()
    optimizer, changed = chapter.train.adamw(model, 1e-6), []
    for _ in range(3):
        optimizer.zero_grad()
        chapter.train.loss_sum(model, make_batch()).backward()
        optimizer.step()
        changed.append((weight != before).float().mean().item())
    assert min(changed) > 0.99 and (integers() != first).float().mean() < 1e-3
    assert (weight - before).abs().max().item() == pytest.approx(3e-6, rel=0.1)
    optimizer.param_groups[0]["lr"] = 1e-3
    for _ in range(10):
        chapter.train.loss_sum(model, make_batch()).backward()
        optimizer.step()
    assert (integers() != first).float().mean() > 0.2


COMPILED = """
import torch, qat
from data import fill, packed_sequence_collate_fn
from model import ModelConfig, Transformer
from parallel.mesh import ALONE
from train import loss_sum
torch.manual_seed(0)
model = Transformer(ModelConfig(vocab_size=70, hidden_size=128, intermediate_size=128, head_dim=32, \
num_hidden_layers=1))
qat.prepare(model, "int4", ALONE)
compiled = torch.compile(loss_sum, fullgraph=True, backend="aot_eager")
batch = fill(packed_sequence_collate_fn([torch.randint(70, (2, length)).tolist() for length in (3, 9, 20)]), 64)
expected, loss = loss_sum(model, batch), compiled(model, batch)
torch.testing.assert_close(loss, expected)
for a, b in zip(torch.autograd.grad(expected, model.parameters()), torch.autograd.grad(loss, model.parameters())):
    torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
"""


def test_the_compiler_can_follow():
    """In a process of its own: the compiler looks modules up by their names.

    What it would translate this into does not matter here.
    """
    done = warm.run("-c", COMPILED, cwd=chapter.folder)
    assert done.returncode == 0, done.stderr


# ------------------------------------------------------------------------------------------------------- whole runs

@pytest.fixture(scope="module", params=["int4", "int8"])
def run(request, text_file, tmp_path_factory):
    """(name, folder, what it printed) of a run of four steps."""
    out = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(chapter.model.CONFIGS, "small", chapter.model.ModelConfig(**SIZES))
        printed = run_here(chapter.train, "--data", text_file, *QUICK, "--steps", 4, "--qat",
                           request.param, "--out", out)
    return request.param, out, printed


def test_the_quantized_checkpoint_is_the_model_that_was_trained(run, text_file, tmp_path):
    """What train.py says about it is true of the folder that quantize.py writes."""
    name, out, printed = run
    assert re.search(rf"^qat +{name}: ", printed, re.M)
    described = json.loads((out / "config.json").read_text())
    weights = load_file(out / "model.safetensors")
    assert "quantization_config" not in described and all(weight.dtype == torch.float32 for weight in weights.values())
    up = weights["model.layers.0.mlp.up_proj.weight"]
    assert up[0].unique().numel() > 100   # not the few values that rounding leaves
    chapter.quantize.quantize(out, name, tmp_path / "quantized")
    _, documents = chapter.data.load_documents(text_file)
    model, tokenizer = chapter.checkpoint.load_model(tmp_path / "quantized")
    full, _ = chapter.checkpoint.load_model(out)
    for (_, _, a), (_, _, b) in zip(*(chapter.quantized.linear_layers(m.model.layers)
                                      for m in (model, with_rounded_weights(full, name)))):
        assert a.dequantized().equal(b.weight)
    nats, bits = chapter.train.evaluate(model, documents, tokenizer, 100, "cpu")
    summary = json.loads((out / "summary.json").read_text())
    assert summary["val_loss"] == pytest.approx(nats, rel=1e-6)
    assert summary["val_bits_per_byte"] == pytest.approx(bits, rel=1e-6)
    unrounded, _ = chapter.train.evaluate(full, documents, tokenizer, 100, "cpu")
    assert summary["val_loss"] != pytest.approx(unrounded, rel=1e-6)


def test_a_resumed_run_is_the_same_run(text_file, tmp_path):
    arguments = ["--data", str(text_file), *QUICK, "--steps", "4", "--save-every", "2", "--qat", "int8",
                 "--accumulate", "2"]
    train(chapter, 1, SIZES, False, *arguments, "--out", str(tmp_path / "whole"))
    train(chapter, 1, SIZES, True, *arguments, "--out", str(tmp_path / "killed"))
    with pytest.raises(chapter.cli.InputError, match="qat int8, this command has int4"):
        train(chapter, 1, SIZES, False, *arguments, "--out", str(tmp_path / "killed"), "--resume", "--qat", "int4")
    train(chapter, 1, SIZES, False, *arguments, "--out", str(tmp_path / "killed"), "--resume")
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


@pytest.fixture(scope="module")
def alone(text_file, tmp_path_factory):
    """{kind of model: the scalars of a run in one process}"""
    found = {}
    for kind, changes in (("dense", {}), ("mixed", MOE)):
        out = tmp_path_factory.mktemp(kind)
        found[kind] = train(chapter, 1, SIZES | changes, False, *in_layout("--dp 1", text_file, out))
    return found


def in_layout(layout, text_file, out):
    accumulate = "1" if "--dp 2" in layout else "2"
    return ["--data", str(text_file), *QUICK, "--steps", "3", "--qat", "int4", "--out", str(out), "--accumulate",
            accumulate, *layout.split()]


@pytest.mark.parametrize("kind, layout", [("dense", f"--dp 2 --zero {stage}") for stage in (0, 2, 3, "torch")]
                         + [("dense", "--tp 2"), ("dense", "--pp 2"), ("mixed", "--dp 2 --ep 2 --zero 1")])
def test_every_layout_trains_the_same_rounded_model(kind, layout, ranks, alone, text_file, tmp_path):
    sizes = SIZES | (MOE if kind == "mixed" else {})
    found = ranks(2, train, 2, sizes, False, *in_layout(layout, text_file, tmp_path), chapter=NAME)[0]
    expected = alone[kind]
    assert [entry[:2] for entry in found] == [entry[:2] for entry in expected]
    for (what, step, a), (_, _, b) in zip(found, expected):
        if "_expert_of_layer_" in what:
            continue   # of the last pack that the writing rank has had, which is not the same in two layouts
        # From the second step on a weight whose last bit differs may lie on the other side of a half, and is then
        # another integer.
        assert a == pytest.approx(b, rel=1e-5 if step == 1 else 5e-3), (what, step)


# ---------------------------------------------------------------------------------------------------------- refusals

def test_rows_without_whole_groups_are_refused(call, text_file, tmp_path, monkeypatch):
    monkeypatch.setitem(chapter.model.CONFIGS, "small", chapter.model.ModelConfig(**SIZES | {"intermediate_size": 192}))
    result = call(chapter.train, "--data", text_file, *QUICK, "--steps", 1, "--qat", "int4", "--out", tmp_path)
    expect_error(result, "128 weights of a row", "rows of 192", "--qat int8")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name, changes, words", [("int8", {}, "--tp 2 cuts rows"),
                                                  ("int4", {"intermediate_size": 128}, "rows of 64 on each rank")])
def test_scales_that_tensor_parallel_would_cut_are_refused(name, changes, words, ranks, text_file, tmp_path):
    with pytest.raises(AssertionError, match=f"InputError: --qat {name} .*{words}"):
        ranks(2, train, 2, SIZES | changes, False, *in_layout("--tp 2", text_file, tmp_path), "--qat",
              name, chapter=NAME)
    assert not list(tmp_path.iterdir())


def test_integers_are_not_trained(run, call, text_file, tmp_path):
    name, out, _ = run
    chapter.quantize.quantize(out, name, tmp_path / "quantized")
    result = call(chapter.train, "--data", text_file, *QUICK, "--steps", 1, "--init", tmp_path / "quantized", "--out",
                  tmp_path / "out")
    expect_error(result, "is quantized", "the model it was made of")
