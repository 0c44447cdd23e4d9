"""Where does a step's time go? torch.profiler's events, grouped as a person thinks, beside what paper predicted.

    python train.py --profile        (in this folder; writes OUT/profile/)

OUT/profile/*.pt.trace.json opens in Perfetto (https://ui.perfetto.dev) and in TensorBoard. steps.json has the table's
numbers; memory.png shows the bytes in use over a step, roofline.png what each group reaches of what the machine could.
"""
import json
import re
from collections import defaultdict
from pathlib import Path

from matplotlib.figure import Figure
from torch.profiler import ProfilerActivity, profile, schedule, tensorboard_trace_handler

from cli import InputError
from flops import bandwidth_ceiling, gemm_ceiling, step_bytes, step_flops

WAIT, WARMUP, ACTIVE = 10, 3, 10   # steps: let caches and autotuning settle, start the profiler, count
STEPS = WAIT + WARMUP + ACTIVE
# A group's events, by name. The first that fits counts, so the order matters.
GROUPS = {
    "data": r"^data$",
    "optimizer": r"^Optimizer\.|_foreach_|linalg_vector_norm|_fused_adamw|clip_grad",
    "attention": r"grouped_attention|scaled_dot_product|_flash_|varlen",
    "loss head": r"softmax|nll_loss|cross_entropy|NllLoss|LogSoftmax",
    "matmul": r"^(aten::(mm|addmm|bmm|linear|matmul|_linalg)|extern_kernels|.*(gemm|cutlass|sgemm|Mm)Backward\d*$)",
}
REST, PYTHON = "norms and elementwise", "Python and waiting"
ORDER = ("matmul", "attention", REST, "loss head", "optimizer", "data", PYTHON)


def group(event, head):
    """Which of ORDER an event's own time belongs to: that of a range around it that has one, else its own name's.

    head: the three sizes of the last matrix multiplication, T, D and V, sorted. V alone would not do: T may be as
    large.
    """
    names, parent = [], event
    while parent is not None and not parent.name.startswith("ProfilerStep"):
        names.append(parent.name)
        parent = parent.cpu_parent
    if not names:
        return PYTHON   # the step itself: the time in which no operator ran
    for name, pattern in GROUPS.items():
        # A multiplication goes by its own name: around it may be one whose gradient recomputes a whole layer (chapter
        # 4).
        if any(re.search(pattern, text) for text in (names[:1] if name == "matmul" else names)):
            return "loss head" if name == "matmul" and sizes(event) == head else name
    return REST


def sizes(event):
    """The three sizes of a matrix multiplication (m, k) @ (k, n), sorted."""
    shapes = [shape for shape in event.input_shapes or [] if len(shape) == 2]
    return sorted([*shapes[0], shapes[1][1]]) if len(shapes) > 1 else None


def step_of(event):
    """The step that an event happened in, or None."""
    while event is not None and not event.name.startswith("ProfilerStep"):
        event = event.cpu_parent
    return event


def group_times(events, config):
    """{group: seconds for one step}, and the seconds of a step.

    Each moment counts once, so the groups sum to the step.
    """
    steps = [event for event in events if event.name.startswith("ProfilerStep")]
    tokens = {step_of(event): event.input_shapes[1][0] for event in events if event.name == "aten::embedding"}
    times = defaultdict(float)
    for event in events:
        step = step_of(event)
        if step is not None:
            head = sorted([tokens.get(step, 0), config.hidden_size, config.vocab_size])
            times[group(event, head)] += event.self_cpu_time_total / 1e6 / len(steps)
    return dict(times), sum(step.cpu_time_total for step in steps) / 1e6 / len(steps)


def predicted_times(config, cu_seqlens, device, dtype):
    """{group: the seconds that the machine's ceilings allow it}: the slower of its arithmetic and its memory traffic.
    """
    flops = {part: sum(pair) for part, pair in step_flops(config, cu_seqlens).items()}
    moved = step_bytes(config, cu_seqlens[-1].item())
    rate, bandwidth = gemm_ceiling(device, dtype), bandwidth_ceiling(device)
    return {"matmul": max(flops["linear"] / rate, moved["matmul"] / bandwidth), "attention": flops["attention"] / rate,
            "loss head": flops["head"] / rate + moved["loss"] / bandwidth, REST: moved[REST] / bandwidth,
            "optimizer": moved["optimizer"] / bandwidth}


def print_table(times, step_time, predicted):
    print(f"\n{'one step':<26}{'ms':>9}{'share':>8}{'ms at the ceilings':>21}")
    for name in ORDER:
        at_best = f"{predicted[name] * 1e3:>21.2f}" if name in predicted else ""
        print(f"{name:<26}{times.get(name, 0) * 1e3:>9.2f}{times.get(name, 0) / step_time:>8.1%}{at_best}")
    print(f"{'sum':<26}{sum(times.values()) * 1e3:>9.2f}{sum(times.values()) / step_time:>8.1%}"
          f"{sum(predicted.values()) * 1e3:>21.2f}\n")


def draw_memory(trace, path):
    """Bytes that torch has allocated, over the profiled steps."""
    events = [event for event in json.loads(Path(trace).read_text())["traceEvents"] if event.get("name") == "[memory]"]
    start = events[0]["ts"]
    figure = Figure(figsize=(8, 3), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.plot([(event["ts"] - start) / 1e3 for event in events],
              [event["args"]["Total Allocated"] / 2 ** 20 for event in events], color="#1f6f8b", linewidth=1)
    axes.set(xlabel="ms", ylabel="MiB allocated by torch", ylim=(0, None))
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def draw_roofline(config, cu_seqlens, times, device, dtype, path):
    """FLOPs per byte against FLOP/s, for the groups whose FLOPs and bytes are known, under the machine's two ceilings.
    """
    flops = {part: sum(pair) for part, pair in step_flops(config, cu_seqlens).items()}
    moved = step_bytes(config, cu_seqlens[-1].item())
    rate, bandwidth = gemm_ceiling(device, dtype), bandwidth_ceiling(device)
    width = config.num_attention_heads + config.num_key_value_heads
    attention_bytes = 4 * 8 * cu_seqlens[-1].item() * width * config.head_dim * config.num_hidden_layers
    points = {"matmul": (flops["linear"], moved["matmul"]), "attention": (flops["attention"], attention_bytes),
              "loss head": (flops["head"], moved["loss"]), REST: (moved[REST] / 8, moved[REST]),
              "optimizer": (moved["optimizer"] / 4, moved["optimizer"])}   # about a FLOP for each number
    figure = Figure(figsize=(8, 4), dpi=120, layout="constrained")
    axes = figure.subplots()
    intensities = [2 ** -4, rate / bandwidth, 2 ** 8]   # the roof and its ridge
    axes.loglog(intensities, [min(rate, bandwidth * i) / 1e9 for i in intensities], color="#888888")
    for name, (work, size) in points.items():
        x, y = work / size, work / times[name] / 1e9
        axes.plot(x, y, "o", color="#1f6f8b")
        axes.annotate(f"{name}: {y / (min(rate, bandwidth * x) / 1e9):.0%}", (x, y), xytext=(6, -4),
                      textcoords="offset points")
    axes.annotate(f"{rate / 1e9:,.0f} GFLOP/s, matrix multiplication", (intensities[-1], rate / 1e9), xytext=(0, 5),
                  textcoords="offset points", ha="right", color="#888888")
    axes.annotate(f"{bandwidth / 1e9:,.0f} GB/s, copying", (0.125, bandwidth / 8e9), xytext=(-4, 10),
                  textcoords="offset points", color="#888888", rotation=30)
    axes.set(xlabel="FLOPs per byte moved", ylabel="GFLOP/s")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def check(arguments, state):
    """InputError where fewer steps are left than a profile takes."""
    left = arguments.steps - state["step"] if arguments.steps else STEPS
    if arguments.profile and left < STEPS:
        raise InputError(f"--profile needs {STEPS} steps, not {left}")


def start(folder, config, batch, device, dtype):
    """A running torch.profiler, to be told of each step: it stops by itself, prints the table and draws the pictures.

    batch: a PackedBatch like those of the run, on the CPU, for the prediction. dtype: what its matrices are multiplied
    in.
    """
    def report(profiler):
        tensorboard_trace_handler(str(folder))(profiler)
        times, step_time = group_times(profiler.events(), config)
        predicted = predicted_times(config, batch.cu_seqlens, device, dtype)
        print_table(times, step_time, predicted)
        (folder / "steps.json").write_text(json.dumps({"step": step_time, "measured": times,
                                                       "predicted": predicted}, indent=2))
        draw_memory(max(folder.glob("*.pt.trace.json")), folder / "memory.png")
        draw_roofline(config, batch.cu_seqlens, times, device, dtype, folder / "roofline.png")

    folder.mkdir(parents=True, exist_ok=True)
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device == "cuda" else [])
    profiler = profile(activities=activities, schedule=schedule(wait=WAIT, warmup=WARMUP, active=ACTIVE, repeat=1),
                       on_trace_ready=report, record_shapes=True, profile_memory=True)
    profiler.start()
    return profiler
