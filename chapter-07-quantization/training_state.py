"""What a resumed run must know besides the model: optimizer, random state and position. All ranks write it together.

    OUT/checkpoint/          everything a resumed run needs, replaced as a whole
        shard-....safetensors, state.json, tokenizer files      see parallel/checkpoint.py
    OUT/config.json, ...     the model, whole, for everyone else: generate.py, transformers

N steps are k steps, a resume and N - k steps, bit for bit on a CPU with as many ranks, and almost with another number.
"""
import hashlib
import json
import os
import tempfile
from pathlib import Path

from checkpoint import complete_checkpoint, not_ours
from cli import InputError
from optimizer import schedule
from parallel.checkpoint import export, load_sharded, read_state, save_sharded
from parallel.mesh import checksum, compare


def prepare_folder(out, mesh):
    """Find out that --out cannot be written, or holds what is not ours, before an hour of training, not after."""
    if not mesh.is_main:
        return
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
    """Write OUT/checkpoint/ with all ranks, and from it the model files beside it with rank 0, for which the others
    wait.
    """
    state = state | optimizer.scaler.state_dict()
    save_sharded(out / "checkpoint", model.config, optimizer.parameters, optimizer.inner, state, tokenizer, model.mesh)
    if model.mesh.is_main:
        export(out)
    model.mesh.wait()


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


def checkpoint_to_resume(arguments, mesh):
    """The last complete checkpoint folder of a run that is to go on, or None; then it says so."""
    # Ranks that torchrun has started again go on. On several machines only some may know that they have been.
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    if not any(mesh.gather(arguments.resume or restarted)):
        return None
    checkpoint = complete_checkpoint(arguments.out)
    if not checkpoint:
        print(f"no checkpoint in {arguments.out}: starting afresh")
    return checkpoint


def compare_starts(source, settings, checkpoint, model, mesh):
    """All ranks must begin with the same documents, checkpoint and weights, or InputError says which do not."""
    if mesh.world.size > 1:
        compare(mesh.gather({
            "data": f"{Path(source).name} with fingerprint {settings['documents']}",
            "checkpoint": f"of step {read_state(checkpoint)['step']}" if checkpoint else "missing",
            "sum of the weights": None if checkpoint else sum(map(checksum, model.parameters()))}))


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


def load_training_state(folder, optimizer, settings, arguments):
    """Restore weights, optimizer and random state from a checkpoint folder; returns the state that save_checkpoint was
    given.

    folder None: a run that begins. settings: what makes a run this run, and has to be what it was.
    """
    if folder is None:
        return {"settings": settings, "step": 0, "tokens": 0, "flops": 0, "train_seconds": 0, "seconds": 0}
    check_settings(settings, read_state(folder)["settings"], folder.parent)
    state = load_sharded(folder, optimizer.parameters, optimizer.inner, optimizer.mesh)
    optimizer.replicas.after_step()   # ZeRO has read its own rows; where it keeps all, it needs the others'
    optimizer.scaler.load_state_dict(state)
    print_resumed(arguments, state)
    return state
