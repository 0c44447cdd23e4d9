"""Chapter 6: data parallel and ZeRO compute what one process does, hold what the formula says, send what it says."""
import itertools
import random
from dataclasses import fields

import pytest
import torch

from chapters import load_chapter

STEPS, PACKS = 3, 3   # steps of a run; packs of each rank in a step
MODES = ("naive", "bucketed", "overlapped", 1, 2, 3, "torch")
EVEN = dict(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=4, max_position_embeddings=64)
# Nothing divides by 2 or 4, and the norms of heads have 2 rows: the last ranks own none of them.
ODD = EVEN | dict(vocab_size=61, hidden_size=15, intermediate_size=27, num_attention_heads=3,
                  num_key_value_heads=1, head_dim=2)


def make_model(chapter, sizes, mesh, dtype=torch.float32):
    torch.manual_seed(0)
    model = chapter.model.Transformer(chapter.model.ModelConfig(**sizes)).to(dtype)
    chapter.parallel.mesh.label(model, mesh)
    return model


def make_packs(chapter, n, vocab_size=61, seed=0):
    """Packs of very unequal length, and in some hardly any token counts."""
    rng, packs = random.Random(seed), []
    for number in range(n):
        windows = []
        for _ in range(rng.randint(1, 4)):
            ids = [rng.randrange(vocab_size) for _ in range(rng.randint(2, 20))]
            counts = [number % 3 > 0 or i == 0 for i in range(len(ids) - 1)]
            windows.append((ids[:-1], [i if count else chapter.data.IGNORE for i, count in zip(ids[1:], counts)]))
        packs.append(chapter.data.packed_sequence_collate_fn(windows))
    return packs


def targets(chapter, packs):
    return sum((pack.targets != chapter.data.IGNORE).sum().item() for pack in packs)


def loss_sum(chapter, model, batch, precision):
    with chapter.precision.autocast(precision, "cpu"):
        return model(batch.input_ids, batch.position_ids, batch.cu_seqlens, batch.max_seqlen, batch.targets)


def adamw(chapter, parameters):
    """As in train.py. Adam divides each gradient by its own size, so that of one that is nearly zero the last bits
    decide where the weight goes. A large eps keeps that out of the comparison."""
    groups = [{"params": [p for p in parameters if p.dim() >= 2], "weight_decay": 0.1},
              {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0}]
    if parameters[0].dtype == torch.bfloat16:
        return chapter.precision.StochasticAdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-3)
    return torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-3, fused=True)


class Separate:
    """naive or bucketed behind the methods of the others."""

    def __init__(self, model, reduce):
        self.parameters, self.reduce = model.parameters, reduce

    def before_backward(self, last):
        pass

    def finish(self):
        self.reduce(self.parameters())

    def after_step(self):
        pass


def make_way(chapter, model, mesh, way):
    d = chapter.parallel.data
    if way == "overlapped":
        return d.Overlapped(model, limit=3000)   # bytes: several buckets
    if way in ("naive", "bucketed"):
        return Separate(model, d.naive if way == "naive" else lambda parameters: d.bucketed(parameters, limit=3000))
    return d.MODES[str(way)](model, mesh)


def whole_of(shards, tensors, mesh):
    """{name: tensor}: each rank's pieces in their places, the holes filled by the others (summed: no two ranks hold the
    same).
    """
    whole = {}
    for shard, tensor in zip(shards, tensors):
        whole[shard.piece.name] = torch.zeros(shard.piece.shape)
        place = tuple(slice(start, start + length) for start, length in zip(shard.piece.offset, shard.shape))
        whole[shard.piece.name][place] = tensor.detach()
        if shard.piece.group.size == 1:
            mesh.data.all_reduce(whole[shard.piece.name])
    return whole


def train(chapter, model, way, mesh, packs_of_step, counts, precision="fp32"):
    """A clipped step for each list of packs -> (losses, norms, the first step's gradients)."""
    optimizer = adamw(chapter, list(way.parameters()))
    copies = chapter.parallel.mesh.count_copies(way.parameters(), mesh)
    losses, norms, first = [], [], None
    for packs, count in zip(packs_of_step, counts):
        optimizer.zero_grad()
        loss = torch.zeros(())
        for i, pack in enumerate(packs):
            way.before_backward(last=i == len(packs) - 1)
            mean = loss_sum(chapter, model, pack, precision) / count
            mean.backward()
            loss += mean.detach()
        way.finish()
        first = first or [p.grad.clone() for p in way.parameters()]
        losses.append(mesh.world.all_reduce(loss).item())
        norms.append(chapter.parallel.mesh.clip_gradients(list(way.parameters()), copies, mesh, 0.5).item())
        optimizer.step()
        way.after_step()
    return losses, norms, first


def shares(chapter, mesh):
    """(packs of this rank in each step, of all ranks, targets of all)"""
    every = [make_packs(chapter, PACKS * mesh.data.size, seed=step) for step in range(STEPS)]
    mine = [packs[mesh.data.rank::mesh.data.size] for packs in every]
    return mine, every, [sum((pack.targets != chapter.data.IGNORE).sum().item() for pack in packs) for packs in every]


def relative(found, expected):
    """Largest difference of any two tensors or numbers, relative to the largest number in them."""
    return max((torch.as_tensor(a) - torch.as_tensor(b)).abs().max().item() / torch.as_tensor(b).abs().max().item()
               for a, b in zip(found, expected))


def differences(chapter, name, size, sizes, checkpointing, precision):
    """By what a run over `size` ranks differs from one process that has all packs."""
    mesh = chapter.parallel.mesh.make_mesh(dp=size)
    mine, every, counts = shares(chapter, mesh)
    alone = chapter.parallel.mesh.Mesh(*(chapter.parallel.mesh.Group()
                                         for _ in fields(chapter.parallel.mesh.Mesh)[:-1]), device_mesh=None)
    model = make_model(chapter, sizes, alone)
    losses, norms, gradients = train(chapter, model, Separate(model, lambda parameters: None), alone, every,
                                     counts, precision)
    gradients, weights = dict(zip(dict(model.named_parameters()), gradients)), dict(model.named_parameters())
    later = loss_sum(chapter, model, every[0][0], precision).item()
    model = make_model(chapter, sizes, mesh)
    model.checkpointing = checkpointing
    way = make_way(chapter, model, mesh, name)
    found = train(chapter, model, way, mesh, mine, counts, precision)
    with torch.no_grad():
        found_later = loss_sum(chapter, model, every[0][0], precision).item()
    found_gradients, found_weights = (whole_of(way.parameters(), tensors, mesh)
                                      for tensors in (found[2], way.parameters()))
    assert list(found_weights) == list(weights), "other names, or in another order"
    return {"losses": relative(found[0], losses), "norms": relative(found[1], norms),
            "gradients": relative(found_gradients.values(), gradients.values()),
            "weights": relative(found_weights.values(), weights.values()),
            "without gradients": relative([found_later], [later])}


@pytest.mark.parametrize("name", MODES)
def test_equal_to_one_process(ranks, name):
    """After three clipped steps of AdamW: three packs of unequal tokens each, a tied table, rows that do not divide."""
    cases = [(2, EVEN, "none", "fp32"), (4, ODD, "none", "fp32")]
    if name in (2, 3, "torch"):
        cases += [(4, ODD | {"tie_word_embeddings": False}, "full", "fp32"), (2, ODD, "selective", "fp32"),
                  (2, ODD, "full", "bf16")]
    for case in cases:
        for found in ranks(case[0], differences, name, *case):
            assert max(found.values()) < (1e-2 if case[3] == "bf16" else 2e-6), (name, *case, found)


def storage_bytes(tensors):
    """Bytes of the memory behind tensors; what several share is counted once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors
                if t is not None}.values())


def costs(chapter, size, stage):
    """A second step of PACKS packs: bytes held when backward is done, bytes sent, both predicted; which units are
    whole.
    """
    mesh = chapter.parallel.mesh.make_mesh(dp=size)
    model = make_model(chapter, EVEN, mesh)
    blocks = sum(p.nbytes for p in model.model.layers.parameters())
    root = sum(p.nbytes for p in model.parameters()) - blocks
    way = chapter.parallel.data.MODES[str(stage)](model, mesh)
    optimizer, together = adamw(chapter, list(way.parameters())), []

    def look(*_):
        together.append([unit.gathered for unit in way.units] if stage else None)
    for block in model.model.layers:
        block.mlp.register_forward_hook(lambda module, arguments, output: (look(), output.register_hook(look)) and None)
    for _ in range(2):
        optimizer.zero_grad()
        sent = mesh.sent
        together.clear()
        for i, pack in enumerate(make_packs(chapter, PACKS, seed=mesh.data.rank)):
            way.before_backward(last=i == PACKS - 1)
            loss_sum(chapter, model, pack, "fp32").backward()
        parameters = [*model.parameters(), *way.parameters()]
        moments = [x for state in optimizer.state.values() for x in state.values() if x.dim() > 0]
        held = storage_bytes(parameters + [p.grad for p in parameters] + moments)
        way.finish()
        optimizer.step()
        way.after_step()
        sent = mesh.sent - sent
    return (held / model.num_parameters(), chapter.parallel.zero.bytes_per_parameter(stage, size),
            sent, chapter.parallel.zero.step_bytes(stage, size, blocks, root, PACKS), together)


@pytest.mark.parametrize("stage", (0, 1, 2, 3))
def test_memory_and_bytes_as_predicted(ranks, stage):
    for size in (2, 4):
        for held, expected, sent, predicted, together in ranks(size, costs, size, stage):
            assert held == expected and sent == predicted, (stage, size, held, expected, sent, predicted)
            if stage == 3:   # the root and the block that computes: first, second forward, second, first backward
                assert together == 3 * [[True, True, False], [True, False, True], [True, False, True],
                                        [True, True, False]]


def others_first(chapter):
    """Three parameters, each a bucket, and on each rank another one that the loss does not depend on."""
    mesh = chapter.parallel.mesh.make_mesh(dp=4)
    module = torch.nn.ParameterList([torch.ones(2), torch.ones(2), torch.ones(2)])
    module.num_parameters = lambda: 6
    chapter.parallel.mesh.label(module, mesh)
    way = chapter.parallel.data.Overlapped(module, limit=1)
    way.before_backward(last=True)
    sum(10 ** i * p.sum() for i, p in enumerate(module) if i != mesh.data.rank).backward()
    way.finish()
    uneven = [p.grad.tolist() for p in module]
    begun = []   # buckets: none in a pack that is not the last, all of them when the last backward is done
    for last in (False, True):
        way.before_backward(last)
        sum(p.sum() for p in module).backward()
        begun.append(way.begun)
    way.finish()
    return uneven, begun, [p.grad.tolist() for p in module]


def test_buckets_in_the_same_order_on_all_ranks(ranks):
    """A gradient that does not come on one rank: the others' buckets are not summed with another one, nobody waits for
    ever.
    """
    expected = [[3.0, 3.0], [30.0, 30.0], [300.0, 300.0]]
    assert ranks(4, others_first) == 4 * [(expected, [0, 3], [[4 * (x + 2) for x in row] for row in expected])]


def two_in_flight(chapter, name):
    """Two packs forward, then two backward, as in a pipeline -> how far gradients are from one after the other."""
    mesh = chapter.parallel.mesh.make_mesh(dp=2)
    packs, found = make_packs(chapter, 2, seed=mesh.data.rank), []
    for in_flight in (False, True):
        model = make_model(chapter, ODD, mesh)
        model.checkpointing = "full" if in_flight else "none"
        way = make_way(chapter, model, mesh, name)
        if in_flight:
            losses = [loss_sum(chapter, model, pack, "fp32") for pack in packs]
        for i, pack in enumerate(packs):
            way.before_backward(last=i == 1)
            (losses[i] if in_flight else loss_sum(chapter, model, pack, "fp32")).backward()
        way.finish()
        found.append([p.grad for p in way.parameters() if p.numel()])
    return relative(*found[::-1])


@pytest.mark.parametrize("name", ("overlapped", 2, 3))
def test_packs_in_flight(ranks, name):
    assert max(ranks(2, two_in_flight, name)) < 1e-6


def in_bfloat16(chapter, name):
    mesh = chapter.parallel.mesh.make_mesh(dp=2)
    mine, _, counts = shares(chapter, mesh)
    losses = []
    for dtype in (torch.float32, torch.bfloat16):
        model = make_model(chapter, ODD, mesh, dtype)
        losses.append(train(chapter, model, make_way(chapter, model, mesh, name), mesh, mine, counts)[0])
    return relative(*losses)


@pytest.mark.parametrize("name", ("overlapped", 1, 2, 3, "torch"))
def test_weights_in_bfloat16(ranks, name):
    """--precision bf16-pure: no rank has random bits of another's rows, so that only the course of the loss can be
    compared.
    """
    assert max(ranks(2, in_bfloat16, name)) < 0.02


def with_experts(chapter, names):
    """Experts spread over two of four ranks: their weights are held and reduced by fewer ranks than the rest."""
    mesh = chapter.parallel.mesh.make_mesh(dp=4, ep=2)
    mine, _, counts = shares(chapter, mesh)
    runs = []
    for name in names:
        model = make_model(chapter, EVEN | dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8), mesh)
        chapter.parallel.experts.spread(model, mesh)
        losses, norms, _ = train(chapter, model, make_way(chapter, model, mesh, name), mesh, mine, counts)
        runs.append(losses + norms)
    return [relative(run, runs[0]) for run in runs]


def test_experts_have_a_group_of_their_own(ranks):
    for found in ranks(4, with_experts, ("naive", "overlapped", 1, 2, 3, "torch")):
        assert max(found) < 2e-6, found


def test_packs_shared_out_by_cost():
    d = load_chapter("chapter-06-parallelism").parallel.data
    cost = [9, 1, 8, 2, 7, 3, 6, 4]
    shares = d.share_out("abcdefgh", cost, 2)
    assert sorted(sum(shares, [])) == list("abcdefgh") and [len(share) for share in shares] == [4, 4]
    assert d.imbalance(d.share_out(cost, cost, 2)) == 1.0 and d.imbalance([cost[::2], cost[1::2]]) == 1.5
    assert d.share_out([5, 1, 1, 1], [5, 1, 1, 1], 2) == [[5, 1], [1, 1]], "a rank that has its number gets no more"
    # Graham's bound: at most 4/3 of the best that any order could do.
    for seed in range(20):
        cost = [random.Random(f"{seed} {i}").randrange(1, 100) for i in range(8)]
        best = min(d.imbalance([[cost[i] for i in half], [cost[i] for i in range(8) if i not in half]])
                   for half in itertools.combinations(range(8), 4))
        assert best <= d.imbalance(d.share_out(cost, cost, 2)) <= 4 / 3 * best
