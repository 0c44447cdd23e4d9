"""Checkpoints that all ranks write together, each its own part, and that any number of ranks can read.

    OUT/checkpoint/shard-00001-model-00001-of-00001.safetensors    what the first rank wrote
    OUT/checkpoint/shard-00002-model-00001-of-00001.safetensors    what the second did, and so on
    OUT/checkpoint/state.json                                      everything that is not a tensor
    OUT/checkpoint/tokenizer.json, tokenizer_config.json

Gathering the model on one rank to write it there would need the memory that the run was spread over many devices for
lack of. So every rank writes what it holds. Whatever cut the model up, that is rectangles of the tensors of the whole
model, and each parameter knows which (parallel.mesh.Piece). On disk nothing remains of the layout but where each
rectangle begins: whoever reads asks for rectangles of its own, from an entirely different layout if need be, and gets
them patched together from what there is.

Who writes which rectangle that several ranks hold, what overlaps with what, and that one rank's failure reaches all:
this is the work of torch.distributed.checkpoint (DCP). To use it without torch's own kinds of cut tensors takes a
planner, which tells it which rectangles there are: Save and Load below. With tensors cut by fully_shard or
parallelize_module it needs none of this: dcp.save(model.state_dict()) is all. Its usual file format is pickle; the
safetensors one is HuggingFaceStorageWriter's.

All ranks must see the same folder: one machine, or a network disk.
"""
import json
import logging
import math
import shutil
import warnings
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import LoadPlan, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from checkpoint import beside, replace_folder, save_model, unfinished
from cli import InputError
from model import ModelConfig, Transformer
from parallel.mesh import checksum
from tokenizer import load_tokenizer

# DCP logs each error that it raises, with traceback, and warns in a process that runs alone, which is all right here.
logging.getLogger("torch.distributed.checkpoint").setLevel(logging.CRITICAL)
warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")

# About so much in a file. While DCP writes one it holds two more copies of its contents, and while it reads one, one.
FILE_BYTES = 1 << 30


@dataclass
class Rectangle:
    """A tensor of this rank, and where it lies in a tensor of the whole model: as in parallel.mesh.Piece."""
    tensor: torch.Tensor
    shape: tuple
    offset: tuple

    @property
    def chunk(self):
        """The same in DCP's terms."""
        return ChunkStorageMetadata(torch.Size(self.offset), self.tensor.shape)


def whole(tensor):
    return Rectangle(tensor, tuple(tensor.shape), (0,) * tensor.dim())


def rectangles(parameters, optimizer):
    """{name: Rectangle} of the weights and of what the optimizer, an Adam, remembers of them. They share memory with
    both.

    The optimizer's parameters may be others than the model's: in ZeRO's first stages they are rows of them.
    Ranks without a row of a tensor stay out of it. DCP knows a rectangle by where it begins, and an empty one begins
    where its neighbour's does: of the two it would write one, perhaps the empty one.
    """
    found = {}
    for parameter in parameters:
        if parameter.numel():
            name = parameter.piece.name
            assert name not in found, f"{name} twice: a file holds one rectangle of each name"
            found[parameter.piece.name] = Rectangle(parameter.detach(), parameter.piece.shape, parameter.piece.offset)
    for group in optimizer.param_groups:
        for parameter in filter(torch.numel, group["params"]):
            state, piece = optimizer.state[parameter], parameter.piece
            if not state:   # not trained yet: what Adam begins with
                state["step"] = torch.zeros((), device=parameter.device if group.get("fused") else "cpu")
                state |= {"exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
            found[f"step.{piece.name}"] = whole(state["step"].view(1))   # lags where a step brought no gradient
            for key in ("exp_avg", "exp_avg_sq"):
                found[f"{key}.{piece.name}"] = Rectangle(state[key], piece.shape, piece.offset)
    return found


# --------------------------------------------------------------------------------------------------- saving

def save_sharded(folder, config, parameters, optimizer, state, tokenizer, mesh):
    """Write a checkpoint folder; every rank calls this, and all return or all raise.

    config: of the whole model. parameters: this rank's weights, each with its piece. state: what else to remember, as
    JSON can hold it, with "step", and "seed" in its "settings". Raises InputError if the weights are not finite, if
    copies of them differ, or any rank cannot write; the folder then is as it was.
    """
    parameters = list(parameters)
    tensors = rectangles(parameters, optimizer)
    compare_copies(tensors, mesh)
    tensors[f"random_state.{mesh.world.rank}"] = whole(torch.get_rng_state())
    layout = {axis: getattr(mesh, axis).size for axis in ("dp", "cp", "pp", "tp", "ep")}
    dtype = str(parameters[0].dtype).removeprefix("torch.")
    state = state | {"sharded": {"ranks": mesh.world.size, "layout": layout, "config": asdict(config), "dtype": dtype}}
    try:
        dcp.save(tensors, storage_writer=Writer(Path(folder), state, tokenizer), planner=Save(parameters),
                 process_group=mesh.patient, no_dist=mesh.patient is None)
    except CheckpointException as failed:
        error = first_error(failed)
        if isinstance(error, FloatingPointError):
            raise InputError(f"the training diverged: its weights are not finite; a checkpoint in {folder} is kept as"
                             " it was; try a lower --learning-rate") from None
        if isinstance(error, OSError):
            raise InputError(f"cannot write a checkpoint to {folder}: {error}; the one before it is complete") from None
        raise   # a mistake in this program


def compare_copies(tensors, mesh):
    """Raise InputError, on all ranks the same, if a rectangle that several ranks hold is not the same on all of them.

    They compute copies from the same sums, bit for bit. Ranks that have drifted apart train on in silence, each from
    gradients of the others' model; and of all copies DCP writes one.
    """
    if mesh.world.size == 1:
        return
    sums = {f"{name} from {part.offset}": checksum(part.tensor) for name, part in tensors.items()
            if not name.startswith("step.")}
    first = {}   # {rectangle: (checksum, rank)}
    for rank, theirs in enumerate(mesh.gather(sums)):
        for rectangle, found in theirs.items():
            expected, other = first.setdefault(rectangle, (found, rank))
            if found != expected:
                raise InputError(f"ranks {other} and {rank} hold copies of {rectangle} that differ, so one of them has"
                                 " computed something else; the checkpoint before is complete, --resume goes on"
                                 " from there")


def first_error(failed):
    """What happened on the first of the ranks that failed. DCP tells all ranks of all failures."""
    error, _ = failed.failures[min(failed.failures)]
    return error


class Save(DefaultSavePlanner):
    """What this rank has to write. From all ranks' plans DCP takes what is in several of them out of all but one."""

    def __init__(self, weights):
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.weights = weights

    def create_local_plan(self):
        if not all(weight.isfinite().all() for weight in self.weights):
            raise FloatingPointError
        return SavePlan([
            WriteItem(MetadataIndex(name, part.offset), WriteItemType.SHARD, tensor_data=TensorWriteData(
                part.chunk, TensorProperties.create_from_tensor(part.tensor), torch.Size(part.shape)))
            for name, part in self.state_dict.items()])

    def resolve_data(self, item):
        return self.state_dict[item.index.fqn].tensor


class Writer(HuggingFaceStorageWriter):
    """DCP's writer, working in a folder beside the final one, which rank 0 puts in its place when all ranks have
    written.
    """

    def __init__(self, folder, state, tokenizer):
        super().__init__(beside(folder, "unfinished"), save_distributed=True)
        self.folder, self.state, self.tokenizer = folder, state, tokenizer

    def prepare_local_plan(self, plan):
        return plan   # DCP's own would make the folder here, on every rank, while rank 0 may still be deleting it

    def prepare_global_plan(self, plans):
        """On rank 0 alone, before anyone writes."""
        shutil.rmtree(self.path, ignore_errors=True)
        self.path.mkdir(parents=True)
        return super().prepare_global_plan(plans)

    def write_data(self, plan, planner):
        """On each rank. Which tensor goes into which of its files, counted from 1."""
        files, size = {}, 0
        for item in plan.items:
            files[item.index.fqn] = 1 + size // FILE_BYTES
            size += planner.resolve_data(item).nbytes
        return super().write_data(replace(plan, storage_data=plan.storage_data | {"fqn_to_index_mapping": files}),
                                  planner)

    def finish(self, metadata, results):
        """On rank 0 alone, when all have written. results: for each rank what it wrote."""
        files = sorted({written.storage_data.relative_path for rank in results for written in rank})
        unseen = [name for name in files if not (self.path / name).is_file()]
        if unseen:
            raise OSError(f"{unseen[0]} was written, but rank 0 does not see it; all ranks need the same disk")
        self.tokenizer.save(self.path)
        self.state["sharded"]["files"] = files
        (self.path / "state.json").write_text(json.dumps(self.state, indent=2))
        replace_folder(self.path, self.folder)


# -------------------------------------------------------------------------------------------------- loading

def read_model(folder, device):
    """(model, tokenizer) of a checkpoint folder.

    The weights have memory but no values yet: cut them, then load_sharded.
    """
    saved = read_state(folder)["sharded"]
    try:
        config, dtype = ModelConfig(**saved["config"]), getattr(torch, saved["dtype"])
    except (KeyError, TypeError, AttributeError, AssertionError) as error:
        raise InputError(f"{Path(folder) / 'state.json'} is not of a model that this program knows:"
                         f" {error!r}") from None
    with torch.device("meta"):   # shapes without memory
        model = Transformer(config).to(dtype)
    model.to_empty(device=device)
    model.tie_weights()
    return model, load_tokenizer(Path(folder))


def load_sharded(folder, parameters, optimizer, mesh):
    """Fill this rank's weights and its optimizer from a checkpoint folder of any layout; returns the state that was
    saved.

    parameters: as in save_sharded; every rank calls this. In ZeRO's first stages these are only some rows of tensors
    that each rank keeps whole: replicas.after_step() fetches the others. Restores the random state too, if there are as
    many ranks as there were. Else nobody's is the right one, and all begin one that depends on seed and step only:
    replicas must go on drawing the same numbers. Raises InputError that names the file and the difference, on all
    ranks.
    """
    state = read_state(folder)
    tensors = rectangles(parameters, optimizer)
    random = torch.get_rng_state()
    if state["sharded"]["ranks"] == mesh.world.size:
        tensors[f"random_state.{mesh.world.rank}"] = whole(random)
    read(folder, tensors, mesh.patient)
    if state["sharded"]["ranks"] == mesh.world.size:
        torch.set_rng_state(random)
    else:
        torch.manual_seed((state["settings"]["seed"] + 1_000_003 * state["step"]) % 2 ** 63)
    del state["sharded"]
    return state


def read_state(folder):
    """state.json of a checkpoint folder, with what save_sharded added as "sharded"."""
    path = Path(folder) / "state.json"
    try:
        state = json.loads(path.read_text())
        files = state["sharded"]["files"]
        state["settings"]["seed"]   # KeyError: it is the state of something else
        if not state["step"] >= 0:
            raise ValueError(f"step {state['step']!r}")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{path} is damaged or not of a sharded checkpoint: {error!r}") from None
    for name in files:
        try:
            with open(path.with_name(name), "rb"), safe_open(path.with_name(name), framework="pt"):
                pass
        except (OSError, SafetensorError) as error:
            raise InputError(f"{path.with_name(name)} is damaged or missing: {error}") from None
    return state


def read(folder, tensors, process_group=None):
    """Fill {name: Rectangle}. process_group None: in this process alone."""
    try:
        dcp.load(tensors, storage_reader=HuggingFaceStorageReader(folder), planner=Load(),
                 process_group=process_group, no_dist=process_group is None)
    except CheckpointException as failed:
        error = first_error(failed)
        if isinstance(error, ValueError):
            raise InputError(f"{folder}: {error}") from None
        raise


class Load(DefaultLoadPlanner):
    """Which parts of which files this rank wants to have copied into its rectangles."""

    def set_up_planner(self, state_dict, metadata=None, is_coordinator=False):
        self.state_dict, self.saved = state_dict, metadata.state_dict_metadata

    def create_local_plan(self):
        items = []
        for name, part in self.state_dict.items():
            if name not in self.saved:
                raise ValueError(f"{name} is missing")
            saved = self.saved[name]
            found, wanted = (tuple(saved.size), saved.properties.dtype), (part.shape, part.tensor.dtype)
            if found != wanted:
                raise ValueError(f"{name} is {found[0]}, {found[1]}, and in this model {wanted[0]}, {wanted[1]}")
            parts = create_read_items_for_chunk_list(name, saved, [part.chunk])
            covered = sum(math.prod(item.lengths) for item in parts)
            if covered != part.tensor.numel():   # what is not covered DCP would leave as it is, without a word
                raise ValueError(f"of {name} there are {covered} of the {part.tensor.numel()} numbers of {part.chunk}")
            items += parts
        return LoadPlan(items)

    def create_global_plan(self, plans):
        """On rank 0 alone: each rank finds all that it asks for in a checkpoint of a deeper model too."""
        read = {item.dest_index.fqn for plan in plans for item in plan.items}
        unknown = [name for name in self.saved.keys() - read
                   if not name.startswith(("step.", "exp_avg", "random_state."))]
        if unknown:
            raise ValueError(f"{len(unknown)} tensors are not in this model, the first is {min(unknown)}")
        return plans

    def lookup_tensor(self, index):
        return self.state_dict[index.fqn].tensor

    def commit_tensor(self, item, tensor):
        """What has been read, now in its place. From here, not after the load, DCP tells all ranks."""
        if not tensor.isfinite().all():
            raise ValueError(f"{item.dest_index.fqn} holds nan or inf; its training diverged, or the file is damaged")


# ------------------------------------------------------------------------------------------- one model again

def gather_model(folder):
    """(model, tokenizer) of a checkpoint folder, whole, in this process alone and in the CPU's memory."""
    model, tokenizer = read_model(folder, "cpu")
    read(folder, {name: whole(parameter.detach()) for name, parameter in model.named_parameters()})
    return model, tokenizer


def export(out):
    """Write the model of OUT/checkpoint/ to OUT as every chapter does, for generate.py and transformers. For one rank
    to call.

    DCP can merge its shards too (enable_consolidation), but all that is in them, moments as well, and into a file whose
    header says neither that it is torch's nor which vocabulary the model was trained with.
    """
    with unfinished(out) as temporary:
        save_model(temporary, *gather_model(Path(out) / "checkpoint"))
