"""Chapter 1 and this chapter, the same documents, the same minutes: who has read more, and who predicts better?

    python equal_time.py                 (in this folder; about three minutes; writes results/equal_time.json)
    python equal_time.py --minutes 5     about ten minutes; writes results/equal_time_5.json

Each run is a process of its own, as a reader would start it. The minutes are for training; the last validation comes on
top.
"""
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from cli import ArgumentParser, InputError, positive, run
from results import write_results

CHAPTERS = ("chapter-01-foundations", "chapter-02-qwen3-packed")


def train(chapter, source, minutes):
    """One row: the summary of a run."""
    with tempfile.TemporaryDirectory() as out:
        script = Path(__file__).resolve().parent.parent / chapter / "train.py"
        done = subprocess.run([sys.executable, script, "--data", source, "--minutes", str(minutes), "--out", out])
        if done.returncode != 0:
            raise InputError(f"{chapter}/train.py ended with status {done.returncode}")
        summary = json.loads((Path(out) / "summary.json").read_text())
    return {"chapter": chapter, "parameters": summary["parameters"], "mflops": summary["flops_per_token"] / 1e6,
            "tokens_per_second": summary["tokens_per_second"], "tokens": summary["tokens"],
            "peak_mib": summary["peak_memory_bytes"] / 2 ** 20, "seconds": summary["wall_seconds"],
            "val_bits_per_byte": summary["val_bits_per_byte"]}


def main():
    parser = ArgumentParser(description="Train chapter 1 and this chapter for the same time, and compare.")
    parser.add_argument("--data", default="tinyshakespeare", metavar="NAME|PATH", help="as in train.py")
    parser.add_argument("--minutes", type=positive(float), default=1.25, metavar="M", help="for each of the two")
    arguments = parser.parse_args()
    source, minutes = arguments.data, arguments.minutes
    rows = [train(chapter, source, minutes) for chapter in CHAPTERS]
    columns = {"chapter": "chapter", "parameters": "parameters", "mflops": "MFLOPs per useful token",
               "tokens_per_second": "useful tokens/s", "tokens": "useful tokens", "peak_mib": "peak MiB",
               "seconds": "seconds",
               "val_bits_per_byte": "bits per byte"}
    name, flags = ("equal_time", "") if minutes == 1.25 else (f"equal_time_{minutes:g}", f" --minutes {minutes:g}")
    print(write_results(name, f"python chapter-02-qwen3-packed/equal_time.py{flags}", columns, rows, data=source))


if __name__ == "__main__":
    run(main)
