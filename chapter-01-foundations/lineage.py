"""From counting pairs to the GPT: the same documents, the same tokens, the same validation bytes, one axis.

    python chapter-01-foundations/lineage.py     about three minutes; writes results/lineage.json and its figure

Two yardsticks stand beside the models: a byte of which nothing is known has 8 bits, and xz, which knows no language but
remembers every string it has seen, is given the training text before it packs the validation text.
"""
import json
import lzma
import subprocess
import sys
import tempfile
from pathlib import Path

from matplotlib.figure import Figure

import bigram
import gru
import ngram
from cli import ArgumentParser, run
from data import fetch, load_documents, num_bytes
from results import FIGURES, write_results


def yardstick(name, bits):
    return {"model": name, "parameters": "", "context": "", "seconds": "", "val_bits_per_byte": bits}


def compressor_row(source):
    """xz on the validation text, after the training text: what the second adds to the packed size."""
    train_documents, val_documents = load_documents(source)
    train_text, all_text = ("\n\n".join(documents).encode()
                            for documents in (train_documents, train_documents + val_documents))
    added = len(lzma.compress(all_text, preset=9)) - len(lzma.compress(train_text, preset=9))
    return yardstick("xz, after the training text", 8 * added / num_bytes(val_documents))


def gpt_row(source):
    """train.py with its defaults, in a process of its own."""
    with tempfile.TemporaryDirectory() as out:
        subprocess.run([sys.executable, Path(__file__).parent / "train.py", "--data", source, "--out", out], check=True)
        summary = json.loads((Path(out) / "summary.json").read_text())
        context = json.loads((Path(out) / "config.json").read_text())["max_position_embeddings"]
    return {"model": "GPT", "parameters": summary["parameters"], "context": str(context),
            "seconds": summary["wall_seconds"],
            "val_bits_per_byte": summary["val_bits_per_byte"]}


def draw(rows):
    figure = Figure(figsize=(8, 2.8), dpi=120, layout="constrained")
    axes = figure.subplots()
    for y, row in enumerate(row for row in rows if row["parameters"]):
        bits = row["val_bits_per_byte"]
        axes.plot(bits, y, "o", color="#1f6f8b", markersize=9)
        axes.annotate(f"{row['model']}: {bits:.3f}   ({row['seconds']:.0f} s, {row['parameters'] / 1e6:.2f} M"
                      " parameters)",
                      (bits, y), xytext=(10, 0), textcoords="offset points", va="center",
                      bbox={"facecolor": "white", "edgecolor": "none", "pad": 2})
    xz = rows[1]["val_bits_per_byte"]
    axes.axvline(xz, color="#888888", linestyle="dashed")
    axes.annotate("xz", (xz, 3.25), xytext=(5, 0), textcoords="offset points", color="#888888", va="center")
    axes.set(xlim=(2.25, 2.85), ylim=(3.6, -0.6), yticks=[],
             xlabel="bits per byte of the validation text (less is better; the axis does not begin at 0)")
    axes.spines[["top", "right", "left"]].set_visible(False)
    FIGURES.mkdir(exist_ok=True)
    figure.savefig(FIGURES / "lineage.png")


def main():
    parser = ArgumentParser(description="Run the bigram, n-gram and GRU models and the GPT, and compare them.")
    parser.add_argument("--data", default="tinyshakespeare", metavar="NAME|PATH",
                        help="tinyshakespeare, python-docs, wikitext-2, or a .txt or .jsonl file")
    source = fetch(parser.parse_args().data)
    rows = [yardstick("nothing known", 8.0), compressor_row(source)]
    rows += [module.run_model(source) for module in (bigram, ngram, gru)]
    rows.append(gpt_row(source))
    columns = {"model": "model", "parameters": "parameters", "context": "context, tokens", "seconds": "seconds",
               "val_bits_per_byte": "bits per byte"}
    print(write_results("lineage", "python chapter-01-foundations/lineage.py", columns, rows, data=source))
    draw(rows)


if __name__ == "__main__":
    run(main)
