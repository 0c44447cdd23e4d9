"""softmax.py, cross_entropy_loss.py, gradient_descent.py, attention_demo.py and sinusoidal_demo.py against torch,
transformers and known answers; training_curve.py against what a run has recorded."""
import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from chapters import chapter1, run_here

softmax = chapter1.softmax
loss = chapter1.cross_entropy_loss
descent = chapter1.gradient_descent
demo = chapter1.attention_demo
positions = chapter1.sinusoidal_demo


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("name, figure", [
    ("softmax", "softmax"), ("cross_entropy_loss", "cross_entropy"), ("gradient_descent", "gradient_descent"),
    ("attention_demo", "attention")])
def test_script_runs_and_draws(name, figure, tmp_path, monkeypatch, capsys):
    script = getattr(chapter1, name)
    monkeypatch.setattr(script, "FIGURES", tmp_path)   # leave the repository's figure as it is
    script.main()
    assert "largest difference" in capsys.readouterr().out
    size = (tmp_path / f"{figure}.png").stat().st_size
    assert 5_000 < size < 200_000, size


def test_check_equal_fails_on_a_difference_and_on_nan(capsys):
    check_equal = chapter1.assert_equal.check_equal
    check_equal("equal", torch.ones(2), torch.ones(2))
    for wrong in (torch.tensor([1.0, 1.1]), torch.tensor([1.0, math.nan])):
        with pytest.raises(AssertionError):
            check_equal("different", wrong, torch.ones(2))


# --------------------------------------------------------------------------------------------------- softmax.py

@pytest.mark.parametrize("shift", [0, 1000, -1000])
@pytest.mark.parametrize("shape", [(7,), (3, 50), (2, 3, 1)])
def test_softmax_and_its_logarithms(shape, shift):
    x = 5 * randn(*shape) + shift
    assert_close(softmax.softmax(x), torch.softmax(x, dim=-1))
    assert_close(softmax.log_softmax(x), torch.log_softmax(x, dim=-1))
    assert_close(softmax.logsumexp(x), torch.logsumexp(x, dim=-1))


def test_softmax_survives_what_the_definition_does_not():
    # The last case needs a maximum for every row: that of the whole tensor leaves 0/0 in the lower one.
    for rows in ([1000.0, 0.0, -1000.0], [-200.0, -201.0, -202.0], [[1.0, 2.0], [1001.0, 1002.0]]):
        x = torch.tensor(rows)
        assert softmax.softmax_as_defined(x).isnan().any()
        assert_close(softmax.softmax(x), torch.softmax(x, dim=-1))
        assert softmax.log_softmax(x).isfinite().all()


def test_temperature():
    x = randn(4, 9)
    assert_close(softmax.softmax(x, 0.25), torch.softmax(x / 0.25, dim=-1))
    cold, warm, hot = (softmax.softmax(x, T).max(dim=-1).values for T in (0.25, 1.0, 4.0))
    assert (cold > warm).all() and (warm > hot).all()
    assert_close(softmax.softmax(x, 1e6), torch.full_like(x, 1 / 9), atol=1e-4, rtol=0)


def test_softmax_gradient():
    x, grad = randn(3, 6).requires_grad_(), randn(3, 6, seed=1)
    p = torch.softmax(x, dim=-1)
    p.backward(grad)
    assert_close(softmax.softmax_backward(p.detach(), grad), x.grad)
    jacobian = softmax.softmax_jacobian(p.detach())
    assert_close(jacobian[1], torch.autograd.functional.jacobian(softmax.softmax, x[1].detach()))
    assert_close((jacobian @ grad[:, :, None]).squeeze(-1), x.grad)


@pytest.mark.parametrize("order", ["random", "rising", "falling", "enormous"])
def test_online_softmax(order):
    scores, values = 3 * randn(200), randn(200, 5, seed=1)
    scores = {"random": scores, "rising": scores.sort().values, "falling": scores.sort(descending=True).values,
              "enormous": 100 * scores}[order]
    assert_close(softmax.online_softmax_average(scores, values), torch.softmax(scores, dim=-1) @ values,
                 atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------------------------------- cross_entropy_loss.py

@pytest.mark.parametrize("padding", [0.0, 0.3, 0.9])
def test_cross_entropy_and_its_gradient(padding):
    logits = (4 * randn(40, 11)).requires_grad_()
    targets = torch.randint(11, (40,), generator=torch.Generator().manual_seed(1))
    targets[:int(40 * padding)] = -100
    expected = F.cross_entropy(logits, targets)
    expected.backward()
    assert_close(loss.cross_entropy(logits, targets), expected)
    assert_close(loss.cross_entropy_gradient(logits.detach(), targets), logits.grad)
    assert_close(loss.token_nats(logits, targets), F.cross_entropy(logits, targets, reduction="none"))


def test_padding_changes_neither_loss_nor_gradient():
    logits, targets = randn(5, 4), torch.tensor([0, 3, 1, 1, 2])
    long_logits, long_targets = F.pad(logits, (0, 0, 0, 20), value=9.0), F.pad(targets, (0, 20), value=-100)
    assert_close(loss.cross_entropy(long_logits, long_targets), loss.cross_entropy(logits, targets))
    gradient = loss.cross_entropy_gradient(long_logits, long_targets)
    assert_close(gradient[:5], loss.cross_entropy_gradient(logits, targets))
    assert (gradient[5:] == 0).all()


def test_nothing_to_count_is_nan_as_in_torch():
    logits, targets = randn(3, 4), torch.full((3,), -100)
    assert loss.cross_entropy(logits, targets).isnan() and F.cross_entropy(logits, targets).isnan()


def test_a_hopeless_target_has_a_finite_loss():
    logits = torch.tensor([[500.0, -500.0]])
    assert loss.cross_entropy(logits, torch.tensor([1])).item() == 1000.0


def test_the_uniform_model_pays_ln_v_and_bits_per_byte():
    nats = loss.token_nats(torch.zeros(10, 256), torch.arange(10))
    assert_close(nats, torch.full((10,), math.log(256)))
    assert loss.bits_per_byte(nats.sum().item(), 10) == pytest.approx(8)   # a byte drawn blindly: 8 bits
    assert loss.bits_per_byte(7 * math.log(2), len("é".encode())) == pytest.approx(3.5)


def test_no_belief_beats_the_entropy_of_the_source():
    p = torch.tensor([0.7, 0.2, 0.1])
    floor = loss.expected_bits(p, p)
    assert_close(floor, torch.distributions.Categorical(p).entropy() / math.log(2))
    for seed in range(20):
        q = torch.softmax(randn(3, seed=seed), dim=-1)
        divergence = F.kl_div(q.log(), p, reduction="sum") / math.log(2)
        assert divergence > 0
        assert_close(loss.expected_bits(p, q), floor + divergence)


# ------------------------------------------------------------------------------------------ gradient_descent.py

def noisy_gradient(x, i):
    """Rosenbrock's curved valley plus noise: every step, every number and every sign occurs."""
    a, b = x
    return torch.stack([-2 * (1 - a) - 4 * a * (b - a * a), 2 * (b - a * a)]) + randn(2, seed=i, dtype=torch.float64)


@pytest.mark.parametrize("rule, optimizer, settings", [
    ("gradient_step", torch.optim.SGD, dict(lr=0.01)),
    ("momentum_step", torch.optim.SGD, dict(lr=0.01, momentum=0.8)),
    ("adam_step", torch.optim.Adam, dict(lr=0.05)),
    ("adam_step", torch.optim.Adam, dict(lr=0.05, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.3)),
    ("adamw_step", torch.optim.AdamW, dict(lr=0.05)),
    ("adamw_step", torch.optim.AdamW, dict(lr=0.05, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.3))])
def test_optimizers_step_by_step(rule, optimizer, settings):
    start = torch.tensor([-1.2, 1.0], dtype=torch.float64)
    ours = descent.descend(getattr(descent, rule), noisy_gradient, start, 150, **settings)
    theirs = descent.descend_with_torch(optimizer, noisy_gradient, start, 150, **settings)
    assert (ours[-1] - ours[0]).abs().min() > 1e-3   # they went somewhere
    assert_close(ours, theirs, atol=1e-9, rtol=1e-9)


def test_l2_and_decoupled_decay_differ():
    start = torch.ones(2, dtype=torch.float64)
    l2, decoupled = (descent.descend(rule, noisy_gradient, start, 50, lr=0.05, weight_decay=0.3)
                     for rule in (descent.adam_step, descent.adamw_step))
    assert (l2[-1] - decoupled[-1]).abs().max() > 1e-2


def test_gradient_descent_diverges_beyond_two_over_curvature():
    limit = 2 / descent.CURVATURE.max().item()
    below, above = (descent.loss(descent.descend(descent.gradient_step, descent.gradient, descent.START, 500, lr=lr))
                    for lr in (0.999 * limit, 1.001 * limit))
    assert below[-1] < below[250] < below[0] and above[250] < above[-1]
    x = descent.START.clone().requires_grad_()
    descent.loss(x).backward()
    assert_close(descent.gradient(descent.START, 0), x.grad)


@pytest.mark.parametrize("steps, warmup, floor", [(50, 10, 0.1), (50, 1, 0.0), (20, 5, 0.0)])
def test_schedule(steps, warmup, floor):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    schedules = torch.optim.lr_scheduler
    up = schedules.LinearLR(optimizer, start_factor=1 / warmup, total_iters=max(warmup - 1, 1))
    down = schedules.CosineAnnealingLR(optimizer, T_max=steps - warmup, eta_min=floor)
    schedule = schedules.SequentialLR(optimizer, [up, down], milestones=[warmup])
    for step in range(steps):
        assert descent.learning_rate(step, steps, 2.0, warmup, floor) == pytest.approx(schedule.get_last_lr()[0]), step
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize("max_norm", [0.1, 1.0, 1000.0])
def test_clip_grad_norm(max_norm):
    parameters = [torch.nn.Parameter(randn(*shape)) for shape in ((3, 4), (5,), ())]
    for i, parameter in enumerate(parameters):
        parameter.grad = 10 ** i * randn(*parameter.shape, seed=i + 1)
    clipped, norm = descent.clip_grad_norm([parameter.grad for parameter in parameters], max_norm)
    assert_close(norm, torch.nn.utils.clip_grad_norm_(parameters, max_norm))
    for ours, parameter in zip(clipped, parameters):
        assert_close(ours, parameter.grad)


# -------------------------------------------------------------------------------------------- attention_demo.py

@pytest.fixture
def qkv():
    return [randn(2, 3, 7, 4, seed=seed) for seed in range(3)]   # B=2, H=3, L=7, K=4


@pytest.mark.parametrize("which", ["causal", "padding", "both"])
def test_attention_three_ways(qkv, which):
    mask = dict(zip(("causal", "padding", "both"), demo.masks([7, 4])))[which]
    output, weights = demo.attention(*qkv, mask)
    assert_close(output, demo.attention_by_loops(*qkv, mask))
    assert_close(output, F.scaled_dot_product_attention(*qkv, attn_mask=mask))
    assert (weights.masked_select(~mask) == 0).all()
    assert_close(weights.sum(dim=-1), torch.ones(2, 3, 7))
    if which == "causal":
        assert_close(output, F.scaled_dot_product_attention(*qkv, is_causal=True))


def test_masks_entry_by_entry():
    causal, padding, both = demo.masks([3, 2])
    assert causal.shape == padding.shape == both.shape == (2, 1, 3, 3)
    assert both[0, 0].tolist() == causal[1, 0].tolist() == [[True, False, False], [True, True, False], [True] * 3]
    assert padding[1, 0].tolist() == [[True, True, False]] * 3
    assert both[1, 0].tolist() == [[True, False, False], [True, True, False], [True, True, False]]


def test_multi_head_attention_equals_torch():
    x, layer = randn(2, 6, 12), torch.nn.MultiheadAttention(12, 3, bias=False, batch_first=True)
    mask = demo.masks([6, 6])[0]
    with torch.no_grad():
        q, k, v = (demo.split_heads(projected, 3) for projected in (x @ layer.in_proj_weight.T).chunk(3, dim=-1))
        output, weights = demo.attention(q, k, v, mask)
        ours = layer.out_proj(output.transpose(1, 2).reshape(2, 6, 12))
        theirs, their_weights = layer(x, x, x, attn_mask=~mask[0, 0], average_attn_weights=False)
    assert_close(ours, theirs)
    assert_close(weights, their_weights)


def test_an_edit_never_reaches_an_earlier_output(qkv):
    q, k, v = qkv
    mask = demo.masks([7, 7])[0]
    for t in range(7):
        edited = [tensor.clone() for tensor in qkv]
        for tensor in edited:
            tensor[:, :, t] += 1
        for rule, leaks in ((demo.attention, False), (demo.attention_masked_too_late, True)):
            before, after = rule(q, k, v, mask)[0], rule(*edited, mask)[0]
            assert (before[:, :, t] != after[:, :, t]).any()
            assert torch.equal(before[:, :, :t], after[:, :, :t]) == (t == 0 or not leaks), (rule.__name__, t)


def test_a_query_that_sees_nothing_is_nan(qkv):
    mask = demo.masks([7, 7])[0].clone()
    mask[..., 0] = False
    output, _ = demo.attention(*qkv, mask)
    assert output[:, :, 0].isnan().all() and output[:, :, 1:].isfinite().all()


def test_induction_heads_do_what_they_were_set_to_do():
    tokens = "<s> a b c a d a b".split()
    previous, induction, says, words = demo.induction_heads(tokens)
    expected = F.one_hot(torch.tensor([0, 0, 1, 2, 3, 4, 5, 6]), 8).float()
    assert_close(previous, expected, atol=1e-3, rtol=0)
    # The second a finds b behind the first; the third finds b and d; the second b finds c. The others find nothing.
    expected = F.one_hot(torch.tensor([0, 0, 0, 0, 2, 0, 0, 3]), 8).float()
    expected[6] = torch.tensor([0, 0, 0.5, 0, 0, 0.5, 0, 0])
    assert_close(induction, expected, atol=1e-3, rtol=0)
    assert words[says[-1].argmax()] == "c"
    assert says[6, words.index("b")] == pytest.approx(0.5, abs=1e-3) == says[6, words.index("d")]


# ------------------------------------------------------------------------------------ sinusoidal_demo.py

@pytest.mark.parametrize("L, D", [(1, 2), (64, 128), (300, 6)])
def test_the_table_is_that_of_the_paper_and_of_transformers(L, D):
    from transformers.models.xlm.modeling_xlm import create_sinusoidal_embeddings
    library = torch.empty(L, D)
    create_sinusoidal_embeddings(L, D, library)
    assert_close(positions.sinusoidal(L, D), library)
    assert_close(positions.sinusoidal(L, D), positions.as_in_the_paper(L, D))


@pytest.mark.parametrize("bug", ["sines first, then cosines", "every pair half as fast", "the shift turns backwards"])
def test_the_proofs_of_the_table_turn_red(bug, monkeypatch):
    table, frequencies, shift = positions.sinusoidal, positions.frequencies, positions.shift
    name, wrong = {
        "sines first, then cosines": ("sinusoidal", lambda L, D: table(L, D).view(L, -1, 2).transpose(1, 2).flatten(1)),
        "every pair half as fast": ("frequencies", lambda D: frequencies(D) / 2),
        "the shift turns backwards": ("shift", lambda k, D: shift(-k, D))}[bug]
    monkeypatch.setattr(positions, name, wrong)
    with pytest.raises(AssertionError, match="the paper's|matrix"):
        positions.show_formula(20, 8)


@pytest.fixture
def short(monkeypatch, tmp_path, text_file):
    """sinusoidal_demo.py with runs of three steps; returns their arguments."""
    monkeypatch.setattr(positions, "STEPS", 3)
    monkeypatch.setattr(positions, "FIGURES", tmp_path)
    monkeypatch.setattr(chapter1.results, "RESULTS", tmp_path)
    small = chapter1.model.ModelConfig(vocab_size=300, hidden_size=32, intermediate_size=64, num_attention_heads=2,
                                       num_hidden_layers=2)
    monkeypatch.setitem(chapter1.model.CONFIGS, "small", small)
    return ["--data", text_file, "--out", tmp_path / "runs"]


def test_learned_positions_train_as_train_py_does(short, call, tmp_path, text_file):
    """To the bit, so that the table's first row is the default run; and a run that was stopped goes on."""
    train_model, trained = positions.train_model, []

    def counted(name, seed, *rest):
        trained.append((name, seed))
        if len(trained) == 5:
            raise KeyboardInterrupt
        return train_model(name, seed, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(positions, "train_model", counted)
        assert call(positions, *short)[0] == 130
        assert call(positions, *short)[0] == 0
    assert trained[5] == trained[4] and len(trained) == 10 and len(set(trained)) == 9   # it is begun again, no other
    runs = {path.name.split("-3-")[0]: json.loads(path.read_text()) for path in (tmp_path / "runs").iterdir()}
    assert len(runs) == 9 and (tmp_path / "positions.png").is_file()
    for seed in (0, 2):
        run_here(chapter1.train, "--data", text_file, "--steps", 3, "--seed", seed, "--out", tmp_path / str(seed))
        summary = json.loads((tmp_path / str(seed) / "summary.json").read_text())
        assert summary["val_bits_per_byte"] == runs[f"learned-{seed}"]["bits"]

    learned, sinusoidal, none = json.loads((tmp_path / "positions.json").read_text())["rows"]
    assert learned["parameters"] - 64 * 32 == sinusoidal["parameters"] == none["parameters"]
    assert sinusoidal["bits"] == pytest.approx(sum(runs[f"sinusoidal-{seed}"]["bits"] for seed in range(3)) / 3)
    assert float(sinusoidal["difference"]) == pytest.approx(sinusoidal["bits"] - learned["bits"], abs=1e-4)


def test_other_weights_begin_the_same_and_positions_are_what_the_name_says(monkeypatch):
    # From the second layer on the causal mask tells the order.
    monkeypatch.setitem(chapter1.model.CONFIGS, "small", chapter1.model.ModelConfig(num_hidden_layers=1))
    tokenizer = chapter1.data.CharTokenizer.train(["abc"])
    models = {name: positions.make_model(name, tokenizer, seed=1) for name in ("learned", "sinusoidal", "none")}
    ids = torch.tensor([[0, 1, 2, 1]])
    for name, model in models.items():
        weights = dict(model.named_parameters())
        assert all(torch.equal(weights[key], value) for key, value in models["learned"].named_parameters()
                   if key in weights)
        position = model.model.embed_positions(torch.arange(4))
        assert position.requires_grad == (name == "learned")
    assert_close(models["sinusoidal"].model.embed_positions(torch.arange(4)),
                 positions.as_in_the_paper(4, 128) / math.sqrt(128))
    swapped = torch.tensor([[1, 0, 2, 1]])   # the last token has met the same ones, in another order
    assert_close(models["none"](ids)[0, 2], models["none"](swapped)[0, 2])
    assert (models["sinusoidal"](ids)[0, 2] - models["sinusoidal"](swapped)[0, 2]).abs().max() > 1e-4


def test_interval_by_hand():
    runs = {(name, seed): {"parameters": 1, "bits": bits, "bits_longer": None if name == "learned" else 3.0}
            for name, all_bits in (("learned", (2.0, 2.2, 2.4)), ("sinusoidal", (2.1, 2.2, 2.5)), ("none", (3, 3, 3)))
            for seed, bits in enumerate(all_bits)}
    row = positions.compare(runs)[1]
    # 0.1, 0 and 0.1: deviation 0.0577, standard error 0.0333, times t = 4.303.
    assert (row["difference"], row["interval"], row["longer"]) == ("+0.0667", "± 0.1434", 3.0)


# -------------------------------------------------------------------------------------------- training_curve.py

def test_the_curve_has_each_step_once(tmp_path, call, monkeypatch, text_file):
    curve = chapter1.training_curve
    monkeypatch.setattr(curve, "FIGURES", tmp_path)
    run_here(chapter1.train, "--data", text_file, "--tokenizer", "char", "--steps", 5, "--save-every", 2, "--out",
             tmp_path / "out")
    status, printed, _ = call(curve, "--out", tmp_path / "out")
    assert status == 0 and "steps 1 to 5" in printed and (tmp_path / "training_curve.png").stat().st_size > 5_000
    curves = curve.read_curves(tmp_path / "out")
    assert curves["train/loss"][0] == (1, 2, 3, 4, 5)
    assert curves["validation/bits_per_byte_of_an_eighth"][0] == (2, 4)
    monkeypatch.setattr(curve, "AROUND", 1)
    assert curve.smooth([1, 2, 6, 7]) == [3, 5] and curve.smooth([1, 2]) == []
