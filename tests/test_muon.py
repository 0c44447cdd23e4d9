"""Chapter 3's muon.py: each matrix takes the step of torch.optim.Muon, every parameter has one optimizer, and a run
that has ended is not made twice."""
import copy
import json

import pytest
import torch

from chapters import load_chapter, run_here

chapter3 = load_chapter("chapter-03-profiling")
muon = chapter3.muon


def small_model(**changes):
    torch.manual_seed(0)
    return chapter3.model.Transformer(chapter3.model.ModelConfig(
        vocab_size=64, hidden_size=32, intermediate_size=96, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
        **changes))


@pytest.mark.parametrize("shape", [(32, 32), (48, 16), (16, 48), (1, 8)], ids=str)
def test_all_singular_values_become_about_one_and_the_vectors_stay(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    found = u.T @ muon.orthogonalize(matrix) @ v.T   # diagonal, where the vectors are the same
    assert (found - found.diag().diag()).abs().max() < 1e-6
    clear = s > s.max() / 100
    assert found.diag()[clear].min() > 0.6 and found.diag().max() < 1.25


def test_a_step_is_that_of_the_library(monkeypatch):
    """In exact arithmetic: float64 for both, where the library would take bfloat16."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda tensor: tensor)
    generator = torch.Generator().manual_seed(0)
    shapes = [(24, 24), (48, 16), (16, 48)]
    mine = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    theirs = [weight.clone() for weight in mine]
    optimizers = [muon.Muon(mine, lr=0.02, momentum=0.9, weight_decay=0.1),
                  torch.optim.Muon(theirs, lr=0.02, momentum=0.9, weight_decay=0.1)]
    for step in range(5):
        for one, other in zip(mine, theirs):
            one.grad = torch.randn(one.shape, generator=generator, dtype=torch.float64)
            other.grad = one.grad.clone()
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = 0.02 / (1 + step)
            optimizer.step()
    for one, other in zip(mine, theirs):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_matrices_inside_the_layers_have_muon_and_all_else_adamw():
    model = small_model()
    optimizer = muon.MuonAndAdamW(model, 8e-3, 0.02)
    inside = {id(parameter) for parameter in optimizer.muon.param_groups[0]["params"]}
    others = {id(parameter) for group in optimizer.inner.param_groups for parameter in group["params"]}
    assert inside | others == set(map(id, model.parameters())) and not inside & others
    assert {name for name, parameter in model.named_parameters() if id(parameter) in inside} == {
        name for name, parameter in model.named_parameters() if "layers" in name and "norm" not in name}


def test_a_step_of_both_is_a_step_of_each():
    """The rest of the model takes the chapter's step, and the matrices one as large as their rate says."""
    model = small_model()
    other = copy.deepcopy(model)
    ours, plain = muon.MuonAndAdamW(model, 8e-3, 0.02), chapter3.optimizer.Optimizer(
        other, chapter3.optimizer.adamw(other, 8e-3))
    for one, two in zip(model.parameters(), other.parameters()):
        one.grad = torch.randn_like(one)
        two.grad = one.grad.clone()
    assert ours.step(4e-3) == plain.step(4e-3)   # the norm of all gradients
    for (name, one), two in zip(model.named_parameters(), other.parameters()):
        assert torch.equal(one, two) == ("layers" not in name or "norm" in name), name
    assert ours.muon.param_groups[0]["lr"] == pytest.approx(0.01)


@pytest.fixture
def here(tmp_path, monkeypatch, text_file):
    """Where muon.py writes, and its arguments for a few short runs."""
    monkeypatch.setattr(muon, "FIGURES", tmp_path)
    monkeypatch.setattr(chapter3.results, "RESULTS", tmp_path)
    return "--data", text_file, "--steps", 4, "--seeds", 2, "--out", tmp_path / "runs"


def test_a_run_that_has_ended_is_not_made_again(here, tmp_path, monkeypatch):
    made, train = [], muon.train

    def dying(texts, *settings):
        if len(made) == 5:
            raise KeyboardInterrupt
        made.append(settings)
        return train(texts, *settings)
    monkeypatch.setattr(muon, "train", dying)
    with pytest.raises(KeyboardInterrupt):
        run_here(muon, *here)
    assert len(list((tmp_path / "runs").iterdir())) == 5
    monkeypatch.setattr(muon, "train", train)
    run_here(muon, *here)
    rows = json.loads((tmp_path / "muon.json").read_text())["rows"]
    assert [row["steps"] for row in rows] == [4, *(round(4 * share) for share in muon.SHARES)]
    assert rows[0]["time"] == 1 and all(0 < row["bits"] < 9 for row in rows)
    assert (tmp_path / "muon.png").stat().st_size > 5_000
    monkeypatch.setattr(muon, "train", None)   # all is there
    run_here(muon, *here)


def test_the_rates_are_tried_on_held_out_training_documents(here, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(muon, "train", lambda texts, *settings: seen.append(settings) or {"bits": 1.0})
    run_here(muon, *here, "--tune")
    assert all(tune for *_, tune in seen)
    assert len(json.loads((tmp_path / "muon_rates.json").read_text())["rows"]) == len(seen) == len(set(seen))
