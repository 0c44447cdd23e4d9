"""Chapter 3's honest_timing.py and idle.py: how they count is right, and both run. What they measure is not tested."""
import json

import pytest
import torch

from chapters import load_chapter, run_here

chapter3 = load_chapter("chapter-03-profiling")
honest, idle = chapter3.honest_timing, chapter3.idle


# -------------------------------------------------------------------------------------------- honest_timing.py

def test_honest_timing_runs_and_draws(tmp_path, monkeypatch):
    monkeypatch.setattr(honest, "FIGURES", tmp_path)   # leave the repository's figures as they are
    monkeypatch.setattr(honest, "REPETITIONS", 20)
    monkeypatch.setattr(honest, "COMPARISONS", 16)
    monkeypatch.setattr(honest, "EACH", 1)
    printed = run_here(honest)
    assert all(f"\n{number}. " in printed for number in range(1, 6))
    assert ("no CUDA GPU" in printed) == (not torch.cuda.is_available())
    assert 5_000 < (tmp_path / "honest_timing.png").stat().st_size < 200_000


def test_comparisons_by_hand():
    times = [1.0, 2.0, 3.0, 4.0]
    assert honest.one_after_the_other(times) == 3 / 7
    assert honest.in_turns(times) == (1 / 2 + 3 / 4) / 2
    assert honest.in_turns([2.0, 1.0] * 4 + [99.0, 1.0]) == 2   # one disturbed step changes nothing
    chunks = honest.compare_with_itself(list(range(11)), list, each=2)
    assert chunks == [[0, 1, 2, 3], [4, 5, 6, 7]]   # what is left over is no comparison
    ratios = [1 + 0.01 * i * (-1) ** i for i in range(100)]
    assert honest.error_of(ratios) == pytest.approx(0.01 * 0.95 * 99)


def test_a_drifting_machine_fools_the_means_only():
    """A machine that slows down by 1 % a step makes B, always the later, look slow."""
    times = [1.01 ** i for i in range(200)]
    means = honest.compare_with_itself(times, honest.one_after_the_other, 5)
    turns = honest.compare_with_itself(times, honest.in_turns, 5)
    assert all(ratio == pytest.approx(1 / 1.01 ** 5) for ratio in means)
    assert all(ratio == pytest.approx(1 / 1.01) for ratio in turns)


# ----------------------------------------------------------------------------------------------------- idle.py

@pytest.fixture
def quick(tmp_path, monkeypatch):
    """idle.py in seconds; it writes to tmp_path."""
    for name, value in {"FIGURES": tmp_path, "ROUNDS": 1, "STEPS": 2, "WARMUP": 1, "PROFILED": 3, "B": 8}.items():
        monkeypatch.setattr(idle, name, value)
    monkeypatch.setattr(chapter3.results, "RESULTS", tmp_path)
    return tmp_path


def test_idle_runs_draws_and_leaves_traces(quick):
    printed = run_here(idle, "--traces", quick / "traces")
    rows = json.loads((quick / "idle.json").read_text())["rows"]
    assert [row["case"] for row in rows] == [
        f"{case}: {what}" for case, wrong, _, cure, _ in idle.CASES for what in (wrong, cure)]
    for row in rows:
        assert row["case"] in printed
        if row["case"].startswith("synchronization") and not torch.cuda.is_available():
            assert "busy" not in row and "ms" not in row   # nobody measured it
        else:
            assert row["ms"] > 0 and 0 < row["busy"] <= 1, row
    assert ("needs a GPU" in printed) == (not torch.cuda.is_available())
    assert 5_000 < (quick / "idle.png").stat().st_size < 200_000
    loops = [loop.__name__ for case, _, before, _, after in idle.CASES for loop in (before, after)
             if torch.cuda.is_available() or case != "synchronization"]
    assert {path.stem for path in (quick / "traces").iterdir()} == set(loops)


def test_traces_need_a_folder(quick, call):
    (quick / "file").touch()
    status, printed, error = call(idle, "--traces", quick / "file")
    assert status == 2 and printed == "" and error.count("\n") == 1 and "--traces" in error


def test_overlapping_intervals_count_once():
    nested, overlapping, touching, apart = (0, 10), (2, 3), (9, 12), (12, 14)
    intervals = [apart, (20, 21), nested, touching, overlapping, nested]
    assert idle.union(intervals) == [(0, 14), (20, 21)]
    assert idle.busy_share(intervals, (0, 30)) == 0.5
    assert idle.busy_share(intervals, (10, 20)) == 0.4   # what is outside of the window does not count
    assert idle.busy_share([(0, 5), (1, 4)], (0, 5)) == 1
    assert idle.busy_share([], (0, 5)) == 0


def event(category, name, start, duration):
    return {"cat": category, "name": name, "ts": start, "dur": duration}


def test_only_what_ran_on_the_device_is_counted():
    """Ranges around operators are no operators, Python's waiting for the GPU is no work, and kernels run behind."""
    events = [event("user_annotation", "step", 0, 10), event("user_annotation", "step", 10, 10),
              event("user_annotation", "Optimizer.step#SGD.step", 1, 8), event("cpu_op", "aten::mm", 1, 4),
              event("cpu_op", "autograd::engine::evaluate_function: MmBackward0", 4, 5),
              event("cpu_op", "aten::add", 6, 1),
              event("cuda_runtime", "cudaDeviceSynchronize", 2, 20), event("gpu_user_annotation", "step", 3, 20),
              event("kernel", "gemm", 3, 6), event("gpu_memcpy", "Memcpy HtoD", 18, 7),
              {"name": "process_name", "ph": "M"}]
    assert sorted(idle.operator_intervals(events, "cpu")) == [(1, 5), (6, 7)]
    assert sorted(idle.operator_intervals(events, "cuda")) == [(3, 9), (18, 25)]
    assert idle.step_windows(events) == [(0, 10), (10, 20)]
    assert idle.profiled_window([(3, 9), (18, 25)], idle.step_windows(events)) == (0, 25)
    assert idle.profiled_window([(1, 5)], idle.step_windows(events)) == (0, 20)


@pytest.mark.parametrize("case", range(len(idle.CASES)))
def test_cures_change_the_speed_only(case, quick):
    """Also of what only a GPU can measure: the same losses, step for step."""
    _, _, before, _, after = idle.CASES[case]
    loops = [loop("cpu", 0) for loop in (before, after)]
    losses = [[next(loop).item() for _ in range(4)] for loop in loops]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][-1] < losses[0][0]   # they learn


def test_a_cure_that_changes_the_loss_is_found(quick, monkeypatch, tmp_path):
    def other(device, pause):
        for loss in idle.plain(device, pause):
            yield 2 * loss

    with pytest.raises(AssertionError, match="changes the loss"):
        idle.measure_case(idle.plain, other, tmp_path, "cpu", 0)


def test_loading_ahead_keeps_the_order_and_stays_bounded():
    drawn = []

    def batches():
        for i in range(100):
            drawn.append(i)
            yield i

    ahead = idle.load_ahead(batches(), size=2)
    assert [next(ahead) for _ in range(5)] == [0, 1, 2, 3, 4]
    assert len(drawn) <= 5 + 2 + 1   # what was taken, what lies ready, and the one in the thread's hand


@pytest.mark.gpu
def test_launch_is_not_the_multiplication(capsys):
    honest.show_asynchronous("cuda")
    assert "measures the launch" in capsys.readouterr().out
