"""Chapter 6: the mesh, the collectives and their conjugates, and who holds what."""
import pytest
import torch
from torch import nn

from chapters import load_chapter
from ranks import CHAPTER

ROWS, ROW = 8, 3 * 4   # of the tensors below, and the bytes of a row
# Rows from rank i to rank j: unequal, and some none.
COUNTS = [[(3 * i + j * j) % 4 for j in range(4)] for i in range(4)]


def apply(chapter, name):
    """(x, f(x), dy, x's gradient, bytes sent forward, and backward).

    What all ranks hold in common is the same on all.
    """
    group = chapter.parallel.mesh.make_mesh(tp=4).tp
    torch.manual_seed(0 if name == "Copy" else group.rank)
    arguments, rows = (), ROWS
    if name == "AllToAll":
        arguments = COUNTS[group.rank], [row[group.rank] for row in COUNTS]
        rows = sum(arguments[0])
    x = torch.randn(rows, 3, requires_grad=True)
    y = getattr(chapter.parallel.mesh, name).apply(x, group, *arguments)
    forward = group.sent
    torch.manual_seed(10 if name == "Reduce" else 10 + group.rank)
    dy = torch.randn(y.shape)
    y.backward(dy)
    return x.detach(), y.detach(), dy, x.grad, forward, group.sent - forward


def test_forward_of_each(ranks):
    answers = {name: ranks(4, apply, name) for name in ("Copy", "Reduce", "Gather", "Scatter", "AllToAll")}
    xs, ys = ({name: [answer[i] for answer in found] for name, found in answers.items()} for i in (0, 1))
    split = [x.split(counts) for x, counts in zip(xs["AllToAll"], COUNTS)]
    for rank in range(4):
        assert torch.equal(ys["Copy"][rank], xs["Copy"][rank])
        torch.testing.assert_close(ys["Reduce"][rank], sum(xs["Reduce"]))
        assert torch.equal(ys["Gather"][rank], torch.cat(xs["Gather"]))
        torch.testing.assert_close(ys["Scatter"][rank], sum(xs["Scatter"])[2 * rank:2 * rank + 2])
        assert torch.equal(ys["AllToAll"][rank], torch.cat([split[sender][rank] for sender in range(4)]))


@pytest.mark.parametrize("name", ("Copy", "Reduce", "Gather", "Scatter", "AllToAll"))
def test_backward_is_the_conjugate(ranks, name):
    """<dy, f(x)> = <dx, x>, summed over the ranks: what backward must be, whatever forward is linear.

    A tensor that all ranks hold in common counts once: Copy's x, and Reduce's result.
    """
    answers = ranks(4, apply, name)
    after = sum((dy * y).sum() for _, y, dy, *_ in answers[:1 if name == "Reduce" else 4])
    before = sum((dx * x).sum() for x, _, _, dx, *_ in answers[:1 if name == "Copy" else 4])
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name, forward, backward", (
    ("Copy", 0, 2 * 3 / 4 * ROWS), ("Reduce", 2 * 3 / 4 * ROWS, 0),
    ("Gather", 3 / 4 * 4 * ROWS, 3 / 4 * 4 * ROWS), ("Scatter", 3 / 4 * ROWS, 3 / 4 * ROWS)))
def test_bytes_are_those_of_the_table(ranks, name, forward, backward):
    """4 ranks; a tensor of ROWS rows, Gather makes 4 times as many."""
    assert [answer[4:] for answer in ranks(4, apply, name)] == [(forward * ROW, backward * ROW)] * 4


def test_all_to_all_keeps_what_is_its_own(ranks):
    for rank, answer in enumerate(ranks(4, apply, "AllToAll")):
        others = [i for i in range(4) if i != rank]
        assert answer[4:] == (ROW * sum(COUNTS[rank][i] for i in others), ROW * sum(COUNTS[i][rank] for i in others))


# ------------------------------------------------------------------------------------------------------------ the mesh

GROUPS = ("pp", "pp_back", "dp", "ep", "cp", "tp", "data", "expert_data", "world")
ALONE, ALL, NEXT, OVER = [[0], [1], [2], [3]], [[0, 1, 2, 3]], [[0, 1], [2, 3]], [[0, 2], [1, 3]]
LAYOUTS = (   # the axes, and the rows of each group that is not of one rank
    ({"dp": 4}, {"dp": ALL, "data": ALL, "expert_data": ALL}),
    ({"tp": 4}, {"tp": ALL}),
    ({"dp": 2, "tp": 2}, {"tp": NEXT, "dp": OVER, "data": OVER, "expert_data": OVER}),
    ({"pp": 2, "tp": 2}, {"tp": NEXT, "pp": OVER, "pp_back": OVER}),
    ({"pp": 2, "dp": 2}, {"dp": NEXT, "data": NEXT, "expert_data": NEXT, "pp": OVER, "pp_back": OVER}),
    ({"dp": 2, "cp": 2}, {"cp": NEXT, "dp": OVER, "data": ALL, "expert_data": ALL}),
    ({"cp": 2, "tp": 2}, {"tp": NEXT, "cp": OVER, "data": OVER, "expert_data": OVER}),
    ({"dp": 4, "ep": 2}, {"dp": ALL, "data": ALL, "ep": NEXT, "expert_data": OVER}),
    ({"dp": 4, "ep": 4}, {"dp": ALL, "data": ALL, "ep": ALL}),
    ({"dp": 2, "ep": 2, "cp": 2}, {"dp": OVER, "ep": OVER, "cp": NEXT, "data": ALL, "expert_data": NEXT}))


def look_around(chapter, layouts):
    """For each layout {group: (its ranks, this one's place, the sum of the ranks' numbers)}, and the largest of the
    numbers.
    """
    found = []
    for axes in layouts:
        mesh = chapter.parallel.mesh.make_mesh(**axes)
        number = mesh.world.rank
        groups = {name: getattr(mesh, name) for name in GROUPS}
        found.append({name: (group.ranks, group.rank, group.all_reduce(torch.tensor(number)).item())
                      for name, group in groups.items()})
        assert mesh.largest(number) == 3 and mesh.is_main == (number == 0)
        assert mesh.sent == sum(group.sent for group in groups.values()) > 0
    return found


def test_who_talks_to_whom(ranks):
    found = ranks(4, look_around, [axes for axes, _ in LAYOUTS])
    for i, (axes, expected) in enumerate(LAYOUTS):
        for name in GROUPS:
            rows = ALL if name == "world" else expected.get(name, ALONE)
            for rank in range(4):
                row = next(row for row in rows if rank in row)
                assert found[rank][i][name] == (row, row.index(rank), sum(row)), (axes, name, rank)


def pass_round(chapter):
    group = chapter.parallel.mesh.make_mesh(cp=4).cp
    arrived = group.exchange(torch.full((5,), float(group.rank)), (group.rank + 1) % 4, (group.rank - 1) % 4)
    return arrived().tolist(), group.sent


def test_exchange_sends_to_one_and_takes_from_another(ranks):
    assert ranks(4, pass_round) == [([float((rank - 1) % 4)] * 5, 20) for rank in range(4)]


# ------------------------------------------------------------------------------------------------------- who holds what

def test_one_process_is_a_mesh_of_one():
    parallel = load_chapter(CHAPTER).parallel.mesh
    mesh, x = parallel.ALONE, torch.ones(4, 2, requires_grad=True)
    for name in ("Copy", "Reduce", "Gather", "Scatter"):
        assert torch.equal(getattr(parallel, name).apply(x, mesh.tp), x)
    assert mesh.is_main and mesh.sent == 0 and mesh.largest(2.5) == 2.5


def test_pieces():
    parallel, mesh = load_chapter(CHAPTER).parallel.mesh, load_chapter(CHAPTER).parallel.mesh.ALONE
    model = nn.ModuleDict({"table": nn.Embedding(6, 4), "head": nn.Linear(4, 6, bias=False),
                           "mlp": nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(4, 4)])})})
    model["head"].weight = model["table"].weight   # tied: one parameter, under the name that comes first
    model.num_parameters = lambda: sum(p.numel() for p in model.parameters())
    parallel.label(model, mesh)
    pieces = {parameter.piece.name: parameter.piece for parameter in model.parameters()}
    assert pieces.keys() == {"table.weight", "mlp.experts.0.weight", "mlp.experts.0.bias"}
    assert pieces["table.weight"].group is mesh.data and pieces["mlp.experts.0.bias"].group is mesh.expert_data
    whole = model["table"].weight
    whole.piece.partial = True
    rows = parallel.cut(whole, 0, 2, 3)
    part = parallel.cut(rows, 1, 1, 2)
    assert part.piece == parallel.Piece("table.weight", (6, 4), (2, 1), mesh.data, partial=True)
    assert whole.piece.offset == (0, 0) and rows.piece.offset == (2, 0)
    assert torch.equal(part, whole[2:5, 1:3]) and part.is_leaf and part.requires_grad
    assert part.untyped_storage().nbytes() == part.nbytes   # of its own: the whole can be freed
