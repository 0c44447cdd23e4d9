"""From counting pairs to the GPT: the same documents, the same tokens, the same validation bytes, one axis.

    python chapter-01-foundations/lineage.py                     about three minutes; results/lineage.json,
                                                                 results/samples.json, figures/lineage.png
    python chapter-01-foundations/lineage.py --tokenizer char    the same with single characters; ..._char.json

Three yardsticks stand beside the models: a byte of which nothing is known has 8 bits; xz, which knows no language but
remembers every string it has seen, is given the training text before it packs the validation text; and nanoGPT.
"""
import json
import lzma
import math
import subprocess
import sys
import tempfile
from pathlib import Path

from matplotlib.figure import Figure

import bigram
import gru
import ngram
from checkpoint import load_model
from cli import ArgumentParser, run
from data import fetch, load_documents, num_bytes
from generate import generate
from results import FIGURES, write_results

# Not run here. The command for a CPU in nanoGPT's README, on a machine like this one's: nats per character and seconds.
NANOGPT = {"model": "nanoGPT, its recipe for a CPU", "parameters": 804096, "context": "64 characters", "seconds": 83,
           "val_bits_per_byte": 1.8857 / math.log(2)}   # the text is ASCII, where a character is a byte


def yardstick(name, bits):
    return {"model": name, "parameters": "", "context": "", "seconds": "", "val_bits_per_byte": bits}


def compressor_row(source):
    """xz on the validation text, after the training text: what the second adds to the packed size."""
    train_documents, val_documents = load_documents(source)
    train_text, all_text = ("\n\n".join(documents).encode()
                            for documents in (train_documents, train_documents + val_documents))
    added = len(lzma.compress(all_text, preset=9)) - len(lzma.compress(train_text, preset=9))
    return yardstick("xz, after the training text", 8 * added / num_bytes(val_documents))


def gpt_row(source, kind):
    """train.py with its defaults, in a process of its own."""
    with tempfile.TemporaryDirectory() as out:
        subprocess.run([sys.executable, Path(__file__).parent / "train.py", "--data", source, "--tokenizer", kind,
                        "--out", out], check=True)
        summary = json.loads((Path(out) / "summary.json").read_text())
        model, tokenizer = load_model(out)
    return {"model": "GPT", "parameters": summary["parameters"],
            "context": str(model.config.max_position_embeddings), "seconds": summary["wall_seconds"],
            "val_bits_per_byte": summary["val_bits_per_byte"],
            "sample": tokenizer.decode(generate(model, tokenizer, [], 300))[:300]}


def draw(path, rows):
    figure = Figure(figsize=(8, 3.2), dpi=120, layout="constrained")
    axes = figure.subplots()
    models = [row for row in rows if row["parameters"]]
    for y, row in enumerate(models):
        bits = row["val_bits_per_byte"]
        axes.plot(bits, y, "o", color="#888888" if row["model"] == NANOGPT["model"] else "#1f6f8b", markersize=9)
        axes.annotate(f"{row['model']}: {bits:.3f}   ({row['seconds']:.0f} s, {row['parameters']:,} parameters)",
                      (bits, y), xytext=(10, 0), textcoords="offset points", va="center",
                      bbox={"facecolor": "white", "edgecolor": "none", "pad": 2})
    xz = rows[1]["val_bits_per_byte"]
    axes.axvline(xz, color="#888888", linestyle="dashed")
    axes.annotate("xz", (xz, -0.45), xytext=(5, 0), textcoords="offset points", color="#888888", va="center")
    low, high = (extreme([xz, *(row["val_bits_per_byte"] for row in models)]) for extreme in (min, max))
    axes.set(xlim=(low - 0.05 * (high - low), high + 0.75 * (high - low)), ylim=(len(models) - 0.4, -0.7), yticks=[],
             xlabel="bits per byte of the validation text (less is better; the axis does not begin at 0)")
    axes.spines[["top", "right", "left"]].set_visible(False)
    FIGURES.mkdir(exist_ok=True)
    figure.savefig(path)


def main():
    parser = ArgumentParser(description="Run the bigram, n-gram and GRU models and the GPT, and compare them.")
    parser.add_argument("--data", default="tinyshakespeare", metavar="NAME|PATH",
                        help="tinyshakespeare, python-docs, wikitext-2, or a .txt or .jsonl file")
    parser.add_argument("--tokenizer", choices=("bpe", "char"), default="bpe", help="byte pairs or single characters")
    arguments = parser.parse_args()
    source, kind = fetch(arguments.data), arguments.tokenizer
    rows = [yardstick("nothing known", 8.0), compressor_row(source)]
    rows += [dict(NANOGPT)] if source == "tinyshakespeare" else []
    rows += [module.run_model(source, kind) for module in (bigram, ngram, gru)]
    rows.append(gpt_row(source, kind))
    samples = {row["model"]: row.pop("sample") for row in rows if "sample" in row}
    _, val_documents = load_documents(source)
    nats = math.log(2) * num_bytes(val_documents) / len("\n\n".join(val_documents))   # per character, of a bit per byte
    for row in rows:
        row["val_nats_per_character"] = nats * row["val_bits_per_byte"]

    command, ending = "python chapter-01-foundations/lineage.py", ""
    if kind == "char":
        command, ending = f"{command} --tokenizer char", "_char"
    columns = {"model": "model", "parameters": "parameters", "context": "context, tokens", "seconds": "seconds",
               "val_bits_per_byte": "bits per byte", "val_nats_per_character": "nats per character"}
    print(write_results(f"lineage{ending}", command, columns, rows, data=source))
    print(write_results(f"samples{ending}", command, {name: name for name in samples}, [samples], data=source))
    draw(FIGURES / f"lineage{ending}.png", rows)


if __name__ == "__main__":
    run(main)
