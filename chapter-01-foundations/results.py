"""Measured numbers go into results/*.json together with the machine, the command and the date that made them.

The tables of the README are rendered from these files (python tests/readmes.py --write), never typed.
"""
import datetime
import json
from pathlib import Path

import torch

from device import device_name

RESULTS = Path(__file__).parent / "results"
FIGURES = Path(__file__).parent / "figures"


def write_results(name, command, columns, rows, device="cpu", data=None):
    """Write results/NAME.json.

    columns: {key: heading} in the order of the table. rows: one dict per line; a missing key reads "not measured".
    data: what was read, since without network it may be another text than the command names.
    """
    record = {
        "command": command,
        "machine": device_name(device),
        "torch": torch.__version__,
        "data": data and str(data),
        "date": datetime.date.today().isoformat(),
        "columns": columns,
        "rows": rows,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return path
