"""Chapter 7: the formats, the layers that hold integers, the command, and the folders it writes."""
import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file, save_file

from chapters import CHAPTERS, chapter1, expect_error, load_chapter

chapter = load_chapter("chapter-07-quantization")
integers, quantized, quantize = chapter.integers, chapter.quantized, chapter.quantize
Format = integers.Format
FORMATS = [Format(8), Format(4, 32), Format(4), Format(4, 32, False), Format(4, 16, False), Format(8, 32)]
METHODS = list(quantize.METHODS)
SIZES = dict(hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2, head_dim=16)


def matrix(N=24, K=96, seed=0, dtype=torch.float32):
    return torch.randn(N, K, generator=torch.Generator().manual_seed(seed)).to(dtype)


# ------------------------------------------------------------------------------------------------------ formats

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("format", FORMATS)
def test_no_weight_moves_by_more_than_half_a_scale(format, dtype):
    weight = matrix()
    scale, zero = integers.choose_scale(weight, format, dtype)
    q = integers.to_integers(weight, scale, zero, format)
    assert q.min() >= format.smallest and q.max() <= format.largest
    back = integers.from_integers(q, scale.float(), zero)
    step = scale.float().repeat_interleave(format.group or 96, dim=1)
    # The largest weight of a group may fall a little beyond the last integer: by what the scale was rounded, or the
    # zero point.
    room = 0.5 + (0 if format.symmetric else 0.5) + (format.largest * 2 ** -8 if dtype == torch.bfloat16 else 1e-4)
    assert ((back - weight).abs() / step).max() <= room


@pytest.mark.parametrize("format", FORMATS)
def test_what_is_on_the_grid_stays(format):
    once = integers.rounded(matrix(), format)
    assert torch.allclose(integers.rounded(once, format), once, atol=1e-6)


@pytest.mark.parametrize("format", FORMATS)
def test_zero_stays_zero_and_a_group_of_zeros_is_no_trouble(format):
    weight = matrix()
    weight[:, ::3] = 0
    weight[2] = 0
    assert (integers.rounded(weight, format)[weight == 0] == 0).all()


def test_absmax_is_symmetric():
    weight = matrix()
    for format in (Format(8), Format(4, 32)):
        assert torch.equal(integers.rounded(-weight, format), -integers.rounded(weight, format))


def test_groups_and_zero_points_make_the_error_smaller():
    weight = matrix(64, 256) + 0.5   # off centre, which is what a zero point is for
    error = {format: (integers.rounded(weight, format) - weight).square().mean().item()
             for format in (Format(8), Format(4), Format(4, 32), Format(4, 32, False))}
    assert error[Format(8)] < error[Format(4, 32, False)] < error[Format(4, 32)] < error[Format(4)], error


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(1, 5), st.integers(1, 9), st.booleans(), st.integers(0, 2 ** 31))
def test_two_in_a_byte_come_out_as_they_went_in(N, half, symmetric, seed):
    low, high = (-7, 8) if symmetric else (0, 16)
    q = torch.randint(low, high, (N, 2 * half),
                      generator=torch.Generator().manual_seed(seed)).to(torch.int8 if symmetric else torch.uint8)
    packed = integers.pack4(q)
    assert packed.dtype == torch.uint8 and packed.shape == (N, half)
    assert torch.equal(integers.unpack4(packed).int() - (8 if symmetric else 0), q.int())


# ------------------------------------------------------------------------------------------------------ layers

def make_layer(cls, weight, format):
    layer = cls(weight.shape[1], weight.shape[0], format, weight.dtype)
    scale, zero = integers.choose_scale(weight, format, weight.dtype)
    layer.fill(integers.to_integers(weight, scale, zero, format), scale, zero)
    return layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cls, format", [("Int8Linear", Format(8)), ("Int4Linear", Format(4, 32)),
                                         ("Int4Linear", Format(4)),
                                         ("Int4Linear", Format(4, 32, False))])
def test_a_layer_computes_with_the_weight_that_is_left(cls, format, dtype):
    weight, x = matrix(dtype=dtype), matrix(5, seed=1, dtype=dtype)
    layer = make_layer(getattr(quantized, cls), weight, format)
    assert torch.equal(layer.dequantized(), integers.rounded(weight, format))
    assert torch.equal(layer(x), F.linear(x, integers.rounded(weight, format)))


@pytest.mark.parametrize("rows", [1, 3, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cls, format", [("Int8Linear", Format(8)), ("Int4Linear", Format(4, 32)),
                                         ("Int4Linear", Format(4, 32, False)),
                                         ("Int4Linear", Format(4, 64, False))])
def test_the_operators_of_pytorch_agree_with_the_plain_product(cls, format, dtype, rows):
    layer = make_layer(getattr(quantized, cls), matrix(64, 128, dtype=dtype), format)
    x = matrix(rows, 128, seed=1, dtype=dtype)
    plain = F.linear(x.double(), layer.dequantized().double())
    native = quantized.native_product(layer)(x)
    assert native.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert (native.double() - plain).abs().max() < tolerance * plain.abs().max()


def integers_by_hand(x, weight_integers, scale):
    """Token by token, in float64: round x to 127 steps of its own largest value, multiply, scale back."""
    out = torch.empty(len(x), len(scale), dtype=torch.float64)
    for t, row in enumerate(x.float()):
        step = row.abs().max() / 127
        out[t] = ((row / step).round().double() @ weight_integers.double().T) * step.double() * scale.double()
    return out


def test_w8a8_is_a_product_of_integers():
    layer = make_layer(quantized.W8A8Linear, matrix(), Format(8))
    x = matrix(20, seed=1)
    assert torch.allclose(layer(x).double(), integers_by_hand(x, layer.weight, layer.scale), rtol=1e-5, atol=1e-6)
    a, b = (torch.randint(-127, 128, (17, 64), generator=torch.Generator().manual_seed(i)).to(torch.int8)
            for i in (0, 1))
    # PyTorch's own, wherever it is not used for speed.
    assert torch.equal(quantized.integer_product(a, b).int(), torch._int_mm(a, b.T))


def test_outliers_are_left_out_of_the_integers():
    weight, x = matrix(), matrix(20, seed=1)
    x[:, 7] *= 100
    layer = make_layer(quantized.OutlierLinear, weight.index_fill(1, torch.tensor([7]), 0), Format(8))
    layer.hold(torch.tensor([7]), weight[:, 7:8])
    by_hand = integers_by_hand(x.index_fill(1, torch.tensor([7]), 0), layer.weight,
                               layer.scale) + x[:, 7:8].double() @ weight[:, 7:8].double().T
    assert torch.allclose(layer(x).double(), by_hand, rtol=1e-5, atol=1e-5)
    exact = x.double() @ weight.double().T
    plain = make_layer(quantized.W8A8Linear, weight, Format(8))
    assert (layer(x) - exact).abs().mean() < 0.1 * (plain(x) - exact).abs().mean()


# ------------------------------------------------------------------------------------------------------ folders

@pytest.fixture(scope="module")
def documents(text_file):
    return chapter.data.load_documents(text_file)[0]


def make_folder(path, documents, dtype=torch.float32, **changes):
    """A folder with a small model of random weights, larger than usual, so that what they are matters."""
    tokenizer = chapter.make_tokenizer(documents)
    model = chapter.make_model(tokenizer, **SIZES | changes)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter *= 1 if "norm" in name or "embed" in name else 4
    path.mkdir()
    chapter.checkpoint.save_model(path, model.to(dtype), tokenizer)
    return path


@pytest.fixture(scope="module")
def full(tmp_path_factory, documents):
    return make_folder(tmp_path_factory.mktemp("full") / "model", documents)


@pytest.fixture(scope="module", params=[*METHODS, "int4 asymmetric"])
def small(request, full, documents, tmp_path_factory):
    """(method, folder) of that model, quantized by each method in turn."""
    method, _, asymmetric = request.param.partition(" ")
    folder = tmp_path_factory.mktemp("small") / "model"
    quantize.quantize(full, method, folder, 32 if "int4" in method else None, bool(asymmetric), documents, 400)
    return method, folder


def logits(folder, change=False):
    """(T, V) for a text, or for one whose last four tokens are others."""
    model, tokenizer = chapter.checkpoint.load_model(folder)
    ids = chapter.prompt_ids(tokenizer, "the king and queen of night speak softly")
    if change:
        ids[-4:] = ids[1:5]
    with torch.no_grad():
        return chapter.logits(model.eval(), ids)


def test_a_quantized_model_answers_nearly_as_before(full, small):
    method, folder = small
    before, after = logits(full), logits(folder)
    error = ((after - before).norm() / before.norm()).item()
    assert 0 < error < (0.05 if "int8" in method else 0.5), error


def test_a_later_token_changes_nothing_before_it(small):
    """The causality probe, on every kind of layer: bit-equal."""
    before, after = logits(small[1]), logits(small[1], change=True)
    assert torch.equal(before[:-4], after[:-4]) and not torch.equal(before[-1], after[-1])


def test_with_a_cache_and_without_it(small):
    """Token by token, in the engine's layout, against the whole text at once."""
    model, tokenizer = chapter.checkpoint.load_model(small[1])
    ids = chapter.prompt_ids(tokenizer, "the king and queen of night speak softly")
    with torch.no_grad():
        whole = chapter.logits(model.eval(), ids)
        cache = chapter.kv_cache.ContiguousCache(model.config, 1, len(ids))
        steps = [model(torch.tensor([i]), *cache.place([0], [1]), cache=cache)[0] for i in ids]
    assert torch.allclose(torch.stack(steps), whole, rtol=1e-4, atol=1e-4 * whole.abs().max())


def test_the_ends_of_an_answer_are_kept(tmp_path, documents):
    """Of a model that was trained to chat, whose config.json names one of its two ends, as Qwen's does."""
    source = make_folder(tmp_path / "source", documents)
    for name, change in (("config.json", {"eos_token_id": 7}),
                         ("tokenizer_config.json", {"eos_token": {"content": "<|im_end|>"}})):
        (source / name).write_text(json.dumps(json.loads((source / name).read_text()) | change))
    chapter.quantize.quantize(source, "int8", tmp_path / "out")
    tokenizer = chapter.tokenizer.load_tokenizer(tmp_path / "out")
    saved = [json.loads((tmp_path / "out" / name).read_text()) for name in ("config.json", "tokenizer_config.json")]
    assert saved[0]["eos_token_id"] == [tokenizer.end_of_text,
                                        tokenizer.end_of_turn] and saved[1]["eos_token"] == "<|im_end|>"


def test_the_engine_and_generate_open_the_folder(small, call, tmp_path):
    (tmp_path / "prompts.txt").write_text("the king\nthe queen and\n")
    status, out, err = call(chapter.engine, tmp_path / "prompts.txt", "--max-new-tokens", 5, "--checkpoint", small[1],
                            "--temperature", 0)
    assert status == 0 and out.startswith("the king") and "the queen and" in out, err
    status, alone, err = call(chapter.generate, "the king", 5, "--checkpoint", small[1], "--temperature", 0)
    assert status == 0 and alone.strip() in out, (alone, out, err)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("changes", [{}, dict(tie_word_embeddings=False),
                                     dict(num_experts=4, moe_intermediate_size=32)])
@pytest.mark.parametrize("method, group, asymmetric", [("int8", None, False), ("int4", 32, False), ("int4", 16, True)])
def test_the_folder_is_as_large_as_predicted(tmp_path, documents, method, group, asymmetric, changes, dtype):
    """The tensors to the byte; the file has a header besides, which counts for little in a model of a real size."""
    folder = make_folder(tmp_path / "full", documents, dtype, **changes)
    quantize.quantize(folder, method, tmp_path / "small", group, asymmetric)
    model, _ = chapter.checkpoint.load_model(tmp_path / "small")
    tensors = {tensor.data_ptr(): tensor.nbytes for tensor in (*model.parameters(), *model.buffers())}
    predicted = quantize.predicted_bytes(model.config, model.config.quantization_config, dtype.itemsize)
    assert sum(tensors.values()) == predicted
    file = (tmp_path / "small" / "model.safetensors").stat().st_size
    assert predicted < file < predicted + 300 * len(model.state_dict())
    assert model.model.norm.weight.dtype == dtype and model.config.quantization_config["group_size"] == (group or 0)


def test_loading_never_holds_the_full_model(small, monkeypatch):
    """Of the matrices, no float one is ever made: neither while loading nor in the model that comes out."""
    seen = []
    read = chapter.pretrained.read_tensor
    monkeypatch.setattr(chapter.pretrained, "read_tensor", lambda *arguments: seen.append(read(*arguments)) or seen[-1])
    model, _ = chapter.checkpoint.load_model(small[1])
    for tensor in [*seen, *model.state_dict().values()]:
        few = tensor.shape[-1] < 64   # a scale, a norm, or the columns of outliers
        assert not tensor.is_floating_point() or tensor.dim() == 1 or few, (tensor.shape, tensor.dtype)


def test_experts_become_integers_and_their_router_does_not(tmp_path, documents):
    folder = make_folder(tmp_path / "full", documents, num_experts=4, moe_intermediate_size=32)
    for method in METHODS[:3] + METHODS[4:7]:   # the others divide what makes a layer's inputs
        quantize.quantize(folder, method, tmp_path / method, 16 if "4" in method else None, False, documents, 400)
        model, _ = chapter.checkpoint.load_model(tmp_path / method)
        assert isinstance(model.model.layers[0].mlp.gate, torch.nn.Linear)
        assert isinstance(model.model.layers[0].mlp.experts["3"].down_proj, quantized.Int8Linear)
        assert (logits(tmp_path / method) - logits(folder)).norm() < 0.5 * logits(folder).norm()
        with torch.no_grad():
            assert chapter.logits(model, [3]).isfinite().all()   # one token: two of the experts get none


def test_a_quantized_folder_may_be_written_again(tmp_path, full, documents):
    for method in ("int4-gptq", "int8", "int8"):
        quantize.quantize(full, method, tmp_path / "a", 32 if "4" in method else None, False, documents, 400)
    quantize.quantize(full, "int8", tmp_path / "b")
    (tmp_path / "b").rename(tmp_path / "c")
    assert torch.equal(logits(tmp_path / "a"), logits(tmp_path / "c"))
    shutil.rmtree(tmp_path / "c")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


@pytest.mark.gpu
@pytest.mark.parametrize("method", METHODS)
def test_a_folder_made_on_the_cpu_gives_the_same_answers_on_a_gpu(tmp_path, documents, method):
    """The folder has the plain order of bytes; each device packs for itself."""
    folder = make_folder(tmp_path / "full", documents, torch.bfloat16, hidden_size=128,
                         intermediate_size=256, head_dim=32)
    quantize.quantize(folder, method, tmp_path / "small", 32 if "int4" in method else None, False, documents, 400)
    answers = []
    for device in ("cpu", "cuda"):
        model, tokenizer = chapter.checkpoint.load_model(tmp_path / "small", device)
        model = chapter.small_batch_matmul.for_small_batches(model).eval()
        ids = chapter.prompt_ids(tokenizer, "the king and queen of night speak softly")
        packed = [x.to(device) for x in (torch.tensor(ids), torch.arange(len(ids)),
                                         torch.tensor([0, len(ids)], dtype=torch.int32))]
        with torch.no_grad():
            answers.append(model(*packed, len(ids)).float().cpu())
    assert (answers[0] - answers[1]).norm() < 0.03 * answers[0].norm()


# ------------------------------------------------------------------------------------------------------ bad input

def test_bad_input(tmp_path, full, documents, call, text_file):
    quantize.quantize(full, "int8", tmp_path / "done")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "letter.txt").write_text("dear")
    command = ("--checkpoint", full, "--data", text_file, "--out", tmp_path / "new")
    for arguments, words in [
        ((*command, "--method", "int4", "--group", 40), ("--group 40", "64, 96", "32")),
        ((*command, "--method", "int4"), ("--group 128",)),
        ((*command, "--method", "int8", "--group", 32), ("--group", "each row")),
        ((*command, "--method", "int8", "--asymmetric"), ("--asymmetric",)),
        ((*command, "--method", "int4-gptq", "--group", 32, "--calibration-tokens", 10 ** 6),
         ("calibration", "1,000,000")),
        ((*command, "--method", "int2"), ("int2",)),
        ((*command, "--method", "int8", "--checkpoint", tmp_path / "done"), ("quantized already", "int8")),
        ((*command, "--method", "int8", "--checkpoint", tmp_path / "nothing"), ("nothing",)),
        ((*command, "--method", "int8", "--out", full), ("the checkpoint itself",)),
        ((*command, "--method", "int8", "--out", tmp_path / "notes"), ("notes", "something else")),
    ]:
        expect_error(call(quantize, *arguments), *words)
        assert not (tmp_path / "new").exists() and not (tmp_path / "new.tmp").exists()
    assert (tmp_path / "notes" / "letter.txt").read_text() == "dear"
    assert (full / "model.safetensors").is_file()


def test_a_device_that_lacks_a_method(tmp_path, full, documents):
    """Said before anything is read or computed, so that no such device is needed to see it."""
    InputError = chapter.cli.InputError
    for method in ("int8-w8a8", "int8-outliers", "int8-smoothquant"):
        with pytest.raises(InputError, match=f"{method} .* torch cannot on mps"):
            quantize.quantize(full, method, tmp_path / "new", documents=documents, tokens=200, device="mps")
    assert list(tmp_path.iterdir()) == []
    quantize.quantize(full, "int8-w8a8", tmp_path / "small")
    with pytest.raises(InputError, match="torch cannot on mps"):
        chapter.checkpoint.load_model(tmp_path / "small", "mps")
    odd = make_folder(tmp_path / "odd", documents, intermediate_size=100)
    with pytest.raises(InputError, match="multiple of 8, and they are 64, 100 long"):
        quantize.quantize(odd, "int8-w8a8", tmp_path / "new", device="cuda")


def test_a_disk_that_is_full_leaves_nothing_behind(tmp_path, full, monkeypatch):
    def no_room(*arguments, **named):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(chapter.pretrained, "save_file", no_room)
    with pytest.raises(chapter.cli.InputError, match="No space left"):
        quantize.quantize(full, "int8", tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("change, words", [
    (dict(quant_method="awq"), "awq"), (dict(bits=3), "'bits': 3"), (dict(activations="int4"), "int4"),
    (dict(group_size="a"), "group_size"),
    (dict(group_size=48), "is (64, 1)|config.json says")])
def test_a_quantization_that_is_not_ours(tmp_path, full, change, words):
    quantize.quantize(full, "int4", tmp_path / "small", 32)
    path = tmp_path / "small" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= change
    path.write_text(json.dumps(config))
    with pytest.raises(chapter.cli.InputError, match=words.replace("(", r"\(").replace(")", r"\)") if "|" not in words
                       else "config.json says"):
        chapter.checkpoint.load_model(tmp_path / "small")


def test_who_else_opens_the_folder(tmp_path, small, call, text_file):
    """Whoever does not know what these integers are must say so; but a folder that an earlier quantize.py wrote is
    known.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3ForCausalLM, Qwen3Model
    for reader in (AutoModelForCausalLM, Qwen3ForCausalLM, Qwen3Model):
        with pytest.raises(ValueError, match="quant"):
            reader.from_pretrained(small[1])
    assert AutoTokenizer.from_pretrained(small[1]).encode("the king")
    expect_error(call(chapter1.generate, "the king", "--checkpoint", small[1]), small[1])
    for earlier in map(load_chapter, CHAPTERS[1:-1]):
        expect_error(call(earlier.generate, "the king", "--checkpoint", small[1]), "quantization_config")
        expect_error(call(earlier.train, "--init", small[1], "--data", text_file, "--out", tmp_path / "run"),
                     "quantization_config")
    before = shutil.copytree(small[1], tmp_path / "before")
    config = json.loads((before / "config.json").read_text())
    config["quantization_config"]["quant_method"] = config["quantization_config"].pop("written_by")
    (before / "config.json").write_text(json.dumps(config))
    assert torch.equal(logits(before), logits(small[1]))


def test_weights_that_are_no_numbers(tmp_path, documents):
    folder = make_folder(tmp_path / "full", documents)
    model, tokenizer = chapter.checkpoint.load_model(folder)
    model.model.layers[1].mlp.up_proj.weight.data[3, 3] = float("nan")
    chapter.checkpoint.save_model(folder, model, tokenizer)
    with pytest.raises(chapter.cli.InputError, match="layers.1.mlp.up_proj.*nan"):
        quantize.quantize(folder, "int8", tmp_path / "small")
    assert not (tmp_path / "small").exists()


PRUNED = {   # what of layer 1 is zero, and which layers get nothing but zeros then
    "up_proj": (["mlp.up_proj.weight"], ["mlp.down_proj"]),
    "a norm": (["input_layernorm.weight"], ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj",
                                            "self_attn.o_proj"]),
    "v_proj": (["self_attn.v_proj.weight"], ["self_attn.o_proj"]),
    "all": (["self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight", "self_attn.o_proj.weight",
             "mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight"], []),
}


def pruned(path, documents, zeros):
    """A folder of a model with zeros, and besides a zero row, a zero column and a zero group in each matrix."""
    folder = make_folder(path, documents)
    model, tokenizer = chapter.checkpoint.load_model(folder)
    with torch.no_grad():
        for name, weight in model.model.layers[1].named_parameters():
            weight *= name not in zeros
            if weight.dim() == 2:
                weight[5], weight[:, 7], weight[2, :32] = 0, 0, 0
    chapter.checkpoint.save_model(folder, model, tokenizer)
    return folder


@pytest.mark.parametrize("method", [*METHODS, "int4 asymmetric"])
@pytest.mark.parametrize("zeros", PRUNED)
def test_a_pruned_model_is_quantized_as_any_other(tmp_path, documents, zeros, method):
    """Where the inputs of a layer are always zero, nothing is known about them, and its weights go to the nearest
    integers.
    """
    names, blind = PRUNED[zeros]
    folder = pruned(tmp_path / "full", documents, names)
    name, _, asymmetric = method.partition(" ")
    quantize.quantize(folder, name, tmp_path / "small", 32 if "int4" in name else None, bool(asymmetric),
                      documents, 400)
    assert all(tensor.isfinite().all() for tensor in load_file(tmp_path / "small" / "model.safetensors").values())
    before, after = logits(folder), logits(tmp_path / "small")
    assert (after - before).square().mean() < 0.1 * before.square().mean()
    full, small = (chapter.checkpoint.load_model(path)[0].model.layers[1] for path in (folder, tmp_path / "small"))
    # Which draws in the largest of a group as if all inputs were alike.
    for layer in blind if name != "int4-gptq" else []:
        plain = integers.rounded(full.get_submodule(layer).weight.detach(), small.get_submodule(layer).format)
        torch.testing.assert_close(small.get_submodule(layer).dequantized(), plain)


@pytest.mark.parametrize("size", [1e-25, 1e-12, 1e12])
def test_awq_does_not_care_how_large_inputs_are(size):
    """A product of two factors that leaves float32 would be 0 or inf, and all weights nan."""
    chapter7, x = chapter.awq_smoothquant, torch.randn(50, 64).exp()
    block = chapter.model.Block(chapter.model.ModelConfig(hidden_size=64))
    site = chapter7.sites(block)[2]
    factors = [chapter7.best_factors(site, SimpleNamespace(mean=x.abs().mean(0) * size, products=x.T @ x),
                                     Format(4, 32), grid=20)
               for size in (1.0, size)]
    torch.testing.assert_close(*factors)


@pytest.mark.parametrize("method", [*METHODS, "int4 asymmetric"])
def test_what_computes_no_numbers_is_not_written(tmp_path, documents, method):
    """All weights are finite, and what they make of a token is not: a bit of an exponent has flipped."""
    folder = make_folder(tmp_path / "full", documents)
    model, tokenizer = chapter.checkpoint.load_model(folder)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 3] = model.model.layers[1].mlp.down_proj.weight[3, 3] = 1e30
    chapter.checkpoint.save_model(folder, model, tokenizer)
    name, _, asymmetric = method.partition(" ")
    with pytest.raises(chapter.cli.InputError, match="layer 1.*nan or inf.*nothing was written"):
        quantize.quantize(folder, name, tmp_path / "small", 32 if "int4" in name else None, bool(asymmetric),
                          documents, 400)
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_a_scale_that_is_no_number_is_found_before_the_folder_is_there(tmp_path, full, monkeypatch):
    def spoil(*arguments):
        integers, scale, zero = quantize.nearest(*arguments)
        scale[3] = float("nan")
        return integers, scale, zero
    monkeypatch.setitem(quantize.METHODS, "int4", replace(quantize.METHODS["int4"], to_integers=spoil))
    with pytest.raises(chapter.cli.InputError, match="layer 0 in integers.*nan or inf"):
        quantize.quantize(full, "int4", tmp_path / "small", 32)
    assert not list(tmp_path.iterdir())


def test_a_table_that_is_read_in_parts(tmp_path, full, monkeypatch):
    """Parts of any size give the same integers, and a table of another shape than config.json says is refused."""
    quantize.quantize(full, "int8", tmp_path / "whole")
    vocab = len(load_file(full / "model.safetensors")["model.embed_tokens.weight"])
    for part in (vocab // 3, vocab - 1, vocab, vocab + 1):
        monkeypatch.setattr(quantize, "PART", part)
        quantize.quantize(full, "int8", tmp_path / "parts")
        found, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("parts", "whole"))
        assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    monkeypatch.setattr(quantize, "PART", 16)
    bad = tmp_path / "bad"
    shutil.copytree(full, bad)
    tensors = load_file(full / "model.safetensors")
    table = tensors["model.embed_tokens.weight"]
    for other, words in ((table[:-1], "embed_tokens.weight from row"),
                         (torch.cat([table, table[:1]]), "embed_tokens.weight from row"),
                         (table[:, 1:].contiguous(), "embed_tokens.weight is"),
                         (table[0, 0].clone(), "embed_tokens.weight")):
        save_file(tensors | {"model.embed_tokens.weight": other}, bad / "model.safetensors", {"format": "pt"})
        with pytest.raises(chapter.cli.InputError, match=words):
            quantize.quantize(bad, "int8", tmp_path / "new")
        assert not (tmp_path / "new").exists()


def test_a_quantized_model_cannot_be_trained(tmp_path, full, text_file, call):
    quantize.quantize(full, "int8", tmp_path / "small")
    expect_error(call(chapter.train, "--init", tmp_path / "small", "--data", text_file, "--out",
                      tmp_path / "run"), "quantized")


def test_experts_are_not_rescaled(tmp_path, documents):
    folder = make_folder(tmp_path / "full", documents, num_experts=4, moe_intermediate_size=32)
    with pytest.raises(chapter.cli.InputError, match="experts"):
        quantize.quantize(folder, "int4-awq", tmp_path / "small", 32, False, documents, 400)


def test_integers_make_up_for_the_rounding_of_their_scale():
    """A scale in bfloat16 is off by up to 0.4 %: of an integer of 127, half a step."""
    weight = matrix(64, 96)
    q, scale, _ = quantize.nearest(weight, None, Format(8), torch.bfloat16)
    inside = q.abs() < 126   # beyond the last integer nothing can be made up for
    error = ((integers.from_integers(q, scale.float()) - weight).abs() / scale.float())[inside]
    assert error.max() <= 0.501, error.max()


def test_evaluate_measures_every_method(tmp_path, full, text_file, call, monkeypatch):
    evaluate = chapter.__getattr__("evaluate")   # the module: all chapters' tests have a function of that name
    monkeypatch.setattr(chapter.results, "RESULTS", tmp_path)
    for name, value in {"FIGURES": tmp_path, "PROMPT": 32, "NEW": 3}.items():
        monkeypatch.setattr(evaluate, name, value)
    quantize.quantize(full, "int8", tmp_path / "int8")
    command = ("--checkpoint", full, "--data", text_file, "--group", 32, "--calibration-tokens", 400, "--rounds", 1,
               "--out", tmp_path, "--device", "cpu")
    status, out, err = call(evaluate, *command, "--qat", full)
    assert status == 0, err
    rows = {row["name"]: row for row in json.loads((tmp_path / "evaluate.json").read_text())["rows"]}
    assert {*METHODS, "float32", "bfloat16", "int4-gptq, zero point", "int4 after --qat",
            "float32, cache in int4"} <= rows.keys()
    assert rows["float32"]["worse"] == "+0.00%"
    assert rows["float32"]["divergence"] == 0 < rows["int8"]["divergence"] < rows["int4"]["divergence"]
    assert rows["int4 after --qat"]["bits_per_byte"] == rows["int4"]["bits_per_byte"]
    assert rows["int4 after --qat"]["recovered"] in ("0%", "-0%")
    assert all(row["decode"] > 0 and row["memory"] < row["disk"] for name, row in rows.items()
               if "cache" not in name), rows
    expect_error(call(evaluate, *command, "--checkpoint", tmp_path / "int8"), "quantized")
