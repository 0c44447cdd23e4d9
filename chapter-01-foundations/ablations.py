"""What matters when you have 36 seconds and two CPU cores? The default run against runs that differ in one thing.

    python chapter-01-foundations/ablations.py     about five minutes; writes results/ablations.json

All runs get the same time, not the same number of steps: what costs more must earn it. Two seeds of the default come
first, because a difference smaller than the difference between seeds is none. The learning rate goes with the square
root of the batch size, because a larger batch averages more noise away.
"""
import json
import multiprocessing
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import train
from cli import run
from model import CONFIGS
from results import write_results

MINUTES = 0.6
VARIANTS = [   # name, changes of the configuration, flags of train.py
    ("default", {}, []),
    ("default, another seed", {}, ["--seed", "1"]),
    ("characters instead of BPE, context 128", {"max_position_embeddings": 128}, ["--tokenizer", "char"]),
    ("context 128 instead of 64", {"max_position_embeddings": 128}, []),
    ("4 layers instead of 2", {"num_hidden_layers": 4}, []),
    ("batch 64 instead of 16", {}, ["--batch-size", "64", "--learning-rate", "6e-3"]),
]


def train_variant(changes, flags, out):
    """In a process of its own, so that memory and threads begin afresh."""
    CONFIGS["small"] = replace(CONFIGS["small"], **changes)
    sys.argv = ["train.py", "--minutes", str(MINUTES), "--save-every", "100000", "--out", out, *flags]
    run(train.main)


def main():
    rows = []
    for name, changes, flags in VARIANTS:
        with tempfile.TemporaryDirectory() as out:
            process = multiprocessing.get_context("spawn").Process(target=train_variant, args=(changes, flags, out))
            process.start()
            process.join()
            if process.exitcode != 0:
                sys.exit(process.exitcode)
            summary = json.loads((Path(out) / "summary.json").read_text())
        row = {"variant": name, "mib": round(summary["peak_memory_bytes"] / 2**20)}
        keys = ("parameters", "steps", "tokens_per_second", "val_bits_per_byte")
        rows.append(row | {key: summary[key] for key in keys})
    columns = {"variant": "variant", "parameters": "parameters", "steps": "steps", "tokens_per_second": "tokens/s",
               "mib": "peak MiB", "val_bits_per_byte": "bits per byte"}
    print(write_results("ablations", "python chapter-01-foundations/ablations.py", columns, rows, data=summary["data"]))


if __name__ == "__main__":
    run(main)
