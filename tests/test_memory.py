"""Chapter 4's own: memory predicted, measured and saved; what rounding does to a training run; autocast by hand."""
import json
from dataclasses import replace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from chapters import TRAINED, load_chapter, run_here
from test_precision import small_config

pytestmark = pytest.mark.parametrize("chapter", [name for name in TRAINED
                                                 if (load_chapter(name).folder / "memory.py").is_file()],
                                     indirect=True)


def test_recomputing_runs_a_layer_twice_and_saves_memory(chapter):
    config = small_config(chapter, num_hidden_layers=8)
    held = {choice: chapter.memory.held_by_a_step(config, 512, checkpointing=choice, fake=False)
            for choice in chapter.recompute.RUN}
    assert held["full"] < held["selective"] < held["none"], held


def test_held_counts_what_the_profiler_counts(chapter, tmp_path):
    """A model that is nearly all table, whose two gradients meet at the end of the way back."""
    config = small_config(chapter, vocab_size=5000, num_hidden_layers=1)
    torch.manual_seed(0)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        model = chapter.model.Transformer(config)
        optimizer = chapter.train.adamw(model, 1e-3)
        for _ in range(2):
            optimizer.zero_grad()
            chapter.train.loss_sum(model, chapter.memory.packed_batch(64, 64, 5000)).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    profiler.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    sums = [event["args"] for event in events if event.get("name") == "[memory]"]
    peak = max(now["Total Allocated"] for now in sums) - (sums[0]["Total Allocated"] - sums[0]["Bytes"])
    for fake in (True, False):
        assert chapter.memory.held_by_a_step(config, 64, fake=fake) == pytest.approx(peak, rel=0.01)
    assert chapter.memory.predict(config, 64)["peak"] == pytest.approx(peak, rel=0.02)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("checkpointing", ["none", "full", "selective"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "bf16-pure"])
def test_predicted_memory_is_within_five_percent(chapter, precision, checkpointing, accumulate):
    """In fake numbers for three layers of Qwen3 0.6B; in real ones for small models, whose peak is in other places.

    Few tokens: gradients are more than activations. A large table, tied or not: it is all that counts. Many layers: it
    is not.
    """
    small, large = (chapter.model.CONFIGS[name] for name in ("small", "qwen3-0.6b"))
    for config, T, fake in [(replace(large, num_hidden_layers=3), 4096, True), (small, 128, False),
                            (replace(small, tie_word_embeddings=False), 16, False),
                            (replace(small, vocab_size=8192), 64, False),
                            (replace(small, vocab_size=256, num_hidden_layers=4), 300, False)]:
        predicted = chapter.memory.predict(config, T, precision, checkpointing, accumulate)["peak"]
        held = chapter.memory.held_by_a_step(config, T, precision, checkpointing, accumulate, fake=fake)
        assert predicted == pytest.approx(held, rel=0.05), (config, T, predicted / held)


def test_autocast_by_hand_equals_that_of_torch(chapter):
    assert "equal to the last bit" in run_here(chapter.autocast_by_hand)


def test_curves_of_rounded_weights(chapter, text_file, tmp_path, monkeypatch):
    """Nearest rounding loses the small steps, the other two keep them; each weight stays on bfloat16's grid."""
    curves = chapter.rounding_curves
    for way in list(curves.COLOURS)[1:]:
        torch.manual_seed(0)
        weight, lost = torch.ones(1000), torch.zeros(1000)
        for _ in range(200):
            before = weight.clone()
            weight += 0.001
            curves.keep(weight, before, lost, way)
            assert torch.equal(weight, weight.bfloat16().float())
        moved = weight.mean().item() - 1
        assert moved == 0 if way.endswith("nearest") else moved == pytest.approx(0.2, abs=0.005), (way, moved)
    monkeypatch.setattr(curves, "FIGURES", tmp_path)
    monkeypatch.setattr(chapter.results, "RESULTS", tmp_path)
    monkeypatch.setitem(chapter.model.CONFIGS, "small", small_config(chapter, vocab_size=300))
    printed = run_here(curves, "--data", text_file, "--steps", 30)
    assert all(way in printed for way in curves.COLOURS) and (tmp_path / "rounding_curves.png").stat().st_size > 5_000
