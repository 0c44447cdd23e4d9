"""The model from chapter 2 on: equal to the reference Qwen3 in logits, gradients and files; documents that never see
each other.
"""
import json
import shutil
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen3Config, Qwen3ForCausalLM

import warm
from chapters import TRAINED, chapter1, load_chapter
from weights import assert_same, far_from_initial, gradients

CHAPTERS = {name: load_chapter(name) for name in TRAINED if name != chapter1.folder.name}
qwen3 = CHAPTERS["chapter-02-qwen3-packed"].model   # each test runs for the model of every chapter, see each_chapter
V = 61
SIZES = dict(vocab_size=V, hidden_size=32, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, head_dim=16, max_position_embeddings=64)
CONFIG = qwen3.ModelConfig(**SIZES)   # of the chapter being tested, too
LENGTHS = (7, 1, 12, 7, 3, 1, 20)


@pytest.fixture(autouse=True, params=CHAPTERS)
def each_chapter(request):
    global chapter, qwen3, attention, pretrained, InputError, CONFIG
    chapter = CHAPTERS[request.param]
    qwen3, attention, pretrained = chapter.model, chapter.attention, chapter.pretrained
    InputError = chapter.cli.InputError
    CONFIG = qwen3.ModelConfig(**SIZES)


def make_model(config=None, seed=0):
    torch.manual_seed(seed)
    return far_from_initial(qwen3.Transformer(config or CONFIG))


def pack(lengths=LENGTHS, seed=1):
    """Random documents of these lengths, as the four arguments of Transformer.forward."""
    ids = torch.randint(0, V, (sum(lengths),), generator=torch.Generator().manual_seed(seed))
    position_ids = torch.cat([torch.arange(length) for length in lengths])
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    return ids, position_ids, cu_seqlens, max(lengths)


def reference_qwen3(model):
    """transformers' Qwen3 with the weights of ours, under the very same names."""
    c = model.config
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings")
    reference = Qwen3ForCausalLM(Qwen3Config(
        **{name: getattr(c, name) for name in names}, attn_implementation="eager",
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta}))
    reference.load_state_dict(model.state_dict())
    return reference


def loss(logits, ids):
    """A loss that depends on every logit."""
    return F.cross_entropy(logits, ids.roll(1), reduction="sum") / 10


# ------------------------------------------------------------------------------------------------ the reference

@pytest.mark.parametrize("changes", [
    dict(num_key_value_heads=4),                                                   # every query head has its own
    dict(num_key_value_heads=2, tie_word_embeddings=False),
    dict(num_attention_heads=8, num_key_value_heads=2, rope_theta=1e6),
    dict(num_attention_heads=4, num_key_value_heads=1, head_dim=6, num_hidden_layers=3, rms_norm_eps=0.1),
], ids=lambda changes: " ".join(f"{value}" for value in changes.values()))
def test_logits_and_gradients_equal_transformers(changes):
    model = make_model(replace(CONFIG, **changes))
    reference = reference_qwen3(model)
    ids, position_ids, cu_seqlens, max_seqlen = pack((40,))
    ours, theirs = model(ids, position_ids, cu_seqlens, max_seqlen), reference(ids[None]).logits[0]
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    loss(ours, ids).backward()
    loss(theirs, ids).backward()
    assert_same(gradients(model), gradients(reference))


def test_packed_equals_one_by_one_equals_padded():
    """The same documents in one row, each alone, and as transformers' padded batch: logits and gradients."""
    model = make_model()
    reference = reference_qwen3(model)
    ids, position_ids, cu_seqlens, max_seqlen = batch = pack()
    packed = model(*batch)
    loss(packed, ids).backward()
    expected = gradients(model)

    model.zero_grad()
    alone = torch.cat([model(document, torch.arange(len(document)), torch.tensor([0, len(document)]).int(),
                             len(document))
                       for document in ids.split(LENGTHS)])
    torch.testing.assert_close(alone, packed, atol=1e-5, rtol=1e-5)
    loss(alone, ids).backward()
    assert_same(gradients(model), expected)

    rows = torch.nn.utils.rnn.pad_sequence(ids.split(LENGTHS), batch_first=True)
    is_token = torch.arange(max_seqlen) < cu_seqlens.diff()[:, None]
    padded = reference(rows, attention_mask=is_token.long()).logits[is_token]
    torch.testing.assert_close(padded, packed, atol=1e-4, rtol=1e-4)
    loss(padded, ids).backward()
    assert_same(gradients(reference), expected)

    padding_free = reference(ids[None], position_ids=position_ids[None], use_cache=False).logits[0]
    torch.testing.assert_close(padding_free, packed, atol=1e-4, rtol=1e-4)


def test_published_numbers_of_parameters():
    counts = {"qwen3-0.6b": 596_049_920, "qwen3-1.7b": 1_720_574_976, "qwen3-4b": 4_022_468_096,
              "qwen3-8b": 8_190_735_360, "qwen3-14b": 14_768_307_200, "qwen3-32b": 32_762_123_264}
    # With experts: test_moe.py.
    assert counts.keys() == qwen3.CONFIGS.keys() - {"small", "medium", "small-moe", "qwen3-30b-a3b"}
    for name, count in counts.items():
        with torch.device("meta"):
            assert qwen3.Transformer(qwen3.CONFIGS[name]).num_parameters() == count, name


def test_rms_norm_equals_torch():
    ours, theirs = qwen3.RMSNorm(48, 1e-3), torch.nn.RMSNorm(48, 1e-3)
    theirs.weight = ours.weight
    torch.nn.init.uniform_(ours.weight)
    x = torch.randn(5, 48) / 10
    torch.testing.assert_close(ours(x), theirs(x))
    assert ours.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


def test_initialization():
    torch.manual_seed(0)
    model = qwen3.Transformer(replace(CONFIG, hidden_size=256, intermediate_size=768, num_hidden_layers=8))
    state = model.state_dict()
    for name, std in {"embed_tokens": 1 / 16, "layers.0.self_attn.q_proj": 0.02, "layers.3.mlp.down_proj": 0.02 / 4,
                      "layers.7.self_attn.o_proj": 0.02 / 4}.items():
        assert state[f"model.{name}.weight"].std().item() == pytest.approx(std, rel=0.1), name
    assert all(value.eq(1).all() for name, value in state.items() if "norm" in name)
    assert model.lm_head.weight is model.model.embed_tokens.weight


# ---------------------------------------------------------------------------------------------------- isolation

def test_a_document_never_sees_another():
    """Editing a document changes its own logits and leaves those of all others bit-equal."""
    model = make_model()
    ids, *packing = pack()
    before = model(ids, *packing)
    documents = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))
    for document in range(len(LENGTHS)):
        edited = torch.where(documents == document, (ids + 1) % V, ids)
        after = model(edited, *packing)
        others = documents != document
        assert torch.equal(after[others], before[others]), f"an edit of document {document} is seen elsewhere"
        assert not torch.isclose(after[~others], before[~others]).all(dim=-1).any()


def test_a_broken_document_spoils_no_other():
    """Not even nan gets across: a mask multiplies by 0 what it hides, and 0 * nan is nan."""
    model = make_model(replace(CONFIG, tie_word_embeddings=False))
    ids, *packing = pack()
    ids = ids % (V - 1)
    before = model(ids, *packing)
    broken = slice(8, 20)   # document 2
    ids[broken] = V - 1
    with torch.no_grad():
        model.model.embed_tokens.weight[V - 1] = float("nan")
    after = model(ids, *packing)
    assert after[broken].isnan().all()
    assert torch.equal(after[:8], before[:8]) and torch.equal(after[20:], before[20:])


def test_causality_probe():
    """Editing token t leaves every logit before t bit-equal, and changes those of its document from t on."""
    model = make_model()
    ids, *packing = pack((5, 30, 9))
    before = model(ids, *packing)
    for t in (5, 17, 34):
        edited = ids.clone()
        edited[t] = (edited[t] + 1) % V
        after = model(edited, *packing)
        assert torch.equal(after[:t], before[:t]), f"a change of token {t} is seen before {t}"
        assert not torch.isclose(after[t:35], before[t:35]).all(dim=-1).any()


# ---------------------------------------------------------------------------------------------------- attention

def attention_formula(q, k, v, cu_seqlens):
    """Chapter 1's way: all scores, a mask, a softmax. Query head h reads key-value head h // (H / G)."""
    T, H, K = q.shape
    heads = torch.arange(H) // (H // k.shape[1])
    documents = torch.arange(len(cu_seqlens) - 1).repeat_interleave(cu_seqlens.diff())
    mask = (documents[:, None] == documents) & torch.ones(T, T, dtype=torch.bool).tril()
    scores = torch.einsum("qhk,shk->hqs", q, k[:, heads]) / K ** 0.5
    return torch.einsum("hqs,shk->qhk", scores.masked_fill(~mask, float("-inf")).softmax(-1), v[:, heads])


def random_qkv(T, H=6, G=2, K=8):
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(T, heads, K, generator=generator, requires_grad=True) for heads in (H, G, G)]


@pytest.mark.parametrize("lengths", [LENGTHS, (1,), (30,), (1,) * 9, (4, 4, 4), (2, 50, 1)])
def test_packed_attention_equals_the_formula(lengths):
    _, _, cu_seqlens, max_seqlen = pack(lengths)
    qkv = random_qkv(sum(lengths))
    ours, theirs = attention.packed_attention(*qkv, cu_seqlens, max_seqlen), attention_formula(*qkv, cu_seqlens)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    direction = torch.randn_like(ours)
    for a, b in zip(torch.autograd.grad(ours, qkv, direction), torch.autograd.grad(theirs, qkv, direction)):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_many_short_documents_take_few_calls(monkeypatch):
    """In any order in chapter 2. Later, neighbours of equal length share a call, and the packer sorts."""
    where, name = ((chapter.custom_ops, "flash") if hasattr(chapter, "custom_ops")
                   else (F, "scaled_dot_product_attention"))
    calls, library = [], getattr(where, name)
    monkeypatch.setattr(where, name, lambda *a, **k: calls.append(a[0].shape) or library(*a, **k))
    _, _, cu_seqlens, max_seqlen = pack((3, 5, 4) * 50 if where is F else (3,) * 50 + (4,) * 50 + (5,) * 50)
    attention.packed_attention(*random_qkv(600), cu_seqlens, max_seqlen)
    assert calls == [(50, 6, 3, 8), (50, 6, 4, 8), (50, 6, 5, 8)]


def varlen_by_loop(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size, enable_gqa=False):
    """What varlen_attn promises, for a machine without CUDA."""
    assert q.dtype == k.dtype == v.dtype and window_size == (-1, 0) and cu_seq_q is cu_seq_k
    assert max_q == max_k == cu_seq_q.diff().max()
    assert enable_gqa or q.shape == k.shape == v.shape
    return attention_formula(q, k, v, cu_seq_q)


@pytest.mark.parametrize("gqa", [{"enable_gqa": True}, {}], ids=["torch 2.12", "torch 2.11"])
def test_the_cuda_path_calls_varlen_attn_rightly(monkeypatch, gqa):
    """With a stand-in for the kernel: the same result, with and without its argument for grouped queries."""
    _, _, cu_seqlens, max_seqlen = pack()
    q, k, v = random_qkv(sum(LENGTHS))
    expected = attention.packed_attention(q, k, v, cu_seqlens, max_seqlen)
    monkeypatch.setattr(attention, "varlen_obstacle", lambda device, dtype: None)
    monkeypatch.setattr(attention, "varlen_attn", varlen_by_loop)
    monkeypatch.setattr(attention, "VARLEN_GQA", gqa)
    torch.testing.assert_close(attention.packed_attention(q, k, v, cu_seqlens, max_seqlen), expected,
                               atol=1e-5, rtol=1e-5)
    autocast = attention.packed_attention(q, k, v.bfloat16(), cu_seqlens, max_seqlen)   # norms leave q and k in float32
    assert autocast.dtype == torch.bfloat16
    ids, *packing = pack()
    assert make_model()(ids, *packing).isfinite().all()


def test_attention_path_says_which_and_why(monkeypatch):
    assert ("one call for each document length (varlen_attn needs a CUDA GPU)"
            in attention.attention_path("cpu", torch.bfloat16))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert attention.attention_path("cuda", torch.bfloat16) == "attention by varlen_attn, one kernel for all documents"
    assert "not float32" in attention.attention_path("cuda", torch.float32)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: True)
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda device: torch.bfloat16)
    assert "by varlen_attn" in attention.attention_path("cuda", torch.float32)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "Ampere" in attention.attention_path("cuda", torch.bfloat16)


@pytest.mark.gpu
def test_varlen_attn_equals_the_cpu_path():
    _, _, cu_seqlens, max_seqlen = pack()
    qkv = [x.detach().bfloat16().requires_grad_() for x in random_qkv(sum(LENGTHS), K=64)]
    cuda = [x.detach().cuda().requires_grad_() for x in qkv]
    ours = attention.packed_attention(*cuda, cu_seqlens.cuda(), max_seqlen)
    theirs = attention_formula(*(x.float() for x in qkv), cu_seqlens)
    torch.testing.assert_close(ours.float().cpu(), theirs, atol=2e-2, rtol=2e-2)
    direction = torch.randn_like(theirs)
    for a, b in zip(torch.autograd.grad(ours, cuda, direction.cuda().bfloat16()),
                    torch.autograd.grad(theirs, qkv, direction)):
        torch.testing.assert_close(a.float().cpu(), b.float(), atol=5e-2, rtol=5e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_model_on_cuda_equals_the_cpu(dtype):
    model, batch = make_model(replace(CONFIG, head_dim=64)), pack()
    expected = model(*batch)
    logits = model.to("cuda", dtype)(*(x.cuda() if isinstance(x, torch.Tensor) else x for x in batch)).float().cpu()
    assert (logits - expected).norm() / expected.norm() < (1e-4 if dtype == torch.float32 else 5e-2)


def in_sight(q, k, v, cu_seqlens):
    """The attention of custom_ops.py by operations that torch's FLOP counter knows."""
    return [torch.cat([F.scaled_dot_product_attention(*stack, is_causal=True,
                                                      enable_gqa=True).transpose(1, 2).flatten(0, 1)
                       for stack in chapter.custom_ops.stacks(cu_seqlens, q, k, v)])]


def test_flops_per_token_agrees_with_torch(monkeypatch):
    """The formula against torch's own counter: attention costs sum(L^2), not T^2."""
    if hasattr(chapter, "custom_ops"):
        monkeypatch.setattr(attention, "grouped_attention", in_sight)
    model, batch = make_model(), pack()
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):   # the plain formula, easily counted
        model(*batch).sum().backward()
    if hasattr(chapter, "flops"):
        predicted = chapter.flops.total_flops(model.config, batch[2])
    else:
        predicted = model.flops_per_token(batch[2]) * sum(LENGTHS)
    assert predicted == pytest.approx(counter.get_total_flops(), rel=1e-12)


# --------------------------------------------------------------------------------------------------- checkpoints

@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transformers_opens_what_we_save(tmp_path, tied, dtype):
    config = replace(CONFIG, tie_word_embeddings=tied, rope_theta=5e4, rms_norm_eps=0.01, eos_token_id=3)
    model = make_model(config).to(dtype)
    pretrained.save_pretrained(model, tmp_path / "model")
    reference = Qwen3ForCausalLM.from_pretrained(tmp_path / "model")
    assert reference.dtype == dtype and reference.generation_config.eos_token_id == 3
    ids, *packing = pack((30,))
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(model(ids, *packing), reference(ids[None]).logits[0], atol=tolerance, rtol=tolerance)

    again = pretrained.load_pretrained(tmp_path / "model")
    assert vars(again.config) == vars(model.config)
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied
    assert torch.equal(again(ids, *packing), model(ids, *packing))
    assert pretrained.load_pretrained(tmp_path / "model", dtype=torch.float16).model.norm.weight.dtype == torch.float16


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shard", ["1GB", "20KB"])
def test_we_open_what_transformers_saves(tmp_path, tied, shard):
    reference = reference_qwen3(make_model(replace(CONFIG, tie_word_embeddings=tied, rope_theta=5e4)))
    reference.save_pretrained(tmp_path, max_shard_size=shard)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 3) == (shard == "20KB")
    model = pretrained.load_pretrained(tmp_path)
    ids, *packing = pack((30,))
    ours, theirs = model(ids, *packing), reference(ids[None]).logits[0]
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    loss(ours, ids).backward()   # a loaded model must learn, in all of its parameters
    loss(theirs, ids).backward()
    assert_same(gradients(model), gradients(reference))


@pytest.fixture
def folder(tmp_path):
    """A checkpoint, to be damaged."""
    pretrained.save_pretrained(make_model(), tmp_path / "model")
    return tmp_path / "model"


def edit_config(folder, **changes):
    """Change keys of config.json; a value of ... takes the key out."""
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


def test_a_published_folder_opens(folder):
    """As the hub has Qwen3-0.6B: written by transformers 4, and the tied table stored twice."""
    expected = pretrained.load_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    save_file(weights | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}, folder / "model.safetensors")
    edit_config(folder, rope_parameters=..., eos_token_id=..., rope_scaling=None, rope_theta=10000, sliding_window=None,
                max_window_layers=28, use_cache=True, initializer_range=0.02, transformers_version="4.51.0")
    model = pretrained.load_pretrained(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model(*pack()), expected(*pack()))


def test_loading_takes_the_memory_of_one_model(tmp_path):
    model = qwen3.Transformer(replace(CONFIG, hidden_size=512, intermediate_size=1536, num_hidden_layers=10))
    pretrained.save_pretrained(model, tmp_path)
    script = ("import resource, sys, pretrained\n"
              "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
              "before = peak()\n"
              "loaded = pretrained.load_pretrained(sys.argv[1])\n"
              "print((peak() - before) * (1 if sys.platform == 'darwin' else 1024))")
    done = warm.run("-c", script, tmp_path, cwd=chapter.folder)   # a process of its own, whose memory nobody else used
    size = (tmp_path / "model.safetensors").stat().st_size
    assert int(done.stdout) < 1.4 * size, f"{int(done.stdout):,} bytes for a file of {size:,}"


# ----------------------------------------------------------------------------------------------------- bad input

def expect_error(*words, load):
    with pytest.raises(InputError) as caught:
        pretrained.load_pretrained(load)
    message = str(caught.value)
    assert "\n" not in message and all(str(word) in message for word in words), message


@pytest.mark.parametrize("changes, words", [
    (dict(model_type="llama"), ["model_type", "llama", "qwen3"]),
    (dict(model_type=...), ["model_type", "None"]),
    (dict(attention_bias=True), ["attention_bias", "True"]),
    (dict(hidden_act="gelu"), ["hidden_act", "gelu"]),
    (dict(attention_dropout=0.1), ["attention_dropout", "0.1"]),
    (dict(use_sliding_window=True, sliding_window=4096), ["use_sliding_window"]),
    (dict(layer_types=["full_attention", "sliding_attention"]), ["layer_types", "sliding_attention"]),
    (dict(rope_parameters=..., rope_scaling={"type": "yarn", "factor": 4.0}), ["rope_type", "yarn"]),
    (dict(rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}), ["rope_type", "linear"]),
    (dict(quantization_config={"quant_method": "fp8"}), ["quantization_config", "fp8"]),
    (dict(hidden_size=...), ["hidden_size", "missing"]),
    (dict(rope_theta=..., rope_parameters=...), ["rope_theta", "missing"]),
    (dict(vocab_size="many"), ["vocab_size", "many"]),
    (dict(num_key_value_heads=3), ["num_attention_heads 4", "num_key_value_heads 3"]),
    (dict(num_key_value_heads=0), ["config.json", "zero"]),
    (dict(head_dim=15), ["head_dim 15"]),
    (dict(vocab_size=99), ["model.embed_tokens.weight", "(61, 32)", "(99, 32)"]),
    (dict(num_hidden_layers=3), ["11 missing tensors", "model.layers.2.input_layernorm.weight"]),
    (dict(num_hidden_layers=1), ["11 unknown tensors", "model.layers.1.input_layernorm.weight"]),
    (dict(tie_word_embeddings=False), ["1 missing tensors", "lm_head.weight"]),
], ids=lambda value: " ".join(value) if isinstance(value, dict) else "")
def test_another_configuration_is_named(folder, changes, words):
    edit_config(folder, **changes)
    expect_error(*words, load=folder)


def test_damaged_files_are_named(folder, tmp_path):
    weights = folder / "model.safetensors"
    for content in ("{", "[1]", "3"):
        broken = shutil.copytree(folder, tmp_path / "broken", dirs_exist_ok=True)
        (broken / "config.json").write_text(content)
        expect_error("config.json", load=broken)
    (broken / "config.json").unlink()
    expect_error("config.json", "No such file", load=broken)
    weights.write_bytes(weights.read_bytes()[:-100])
    expect_error(folder, "damaged", load=folder)
    weights.write_text("not a tensor")
    expect_error(folder, "damaged", load=folder)
    weights.unlink()
    expect_error(folder, "neither model.safetensors nor", load=folder)


def test_damaged_shards_are_named(tmp_path):
    reference_qwen3(make_model()).save_pretrained(tmp_path, max_shard_size="20KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    content = shard.read_bytes()
    shard.write_bytes(content[:-100])
    expect_error(shard.name, "damaged", load=tmp_path)
    shard.unlink()
    expect_error(shard.name, load=tmp_path)
    shard.write_bytes(content)
    index = tmp_path / "model.safetensors.index.json"
    saved = json.loads(index.read_text())
    saved["weight_map"]["model.norm.weight"] = next(  # a file without this tensor
        file for file in saved["weight_map"].values() if file != saved["weight_map"]["model.norm.weight"])
    index.write_text(json.dumps(saved))
    expect_error("model.norm.weight", load=tmp_path)
    del saved["weight_map"]["model.norm.weight"]
    index.write_text(json.dumps(saved))
    expect_error("1 missing tensors", "model.norm.weight", load=tmp_path)
    index.write_text("{}")
    expect_error("damaged", load=tmp_path)


def test_the_single_file_counts_where_there_is_an_old_index_too(folder):
    """As transformers does. Otherwise training into a folder of shards would seem to have changed nothing."""
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": "gone"}}))
    pretrained.load_pretrained(folder)


def test_a_tied_head_that_differs_from_the_table_is_named(folder):
    weights = load_file(folder / "model.safetensors")
    save_file(weights | {"lm_head.weight": weights["model.embed_tokens.weight"] + 1}, folder / "model.safetensors")
    expect_error("lm_head.weight", "tie_word_embeddings", load=folder)


def test_weights_of_several_dtypes_become_one_and_integers_are_named(folder):
    weights = load_file(folder / "model.safetensors")
    save_file({name: weight if "norm" in name else weight.bfloat16() for name, weight in weights.items()},
              folder / "model.safetensors")
    assert {weight.dtype for weight in pretrained.load_pretrained(folder).parameters()} == {torch.bfloat16}
    save_file(weights | {"model.norm.weight": torch.ones(32, dtype=torch.int8)}, folder / "model.safetensors")
    expect_error("model.norm.weight", "int8", load=folder)


@pytest.mark.parametrize("changes", [
    dict(layer_types=5), dict(layer_types=[{}]), dict(vocab_size=True), dict(hidden_size=10 ** 30),
    dict(rms_norm_eps=-1.0),
    dict(rope_parameters={"rope_theta": 0.0}, rope_theta=0.0), dict(rms_norm_eps=float("inf"))], ids=str)
def test_numbers_that_no_model_has_are_named(folder, changes):
    edit_config(folder, **changes)
    expect_error("config.json", load=folder)


def test_hub_names(monkeypatch, folder):
    asked = []
    monkeypatch.setattr(pretrained.huggingface_hub, "snapshot_download",
                        lambda name, revision, allow_patterns: asked.append((name, revision)) or str(folder))
    for name in ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B@main", "someone/Qwen3-tuned"):
        assert vars(pretrained.load_pretrained(name).config) == vars(CONFIG)
    assert asked == [("Qwen/Qwen3-0.6B", "c1899de289a04d12100db370d81485cdf75e47ca"), ("Qwen/Qwen3-0.6B", "main"),
                     ("someone/Qwen3-tuned", None)]
    for nonsense in ("nowhere", "no/such/folder", "/no/such/folder", "Qwen3-0.6B"):
        expect_error(nonsense, "neither a folder nor", load=nonsense)


def test_no_network_is_one_line(tmp_path):
    script = ("import sys, cli, pretrained\n"
              "from huggingface_hub import constants\n"
              "constants.HF_HUB_OFFLINE, constants.HF_HUB_CACHE = True, sys.argv[1]   # the variables of that name"
              " were read long ago\n"
              "cli.run(lambda: pretrained.load_pretrained('Qwen/Qwen3-0.6B'))")
    done = warm.run("-c", script, tmp_path, cwd=chapter.folder)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert "Qwen/Qwen3-0.6B" in done.stderr and "without network, give a folder" in done.stderr


@pytest.mark.parametrize("changes, words", [
    (dict(cu_seqlens=[0, 4, 9]), ["from 0 to 9", "T = 10"]),
    (dict(cu_seqlens=[0, 4, 11]), ["from 0 to 11", "T = 10"]),
    (dict(cu_seqlens=[1, 4, 10]), ["from 1 to 10"]),
    (dict(cu_seqlens=[0, 4, 4, 10]), ["document 1 has 0 tokens"]),
    (dict(cu_seqlens=[0, 6, 4, 10]), ["document 1 has -2 tokens"]),
    (dict(cu_seqlens=[0]), ["(1,)"]),
    (dict(cu_seqlens=torch.tensor([0, 4, 10])), ["torch.int64", "torch.int32"]),
    (dict(max_seqlen=7), ["max_seqlen is 7", "6 tokens"]),
    (dict(max_seqlen=5), ["max_seqlen is 5", "6 tokens"]),
    (dict(position_ids=torch.arange(9)), ["(10,)", "(9,)"]),
    (dict(input_ids=torch.zeros(1, 10).long(), position_ids=torch.zeros(1, 10).long()), ["(1, 10)", "(T,)"]),
])
def test_a_packing_that_does_not_fit_is_named(changes, words):
    ids, position_ids, cu_seqlens, max_seqlen = pack((4, 6))
    arguments = dict(input_ids=ids, position_ids=position_ids, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen) | changes
    if isinstance(arguments["cu_seqlens"], list):
        arguments["cu_seqlens"] = torch.tensor(arguments["cu_seqlens"]).int()
    with pytest.raises(InputError) as caught:
        make_model()(**arguments)
    assert all(word in str(caught.value) for word in words), caught.value


def test_a_document_longer_than_the_model_is_named():
    with pytest.raises(AssertionError, match="65 tokens do not fit into 64"):
        make_model()(*pack((65,)))
