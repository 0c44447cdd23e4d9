"""Chapter 6: tensor parallelism computes what one process does, and sends what the formula says."""
import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh

from chapters import load_chapter
from ranks import CHAPTER, assemble

SIZES = dict(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=8,
             num_key_value_heads=4, head_dim=8, max_position_embeddings=64)   # 61 divides by nothing
both = pytest.mark.parametrize("sequence", (True, False), ids=("sequence", "plain"))


def make_model(chapter, sizes):
    """Not a fresh model: its norms would all be 1, and what is wrong with them would not show."""
    torch.manual_seed(0)
    model = chapter.model.Transformer(chapter.model.ModelConfig(**SIZES | sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def make_packs(chapter):
    """Two packs of a step, 40 and 48 tokens, with unequal documents; of one not every target counts."""
    torch.manual_seed(1)
    packs = []
    for lengths in ((17, 3, 15), (30, 1, 9, 5)):
        documents = [(torch.randint(61, (n,)).tolist(), torch.randint(61, (n,)).tolist()) for n in lengths]
        documents[0][1][:4] = [chapter.data.IGNORE] * 4
        packs.append(chapter.data.fill(chapter.data.packed_sequence_collate_fn(documents), -(-sum(lengths) // 8) * 8))
    return packs


def step(chapter, model, packs, precision="fp32"):
    """The loss of all packs, their sum; its gradients are in the parameters."""
    loss = 0
    for batch in packs:
        with chapter.precision.autocast(precision, "cpu"):
            nats = model(batch.input_ids, batch.position_ids, batch.cu_seqlens, batch.max_seqlen, batch.targets)
        nats.backward()
        loss += nats.detach()
    return loss


def alone(chapter, sizes, precision="fp32"):
    model = make_model(chapter, sizes)
    loss = step(chapter, model, make_packs(chapter), precision)
    return loss, {name: parameter.grad for name, parameter in model.named_parameters()}


def together(chapter, axes, sizes, sequence, precision="fp32", checkpointing="none"):
    """(loss, gradients by piece, bytes sent over tp); the packs are dealt to the ranks of dp."""
    mesh = chapter.parallel.mesh.make_mesh(**axes)
    chapter.parallel.tensor.CHUNK = 20   # or every pack would be one chunk
    model = make_model(chapter, sizes)
    chapter.parallel.mesh.label(model, mesh)
    chapter.parallel.tensor.split(model, mesh, sequence)
    model.checkpointing = checkpointing
    loss = step(chapter, model, make_packs(chapter)[mesh.dp.rank::mesh.dp.size], precision)
    chapter.parallel.tensor.sum_partial(list(model.parameters()), mesh)
    for parameter in model.parameters():
        parameter.piece.group.all_reduce(parameter.grad)
    gradients = [(p.piece.name, p.piece.shape, p.piece.offset, p.grad) for p in model.parameters()]
    return mesh.dp.all_reduce(loss), gradients, mesh.tp.sent


def compare(answers, expected, tolerance=1e-5):
    loss, gradients = expected
    whole = assemble([pieces for _, pieces, _ in answers])
    assert whole.keys() == gradients.keys()
    for found, _, _ in answers:
        torch.testing.assert_close(found, loss, rtol=tolerance, atol=0)
    for name, gradient in gradients.items():
        worst = (whole[name] - gradient).abs().max() / gradient.abs().max()
        assert worst <= tolerance, f"{name} differs by {worst:.1e}"
    norm, expected_norm = (torch.nn.utils.get_total_norm(list(g.values())) for g in (whole, gradients))
    torch.testing.assert_close(norm, expected_norm, rtol=tolerance, atol=0)


LAYOUTS = {
    "tp2": ({"tp": 2}, {}), "tp4": ({"tp": 4}, {}), "untied": ({"tp": 4}, {"tie_word_embeddings": False}),
    "no_groups": ({"tp": 2}, {"num_key_value_heads": 8}),
    "a_head_each": ({"tp": 4}, {"num_attention_heads": 4, "head_dim": 16}),
    "dp2_tp2": ({"dp": 2, "tp": 2}, {"num_key_value_heads": 2})}


@both
@pytest.mark.parametrize("axes, sizes", LAYOUTS.values(), ids=LAYOUTS)
def test_equal_to_one_process(ranks, axes, sizes, sequence):
    answers = ranks(axes["tp"] * axes.get("dp", 1), together, axes, sizes, sequence)
    compare(answers, alone(load_chapter(CHAPTER), sizes))


@both
@pytest.mark.parametrize("checkpointing", ("full", "selective"))
def test_what_was_forgotten_comes_out_the_same(ranks, checkpointing, sequence):
    compare(ranks(2, together, {"tp": 2}, {}, sequence, "fp32", checkpointing), alone(load_chapter(CHAPTER), {}))


@both
@pytest.mark.parametrize("precision", ("bf16", "fp16"))
def test_as_far_from_float32_as_one_process_is(ranks, precision, sequence):
    chapter = load_chapter(CHAPTER)
    _, exact = alone(chapter, {})
    loss, one = alone(chapter, {}, precision)
    answers = ranks(2, together, {"tp": 2}, {}, sequence, precision)
    many = assemble([pieces for _, pieces, _ in answers])
    torch.testing.assert_close(answers[0][0], loss, rtol=1e-3, atol=0)
    for name in exact:
        error, error_of_one = ((found[name] - exact[name]).norm() / exact[name].norm() for found in (many, one))
        assert error < 3 * error_of_one + 1e-4, f"{name} is off by {error:.1e}, in one process by {error_of_one:.1e}"


def loss_alone(chapter, dtype, wrong):
    """The loss over a table that is cut, with one target that is no word or, where wrong is None, none: what it raises,
    or (loss, dx, dweight).
    """
    mesh = chapter.parallel.mesh.make_mesh(tp=2)
    chapter.parallel.tensor.CHUNK = 4
    torch.manual_seed(0)
    x, weight, targets = torch.randn(40, 8, dtype=dtype), torch.randn(61, 8, dtype=dtype), torch.randint(61, (40,))
    targets[::7] = chapter.data.IGNORE
    first, last = chapter.parallel.tensor.vocabulary_part(61, mesh.tp)
    part, x = weight[first:last].clone().requires_grad_(), x.requires_grad_()
    loss_of = chapter.parallel.tensor.VocabParallelLoss(first, 61, mesh.tp, sequence=False)
    if wrong is not None:
        targets[5] = wrong
        try:
            return loss_of(x, part, targets).item()
        except IndexError as error:
            return str(error)
    loss = loss_of(x, part, targets)
    (loss / 40).backward()
    exact = [x.detach().double().requires_grad_(), weight.double().requires_grad_()]
    right = torch.nn.functional.cross_entropy(exact[0] @ exact[1].T, targets, reduction="sum")
    (right / 40).backward()
    return [(ours.double() - theirs).norm().item() / theirs.norm().item() for ours, theirs in (
        (loss.detach(), right.detach()), (x.grad, exact[0].grad), (part.grad, exact[1].grad[first:last]))]


@pytest.mark.parametrize("wrong", (-1, -101, 61))
def test_a_target_that_is_no_word_is_an_error_on_all_ranks(ranks, wrong):
    assert ranks(2, loss_alone, torch.float32, wrong) == [f"Target {wrong} is out of bounds."] * 2


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
def test_the_loss_over_weights_of_any_dtype(ranks, dtype, tolerance):
    for errors in ranks(2, loss_alone, dtype, None):
        assert max(errors) < tolerance, errors


@both
@pytest.mark.parametrize("tp", (2, 4))
def test_bytes_are_those_of_the_formula(ranks, tp, sequence):
    chapter = load_chapter(CHAPTER)
    config = chapter.model.ModelConfig(**SIZES)
    packs = [len(batch.input_ids) for batch in make_packs(chapter)]
    once = chapter.parallel.tensor.bytes_sent(config, 0, tp, sequence)   # what does not depend on tokens: the norms
    expected = sum(chapter.parallel.tensor.bytes_sent(config, T, tp, sequence) for T in packs) - once
    assert [sent for _, _, sent in ranks(tp, together, {"tp": tp}, {}, sequence)] == [expected] * tp


def native(chapter, tp, sizes):
    model = make_model(chapter, sizes)
    chapter.parallel.tensor.split_with_torch(model, init_device_mesh("cpu", (tp,)))
    loss = step(chapter, model, make_packs(chapter))
    gradients = [(name, p.shape, (0,) * p.dim(), p.grad.full_tensor().clone()) for name, p in model.named_parameters()]
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).full_tensor()   # in place, hence the clones
    return loss, gradients, norm


@pytest.mark.parametrize("tp, sizes", ((4, {}), (2, {"tie_word_embeddings": False})), ids=("tied", "untied"))
def test_torch_has_the_same(ranks, tp, sizes):
    expected = alone(load_chapter(CHAPTER), sizes)
    answers = ranks(tp, native, tp, sizes)
    compare(answers, expected)
    for _, _, norm in answers:
        torch.testing.assert_close(norm, torch.nn.utils.get_total_norm(list(expected[1].values())), rtol=1e-5, atol=0)


def test_what_cannot_be_cut_is_refused_with_what_can():
    chapter = load_chapter(CHAPTER)
    config = chapter.model.ModelConfig(**SIZES)
    for size in (1, 2, 4):
        chapter.parallel.tensor.check(config, size)
    for size, what in {3: "8 query heads", 8: "4 key-value heads"}.items():
        with pytest.raises(chapter.cli.InputError, match=f"--tp {size}: {what}.* with --tp 1 or 2 or 4"):
            chapter.parallel.tensor.check(config, size)
