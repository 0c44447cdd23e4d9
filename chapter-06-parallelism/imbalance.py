"""How unequal the packs of a step are, and what share_out (parallel/data.py) makes of it.

    python imbalance.py        writes results/imbalance.json   (in this folder)
"""
import itertools
from pathlib import Path

import torch

from cli import run
from data import python_docs, tokenize, training_packs
from flops import total_flops
from model import CONFIGS
from parallel.data import imbalance, share_out
from results import write_results
from tokenizer import Tokenizer

STEPS = 20   # over which the mean is taken


def main():
    """results/imbalance.json: the first steps on python-docs."""
    rows, documents = [], python_docs()
    tokenizer = Tokenizer.train(documents, 1024)
    for name, T, ranks, each in (("small", 1024, 4, 1), ("small", 1024, 4, 4), ("qwen3-0.6b", 4096, 8, 4),
                                 ("qwen3-0.6b", 32768, 8, 4)):
        windows, _ = tokenize(documents, tokenizer, T)
        packs = itertools.islice(training_packs(windows, T, seed=0), STEPS * ranks * each)
        lengths = [torch.tensor([0, *(len(ids) for ids, _ in chosen)]).cumsum(0) for chosen in packs]
        costs = [total_flops(CONFIGS[name], cu_seqlens) for cu_seqlens in lengths]
        steps = [costs[i:i + ranks * each] for i in range(0, len(costs), ranks * each)]
        dealt = [imbalance([cost[rank::ranks] for rank in range(ranks)]) for cost in steps]
        shared = [imbalance(share_out(cost, cost, ranks)) for cost in steps]
        rows.append({"config": name, "tokens": T, "ranks": ranks, "each": each,
                     "dealt": sum(dealt) / STEPS, "shared": sum(shared) / STEPS})
        print(rows[-1])
    columns = {"config": "FLOPs of", "tokens": "tokens of a pack", "ranks": "ranks", "each": "packs each",
               "dealt": "as they come", "shared": "`share_out`"}
    print(write_results("imbalance", f"python {Path(__file__).resolve().parent.name}/imbalance.py", columns, rows,
                        data="python-docs"))


if __name__ == "__main__":
    run(main)
