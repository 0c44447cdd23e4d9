"""What a resumed run must know besides the model: optimizer, random state and position. OUT/checkpoint/ holds both.

    OUT/checkpoint/          everything a resumed run needs, replaced as a whole
        config.json, model.safetensors, tokenizer files     the model, see checkpoint.py
        optimizer.safetensors                               AdamW's moments, the state of the random generator
        state.json                                          settings, steps, tokens, seconds
    OUT/config.json, ...     the model once more, for everyone else: generate.py

N steps are k steps, a resume and N - k steps, bit for bit on a CPU.
"""
import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from checkpoint import MODEL_FILES, beside, complete_checkpoint, not_ours, replace_folder, save_model, unfinished
from cli import InputError
from optimizer import schedule


def prepare_folder(out):
    """Find out that --out cannot be written, or holds what is not ours, before an hour of training, not after."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
        found = not_ours(out)
    except OSError as error:
        raise InputError(f"--out {out} cannot be written: {error.strerror}") from None
    if found:
        raise InputError(f"--out {out} holds {found[0]}, which no run has written and this one would replace; choose"
                         " another folder")


def fingerprint(documents):
    return hashlib.sha256(json.dumps(documents).encode()).hexdigest()[:16]


# --------------------------------------------------------------------------------------------------- saving

def save_checkpoint(out, model, tokenizer, optimizer, state):
    """Write OUT/checkpoint/ and the model files beside it. state: what else to remember, as JSON can hold it."""
    if not all(parameter.isfinite().all() for parameter in model.parameters()):
        raise InputError(f"the training diverged: its weights are not finite; a checkpoint in {out} is kept as it was;"
                         " try a lower --learning-rate")
    try:
        write_checkpoint(out, model, tokenizer, optimizer, state)
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot write a checkpoint to {out}: {error}; the one before it is complete") from None


def write_checkpoint(out, model, tokenizer, optimizer, state):
    final = Path(out) / "checkpoint"
    temporary = beside(final, "unfinished")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_model(temporary, model, tokenizer)
    moments = optimizer.inner.state_dict()["state"]   # {number of a parameter: {"exp_avg": tensor, ...}}
    tensors = {f"{i}.{key}": value for i, entry in moments.items() for key, value in entry.items()}
    save_file({"random_state": torch.get_rng_state(), **tensors}, temporary / "optimizer.safetensors")
    (temporary / "state.json").write_text(json.dumps(state, indent=2))
    shutil.copymode(temporary / "state.json", temporary / "optimizer.safetensors")   # as for the weights
    replace_folder(temporary, final)
    with unfinished(out) as copies:
        for name in MODEL_FILES:
            shutil.copyfile(final / name, copies / name)


# -------------------------------------------------------------------------------------------------- loading

def check_settings(settings, saved, out):
    """A resumed run must be the same run. Only the budget (--steps, --minutes) may grow."""
    if saved.get("documents") == settings["documents"]:   # the same text, by whatever name
        saved = saved | {"data": settings["data"]}
    if os.path.abspath(str(saved.get("init"))) == os.path.abspath(str(settings["init"])):
        saved = saved | {"init": settings["init"]}
    for name, value in settings.items():
        if saved.get(name) != value:
            raise InputError(f"--resume: the checkpoint in {out} has {name} {saved.get(name)}, this command has"
                             f" {value}; repeat the first command or choose another --out")


def checkpoint_to_resume(out):
    """The last complete checkpoint folder of a run, or None; then it says so."""
    checkpoint = complete_checkpoint(out)
    if not checkpoint:
        print(f"no checkpoint in {out}: starting afresh")
    return checkpoint


def share_done(arguments, state):
    """Share of the run that is done, by its steps or by its minutes; 1 is the end."""
    return max(state["step"] / arguments.steps if arguments.steps else 0,
               state["seconds"] / 60 / arguments.minutes if arguments.minutes else 0)


def print_resumed(arguments, state):
    """Where the run goes on.

    In a larger budget that is an earlier place of the schedule, with another learning rate.
    """
    print(f"resuming after step {state['step']}")
    before, now = state.get("progress", 0), share_done(arguments, state)
    if now < before:
        last, following = (arguments.learning_rate * schedule(share) for share in (before, now))
        print(f"        the budget has grown: the schedule goes back from {before:.0%} to {now:.0%} of the run, and"
              f" the learning rate jumps from {last:.2g} to {following:.2g}")


def read_tensors(path):
    """(tensors, metadata) of a safetensors file; a truncated or foreign file, or one with nan in it, is an InputError.
    """
    try:
        # safe_open calls missing what we are not allowed to read.
        with open(path, "rb"), safe_open(path, framework="pt") as file:
            tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} is damaged or not a safetensors file: {error}") from None
    for name, tensor in tensors.items():
        if tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all():   # no mask as large as the tensor
            raise InputError(f"{path}: {name} holds nan or inf: its training diverged, or the file is damaged")
    return tensors, metadata


def load_training_state(folder, optimizer, settings, arguments):
    """Restore optimizer and random state from a checkpoint folder; returns the state that save_checkpoint was given.

    folder None: a run that begins. settings: what makes a run this run, and has to be what it was.
    """
    if folder is None:
        return {"settings": settings, "step": 0, "tokens": 0, "flops": 0, "train_seconds": 0, "seconds": 0}
    try:
        state = json.loads((folder / "state.json").read_text())
        if not state["step"] >= 0 or "settings" not in state:   # KeyError: it is the state of something else
            raise ValueError(f"step {state['step']!r}")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{folder / 'state.json'} is damaged: {error!r}") from None
    check_settings(settings, state["settings"], folder.parent)
    tensors, _ = read_tensors(folder / "optimizer.safetensors")
    try:
        torch.set_rng_state(tensors.pop("random_state"))
        entries = {}
        for name, value in tensors.items():
            i, key = name.split(".")
            entries.setdefault(int(i), {})[key] = value
        optimizer.inner.load_state_dict({"state": entries,
                                         "param_groups": optimizer.inner.state_dict()["param_groups"]})
        for group in optimizer.inner.param_groups:
            for parameter in group["params"]:
                shape = optimizer.inner.state[parameter]["exp_avg"].shape   # load_state_dict compares no shapes
                if shape != parameter.shape:
                    raise ValueError(f"moments {tuple(shape)} for a parameter {tuple(parameter.shape)}")
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        raise InputError(f"{folder / 'optimizer.safetensors'} is not of this run: {error!r}") from None
    print_resumed(arguments, state)
    return state
