"""Chapter 6: a layer of experts, equal to transformers' Qwen3Moe; with a limit (moe_demo.py), equal to one that drops
row by row; on several ranks, equal to one process that has all of them.
"""
import json
import multiprocessing
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen3MoeForCausalLM
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from chapters import expect_error, load_chapter, run_here
from weights import assert_same, far_from_initial, gradients

chapter6 = load_chapter("chapter-06-parallelism")
V, E, K = 61, 8, 2
LENGTHS = (7, 1, 12, 7, 3)


def make_model(chapter, seed=0, **changes):
    torch.manual_seed(seed)
    sizes = dict(vocab_size=V, hidden_size=32, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, head_dim=16, max_position_embeddings=64, num_experts=E, num_experts_per_tok=K,
                 moe_intermediate_size=24, router_aux_loss_coef=0.0)
    model = chapter.model.Transformer(chapter.model.ModelConfig(**sizes | changes))
    return far_from_initial(model)


def make_pack(chapter, lengths=LENGTHS, seed=1):
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(V, (length + 1,), generator=generator).tolist() for length in lengths]
    return chapter.data.packed_sequence_collate_fn([(document[:-1], document[1:]) for document in ids])


def loss_sum(model, pack):
    return model(pack.input_ids, pack.position_ids, pack.cu_seqlens, pack.max_seqlen, pack.targets)


# ------------------------------------------------------------------------------------------------ equal to transformers

def gradients_as_saved(reference, folder):
    """transformers holds the experts of a layer in one tensor; on disk it writes them one by one, under our names."""
    for parameter in reference.parameters():
        parameter.data = parameter.grad
    reference.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("changes", [dict(), dict(norm_topk_prob=False, num_experts_per_tok=3),
                                     dict(tie_word_embeddings=False)], ids=str)
def test_logits_and_gradients_equal_transformers_and_folders_open_both_ways(tmp_path, changes):
    model = make_model(chapter6, **changes)
    chapter6.pretrained.save_pretrained(model, tmp_path / "ours")
    reference = Qwen3MoeForCausalLM.from_pretrained(tmp_path / "ours")
    pack = make_pack(chapter6, (40,))
    ours = model(pack.input_ids, pack.position_ids, pack.cu_seqlens, pack.max_seqlen)
    theirs = reference(pack.input_ids[None]).logits[0]
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)

    reference.save_pretrained(tmp_path / "theirs")
    again = chapter6.pretrained.load_pretrained(tmp_path / "theirs")
    assert vars(again.config) == vars(model.config)
    assert all(torch.equal(weight, model.state_dict()[name]) for name, weight in again.state_dict().items())

    F.cross_entropy(ours, pack.targets, reduction="sum").backward()
    F.cross_entropy(theirs, pack.targets, reduction="sum").backward()
    assert_same(gradients(model), gradients_as_saved(reference, tmp_path / "gradients"))


def test_the_config_of_a_dense_model_does_not_mention_experts(tmp_path):
    """It stays what chapter 5 writes, to the byte."""
    written = []
    for name in ("chapter-05-kv-cache", "chapter-06-parallelism"):
        chapter = load_chapter(name)
        chapter.pretrained.save_pretrained(chapter.model.Transformer(chapter.model.ModelConfig(vocab_size=V)), tmp_path)
        written.append((tmp_path / "config.json").read_text())
    assert written[0] == written[1]


@pytest.mark.parametrize("changes, words", [
    (dict(num_experts=0), "num_experts"), (dict(num_experts_per_tok=9),
                                           "num_experts_per_tok 9 is more than num_experts 8"),
    (dict(decoder_sparse_step=2), "decoder_sparse_step"), (dict(mlp_only_layers=[0]), "mlp_only_layers"),
    (dict(norm_topk_prob=None), "norm_topk_prob"), (dict(model_type="qwen3"), "6 missing tensors")], ids=str)
def test_experts_that_this_model_does_not_know_are_named(tmp_path, changes, words):
    chapter6.pretrained.save_pretrained(make_model(chapter6), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(chapter6.cli.InputError, match=words):
        chapter6.pretrained.load_pretrained(tmp_path)


def make_layer(**changes):
    torch.manual_seed(0)
    model = make_model(chapter6, num_hidden_layers=1, **changes)
    return model.model.layers[0].mlp


def test_the_balance_loss_equals_that_of_transformers():
    """Ours is never computed, only its gradient. It enters on the way back and leaves the output as it is."""
    coefficient, T = 0.5, 50
    layer, x = make_layer(router_aux_loss_coef=coefficient), torch.randn(50, 32)
    expected = coefficient * T * load_balancing_loss_func((layer.gate(x),), E, K)
    expected, = torch.autograd.grad(expected, layer.gate.weight)

    layer.eval()
    plain = layer(x)
    without, = torch.autograd.grad(plain.square().sum(), layer.gate.weight)
    layer.train()
    trained = layer(x)
    assert torch.equal(trained, plain)
    found, = torch.autograd.grad(trained.square().sum(), layer.gate.weight)
    torch.testing.assert_close(found - without, expected, atol=1e-4, rtol=1e-4)

    layer.loss_scale = 0.1   # as where the loss is divided by ten: by chapter6.parallel.experts.scale_balance
    found, = torch.autograd.grad(0.1 * layer(x).square().sum(), layer.gate.weight)
    torch.testing.assert_close(found, 0.1 * (without + expected), atol=1e-4, rtol=1e-4)
    assert layer.load.sum() == T * K and torch.equal(layer.load, layer.route(x)[1].flatten().bincount(minlength=E))


@pytest.mark.parametrize("changes", [dict(), dict(num_experts_per_tok=E), dict(num_experts_per_tok=1),
                                     dict(num_experts=1, num_experts_per_tok=1)], ids=str)
@pytest.mark.parametrize("targets", [39, 4])
def test_the_whole_loss_of_several_layers_equals_that_of_transformers(tmp_path, changes, targets):
    """Cross-entropy over the targets and, times config.json's coefficient, the balance over all tokens and layers."""
    model = make_model(chapter6, num_hidden_layers=3, router_aux_loss_coef=0.5, **changes)
    chapter6.pretrained.save_pretrained(model, tmp_path / "ours")
    reference = Qwen3MoeForCausalLM.from_pretrained(tmp_path / "ours", output_router_logits=True)
    pack = make_pack(chapter6, (40,))
    pack.targets[targets:] = -100   # the last token has no target there
    reference(pack.input_ids[None], labels=F.pad(pack.targets[:-1], (1, 0), value=-100)[None]).loss.backward()
    chapter6.parallel.experts.scale_balance(model, 1 / 40)
    (loss_sum(model, pack) / targets).backward()
    assert_same(gradients(model), gradients_as_saved(reference, tmp_path / "gradients"), 1e-5)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_step_of_train_has_the_balance_of_all_its_tokens(tmp_path, monkeypatch, precision):
    """Packs of unequal size, of which one token in ten or so is a target: each pack's balance counts by its tokens."""
    chats = tmp_path / "chats.jsonl"
    chats.write_text("\n".join(json.dumps({"messages": [{"role": "user", "content": "a few words " * (3 + i)},
                                                        {"role": "assistant", "content": "b" * (i % 3 + 1)}]})
                                                        for i in range(40)))
    config = make_model(chapter6, router_aux_loss_coef=0.5).config
    monkeypatch.setitem(chapter6.model.CONFIGS, "small-moe",
                        replace(config, vocab_size=300, max_position_embeddings=200))
    found, clip, loss_sum = {}, torch.nn.utils.clip_grads_with_norm_, chapter6.train.loss_sum

    def spy(model, batch):
        found.setdefault("packs", []).append((model, batch))
        return loss_sum(model, batch)
    monkeypatch.setattr(chapter6.train, "loss_sum", spy)

    def before_the_step(parameters, *rest):
        model = found["packs"][0][0]
        found["gradients"] = gradients(model)
        found["weights"] = {name: w.clone() for name, w in model.state_dict().items()}
        found["packs"] = [batch for _, batch in found["packs"]]
        monkeypatch.setattr(chapter6.train, "loss_sum", loss_sum)
        return clip(parameters, *rest)
    monkeypatch.setattr(torch.nn.utils, "clip_grads_with_norm_", before_the_step)
    run_here(chapter6.train, "--config", "small-moe", "--data", chats, "--batch-tokens", 200, "--accumulate",
             3, "--steps", 1,
             "--precision", precision, "--out", tmp_path / "out")

    model = chapter6.checkpoint.load_model(tmp_path / "out")[0].eval()   # which adds no gradient of its own
    model.load_state_dict(found["weights"])
    model.precision = precision
    targets = sum((pack.targets != -100).sum() for pack in found["packs"])
    tokens, loss, logits = sum(len(pack.targets) for pack in found["packs"]), 0, []
    for layer in chapter6.parallel.experts.layers(model):
        layer.gate.register_forward_hook(lambda module, inputs, output: logits.append(output))
    for pack in found["packs"]:
        logits.clear()
        loss += loss_sum(model, pack) / targets
        loss += 0.5 * len(pack.targets) / tokens * load_balancing_loss_func(tuple(logits), E, K)
    loss.backward()
    assert len(found["packs"]) == 3 and targets < 0.2 * tokens
    assert_same(found["gradients"], gradients(model), 1e-4 if precision == "fp32" else 2e-2)


def test_tokens_that_fill_a_pack_up_do_not_count():
    pack, expected = make_pack(chapter6), None
    for T in (len(pack.targets), 64):
        model = make_model(chapter6, router_aux_loss_coef=0.5)
        loss_sum(model, chapter6.data.fill(pack, T)).backward()
        expected = expected or gradients(model)
        assert_same(gradients(model), expected, 1e-5)


def test_steps_against_the_balance_loss_alone_spread_the_tokens():
    layer, x = make_layer(router_aux_loss_coef=1.0), torch.randn(400, 32)
    with torch.no_grad():
        layer.gate.weight.div_(10)
        layer.gate.weight[0] += 0.1 * x.mean(0) / x.mean(0).square().sum()   # a favourite
        x += x.mean(0)
    uneven = []
    for _ in range(60):
        layer.zero_grad()
        (0 * layer(x)).sum().backward()
        uneven.append((layer.load.max() / layer.load.float().mean()).item())
        layer.gate.weight.data -= 1e-4 * layer.gate.weight.grad
    assert uneven[-1] < 1.3 < uneven[0], uneven


# ------------------------------------------------------------------------------------------------------------ the layer

def test_all_experts_chosen_are_a_weighted_sum_of_all():
    layer, x = make_layer(num_experts_per_tok=E), torch.randn(20, 32)
    weights = layer.gate(x).softmax(-1)
    dense = sum(weights[:, i:i + 1] * layer.experts[str(i)](x) for i in range(E))
    torch.testing.assert_close(layer(x), dense, atol=1e-5, rtol=1e-5)


def test_the_loop_equals_grouped_mm():
    """The products of all experts in one call, as at work."""
    layer, x = make_layer(), torch.randn(20, 32)
    weights, chosen = layer.route(x)
    order = chosen.flatten().argsort(stable=True)
    rows, ends = x[order // K], layer.load.cumsum(0, dtype=torch.int32)
    gate, up, down = (torch.stack([getattr(expert, name).weight.T for expert in layer.experts.values()])
                      for name in ("gate_proj", "up_proj", "down_proj"))                # (E, in, out) each
    hidden = F.silu(F.grouped_mm(rows, gate, offs=ends)) * F.grouped_mm(rows, up, offs=ends)
    torch.testing.assert_close(layer.compute(rows, layer.load), F.grouped_mm(hidden, down, offs=ends),
                               atol=1e-5, rtol=1e-5)


def test_experts_without_tokens_get_a_gradient_of_zeros():
    """Data parallel waits for the gradient of every parameter. One token keeps two experts busy and six idle."""
    for precision in ("fp32", "bf16"):
        layer = make_layer()
        with chapter6.precision.autocast(precision, "cpu"):
            layer(torch.randn(1, 32)).sum().backward()
        assert (layer.load > 0).sum() == K
        for i, expert in enumerate(layer.experts.values()):
            assert all(parameter.grad.shape == parameter.shape for parameter in expert.parameters())
            assert any(parameter.grad.any() for parameter in expert.parameters()) == (layer.load[i] > 0).item()


@torch.no_grad()
def test_no_token_sees_a_later_one_or_another_document():
    model, pack = make_model(chapter6), make_pack(chapter6)
    before = model(pack.input_ids, pack.position_ids, pack.cu_seqlens, pack.max_seqlen)
    start, end, changed = 8, 20, 13   # the third document, a token in its middle
    pack.input_ids[changed] = (pack.input_ids[changed] + 1) % V
    after = model(pack.input_ids, pack.position_ids, pack.cu_seqlens, pack.max_seqlen)
    # Nearly, not to the bit: an expert has more or fewer rows now, and a product of another shape rounds otherwise.
    same = (after - before).abs().amax(1) < 1e-5
    assert same[:changed].all() and not same[changed:end].any() and same[end:].all()


def test_recomputed_layers_have_the_same_gradients():
    expected = None
    for how in ("none", "full", "selective"):
        model = make_model(chapter6, router_aux_loss_coef=0.5)
        model.checkpointing = how
        loss_sum(model, make_pack(chapter6)).backward()
        expected = expected or gradients(model)
        assert_same(gradients(model), expected, 1e-6)


def test_cached_tokens_have_the_logits_of_the_whole_document():
    model, pack = make_model(chapter6).eval(), make_pack(chapter6, (12,))
    with torch.no_grad():
        expected = model(pack.input_ids, pack.position_ids, pack.cu_seqlens, pack.max_seqlen)
        cache = chapter6.kv_cache.ContiguousCache(model.config, 1, 12)
        for t, token in enumerate(pack.input_ids):   # one token at a time: six of eight experts have nothing to do
            found = model(token[None], *cache.place([0], [1]), cache=cache)
            torch.testing.assert_close(found, expected[t:t + 1], atol=1e-4, rtol=1e-4)


def test_parameters_and_flops_are_counted(monkeypatch):
    """All experts are parameters; the FLOPs of a token are those of the experts that it is sent to."""
    small, dense, large = (chapter6.model.CONFIGS[name] for name in ("small-moe", "small", "qwen3-30b-a3b"))
    assert chapter6.flops.num_parameters(large) == 30_532_122_624
    assert 3.0e9 < sum(chapter6.flops.weights(large).values()) < 3.4e9
    # The routers.
    assert chapter6.flops.weights(small)["linear"] - chapter6.flops.weights(dense)["linear"] == 2 * 128 * E
    for config in (make_model(chapter6).config, small, replace(large, num_hidden_layers=1)):
        with torch.device("meta"):
            assert chapter6.flops.num_parameters(config) == chapter6.model.Transformer(config).num_parameters()

    monkeypatch.setattr(chapter6.attention, "grouped_attention", lambda q, k, v, cu_seqlens: [torch.cat(
        [F.scaled_dot_product_attention(*stack, is_causal=True, enable_gqa=True).transpose(1, 2).flatten(0, 1)
         for stack in chapter6.custom_ops.stacks(cu_seqlens, q, k, v)])])
    model, pack = make_model(chapter6, router_aux_loss_coef=0.5), make_pack(chapter6)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(pack.input_ids, pack.position_ids, pack.cu_seqlens, pack.max_seqlen).sum().backward()
    assert chapter6.flops.total_flops(model.config, pack.cu_seqlens) == counter.get_total_flops()


def tiny(patch):
    """What --config small and small-moe mean here."""
    config = replace(make_model(chapter6, router_aux_loss_coef=0.02).config, vocab_size=300)
    patch.setitem(chapter6.model.CONFIGS, "small-moe", config)
    patch.setitem(chapter6.model.CONFIGS, "small", replace(config, num_experts=0, intermediate_size=48))


def test_train_shows_the_busiest_and_the_idlest_expert_of_each_layer(tmp_path, text_file, monkeypatch):
    tiny(monkeypatch)
    for config, shown in (("small", 0), ("small-moe", 2)):
        run_here(chapter6.train, "--config", config, "--data", text_file, "--batch-tokens", 256, "--steps", 3, "--out",
                 tmp_path / config)
        events = EventAccumulator(str(tmp_path / config / "tensorboard")).Reload()
        busiest, idlest = ([[event.value for event in events.Scalars(tag)] for tag in sorted(events.Tags()["scalars"])
                            if tag.startswith(f"train/{which}_expert_of_layer_")] for which in ("busiest", "idlest"))
        assert len(busiest) == len(idlest) == shown
        assert all(len(curve) == 3 and min(curve) >= 1 for curve in busiest)
        assert all(len(curve) == 3 and 0 <= min(curve) <= max(curve) <= 1 for curve in idlest)


# -------------------------------------------------------------------------------------------- moe_demo.py: with a limit

demo = chapter6.moe_demo


def make_limited(factor, **changes):
    model = make_model(chapter6, **changes)
    demo.limit(model, factor)
    return model


def dropped_by_hand(chosen, capacity, first_choices_first=False):
    """{(token, choice)} of the rows that find no room. chosen: lists (T, k); each row takes its place in turn."""
    rows = [(token, choice) for token in range(len(chosen)) for choice in range(len(chosen[0]))]
    rows.sort(key=lambda row: row[1] if first_choices_first else 0)
    room, dropped = [capacity] * E, set()
    for token, choice in rows:
        expert = chosen[token][choice]
        room[expert] -= 1
        dropped |= {(token, choice)} if room[expert] < 0 else set()
    return dropped


@pytest.mark.parametrize("factor", [E / K, 100])
def test_with_room_for_all_nothing_changes(factor):
    found = []
    for model in (make_model(chapter6, router_aux_loss_coef=0.5), make_limited(factor, router_aux_loss_coef=0.5)):
        loss = loss_sum(model, make_pack(chapter6))
        loss.backward()
        found.append({"loss": loss.detach(), **gradients(model)})
    assert demo.dropped_share(model) == 0
    assert_same(*found, 1e-5)


@pytest.mark.parametrize("k, factor, capacity", [(2, 1.0, 13), (2, 1.25, 16), (2, 0.1, 2), (1, 1.0, 7), (3, 0.5, 10)])
def test_rows_over_the_limit_are_dropped_and_counted_exactly(k, factor, capacity):
    layer = make_limited(factor, num_hidden_layers=1, num_experts_per_tok=k).model.layers[0].mlp
    x = torch.randn(50, 32)
    weights, chosen = layer.route(x)
    dropped, expected = dropped_by_hand(chosen.tolist(), capacity), []
    for token in range(50):
        kept = [choice for choice in range(k) if (token, choice) not in dropped]
        expected.append(sum((weights[token, choice] * layer.experts[str(chosen[token, choice].item())](x[token])
                             for choice in kept), torch.zeros(32)))
    torch.testing.assert_close(layer(x), torch.stack(expected), atol=1e-5, rtol=1e-5)
    assert layer.capacity(50) == capacity and dropped
    assert layer.dropped == len(dropped) == (layer.load - capacity).clamp(min=0).sum() and layer.rows == 50 * k


@torch.no_grad()
def test_with_a_limit_no_token_knows_a_later_one_but_documents_know_each_other():
    """Whether a row is dropped depends on those before it in the pack, of whichever document."""
    ends, elsewhere = torch.tensor(LENGTHS).cumsum(0), set()
    for factor in (E / K, 1.0):
        model, pack = make_limited(factor), make_pack(chapter6)
        for changed in range(len(pack.targets)):
            before = model(pack.input_ids, pack.position_ids, pack.cu_seqlens, pack.max_seqlen)
            pack.input_ids[changed] = (pack.input_ids[changed] + 1) % V
            after = model(pack.input_ids, pack.position_ids, pack.cu_seqlens, pack.max_seqlen)
            differs = (after - before).abs().amax(1) > 1e-5
            assert differs[changed] and not differs[:changed].any()
            end = ends[(ends > changed).nonzero()[0]]
            elsewhere |= {factor} if differs[end:].any() else set()
    assert elsewhere == {1.0}


def test_if_first_choices_came_first_a_token_would_know_a_later_one():
    """Room for one row. Whether the first token keeps its second choice then depends on what the next one likes."""
    likes_the_same, likes_another = [[0, 1], [1, 2]], [[0, 1], [3, 2]]
    assert dropped_by_hand(likes_the_same, 1) == {(1, 0)} and dropped_by_hand(likes_another, 1) == set()
    assert dropped_by_hand(likes_the_same, 1, first_choices_first=True) == {(0, 1)}
    assert dropped_by_hand(likes_another, 1, first_choices_first=True) == set()


@torch.no_grad()
def test_with_a_limit_the_length_of_the_pack_counts():
    layer, x = make_limited(1.0, num_hidden_layers=1).model.layers[0].mlp, torch.randn(50, 32)
    assert not torch.allclose(layer(x)[:10], layer(x[:10]), atol=1e-5)
    alone = torch.cat([layer(token[None]) for token in x])   # as in generate.py: there is room
    layer.factor = E / K
    torch.testing.assert_close(layer(x), alone, atol=1e-5, rtol=1e-5)


# -------------------------------------------------------------------------------------------- moe_demo.py: its runs

class Here:
    """multiprocessing's context, but what it starts has ended already."""
    Value = staticmethod(multiprocessing.Value)

    @staticmethod
    def Process(target, args, daemon):
        return SimpleNamespace(start=lambda: target(*args), sentinel=None, exitcode=0)


@pytest.fixture
def runs(call, monkeypatch, text_file, tmp_path):
    """runs(flags...) -> what the command returns. runs.out: its folder. runs.made: files of runs that it has made."""
    def runs(*flags):
        runs.made.clear()
        return call(demo, "--data", text_file, "--out", runs.out, *flags)
    runs.out, runs.made = tmp_path / "runs", []
    complete_run = demo.complete_run

    def note(variant, source, steps, seed, path, *rest):
        complete_run(variant, source, steps, seed, path, *rest)
        runs.made.append(path.name)
    tiny(monkeypatch)
    monkeypatch.setattr(demo, "complete_run", note)
    monkeypatch.setattr(demo, "multiprocessing", SimpleNamespace(get_context=lambda how: Here))
    monkeypatch.setattr(demo, "wait", lambda *_, **__: None)
    for name, number in dict(SEEDS=2, WARM=0, ROUNDS=2).items():
        monkeypatch.setattr(demo, name, number)
    monkeypatch.setattr(demo, "FIGURES", tmp_path)
    monkeypatch.setattr(chapter6.results, "RESULTS", tmp_path)
    return runs


def table(folder, name):
    return {row["variant"]: row for row in json.loads((folder / f"{name}.json").read_text())["rows"]}


def test_the_command_trains_measures_draws_and_goes_on(runs, text_file, tmp_path, monkeypatch):
    status, printed, _ = runs("--steps", 2)
    assert status == 0 and "moe_demo.json" in printed and "moe_limits.json" in printed
    assert len(runs.made) == len(set(runs.made)) == demo.SEEDS * len(demo.VARIANTS)
    learning, limits = table(tmp_path, "moe_demo"), table(tmp_path, "moe_limits")
    assert list(learning) == [variant.name for variant in demo.VARIANTS]
    assert learning["experts"]["parameters"] > 1.5 * learning["dense"]["parameters"]
    assert 1 < learning["experts"]["mflops"] / learning["dense"]["mflops"] < 1.02   # the routers
    assert limits["experts"]["dropped"] == "0.0%" != limits["capacity factor 1"]["dropped"]
    assert 5_000 < (tmp_path / "moe.png").stat().st_size < 300_000
    for path in runs.out.glob("*experts*.json"):
        load = torch.tensor(json.loads(path.read_text())["load"])                       # (points, layers, E)
        torch.testing.assert_close(load.sum(-1), torch.ones(load.shape[:2]))

    # The dense model's run is that of train.py, to the last digit.
    run_here(chapter6.train, "--data", text_file, "--steps", 2, "--seed", 1, "--out", tmp_path / "train")
    expected = json.loads((tmp_path / "train" / "summary.json").read_text())["val_bits_per_byte"]
    assert json.loads((runs.out / "dense, seed 1.json").read_text())["bits"] == expected

    # Killed while a run was being written, and before another was.
    written = (tmp_path / "moe_demo.json").read_text()
    lost = runs.out / "capacity factor 1, seed 1.json"
    lost.rename(chapter6.checkpoint.beside(lost, "unfinished"))
    (runs.out / "dense, seed 0.json").unlink()
    assert runs("--steps", 2)[0] == 0
    assert runs.made == ["dense, seed 0.json", lost.name] and (tmp_path / "moe_demo.json").read_text() == written

    expect_error(runs("--steps", 3), str(runs.out), "--steps 2", "3")
    lost.write_text("{")
    expect_error(runs("--steps", 2), lost.name, "damaged")


def test_the_balance_loss_is_left_out_where_it_says_so(tmp_path, text_file, monkeypatch):
    tiny(monkeypatch)
    monkeypatch.setattr("sys.argv", [])
    for variant in demo.VARIANTS[1:]:
        training = demo.Training(variant, str(text_file), 4, seed=0)
        for layer in chapter6.parallel.experts.layers(training.model):
            assert layer.config.router_aux_loss_coef == (0.02 if variant.balance else 0)
            assert getattr(layer, "factor", None) == variant.factor


# ------------------------------------------------------------------------------------------------------- several ranks

def packs_of(chapter):
    """One for each rank, of different sizes; the last so small that hardly any expert has work."""
    return [make_pack(chapter, lengths, seed) for seed, lengths in enumerate([(7, 1, 12), (20, 3), (5, 5, 5, 9), (2,)])]


def one_process(chapter, packs):
    """Loss and gradients, pack after pack, with all experts; how many rows each pack has for each expert; the model."""
    model, loss, loads = make_model(chapter, router_aux_loss_coef=0.5), 0, []
    for pack in packs:
        one = loss_sum(model, pack)
        one.backward()
        loss += one.item()
        loads.append(chapter.parallel.experts.load(model))                                           # (layers, E)
    return loss, gradients(model), loads


def several(chapter, axes):
    """Each rank its own pack, and its experts: loss, gradients under their global names, names left, bytes sent."""
    mesh = chapter.parallel.mesh.make_mesh(**axes)
    model = make_model(chapter, router_aux_loss_coef=0.5)
    chapter.parallel.mesh.label(model, mesh)
    chapter.parallel.experts.spread(model, mesh)
    loss = loss_sum(model, packs_of(chapter)[mesh.dp.rank])
    loss.backward()
    sent = mesh.sent
    names = [name for name, _ in model.named_parameters()]
    grads = {parameter.piece.name: parameter.piece.group.all_reduce(parameter.grad) for parameter in model.parameters()}
    return mesh.world.all_reduce(loss.detach()).item(), grads, names, sent


@pytest.mark.parametrize("axes", [dict(dp=2, ep=2), dict(dp=4, ep=2), dict(dp=4, ep=4)],
                         ids=("dp2-ep2", "dp4-ep2", "dp4-ep4"))
def test_expert_parallel_equals_one_process(ranks, axes):
    size, ep = axes["dp"], axes["ep"]
    answers = ranks(size, several, axes)
    loss, expected, loads = one_process(chapter6, packs_of(chapter6)[:size])
    n = E // ep
    for rank, (found, grads, names, _) in enumerate(answers):
        assert found == pytest.approx(loss, rel=1e-5)
        place = rank % ep
        mine = {name for name in expected
                if ".experts." not in name or int(name.split(".experts.")[1].split(".")[0]) // n == place}
        assert set(names) == grads.keys() == mine   # others' experts are gone, and the rest keep their names
        assert_same(grads, {name: expected[name] for name in mine})

    # Bytes: each row whose expert lives elsewhere goes there, comes back, and so do the two gradients; 32 float32
    # numbers each. And the counts, n whole numbers of 8 bytes for each other rank.
    moved = sum(load[:, i].sum().item() for rank, load in enumerate(loads) for i in range(E) if i // n != rank % ep)
    assert sum(sent for *_, sent in answers) == 4 * moved * 32 * 4 + size * 2 * (ep - 1) * n * 8


def balance_over_cp(chapter):
    """The router's gradient with each rank half of the tokens of a pack; and with one process all of them."""
    model = make_model(chapter, num_hidden_layers=1, router_aux_loss_coef=0.5)
    torch.manual_seed(0)
    layer, x = model.model.layers[0].mlp, torch.randn(40, 32)
    expected, = torch.autograd.grad(layer(x).sum(), layer.gate.weight)
    mesh = chapter.parallel.mesh.make_mesh(cp=2)
    chapter.parallel.mesh.label(model, mesh)
    chapter.parallel.experts.spread(model, mesh)
    found, = torch.autograd.grad(layer(x.chunk(2)[mesh.cp.rank]).sum(), layer.gate.weight)
    return mesh.cp.all_reduce(found), expected


def test_with_context_parallel_the_balance_is_that_of_the_whole_pack(ranks):
    for found, expected in ranks(2, balance_over_cp):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_what_cannot_be_dealt_out_is_refused():
    moe, config = chapter6.parallel.experts, make_model(chapter6).config
    moe.check(config, ep=4, tp=1)
    moe.check(replace(config, num_experts=0), ep=1, tp=4)
    for experts, ep, tp, words in [(8, 3, 1, "--ep 3: 8 experts do not divide by 3 ranks"),
                                   (8, 2, 2, "experts are cut by --ep, not by --tp"),
                                   (0, 2, 1, "--ep 2: this model has no experts")]:
        with pytest.raises(chapter6.cli.InputError, match=words):
            moe.check(replace(config, num_experts=experts), ep, tp)
