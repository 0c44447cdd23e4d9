"""How good are the predictions of plan.py? Throughput that others have published, predicted, with the error.

    python plan_validation.py        writes results/plan_validation.json, results/plan_summary.json and figures/plan.png

Only what the sources state is put in; where they leave something open, the remark says what was assumed. Rows that
calibrate give one number of plan.EFFICIENCY each and are right by construction: for each GPU and precision a source's
run of a 7B or 8B model on 8 GPUs, for torchtitan the compiled one. No other row is fitted, and what misses stays, with
the reason as far as it is known.
"""
import statistics

from cli import run
from plan import EFFICIENCY, GPUS, MODELS, SAME_CHIP, Layout, cluster, plan, predict
from results import FIGURES, write_results

SOURCES = {
    "torchtitan": "https://github.com/pytorch/torchtitan/blob/main/benchmarks/llama3_h100_202412_torchtitan.md",
    "torchtitan H200": "https://github.com/pytorch/torchtitan/blob/main/benchmarks/"
                       "llama3-8b_h200_202506_trainy-whitefiber.md",
    "llm-foundry": "https://github.com/mosaicml/llm-foundry/blob/main/scripts/train/benchmarking/README.md",
    "Megatron 2021": "https://arxiv.org/abs/2104.04473",
    "Megatron 2022": "https://arxiv.org/abs/2205.05198",
    "Megatron-LM": "https://github.com/NVIDIA/Megatron-LM#training-speed-and-scalability",
    "NeMo 24.12": "https://docs.nvidia.com/nemo-framework/user-guide/24.12/nemotoolkit/performance/"
                  "performance_summary.html",
    "picotron": "https://github.com/huggingface/picotron",
}

# How each source counts where it does not say tokens/s. Model.flops counts the weights of layers and head, and
# attention in full.
#     Megatron 2021, in TFLOP/s       as that, and the layers' forward pass again, for full checkpointing (equation 3)
#     Megatron 2022, in seconds       of a step: nothing to count
#     Megatron-LM, in MFU             as that
#     picotron, in MFU                6 for each parameter instead, of embeddings and norms too


def entry(name, source, gpu, gpus, model, length, published, unit="tok/s", gib=None, calibrates=False, open="",
          why="", **layout):
    return dict(name=name, source=source, gpu=gpu, gpus=gpus, model=model, length=length, published=published,
                unit=unit, gib=gib,
                calibrates=calibrates, open=open, why=why, layout=layout)


def titan(name, gpus, published, gib, model="llama-3.1-8b", length=8192, **layout):
    return entry(name, "torchtitan", "h100-500w", gpus, model, length, published, gib=gib, **layout)


def foundry(model, gpus, published, micro, microbatches, length=2048, gpu="a100", checkpointing="none", **more):
    return entry(f"{model}, length {length}", "llm-foundry", gpu, gpus, model, length, published, dp=gpus,
                 zero=3, micro=micro,
               microbatches=microbatches, checkpointing=checkpointing, compiled=False, **more)


def megatron(model, gpus, published, unit, source, tp, pp, batch, chunks=1, **more):
    dp = gpus // tp // pp
    name = f"{model}, {more['checkpointing']} checkpointing"
    return entry(name, source, "a100", gpus, model, 2048, published, unit, dp=dp, tp=tp, pp=pp, chunks=chunks,
                 microbatches=batch // dp // more.get("micro", 1), flash=False, **more)


def nemo(model, gpus, published, batch, micro, length=4096, tp=1, pp=1, cp=1, chunks=1, **more):
    dp = gpus // tp // pp // cp
    return entry(f"{model}, fp8", "NeMo 24.12", "h100", gpus, model, length, published, dp=dp, cp=cp, tp=tp, pp=pp,
                 chunks=chunks,
                 micro=micro, microbatches=batch // dp // micro, zero=1, precision="fp8", hide_tp=True, **more)


def titan_h200(gpus, published, gib):
    return entry("8B, compiled, fp8", "torchtitan H200", "h200", gpus, "llama-3.1-8b", 8192, published,
                 gib=gib, dp=gpus,
                 precision="fp8", **SAC)


TWO = "interleaved, number of chunks not published: the least, 2"
RING = "assumed: the ring hides behind attention, whose rate stays; torchtitan's rows fall short of it as cp grows"
SAC = dict(zero=3, micro=2, checkpointing="every-other")
FP8_FULL = dict(precision="fp8", checkpointing="full")
LONG = dict(FP8_FULL, zero=3)
ANY = dict(tokens=1152 * 4096, zero=1, checkpointing=("none", "selective", "full"), hide_tp=True,
           open="layout not published: the best one found")
BIG = dict(FP8_FULL, model="llama-3.1-405b", pp=8, tp=8, microbatches=8, hide_tp=True, zero=1,
           open="microbatches not published: the default, as many as stages")
PUBLISHED = [
    titan("8B, eager", 8, 5762, 82.4, dp=8, compiled=False, **SAC),
    titan("8B, compiled", 8, 6667, 77.0, dp=8, calibrates=True, **SAC),
    titan("8B, compiled, fp8", 8, 8532, 76.8, dp=8, precision="fp8", calibrates=True, **SAC),
    titan("8B, eager", 128, 5605, 67.0, dp=128, compiled=False, **SAC),
    titan("8B, compiled", 128, 6514, 62.0, dp=128, **SAC),
    titan("8B, compiled, fp8", 128, 8380, 61.8, dp=128, precision="fp8", **SAC),
    titan("8B, 32k, fp8", 8, 3890, 83.9, length=32768, dp=8, **LONG),
    titan("8B, 64k, fp8", 8, 2540, 84.2, length=65536, dp=4, cp=2, **LONG),
    titan("8B, 128k, fp8", 8, 1071, 84.0, length=131072, dp=2, cp=4, why=RING, **LONG),
    titan("8B, 256k, fp8", 8, 548, 84.5, length=262144, cp=8, why=RING, **LONG),
    titan("70B, fp8", 256, 829, 71.9, model="llama-3.1-70b", dp=32, tp=8, micro=16, **LONG),
    titan("70B, fp8, async TP", 256, 876, 67.6, model="llama-3.1-70b", dp=32, tp=8, micro=16, hide_tp=True, **LONG),
    titan("405B, fp8, 1F1B", 512, 100, 82.5, dp=8, micro=4, **BIG),
    titan("405B, fp8, interleaved", 512, 128, 72.7, dp=8, micro=4, chunks=2, **BIG),   # chunks: the least
    titan("405B, 32k, fp8", 512, 76, 75.3, length=32768, dp=8, **BIG),
    titan("405B, 64k, fp8", 512, 47, 75.9, length=65536, dp=4, cp=2, why=RING, **BIG),
    titan("405B, 128k, fp8", 512, 31, 77.1, length=131072, dp=2, cp=4, **BIG),
    titan("405B, 256k, fp8", 512, 16, 84.9, length=262144, cp=8, why=RING, **BIG),
    titan_h200(32, 10938, 47.96),
    titan_h200(64, 10753, 46.97),
    foundry("mpt-7b", 8, 4641, 6, 2, calibrates=True),
    foundry("mpt-1b", 8, 20513, 14, 4),
    foundry("mpt-3b", 8, 10811, 10, 2),
    foundry("mpt-13b", 8, 2262, 2, 3),
    foundry("mpt-30b", 8, 916, 3, 21, checkpointing="full"),
    foundry("mpt-70b", 64, 410, 8, 4, checkpointing="full"),
    foundry("mpt-7b", 8, 3206, 8, 2, length=8192, checkpointing="full"),
    foundry("mpt-7b", 8, 1013, 1, 2, length=65536, checkpointing="full",
            why="assumed: the rate of FlashAttention-2, which is probably younger than this run"),
    foundry("mpt-7b", 128, 3623, 18, 1, gpu="a100-40gb", checkpointing="full"),
    foundry("mpt-7b", 8, 10643, 6, 1, gpu="h100", calibrates=True),
    foundry("mpt-3b", 64, 22525, 6, 3, gpu="h100"),
    foundry("mpt-13b", 64, 4800, 2, 1, gpu="h100", why="assumed: FSDP hides, here behind one microbatch of 4,096"
                                                       " tokens"),
    foundry("mpt-70b", 64, 1039, 8, 4, gpu="h100", checkpointing="full"),
    megatron("gpt-7.5b", 128, 142, "TFLOP/s", "Megatron 2021", 4, 1, 512, checkpointing="full"),
    megatron("gpt-39b", 512, 138, "TFLOP/s", "Megatron 2021", 8, 2, 1536, 2, checkpointing="full", open=TWO),
    megatron("gpt-145b", 1536, 148, "TFLOP/s", "Megatron 2021", 8, 8, 2304, 2, checkpointing="full", open=TWO),
    megatron("gpt-1t", 3072, 163, "TFLOP/s", "Megatron 2021", 8, 64, 3072, 2, checkpointing="full", open=TWO),
    megatron("gpt-22b", 8, 1.10, "s", "Megatron 2022", 8, 1, 4, micro=4, checkpointing="selective"),
    megatron("gpt-175b", 64, 13.75, "s", "Megatron 2022", 8, 8, 64, 3, checkpointing="selective"),
    megatron("gpt-175b", 64, 18.13, "s", "Megatron 2022", 8, 8, 64, 3, checkpointing="full"),
    megatron("gpt-530b", 280, 37.83, "s", "Megatron 2022", 8, 35, 280, 3, checkpointing="selective"),
    megatron("gpt-1t", 512, 71.49, "s", "Megatron 2022", 8, 64, 512, checkpointing="selective"),
    nemo("llama-2-7b", 8, 16934, 128, 1, calibrates=True),
    nemo("llama-2-13b", 16, 8715, 128, 1, pp=4, chunks=10),
    nemo("llama-2-70b", 64, 1728, 128, 1, tp=4, pp=4, chunks=20),
    nemo("llama-3.1-8b", 8, 12273, 128, 1, length=8192, cp=2),
    nemo("llama-3.1-70b", 64, 1524, 128, 1, length=8192, tp=4, pp=4, cp=2, chunks=5),
    nemo("gpt-175b", 128, 716, 256, 1, length=2048, tp=4, pp=8, chunks=6),
    nemo("gpt-175b", 512, 825, 2048, 2, length=2048, tp=4, pp=8, chunks=6),
    entry("gpt-175b", "Megatron-LM", "h100", 96, "gpt-175b-131k", 4096, 0.47, "MFU", **ANY),
    entry("gpt-175b", "Megatron-LM", "h100", 4608, "gpt-175b-131k", 4096, 0.42, "MFU", **ANY),
    entry("smollm-1.7b", "picotron", "h100", 8, "smollm-1.7b", 2048, 0.50, "MFU", dp=8, micro=4, microbatches=32,
          compiled=False,
          open='"nearly 50 %"; layout not published: that of its quick start',
          why="the H100's efficiency is that of llm-foundry's software"),
    entry("llama-2-7b", "picotron", "h100", 64, "llama-2-7b", 4096, 0.38, "MFU", tokens=2 ** 22, zero=0,
          checkpointing=("none",),
          compiled=False, open="layout and batch not published: the best one found for 4 M tokens"),
]


def published_tokens(row):
    """What a row of PUBLISHED reports, as tokens/s of each GPU, by the source's own way of counting."""
    model, length, layout, value = MODELS[row["model"]], row["length"], row["layout"], row["published"]
    if row["unit"] == "s":
        return layout["dp"] * layout.get("micro", 1) * layout["microbatches"] * length / value / row["gpus"]
    if row["unit"] == "TFLOP/s":   # Megatron 2021 counts what full checkpointing recomputes
        again = model.flops(length) - 6 * model.vocab * model.hidden
        return value * 1e12 / (model.flops(length) + again / 3)
    if row["unit"] == "MFU":
        tables = 6 * (model.parameters(length) - sum(model.layer_weights().values()) * model.layers - model.vocab
                      * model.hidden)
        flops = model.flops(length) + (tables if row["source"] == "picotron" else 0)
        return value * GPUS[row["gpu"]].peak["bf16"] / flops
    return value


def predict_published(row):
    """The Prediction for a row; where its layout is not published, that of the best one."""
    model, machines, options = MODELS[row["model"]], cluster(row["gpu"], row["gpus"]), dict(row["layout"])
    if "tokens" not in options:
        return predict(model, row["length"], machines, Layout(**options))
    tokens, zero, choices = options.pop("tokens"), options.pop("zero"), options.pop("checkpointing")
    return plan(model, row["length"], tokens, machines, base=Layout(**options), zeros=(zero,),
                checkpointing=choices)[0][0]


def calibrate(row):
    """The efficiency at which the prediction for a row is what was published, by bisection.

    Leaves EFFICIENCY as it was.
    """
    key = SAME_CHIP.get(row["gpu"], row["gpu"]), row["layout"].get("precision", "bf16")
    before, low, high = EFFICIENCY[key], 0.01, 1.0
    for _ in range(40):
        EFFICIENCY[key] = (low + high) / 2
        slow = predict_published(row).tokens_per_second < published_tokens(row)
        low, high = (EFFICIENCY[key], high) if slow else (low, EFFICIENCY[key])
    EFFICIENCY[key] = before
    return high


def compare():
    """The rows of results/plan_validation.json."""
    rows = []
    for row in PUBLISHED:
        prediction, tokens = predict_published(row), published_tokens(row)
        remark = ["calibrates"] * row["calibrates"] + [text for text in (row["open"], row["why"]) if text]
        rows.append({
            "source": f"[{row['source']}]({SOURCES[row['source']]})", "run": f"{row['name']}, {row['gpu']}",
            "gpus": row["gpus"],
            "layout": f"{prediction.layout}", "published": round(tokens, 1),
            "predicted": round(prediction.tokens_per_second, 1),
            "error": f"{100 * (prediction.tokens_per_second / tokens - 1):+.1f} %", "gib": row["gib"] or "",
            "predicted_gib": round(prediction.gib(), 1), "remark": "; ".join(remark)})
    return rows


def summary(rows):
    """The rows of results/plan_summary.json: how good the predictions are, by source, without what calibrates."""
    predicted = [(row["source"], float(row["error"].split()[0])) for row in rows
                 if not row["remark"].startswith("calibrates")]
    names = list(dict.fromkeys(source for source, _ in predicted))
    groups = {name: [error for source, error in predicted if source == name] for name in names}
    groups["all"] = [error for _, error in predicted]
    return [{"source": name, "runs": len(errors), "within": sum(abs(error) <= 15 for error in errors),
             "median": f"{statistics.median(map(abs, errors)):.1f} %", "worst": f"{max(errors, key=abs):+.1f} %"}
            for name, errors in groups.items()]


def draw(rows):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 4.6), layout="constrained")
    colours = dict(zip(SOURCES, ["#1f6f8b", "#1f6f8b", "#d9822b", "#7a5195", "#7a5195", "#7a5195",
                                 "#888888", "#b23a48"]))
    left.axhspan(0.85, 1.15, color="#1f6f8b", alpha=0.12, linewidth=0)
    left.axhline(1, color="#888888", linewidth=0.8)
    for row, source in zip(rows, PUBLISHED):
        colour = colours[source["source"]]
        left.plot(row["published"], row["predicted"] / row["published"], "o", markersize=5.5, color=colour,
                  markerfacecolor="none" if source["calibrates"] else colour)
    for place, (name, colour) in enumerate((("torchtitan", "#1f6f8b"), ("llm-foundry", "#d9822b"),
                                            ("Megatron-LM", "#7a5195"),
                                            ("NeMo", "#888888"), ("picotron", "#b23a48"))):
        left.text(0.97, 0.94 - 0.055 * place, name, color=colour, ha="right", transform=left.transAxes, fontsize=11)
    left.text(0.03, 0.04, "band: 15 %\nopen circles calibrate", transform=left.transAxes, fontsize=10)
    left.set(xscale="log", ylim=(0.6, 1.5), xlabel="published, tokens/s of each GPU", ylabel="predicted / published",
             title=f"{len(rows)} published runs")

    model, sizes = MODELS["llama-3.1-405b"], [2 ** k for k in range(7, 15)]
    for tokens, colour in ((2 ** 22, "#d9822b"), (2 ** 24, "#1f6f8b")):
        best = [plan(model, 8192, tokens, cluster("h100", gpus), zeros=(0, 1))[0][0] for gpus in sizes]
        right.plot(sizes, [100 * prediction.mfu for prediction in best], "o-", color=colour, markersize=4)
        right.annotate(f"{tokens // 2 ** 20} M tokens a step", (sizes[4], 100 * best[4].mfu), color=colour, fontsize=10,
                       xytext=(0, 12) if tokens == 2 ** 24 else (-10, -24), textcoords="offset points", ha="center")
    right.set(xscale="log", xlabel="H100s", ylabel="MFU, %", title="Llama 3.1 405B, best layout", ylim=(0, 50))
    right.set_xticks(sizes, [f"{size:,}" for size in sizes], rotation=45)
    right.minorticks_off()
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    FIGURES.mkdir(exist_ok=True)
    figure.savefig(FIGURES / "plan.png", dpi=120)


def main():
    rows = compare()
    for row, source in zip(rows, PUBLISHED):
        print(f"{source['source']:<16}{row['run']:<40}{row['gpus']:>5}  {row['layout']:<44}"
              f"{row['published']:>8,.0f}{row['predicted']:>8,.0f}{row['error']:>9}"
              f"{'  calibrates' * source['calibrates']}")
    command = "python chapter-06-parallelism/plan_validation.py"
    print(write_results("plan_validation", command, {
        "run": "run", "gpus": "GPUs", "layout": "layout, microbatches", "published": "tok/s/GPU published",
        "predicted": "predicted", "error": "error", "gib": "GiB published", "predicted_gib": "predicted",
        "remark": "remark",
        "source": "source"}, rows))
    print(write_results("plan_summary", command, {"source": "source", "runs": "runs predicted", "within": "within 15 %",
                                                  "median": "median error", "worst": "largest error"}, summary(rows)))
    for row in summary(rows):
        name = row["source"].partition("]")[0].strip("[")
        print(f"{name:<16}{row['within']:>3} of {row['runs']:>2} within 15 %, median {row['median']}, largest"
              f" {row['worst']}")
    draw(rows)


if __name__ == "__main__":
    run(main)
