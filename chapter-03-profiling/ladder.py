"""Every chapter's default training, one after the other: the same documents, the same tokens, and what each step cost.

    python ladder.py        (in this folder; a minute or two for each chapter)

Finds the chapters by itself, so that later ones join. Writes results/ladder.json and figures/ladder.png, the
repository's central table, which the root README shows. Chapter 1 pads and has another batch; it runs as long as
chapter 2 did.
"""
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from matplotlib.figure import Figure

from cli import ArgumentParser, InputError, positive, run
from results import FIGURES, write_results

CHAPTERS = sorted(path.parent.name for path in Path(__file__).resolve().parent.parent.glob("chapter-*/train.py"))


def train(chapter, source, *budget):
    """The summary of a chapter's default run."""
    with tempfile.TemporaryDirectory() as out:
        script = Path(__file__).resolve().parent.parent / chapter / "train.py"
        done = subprocess.run([sys.executable, script, "--data", source, "--out", out, *budget])
        if done.returncode != 0:
            raise InputError(f"{chapter}/train.py ended with status {done.returncode}")
        return json.loads((Path(out) / "summary.json").read_text())


def measure(source, rounds):
    """{chapter: its summaries}. The chapters take turns, so that a slow minute of the machine falls on all of them."""
    summaries = {chapter: [] for chapter in CHAPTERS}
    for _ in range(rounds):
        for chapter in CHAPTERS:
            summaries[chapter].append(train(chapter, source))
    return summaries


def row(chapter, summaries, base):
    rate = statistics.median(summary["tokens_per_second"] for summary in summaries)
    return {"chapter": chapter, "steps": summaries[0]["steps"], "tokens": summaries[0]["tokens"],
            "tokens_per_second": rate,
            "speed": rate / base, "seconds": statistics.median(summary["wall_seconds"] for summary in summaries),
            "peak_mib": statistics.median(summary["peak_memory_bytes"] for summary in summaries) / 2 ** 20,
            "val_bits_per_byte": summaries[0]["val_bits_per_byte"]}


def draw(rows):
    figure = Figure(figsize=(8, 0.6 * len(rows) + 1.2), dpi=120, layout="constrained")
    axes = figure.subplots()
    for y, row in enumerate(rows):
        axes.barh(y, row["tokens_per_second"], color="#1f6f8b", height=0.6)
        axes.annotate(f"{row['tokens_per_second']:,.0f} tokens/s, {row['speed']:.2f}x"
                      f"   ({row['val_bits_per_byte']:.3f} bits per byte, {row['peak_mib']:,.0f} MiB)",
                      (row["tokens_per_second"], y), xytext=(6, 0), textcoords="offset points", va="center")
    axes.set(yticks=range(len(rows)), yticklabels=[row["chapter"].removeprefix("chapter-") for row in rows],
             xlim=(0, 2.6 * max(row["tokens_per_second"] for row in rows)),
             xlabel="useful tokens per second, default run")
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    FIGURES.mkdir(exist_ok=True)
    figure.savefig(FIGURES / "ladder.png")


def main():
    parser = ArgumentParser(description="Run the default training of every chapter and compare.")
    parser.add_argument("--data", default="tinyshakespeare", metavar="NAME|PATH", help="as in train.py")
    parser.add_argument("--rounds", type=positive(int), default=1, metavar="N",
                        help="runs of each; the table has medians")
    arguments = parser.parse_args()
    summaries = measure(arguments.data, arguments.rounds)
    base = statistics.median(summary["tokens_per_second"] for summary in summaries[CHAPTERS[0]])
    rows = [row(chapter, found, base) for chapter, found in summaries.items()]
    columns = {"chapter": "chapter", "steps": "steps", "tokens": "useful tokens", "seconds": "seconds",
               "tokens_per_second": "useful tokens/s", "speed": "times chapter 1", "peak_mib": "peak MiB",
               "val_bits_per_byte": "bits per byte"}
    command = "python chapter-03-profiling/ladder.py" + "".join(f" {argument}" for argument in sys.argv[1:])
    print(write_results("ladder", command, columns, rows, data=next(iter(summaries.values()))[0]["data"]))
    draw(rows)


if __name__ == "__main__":
    run(main)
