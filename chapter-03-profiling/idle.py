"""Why is my GPU idle (or my processor)? Four causes, each in a training loop of a few lines, with its cure beside it.

1. Data: the loop waits for its loader, then the loader for the loop. Cure: a thread that loads ahead.
2. Python: thousands of tiny operators, one call each. Cure: the same arithmetic as one operator over all rows.
3. Synchronization: .item() makes Python wait for the GPU, and then the GPU for Python. Cure: read once a step.
4. Small kernels: operators run most of the time, and get little done. Cure: the same FLOPs in one large one.

The cure never changes the loss. What torch.profiler recorded tells which cause it is: a long gap is a wait, many short
gaps are Python, and few gaps may still be a machine badly used.

    python idle.py                     (in this folder)
    python idle.py --traces traces     also keeps a trace of each loop, for https://ui.perfetto.dev

"Busy" is the share of the time in which an operator ran: on a GPU a kernel or a copy, on a CPU an ATen operator, with
what it needs to get started. It comes from the profiler's own events. Milliseconds per step are the clock's, without
the profiler, which makes a step of many tiny operators a good deal longer: so the figure's bars are longer too.

Writes results/idle.json and figures/idle.png.

Shape letters: B rows in a batch, D width of the model.
"""
import json
import queue
import tempfile
import threading
import time
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from cli import ArgumentParser, InputError, run
from results import FIGURES, write_results

B, LAYERS = 256, 4
WIDTH = {"cpu": 512, "cuda": 4096}   # D. A GPU must get so much to do that Python is not what limits a healthy step
ROUNDS, STEPS = 5, 10   # of the clock: before and after take turns, each times so many steps in a row
WARMUP, PROFILED = 3, 5   # steps
TEAL, ORANGE, GREY = "#1f6f8b", "#d9822b", "#888888"


def make_model(device):
    """The same weights at every call, and the same batch: (model, optimizer, x (B, D), target (B, D))."""
    torch.manual_seed(0)
    D = WIDTH[device]
    model = nn.Sequential(*[nn.Linear(D, D) for _ in range(LAYERS)]).to(device)
    x, target = torch.randn(2, B, D)
    return model, torch.optim.SGD(model.parameters(), lr=0.01), x.to(device), target.to(device)


def learn(loss, optimizer):
    """The part that all loops share: one step downhill."""
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


# ------------------------------------------------------------ the loops: generators, each yields its loss after a step

def storage(batch, seconds):
    """Endless batches from somewhere slow, each the same. It waits as one does for a disk or a network."""
    while True:
        time.sleep(seconds)
        yield batch


def load_ahead(batches, size=2):
    """The same batches, fetched by a thread while the caller computes. At work: DataLoader with num_workers.

    A thread is enough for waiting. Python that computes needs processes, since one lock serves all threads (the GIL).
    """
    ready = queue.Queue(maxsize=size)   # bounded, or a loader that is faster than the loop fills the memory

    def fetch():
        for batch in batches:
            ready.put(batch)

    threading.Thread(target=fetch, daemon=True).start()
    while True:
        yield ready.get()


def plain(device, pause):
    """Nothing wrong here: the step that the others are compared with, and that tells how slow a loader to build."""
    model, optimizer, x, target = make_model(device)
    while True:
        yield learn(F.mse_loss(model(x), target), optimizer)


def data_waits(device, pause):
    model, optimizer, x, target = make_model(device)
    for x in storage(x, pause):
        yield learn(F.mse_loss(model(x), target), optimizer)


def data_ahead(device, pause):
    model, optimizer, x, target = make_model(device)
    for x in load_ahead(storage(x, pause)):
        yield learn(F.mse_loss(model(x), target), optimizer)


def python_rows(device, pause):
    model, optimizer, x, target = make_model(device)
    while True:
        rows = torch.stack([(row - row.mean()) / row.std() for row in x])               # (B, D)
        yield learn(F.mse_loss(model(rows), target), optimizer)


def python_batched(device, pause):
    model, optimizer, x, target = make_model(device)
    while True:
        rows = (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True)                   # (B, D)
        yield learn(F.mse_loss(model(rows), target), optimizer)


def synchronize_often(device, pause):
    """Looks at each layer's output and at its gradient: one number each, and each time Python waits for it."""
    model, optimizer, x, target = make_model(device)
    while True:
        sizes, h = [], x
        for layer in model:
            h = layer(h)                                                                # (B, D)
            sizes.append(h.detach().abs().mean().item())
        loss = learn(F.mse_loss(h, target), optimizer)
        sizes += [layer.weight.grad.abs().mean().item() for layer in model]
        yield loss


def synchronize_once(device, pause):
    model, optimizer, x, target = make_model(device)
    while True:
        sizes, h = [], x
        for layer in model:
            h = layer(h)                                                                # (B, D)
            sizes.append(h.detach().abs().mean())
        loss = learn(F.mse_loss(h, target), optimizer)
        sizes += [layer.weight.grad.abs().mean() for layer in model]
        sizes = torch.stack(sizes).tolist()   # the only wait of the step
        yield loss


def small_kernels(device, pause):
    model, optimizer, x, target = make_model(device)
    while True:
        h = torch.cat([model[0](row) for row in x.split(1)])                            # B times (1, D) -> (B, D)
        yield learn(F.mse_loss(model[1:](h), target), optimizer)


# (case, what is wrong, the loop, what cures it, the loop)
CASES = (("data", "waits for its loader", data_waits, "a thread loads ahead", data_ahead),
         ("Python", f"{B} rows one by one", python_rows, "all rows at once", python_batched),
         ("synchronization", ".item() after every layer", synchronize_often, "read once a step", synchronize_once),
         ("small kernels", f"{B} small matmuls", small_kernels, "one large matmul", plain))


# ------------------------------------------------------------------------------------------------- measuring

def synchronize(device):
    if device == "cuda":
        torch.cuda.synchronize()


def milliseconds(loop, device):
    """Of one step, by the clock. A GPU is waited for at both ends only, as in a training that runs on and on."""
    for _ in range(WARMUP):
        next(loop)
    synchronize(device)
    start = time.perf_counter()
    for _ in range(STEPS):
        next(loop)
    synchronize(device)
    return (time.perf_counter() - start) * 1e3 / STEPS


def record(loop, path, device):
    """Profile some steps, each in a range named "step". Writes the trace to path, returns its events."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == "cuda")
    for _ in range(WARMUP):
        next(loop)
    synchronize(device)
    with profile(activities=activities) as profiler:
        for _ in range(PROFILED):
            with record_function("step"):
                next(loop)
        synchronize(device)
    profiler.export_chrome_trace(str(path))
    return json.loads(path.read_text())["traceEvents"]


def union(intervals):
    """(start, end) pairs, in order and disjoint: what overlaps or lies inside another counts once."""
    merged = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def clip(intervals, window):
    """The parts of the intervals that lie within the window (start, end)."""
    clipped = [(max(start, window[0]), min(end, window[1])) for start, end in intervals]
    return [(start, end) for start, end in clipped if start < end]


def busy_share(intervals, window):
    """The share of the window in which at least one interval runs, 0 to 1."""
    return sum(end - start for start, end in union(clip(intervals, window))) / (window[1] - window[0])


def operator_intervals(events, device):
    """(start, end) in microseconds of all that ran on the device."""
    if device == "cuda":
        ran = [event for event in events if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    else:   # the ranges of autograd and of the optimizer have Python and gaps inside, ATen's operators have not
        ran = [event for event in events if event.get("cat") == "cpu_op" and event["name"].startswith("aten::")]
    return [(event["ts"], event["ts"] + event["dur"]) for event in ran]


def step_windows(events):
    """(start, end) of each step, in microseconds, in order. Python's view: on a GPU the kernels may run behind."""
    steps = [event for event in events if event.get("cat") == "user_annotation" and event["name"] == "step"]
    return sorted((event["ts"], event["ts"] + event["dur"]) for event in steps)


def profiled_window(intervals, windows):
    """From the first step's beginning to the last one's end, and on to the end of what it left the GPU to do."""
    return windows[0][0], max(windows[-1][1], max(end for _, end in intervals))


def measure_case(before, after, traces, device, pause):
    """Both loops of a case: {"ms", "busy", "intervals", "windows"} of each.

    The clock first, the two in turns, without the profiler: it makes a step of many tiny operators longer.
    """
    loops = before(device, pause), after(device, pause)
    losses = [next(loop).item() for loop in loops]
    assert abs(losses[0] - losses[1]) < 1e-4, f"the cure changes the loss: before {losses[0]}, after {losses[1]}"
    times = list(zip(*[[milliseconds(loop, device) for loop in loops] for _ in range(ROUNDS)]))
    measured = []
    for loop, ms in zip(loops, times):
        events = record(loop, traces / f"{loop.__name__}.json", device)
        intervals, windows = operator_intervals(events, device), step_windows(events)
        measured.append({"ms": median(ms), "busy": busy_share(intervals, profiled_window(intervals, windows)),
                         "intervals": intervals, "windows": windows})
    return measured


# --------------------------------------------------------------------------------------------------- drawing

def draw_step(ax, y, measured, colour):
    """The step of median length as a bar: coloured while an operator runs, white while none does."""
    window = sorted(measured["windows"], key=lambda pair: pair[1] - pair[0])[len(measured["windows"]) // 2]
    bars = union(clip(measured["intervals"], window))
    length = (window[1] - window[0]) / 1e3
    ax.broken_barh([((start - window[0]) / 1e3, (end - start) / 1e3) for start, end in bars], (y, 0.7), color=colour,
                   linewidth=0)
    ax.broken_barh([(0, length)], (y, 0.7), facecolor="none", edgecolor=GREY, linewidth=0.8)
    ax.text(length, y + 0.35, f"  {measured['busy']:.0%} busy", fontsize=12, va="center")
    return length


def draw(path, cases, device):
    """cases: {case: (what is wrong, the cure, measured of both or None)}."""
    fig = Figure(figsize=(10, 8), dpi=120, layout="constrained")
    for ax, (case, (wrong, cure, measured)) in zip(fig.subplots(len(cases), 1), cases.items()):
        ax.set_title(case, fontsize=14, loc="left")
        ax.spines[["top", "right", "left"]].set_visible(False)
        ax.set(ylim=(2, -0.1), yticks=[0.35, 1.35])
        ax.set_yticklabels([wrong, cure], fontsize=12)
        ax.tick_params(axis="y", length=0)
        if measured is None:
            ax.text(0.01, 0.5, "not measured: needs a GPU", fontsize=12, color=GREY, transform=ax.transAxes)
            ax.set_xticks([])
            ax.spines["bottom"].set_visible(False)
            continue
        lengths = [draw_step(ax, y, side, colour) for y, (side, colour) in enumerate(zip(measured, (ORANGE, TEAL)))]
        ax.set_xlim(0, max(lengths) * 1.13)
    what = "a kernel" if device == "cuda" else "an operator"
    ax.set_xlabel(f"milliseconds of one profiled step; coloured: {what} runs, white: none does", fontsize=12)
    fig.savefig(path)


# ---------------------------------------------------------------------------------------------------- main

def parse_arguments():
    parser = ArgumentParser(description="Four reasons why a processor is idle, and their cures, measured.")
    parser.add_argument("--traces", type=Path, metavar="DIR", help="keep the traces, one of each loop, in this folder")
    return parser.parse_args()


def prepare_folder(path):
    """Find out that --traces cannot be written before measuring, not after."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise InputError(f"--traces {path} cannot be written: {error.strerror}") from None


def measure_all(traces, device):
    """Every case; the traces go to a folder. Returns (rows of the table, what draw() wants), and prints the table."""
    step = plain(device, 0)
    pause = median(milliseconds(step, device) for _ in range(ROUNDS)) / 1e3
    print(f"A step with nothing wrong takes {pause * 1e3:.2f} ms; the slow loader needs as long for each batch.\n")
    print(f"{'':<44}{'ms/step':>10}{'busy':>8}")
    rows, cases = [], {}
    for case, wrong, before, cure, after in CASES:
        # On a CPU an operator is done when it returns: .item() has nothing to wait for.
        missing = case == "synchronization" and device == "cpu"
        measured = None if missing else measure_case(before, after, traces, device, pause)
        cases[case] = wrong, cure, measured
        for i, what in enumerate((wrong, cure)):
            row = {"case": f"{case}: {what}"}
            if missing:
                print(f"{row['case']:<44}  not measured: needs a GPU")
            else:
                row |= {key: measured[i][key] for key in ("ms", "busy")}
                print(f"{row['case']:<44}{row['ms']:>10.2f}{row['busy']:>8.0%}")
            rows.append(row)
    return rows, cases


def main():
    kept = parse_arguments().traces
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory() as temporary:
        if kept:
            prepare_folder(kept)
        rows, cases = measure_all(kept or Path(temporary), device)
    write_results("idle", f"python {Path(__file__).parent.name}/idle.py",
                  {"case": "case", "ms": "ms/step", "busy": "busy, share of the time"}, rows, device)
    draw(FIGURES / "idle.png", cases, device)
    print(f"\nresults/idle.json, figures/idle.png{f', and the traces in {kept}' if kept else ''}")


if __name__ == "__main__":
    run(main)
