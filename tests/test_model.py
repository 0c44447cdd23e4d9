"""Chapter 1's model: equal to the reference GPT-2, and blind to the future and to padding."""
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from chapters import chapter1

IGNORE = chapter1.data.IGNORE
PAD = 50
CONFIG = chapter1.model.ModelConfig(vocab_size=51, hidden_size=32, intermediate_size=80, num_hidden_layers=2,
                                    num_attention_heads=4, max_position_embeddings=24, pad_token_id=PAD)


def make_model(config=CONFIG, seed=0):
    torch.manual_seed(seed)
    model = chapter1.model.Transformer(config)
    for parameter in model.parameters():   # far from the small initial values, so that a missing term shows
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def random_ids(*shape, seed=1):
    return torch.randint(0, PAD, shape, generator=torch.Generator().manual_seed(seed))


def reference_gpt2(model):
    """transformers' GPT-2 with the weights of ours."""
    c = model.config
    gpt2 = GPT2LMHeadModel(GPT2Config(
        vocab_size=c.vocab_size, n_positions=c.max_position_embeddings, n_embd=c.hidden_size,
        n_layer=c.num_hidden_layers,
        n_head=c.num_attention_heads, n_inner=c.intermediate_size, attn_pdrop=0, embd_pdrop=0, resid_pdrop=0,
        tie_word_embeddings=c.tie_word_embeddings)).eval()
    ours, theirs = model.state_dict(), {}
    for part in ("weight", "bias"):
        for i in range(c.num_hidden_layers):
            to, old = f"transformer.h.{i}", f"model.layers.{i}"
            qkv = torch.cat([ours[f"{old}.self_attn.{p}_proj.{part}"] for p in "qkv"])
            dense = {"attn.c_attn": qkv, "attn.c_proj": ours[f"{old}.self_attn.o_proj.{part}"],
                     "mlp.c_fc": ours[f"{old}.mlp.up_proj.{part}"], "mlp.c_proj": ours[f"{old}.mlp.down_proj.{part}"]}
            theirs |= {f"{to}.{name}.{part}": w.t() for name, w in dense.items()}   # GPT-2 stores matrices transposed
            theirs[f"{to}.ln_1.{part}"] = ours[f"{old}.input_layernorm.{part}"]
            theirs[f"{to}.ln_2.{part}"] = ours[f"{old}.post_attention_layernorm.{part}"]
        theirs[f"transformer.ln_f.{part}"] = ours[f"model.norm.{part}"]
    theirs |= {"transformer.wte.weight": ours["model.embed_tokens.weight"],
               "transformer.wpe.weight": ours["model.embed_positions.weight"], "lm_head.weight": ours["lm_head.weight"]}
    gpt2.load_state_dict(theirs)
    return gpt2


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("heads", [1, 4])
def test_logits_and_gradients_equal_gpt2(tied, heads):
    model = make_model(replace(CONFIG, tie_word_embeddings=tied, num_attention_heads=heads))
    gpt2 = reference_gpt2(model)
    ids = random_ids(3, 24)
    ours, theirs = model(ids), gpt2(ids).logits
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    for logits in (ours, theirs):
        F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    layers, blocks = model.model.layers, gpt2.transformer.h
    for ours, theirs in [(model.model.embed_tokens.weight.grad, gpt2.transformer.wte.weight.grad),
                         (model.model.embed_positions.weight.grad, gpt2.transformer.wpe.weight.grad),
                         (layers[0].self_attn.o_proj.weight.grad, blocks[0].attn.c_proj.weight.grad.T),
                         (layers[1].mlp.up_proj.bias.grad, blocks[1].mlp.c_fc.bias.grad)]:
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_gpt2_124m_has_the_published_number_of_parameters():
    with torch.device("meta"):
        model = chapter1.model.Transformer(chapter1.model.CONFIGS["gpt2-124m"])
    assert model.num_parameters() == 124_439_808


def test_causality_probe():
    """Editing token t leaves every logit before t bit-equal, and changes those from t on."""
    model = make_model()
    ids = random_ids(2, 20)
    before = model(ids)
    for t in (1, 7, 19):
        edited = ids.clone()
        edited[:, t] = (edited[:, t] + 1) % PAD
        after = model(edited)
        assert torch.equal(after[:, :t], before[:, :t]), f"a change of token {t} is seen before {t}"
        assert not torch.equal(after[:, t:], before[:, t:])


def test_padding_is_invisible():
    """A document scores the same alone as in a batch of longer ones, in logits and in gradients."""
    model = make_model()
    windows = [random_ids(n, seed=n).tolist() for n in (4, 25, 11)]
    batch = chapter1.data.padded_collate_fn(windows, PAD)
    logits = model(batch.input_ids)
    F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORE, reduction="sum").backward()
    padded = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    for row, window in enumerate(windows):
        alone = model(torch.tensor([window[:-1]]))
        torch.testing.assert_close(logits[row, :len(window) - 1], alone[0], atol=1e-5, rtol=1e-5)
        F.cross_entropy(alone[0], torch.tensor(window[1:]), reduction="sum").backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(padded[name], parameter.grad, atol=1e-3, rtol=1e-3, msg=lambda m: f"{name}: {m}")


def test_padding_on_the_left_is_invisible_too():
    """Nothing may attend to padding. At the right the causal mask alone would see to that; at the left it would not."""
    model = make_model()
    ids = random_ids(1, 12)
    ids[0, :5] = PAD
    with torch.no_grad():
        before = model(ids)[0, 5:]
        model.model.embed_tokens.weight[PAD] += 1.0
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())   # only as an input, not as an output
        after = model(ids)[0, 5:]
    torch.testing.assert_close(before[:, :PAD], after[:, :PAD], atol=0, rtol=0)
    assert torch.isfinite(model(ids)).all()


def test_flops_per_position_agrees_with_torch():
    """The formula against torch's own counter (full scores: the counter does not know about causality either)."""
    from torch.utils.flop_counter import FlopCounterMode
    model, L = make_model(), 24
    with FlopCounterMode(display=False) as counter:
        model(random_ids(3, L)).sum().backward()
    predicted = model.flops_per_position(L) * 3 * L
    assert predicted == counter.get_total_flops(), (predicted, counter.get_total_flops())


def test_initialization():
    torch.manual_seed(0)
    config = replace(CONFIG, hidden_size=256, intermediate_size=1024, num_hidden_layers=8)
    model = chapter1.model.Transformer(config)
    state = model.state_dict()
    for name, std in {"model.embed_tokens.weight": 1 / 16, "model.layers.0.self_attn.q_proj.weight": 0.02,
                      "model.layers.3.mlp.down_proj.weight": 0.02 / 4,
                      "model.layers.7.self_attn.o_proj.weight": 0.02 / 4}.items():
        assert state[name].std().item() == pytest.approx(std, rel=0.1), name
    assert state["model.norm.weight"].eq(1).all() and state["model.layers.0.mlp.up_proj.bias"].eq(0).all()
    assert model.lm_head.weight is model.model.embed_tokens.weight
