"""From chapter 4 on: the loss in chunks, recomputed layers, accumulated packs, scaled and rounded gradients, counted
bytes.
"""
import functools
import itertools
import json
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from chapters import TRAINED, expect_error, load_chapter, run_here
from test_train import assert_same_run

PRECISE = [name for name in TRAINED if hasattr(load_chapter(name), "precision")]
pytestmark = pytest.mark.parametrize("chapter", PRECISE, indirect=True)


def small_config(chapter, **changes):
    return chapter.model.ModelConfig(**{"vocab_size": 70, "hidden_size": 32, "intermediate_size": 48,
                                        "num_hidden_layers": 3,
                                        "head_dim": 16, **changes})


def batch_of(chapter, lengths, masked=0, seed=0):
    """Documents of random tokens; the first `masked` targets of each do not count."""
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(70, (length + 1,), generator=generator).tolist() for length in lengths]
    return chapter.data.packed_sequence_collate_fn(
        [(document[:-1], [-100] * masked + document[1 + masked:]) for document in ids])


def random_model(chapter, **changes):
    torch.manual_seed(0)
    model = chapter.model.Transformer(small_config(chapter, **changes))
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, 1, 0.2)   # norms that do something
    return model


def gradients(model, loss):
    return torch.autograd.grad(loss, list(model.parameters()))


def assert_same(found, expected, tolerance=1e-5):
    for a, b in zip(found, expected, strict=True):
        assert (a - b).abs().max() <= tolerance * (b.abs().max() + 1e-2), (a - b).abs().max() / b.abs().max()


# ----------------------------------------------------------------------------------------- the loss without the logits

@pytest.mark.parametrize("T", [1, 7, 16, 50])
@pytest.mark.parametrize("tied", [True, False])
def test_loss_in_chunks_equals_the_plain_one(chapter, T, tied, monkeypatch):
    monkeypatch.setattr(chapter.linear_cross_entropy, "CHUNK", 16)
    model = random_model(chapter, tie_word_embeddings=tied)
    batch = batch_of(chapter, (T,), masked=T // 3)
    model_inputs = batch.input_ids, batch.position_ids, batch.cu_seqlens, batch.max_seqlen
    plain = F.cross_entropy(model(*model_inputs), batch.targets, reduction="sum")
    chunked = model(*model_inputs, batch.targets)
    torch.testing.assert_close(chunked, plain)
    assert_same(gradients(model, chunked / 3), gradients(model, plain / 3))
    with torch.no_grad():
        torch.testing.assert_close(model(*model_inputs, batch.targets), plain)


@pytest.mark.reaches("linear_cross_entropy", "memory_counter")
def test_loss_in_chunks_never_holds_all_logits(chapter, monkeypatch):
    monkeypatch.setattr(chapter.linear_cross_entropy, "CHUNK", 16)
    x, weight = torch.randn(512, 8, requires_grad=True), torch.randn(300, 8, requires_grad=True)
    for loss_of, whole in ((chapter.linear_cross_entropy.linear_cross_entropy, False),
                           (chapter.linear_cross_entropy.plain, True)):
        with chapter.memory_counter.Held() as held:
            loss_of(x, weight, torch.randint(300, (512,))).backward()
        assert (held.peak > 512 * 300 * 4) == whole


@pytest.mark.reaches("linear_cross_entropy")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loss_in_chunks_in_few_bits(chapter, dtype, monkeypatch):
    """Against the exact gradient: no worse than twice what torch makes of the same inputs, and nothing vanishes in
    float16.
    """
    monkeypatch.setattr(chapter.linear_cross_entropy, "CHUNK", 16)
    torch.manual_seed(0)
    x, weight = torch.randn(40, 32), torch.randn(5000, 32)
    targets = torch.randint(5000, (40,))

    def grads(loss_of):
        inputs = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        with torch.autocast("cpu", dtype):
            loss = loss_of(*inputs, targets)
        return torch.autograd.grad(loss / 40 * 2 ** 10, inputs)

    exact_inputs = [x.double().requires_grad_(), weight.double().requires_grad_()]
    exact = torch.autograd.grad(chapter.linear_cross_entropy.plain(*exact_inputs, targets) / 40 * 2 ** 10, exact_inputs)
    for ours, theirs, right in zip(grads(chapter.linear_cross_entropy.linear_cross_entropy),
                                   grads(chapter.linear_cross_entropy.plain), exact):
        assert (ours - right).norm() <= 2 * (theirs - right).norm() + 1e-3 * right.norm()
        assert ours.dtype == torch.float32


@pytest.mark.reaches("linear_cross_entropy")
@pytest.mark.parametrize("wrong", [-1, -99, -101, 50, 10 ** 6])
def test_loss_in_chunks_raises_where_the_plain_one_does(chapter, wrong, monkeypatch):
    monkeypatch.setattr(chapter.linear_cross_entropy, "CHUNK", 16)
    x, weight, targets = torch.randn(40, 8), torch.randn(50, 8), torch.randint(50, (40,))
    targets[20] = wrong   # in the second chunk
    for loss_of in (chapter.linear_cross_entropy.plain, chapter.linear_cross_entropy.linear_cross_entropy):
        with pytest.raises(IndexError, match=f"Target {wrong} is out of bounds"):
            loss_of(x, weight, targets)


@pytest.mark.reaches("linear_cross_entropy")
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-6), (torch.float32, 1e-6), (torch.bfloat16, 2e-2),
                                              (torch.float16, 2e-3)])
def test_loss_in_chunks_of_weights_of_any_dtype(chapter, dtype, tolerance, monkeypatch):
    """Without autocast: weights, inputs and both gradients of one dtype.

    A float16 sum over chunks would lose what is small.
    """
    monkeypatch.setattr(chapter.linear_cross_entropy, "CHUNK", 4)
    torch.manual_seed(0)
    x, weight = torch.randn(400, 32, dtype=dtype), torch.randn(300, 32, dtype=dtype)
    targets = torch.randint(300, (400,))
    targets[::7] = -100
    found, exact = ([loss, *torch.autograd.grad(loss / 400, inputs)] for inputs, loss in (
        (inputs, loss_of(*inputs, targets)) for loss_of, inputs in (
            (chapter.linear_cross_entropy.linear_cross_entropy, [x.requires_grad_(), weight.requires_grad_()]),
            (chapter.linear_cross_entropy.plain, [tensor.detach().double().requires_grad_()
                                                  for tensor in (x, weight)]))))
    assert found[1].dtype == found[2].dtype == dtype
    for ours, right in zip(found, exact):
        assert (ours - right).norm() <= tolerance * right.norm(), (ours - right).norm() / right.norm()


@pytest.mark.reaches("linear_cross_entropy")
def test_loss_script_runs(chapter, monkeypatch):
    measure = chapter.linear_cross_entropy.measure
    monkeypatch.setattr(chapter.linear_cross_entropy, "measure", lambda loss_of, x, weight, targets: measure(
        loss_of, x[:40], weight, targets[:40]))   # of 2,048 tokens
    assert run_here(chapter.linear_cross_entropy).count("gradients differ") >= 2


# --------------------------------------------------------------------------------------------- activation checkpointing

@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("checkpointing", ["full", "selective", "by hand"])
def test_recomputed_layers_have_the_same_gradients(chapter, checkpointing, precision, monkeypatch):
    monkeypatch.setitem(chapter.recompute.RUN, "by hand", chapter.recompute.recompute)
    model, batch = random_model(chapter), batch_of(chapter, (3, 9, 9, 20))
    model.precision = precision
    expected = chapter.train.loss_sum(model, batch)
    expected_gradients = gradients(model, expected)
    model.checkpointing = checkpointing
    loss = chapter.train.loss_sum(model, batch)
    assert loss.equal(expected)
    assert_same(gradients(model, loss), expected_gradients, tolerance=0)


# --------------------------------------------------------------------------------------------------------- accumulation

def test_accumulated_packs_equal_one_large_batch(chapter, text_file, tmp_path, monkeypatch):
    """train.py's own loop: the gradient of its first step, over packs of unequal numbers of targets, against one batch
    of all.
    """
    found = []
    clip = getattr(torch.nn.utils, chapter.clip)

    def spy(parameters, limit, *norm):
        parameters = list(parameters)
        found.append([parameter.grad.clone() for parameter in parameters])
        return clip(parameters, limit, *norm)
    monkeypatch.setattr(torch.nn.utils, chapter.clip, spy)
    text = [json.loads(json.dumps({"messages": [{"role": "user", "content": "a " * (5 * i)},
                                                {"role": "assistant", "content": "b " * (90 // (i + 1))}]}))
            for i in range(40)]
    chats = tmp_path / "chats.jsonl"
    chats.write_text("\n".join(map(json.dumps, text)))
    arguments = ("--data", chats, "--batch-tokens", 200, "--steps", 1)
    run_here(chapter.train, *arguments, "--accumulate", 3, "--out", tmp_path / "a")

    model, tokenizer = chapter.checkpoint.load_model(tmp_path / "a")
    documents, _ = chapter.data.load_documents(chats)
    windows, _ = chapter.data.tokenize(documents, tokenizer, 200)
    packs = list(itertools.islice(chapter.data.training_packs(windows, 200, 0), 3))
    counts = [sum(target != -100 for _, targets in pack for target in targets) for pack in packs]
    assert max(counts) > 1.5 * min(counts), counts
    torch.manual_seed(0)   # the model as it was before the step
    model = chapter.model.Transformer(replace(model.config))
    whole = chapter.data.packed_sequence_collate_fn(sum(packs, []))
    expected = gradients(model, chapter.train.loss_sum(model, whole) / sum(counts))
    assert_same(found[0], expected, tolerance=1e-4)
    summary = json.loads((tmp_path / "a" / "summary.json").read_text())
    assert summary["tokens"] == sum(len(ids) for pack in packs for ids, _ in pack) and summary["steps"] == 1


# ------------------------------------------------------------------------------------------------------------ precision

@pytest.mark.reaches("precision")
def test_scaler_equals_that_of_torch(chapter):
    """The same weights and the same scale after steps of which some overflow."""
    ours, theirs = (torch.nn.Parameter(torch.ones(4)) for _ in range(2))
    optimizers = [torch.optim.AdamW([weight], lr=0.1) for weight in (ours, theirs)]
    scaler, reference = chapter.precision.GradScaler("fp16", interval=3), torch.amp.GradScaler("cpu", growth_interval=3)
    scales = []
    for step in range(20):
        spoiled = float("inf") if step in (2, 3, 9, 17) else 1.0
        slopes = torch.randn(4, generator=torch.Generator().manual_seed(step)) * spoiled
        for weight, optimizer in zip((ours, theirs), optimizers):
            optimizer.zero_grad()
        ((ours * slopes).sum() * scaler.scale).backward()
        scaler.unscale([ours])
        finite = ours.grad.isfinite().all().item()
        if finite:
            optimizers[0].step()
        scaler.update(finite)
        reference.scale((theirs * slopes).sum()).backward()
        reference.step(optimizers[1])
        reference.update()
        assert scaler.scale == reference.get_scale() and torch.equal(ours, theirs), step
        scales.append(scaler.scale)
    assert any(a < b for a, b in zip(scales, scales[1:])) and any(a > b for a, b in zip(scales, scales[1:]))


@pytest.mark.reaches("precision")
def test_scaler_of_other_precisions_does_nothing(chapter):
    scaler = chapter.precision.GradScaler("bf16")
    for finite in [True] * 2000 + [False]:
        scaler.update(finite)
    assert scaler.scale == 1


@pytest.mark.reaches("precision")
def test_stochastic_rounding_is_right_on_average(chapter):
    torch.manual_seed(0)
    x = torch.tensor([1.0, 1.001, -3.14159, 1e-30, 70000.3, 1 / 3])
    rounded = chapter.precision.round_stochastically(x.repeat(20_000, 1)).double()
    lower = x.view(torch.int32).bitwise_and(-(1 << 16)).view(torch.float32).double()
    upper = (x.view(torch.int32).bitwise_and(-(1 << 16)) + (1 << 16)).view(torch.float32).double()
    assert ((rounded == lower) | (rounded == upper)).all()
    assert (rounded[:, 0] == 1).all()   # what bfloat16 can hold stays
    error = (rounded.mean(0) - x.double()).abs() / (upper - lower).abs()
    assert error.max() < 4 * 0.5 / math.sqrt(20_000), error   # four standard errors


@pytest.mark.reaches("precision")
def test_adamw_by_hand_is_adamw_but_for_the_rounding(chapter, monkeypatch):
    monkeypatch.setattr(chapter.precision, "round_stochastically", lambda x: x)
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in ((30, 20), (7,))]
    theirs = [torch.nn.Parameter(weight.detach().clone()) for weight in ours]
    optimizers = [kind([{"params": weights[:1], "weight_decay": 0.1}, {"params": weights[1:], "weight_decay": 0.0}],
                       lr=0.01, betas=(0.9, 0.95))
                  for kind, weights in ((chapter.precision.StochasticAdamW, ours), (torch.optim.AdamW, theirs))]
    for _ in range(20):
        for a, b in zip(ours, theirs):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
        for a, b in zip(ours, theirs):
            torch.testing.assert_close(a, b)


@pytest.fixture(scope="module")
def score(chapter, text_file, tmp_path_factory):
    """score(precision) -> (bits per byte, folder) of a run of 25 steps; each is run once.

    A CPU may need long for products of few bits.
    """
    @functools.cache
    def score(precision):
        out = tmp_path_factory.mktemp(precision)
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(chapter.model.CONFIGS, "small",
                          small_config(chapter, vocab_size=300, hidden_size=64, intermediate_size=128))
            run_here(chapter.train, "--data", text_file, *chapter.quick, "--steps", 25, "--precision",
                     precision, "--out", out)
        return json.loads((out / "summary.json").read_text())["val_bits_per_byte"], out
    return score


@pytest.mark.parametrize("precision, tolerance", [("bf16", 0.02), ("fp16", 0.01), ("bf16-pure", 0.05)])
def test_few_bits_stay_near_float32(score, precision, tolerance):
    (bits, out), (expected, _) = score(precision), score("fp32")
    assert bits == pytest.approx(expected, rel=tolerance) and bits != expected
    stored = load_file(out / "model.safetensors")["model.embed_tokens.weight"].dtype
    assert stored == (torch.bfloat16 if precision == "bf16-pure" else torch.float32)


def test_what_a_device_has_not_is_refused(chapter, text_file, tmp_path, call):
    expect_error(call(chapter.train, "--data", text_file, "--device", "cpu", "--precision", "tf32", "--out", tmp_path),
                 "tf32", "cpu", "fp32")


# ----------------------------------------------------------------------------------------------------------- not finite

def spoil(chapter, monkeypatch, steps):
    """Let the loss of these calls be nan."""
    calls, loss_sum = itertools.count(1), chapter.train.loss_sum
    monkeypatch.setattr(chapter.train, "loss_sum", lambda model, batch: loss_sum(model, batch) * (
        float("nan") if torch.is_grad_enabled() and next(calls) in steps else 1))


def test_a_step_that_is_not_finite_is_left_out_and_counted(chapter, text_file, tmp_path, monkeypatch, call):
    spoil(chapter, monkeypatch, {3, 4, 7})
    status, _, err = call(chapter.train, "--data", text_file, *chapter.quick, "--steps", 8, "--out", tmp_path)
    assert status == 0 and "skipped=3" in err
    state = json.loads((tmp_path / "checkpoint" / "state.json").read_text())
    assert state["skipped"] == 3 and state["step"] == 8
    assert all(weight.isfinite().all() for weight in load_file(tmp_path / "model.safetensors").values())


@pytest.mark.parametrize("left_out", [range(1, 5), range(1, 7)], ids=["before the resume", "after it too"])
def test_a_run_whose_steps_were_left_out_resumes_bit_for_bit(left_out, chapter, text_file, tmp_path, monkeypatch):
    """float16's scale begins too high: the checkpoint after step 4 may know of no step that was taken, and so of no
    moments.
    """
    run = ["--data", text_file, *chapter.quick, "--precision", "fp16"]
    for out, more in ("whole", [8]), ("resumed", [4]), ("resumed", [8, "--resume"]):
        steps = [step - 4 for step in left_out] if "--resume" in more else left_out
        with monkeypatch.context() as patch:
            patch.setattr(chapter.train, "schedule", lambda progress: 1)   # that of 4 steps is another than that of 8
            patch.setitem(chapter.model.CONFIGS, "small", small_config(chapter, vocab_size=300))
            spoil(chapter, patch, steps)
            run_here(chapter.train, *run, "--out", tmp_path / out, "--steps", *more)
    assert_same_run(tmp_path / "whole", tmp_path / "resumed")


def test_moments_that_are_missing_are_told(chapter, text_file, tmp_path, call):
    if "optimizer.safetensors" not in chapter.saved:
        pytest.skip("test_sharded_checkpoint.py has one of its own")
    run = ["--data", text_file, *chapter.quick, "--out", tmp_path]
    run_here(chapter.train, *run, "--steps", 1)
    path = tmp_path / "checkpoint" / "optimizer.safetensors"
    save_file({"random_state": load_file(path)["random_state"]}, path)
    expect_error(call(chapter.train, *run, "--steps", 2, "--resume"), path, "exp_avg")


def test_too_many_in_a_row_end_the_run_and_leave_the_checkpoint(chapter, text_file, tmp_path, monkeypatch, call):
    spoil(chapter, monkeypatch, range(11, 99))
    run = ["--data", text_file, *chapter.quick, "--steps", 90, "--save-every", 5, "--out", tmp_path]
    expect_error(call(chapter.train, *run), "20 steps in a row, up to step 30", "--learning-rate")
    assert json.loads((tmp_path / "checkpoint" / "state.json").read_text())["step"] == 25
    expect_error(call(chapter.train, *run, "--resume"), "up to step 45")
    chapter.checkpoint.load_model(tmp_path)


# --------------------------------------------------------------------------------------------------------------- memory

@pytest.mark.reaches("memory_counter")
def test_held_counts_what_lives(chapter):
    with chapter.memory_counter.Held() as held:
        a = torch.ones(1000)
        view = a.view(10, 100)[3:]
        b = a + 1
        assert held.now == 8000
        del a
        assert held.now == 8000   # the view keeps it
        del view, b
        assert held.now == 0 and held.peak == 8000
