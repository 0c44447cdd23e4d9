"""Chapter 6: pipeline parallel. Layers in stages, tied tables, schedules, and the runner that takes any of them."""
import itertools

import pytest
import torch

from chapters import load_chapter

CHAPTER = load_chapter("chapter-06-parallelism")
LENGTHS = ([5, 3, 1], [7], [2, 2], [9, 4], [1, 6, 3], [8])   # documents of each pack: no two packs are equally long
BY_HAND = ("gpipe", "1f1b")
V, D = 30, 16


# --------------------------------------------------------------------------------------------------- with several ranks

def make_model(chapter, tied):
    torch.manual_seed(0)
    return chapter.model.Transformer(chapter.model.ModelConfig(
        vocab_size=V, hidden_size=D, intermediate_size=24, num_hidden_layers=5, num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8, max_position_embeddings=32, tie_word_embeddings=tied))


def make_batches(chapter, m):
    torch.manual_seed(1)
    packs = [[(torch.randint(V, (length,)).tolist(), torch.randint(V, (length,)).tolist()) for length in lengths]
             for lengths in LENGTHS[:m]]
    return [chapter.data.packed_sequence_collate_fn(pack) for pack in packs]


def forward_of(model, batches):
    """forward(batch) for the runner, its loss divided by the targets of all batches."""
    targets = sum(len(batch.targets) for batch in batches)

    def forward(batch):
        out = model(batch.input_ids, batch.position_ids, batch.cu_seqlens, batch.max_seqlen, batch.targets)
        return out / targets if out.dim() == 0 else out
    return forward


def one_process(m, tied):
    """(loss, {name: gradient}) of all batches."""
    model, batches = make_model(CHAPTER, tied), make_batches(CHAPTER, m)
    forward = forward_of(model, batches)
    loss = sum(map(forward, batches))
    loss.backward()
    return loss.item(), {name: parameter.grad for name, parameter in model.named_parameters()}


def pipeline(chapter, mesh, m, name, tied):
    """What a rank finds in one step."""
    pp = chapter.parallel.pipeline
    model, batches = make_model(chapter, tied), make_batches(chapter, m)
    chapter.parallel.mesh.label(model, mesh)
    pp.keep_stage(model, mesh, name)
    forward, before, backwards, done = forward_of(model, batches), (mesh.pp.sent, mesh.pp_back.sent), [], []
    model.model.layers[0].self_attn.q_proj.weight.register_post_accumulate_grad_hook(backwards.append)

    loss = pp.run_stage(model, batches, forward, before_last_backward=lambda: done.append(len(backwards)))
    between = (mesh.pp.sent, mesh.pp_back.sent)
    pp.sum_tied(model.parameters(), mesh)
    after = mesh.pp.sent + mesh.pp_back.sent
    with torch.no_grad():
        validation = pp.run_stage(model, batches, forward)
    return {"loss": loss.item(), "validation": validation.item(), "backwards before the last": done,
            "sent": (between[0] - before[0], between[1] - before[1], after - sum(between)),
            "grads": {parameter.piece.name: parameter.grad for parameter in model.parameters()},
            "tied": [parameter.piece.name for parameter in model.parameters() if parameter.piece.tied]}


def pipelines(chapter, size, dp):
    mesh = chapter.parallel.mesh.make_mesh(pp=size, dp=dp)
    assert mesh.pp.ranks == mesh.pp_back.ranks
    return {case: pipeline(chapter, mesh, *case) for case in CASES}


CASES = [(m, name, tied) for m, name, tied in itertools.product((1, 2, 4, 6), BY_HAND, (True, False))]


@pytest.fixture(scope="module")
def found(ranks):
    """found(size, dp=1) -> {case: what each rank finds, in the order of the stages}."""
    answers = {}

    def found(size, dp=1):
        if (size, dp) not in answers:
            every = ranks(size * dp, pipelines, size, dp)
            answers[size, dp] = {case: [rank[case] for rank in every] for case in CASES}
        return answers[size, dp]
    return found


@pytest.mark.parametrize("size, dp", [(2, 1), (4, 1), (2, 2)])
def test_loss_and_gradients_equal_one_process(found, size, dp):
    """Fewer microbatches than stages, as many, and more; no two equally long; tied and not."""
    for (m, name, tied), ranks in found(size, dp).items():
        loss, grads = one_process(m, tied)
        for rank, stage in enumerate(ranks):
            where = f"{name}, {m} microbatches, tied {tied}, rank {rank}"
            assert stage["loss"] == pytest.approx(loss, rel=1e-5), where
            assert stage["validation"] == pytest.approx(loss, rel=1e-5), where
            for key, grad in stage["grads"].items():
                torch.testing.assert_close(grad, grads[key], rtol=1e-4, atol=1e-6,
                                           msg=lambda text: f"{where}, {key}: {text}")
        assert set().union(*(stage["grads"] for stage in ranks)) == grads.keys()   # no layer is left out


def test_tied_tables_stay_equal(found):
    """Not nearly: a difference would grow, since nothing ever makes them equal again."""
    for (m, name, tied), ranks in found(4).items():
        for rank, stage in enumerate(ranks):
            assert stage["tied"] == ["model.embed_tokens.weight"] * (tied and rank in (0, 3))
        if tied:
            assert torch.equal(*(ranks[rank]["grads"]["model.embed_tokens.weight"] for rank in (0, 3)))


def test_data_parallelism_is_told_before_the_last_backward(found):
    """Once, and with all gradients but the last microbatch's summed up."""
    for (m, *_), ranks in found(4).items():
        assert [stage["backwards before the last"] for stage in ranks] == [[m - 1]] * 4


@pytest.mark.parametrize("size", [2, 4])
def test_bytes_sent_equal_the_formula(found, size):
    for (m, name, tied), ranks in found(size).items():
        stream = sum(map(sum, LENGTHS[:m])) * D * 4
        for rank, stage in enumerate(ranks):
            last = rank == size - 1
            loss = 2 * 4 * (size - 1) // size   # of an all-reduce, so that all stages know it
            assert stage["sent"] == (stream * (not last) + loss, stream * (rank > 0),
                                     V * D * 4 * (tied and (last or rank == 0)))


def differences(chapter, m):
    return chapter.schedules.largest_difference(chapter.parallel.mesh.make_mesh(pp=4), m)


def test_library_and_hand_find_the_same_gradients(ranks):
    """GPipe and 1F1B by both, interleaved and zero bubble by torch.distributed.pipelining."""
    for own in ranks(4, differences, 4):
        assert len(own) == 7 and max(own.values()) < 1e-5, own


# ------------------------------------------------------------------------------------------------------------ on paper

def test_stages():
    stage_layers = CHAPTER.parallel.pipeline.stage_layers
    for layers, head in itertools.product(range(1, 25), (0, 0.7, 3, 10)):
        for size in range(1, layers + 1):
            stages = stage_layers(layers, size, head)
            # Each layer once, in order.
            assert [start for start, _ in stages] + [layers] == [0] + [end for _, end in stages]
            *counts, last = [end - start for start, end in stages]
            assert last >= 1 and (not counts or max(counts) - 1 <= min(counts) >= 1)
            if size > 1:   # no other split is faster
                slowest = max(*counts, last + head)
                assert slowest <= min(max(-(-(layers - k) // (size - 1)), k + head)
                                      for k in range(1, layers - size + 2))
    assert stage_layers(28, 4) == [(0, 7), (7, 14), (14, 21), (21, 28)]
    # The 0.6B: its head costs ten layers.
    assert stage_layers(28, 4, head=9.9) == [(0, 9), (9, 18), (18, 27), (27, 28)]
    assert stage_layers(5, 4) == [(0, 1), (1, 2), (2, 4), (4, 5)]
    with pytest.raises(CHAPTER.cli.InputError, match="2 layers do not fill 3 pipeline stages"):
        stage_layers(2, 3)


@pytest.mark.parametrize("name", BY_HAND)
def test_one_stage_is_accumulation(name):
    model, batches = make_model(CHAPTER, True), make_batches(CHAPTER, 3)
    model.schedule = CHAPTER.parallel.pipeline.SCHEDULES[name]
    loss = CHAPTER.parallel.pipeline.run_stage(model, batches, forward_of(model, batches))
    expected, grads = one_process(3, True)
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, grads[key])
    expected = [("F", 0), ("B", 0), ("F", 1), ("B", 1), ("F", 2), ("B", 2)]
    assert CHAPTER.parallel.pipeline.one_f_one_b(0, 1, 3) == expected


@pytest.mark.parametrize("p", [1, 2, 3, 4, 8])
def test_orders_are_legal_and_1f1b_holds_few(p):
    """Each microbatch forward and backward once, on each rank; played on paper nobody waits for ever."""
    schedules = CHAPTER.schedules
    for name, m in itertools.product(schedules.BY_HAND, range(1, 2 * p + 3)):
        orders = schedules.orders_by_hand(name, p, m)
        for rank, order in enumerate(orders):
            assert sorted(order) == sorted((rank, action, i) for action in "FB" for i in range(m))
            held = schedules.most_held(order, 1)
            assert held == (m if name == "GPipe" else min(p - rank, m)), (name, m, rank)
        ends = {event[1:4]: event[-1] for event in schedules.simulate(orders, schedules.TIMES)}
        for stage, action, i in ends:
            assert ends[stage, "F", i] < ends[stage, "B", i]
            assert (stage == 0 or ends[stage - 1, "F", i] < ends[stage, "F", i]
                    and ends[stage, "B", i] < ends[stage - 1, "B", i])


def test_impossible_orders_are_noticed():
    with pytest.raises(ValueError, match="all ranks wait"):
        CHAPTER.schedules.simulate([[(0, "F", 0), (0, "B", 0), (0, "F", 1), (0, "B", 1)],
                                    [(1, "F", 0), (1, "F", 1), (1, "B", 0), (1, "B", 1)]], CHAPTER.schedules.TIMES)


def hangs(orders, groups):
    """Whether ranks wait for ever if messages go as NCCL's do: what a rank sends and receives in one group happens in
    the order in which it began, a message happens when it is the turn of both, and only a receive makes the rank wait.

    groups: {"F": name, "B": name}, in which group forward and backward messages go.
    """
    programs, lanes, done = [], {}, set()
    for rank, order in enumerate(orders):
        programs.append([])
        for action, i in order:
            step = 1 if action == "F" else -1
            for source in (rank - step, rank):   # receive, then send
                if 0 <= source < len(orders) and 0 <= source + step < len(orders):
                    programs[rank].append((source, source + step, action, i))
    positions, progress = [0] * len(orders), True
    while progress:
        progress = False
        for rank, program in enumerate(programs):
            while positions[rank] < len(program):
                message = program[positions[rank]]
                lane = lanes.setdefault((rank, groups[message[2]]), [])
                if message not in lane:
                    lane.append(message)
                    progress = True
                if message[1] == rank and message not in done:
                    break
                positions[rank] += 1
        turns = [next((message for message in lane if message not in done), None) for lane in lanes.values()]
        both = {message for message in turns if message and turns.count(message) == 2}
        done |= both
        progress |= bool(both)
    return len(done) < len(set().union(*programs))


@pytest.mark.parametrize("p, m", [(2, 3), (4, 2), (4, 4), (4, 9)])
def test_two_groups_do_not_hang_where_one_would(p, m):
    pp = CHAPTER.parallel.pipeline
    for order in (pp.gpipe, pp.one_f_one_b):
        assert not hangs([order(rank, p, m) for rank in range(p)], {"F": "pp", "B": "pp_back"})
    assert hangs([pp.one_f_one_b(rank, p, m) for rank in range(p)], {"F": "pp", "B": "pp"})


@pytest.mark.parametrize("p", [2, 4])
@pytest.mark.parametrize("rounds", [2, 3, 4])
def test_simulated_bubble_equals_the_formula(p, rounds):
    schedules, m = CHAPTER.schedules, p * rounds
    for name, (_, v) in schedules.LIBRARY.items():
        orders = (schedules.orders_by_hand if name in schedules.BY_HAND else schedules.orders_of_library)(name, p, m)
        events = schedules.simulate(orders, {action: length / v for action, length in schedules.TIMES.items()})
        assert len(events) == p * m * v * (3 if "zero" in name else 2)
        assert schedules.bubble(events) == pytest.approx(schedules.FORMULA[name](p, m)), name
