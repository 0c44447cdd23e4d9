"""Many devices: who talks to whom, and the few ways of talking that everything in this chapter is made of.

Every rank, one process for one device, runs the same program. torchrun starts them and tells each its number:

    torchrun --nproc_per_node 4 train.py --dp 2 --tp 2        (in this folder)

The ranks form a grid, the mesh. Each axis is one way to cut the work:

    pp    pipeline parallel: each has some of the layers                   pipeline.py
    dp    data parallel: each has other documents                         data.py, zero.py
    ep    expert parallel, a part of dp: each has some of the experts      experts.py
    cp    context parallel: each has a part of every document             context.py
    tp    tensor parallel: each has a part of every matrix                tensor.py

Neighbours on the last axis have neighbouring numbers and sit in one machine, with the fastest wires between them:
tensor parallelism talks in every layer, pipeline stages only once a layer's end has been reached.

A group is one row of the mesh along one axis: those who share everything but their place on it. With n ranks in it,
each collective sends from each rank, if its algorithm is a ring or as good as one (Thakur et al. 2005; b: bytes of the
whole):

    all-reduce       everyone gets the sum                         2 (n - 1) / n b
    all-gather       everyone gets everyone's part                   (n - 1) / n b
    reduce-scatter   everyone gets a part of the sum                 (n - 1) / n b
    all-to-all       everyone sends another part to each               what is not its own
"""
import atexit
import datetime
import json
import os
import select
import signal
import sys
import threading
from collections import Counter
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from cli import InputError

# What torch 2.13 calls all_gather_single and reduce_scatter_single.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
PATIENCE = datetime.timedelta(minutes=5)   # how long a rank waits for the others before it gives up
AS_LONG_AS_IT_TAKES = datetime.timedelta(days=7)   # where one of them reads or writes a large model, or downloads
TOLD = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")   # what torchrun tells each rank


class Group:
    """The ranks of one row of the mesh, and how they talk. sent: bytes that this rank has sent so far, by the table
    above.

    mesh: a one-dimensional DeviceMesh; None is a group of one, for which all that follows does nothing.
    Tensors that are gathered or scattered are cut along their first dimension; all parts must be equally long.
    """

    def __init__(self, mesh=None):
        self.pg = mesh.get_group() if mesh is not None else None   # torch's own name for it: a process group
        self.size = mesh.size() if mesh is not None else 1
        self.rank = mesh.get_local_rank() if mesh is not None else 0
        self.ranks = mesh.mesh.tolist() if mesh is not None else [0]   # their numbers in the world
        self.sent = 0

    def count(self, tensor, times=1):
        self.sent += times * tensor.nbytes * (self.size - 1) // self.size

    def all_reduce(self, tensor, operation=dist.ReduceOp.SUM, wait=True):
        """The sum (or "operation") over the group, in the place of tensor.

        Returns tensor, or with wait=False a handle to wait() on.
        """
        if self.size == 1:
            return tensor if wait else None
        self.count(tensor, times=2)
        work = dist.all_reduce(tensor, operation, group=self.pg, async_op=not wait)
        return tensor if wait else work

    def all_gather(self, tensor, out=None):
        """(n, ...) of each rank -> (size * n, ...) of all, in their order."""
        if self.size == 1:
            return tensor if out is None else out.copy_(tensor)
        out = tensor.new_empty(self.size * tensor.shape[0], *tensor.shape[1:]) if out is None else out
        self.count(out)
        all_gather(out, tensor.contiguous(), group=self.pg)
        return out

    def reduce_scatter(self, tensor):
        """(size * n, ...) -> the sum over the group, of it this rank's (n, ...)."""
        if self.size == 1:
            return tensor
        assert tensor.shape[0] % self.size == 0, f"{tensor.shape[0]} rows do not divide by {self.size} ranks"
        out = tensor.new_empty(tensor.shape[0] // self.size, *tensor.shape[1:])
        self.count(tensor)
        reduce_scatter(out, tensor.contiguous(), group=self.pg)
        return out

    def all_to_all(self, tensor, send, receive):
        """Rows of tensor to the others: the first send[0] to rank 0, the next send[1] to rank 1.

        Returns what came, receive[i] from i.
        """
        if self.size == 1:
            return tensor
        out = tensor.new_empty(sum(receive), *tensor.shape[1:])
        self.sent += (len(tensor) - send[self.rank]) * tensor[:1].nbytes
        dist.all_to_all_single(out, tensor.contiguous(), receive, send, group=self.pg)
        return out

    def send(self, tensor, to):
        """Begin to send to the rank in place `to` of this group.

        Returns a handle to wait() on; keep the tensor until then.
        """
        self.sent += tensor.nbytes
        return dist.isend(tensor, self.ranks[to], group=self.pg)

    def receive(self, tensor, source):
        """Begin to fill tensor with what the rank in place `source` sends. Returns a handle to wait() on."""
        return dist.irecv(tensor, self.ranks[source], group=self.pg)

    def exchange(self, tensor, to, source):
        """Begin to send tensor to the rank in place `to` and to receive one like it. Returns a function that waits for
        that one.

        Both in one batch. NCCL takes what it is given in order, and where all ranks begin with sending, nobody would
        receive.
        """
        self.sent += tensor.nbytes
        out = torch.empty_like(tensor)
        works = dist.batch_isend_irecv([dist.P2POp(dist.isend, tensor, self.ranks[to], self.pg),
                                        dist.P2POp(dist.irecv, out, self.ranks[source], self.pg)])

        def arrived(_keep=tensor):   # what is being sent must not be freed before it has left
            for work in works:
                work.wait()
            return out
        return arrived


@dataclass
class Mesh:
    """The groups of this rank. data: all ranks that hold the same weights and see other tokens, dp and cp together."""
    pp: Group
    pp_back: Group        # the same ranks as pp, talking among themselves a second time: gradients, on their way back
    dp: Group
    cp: Group
    tp: Group
    ep: Group             # a part of dp
    data: Group           # dp x cp
    expert_data: Group    # the ranks that hold the same experts: data without ep
    world: Group
    patient: object       # torch's process group of all ranks, on their CPUs, that waits AS_LONG_AS_IT_TAKES
    device_mesh: object   # torch's DeviceMesh with the axes pp, dp_outer, ep, cp, tp; None for a process that is alone

    def __str__(self):
        if self.world.size == 1:
            return "one rank, alone"
        return (f"{self.world.size} ranks: dp {self.dp.size} x cp {self.cp.size} x pp {self.pp.size} x tp"
                f" {self.tp.size}; ep {self.ep.size}")

    @property
    def is_main(self):
        return self.world.rank == 0

    def largest(self, number):
        """The largest of the numbers that the ranks give, for all of them."""
        device = self.device_mesh.device_type if self.device_mesh else "cpu"
        return self.world.all_reduce(torch.tensor(number, dtype=torch.float64, device=device), dist.ReduceOp.MAX).item()

    def gather(self, thing):
        """What each of all ranks gives, in their order, for each of them: anything that can be pickled."""
        everyone = [thing] * self.world.size
        if self.world.size > 1:
            dist.all_gather_object(everyone, thing, group=self.patient)
        return everyone

    def seed(self, seed, step):
        """Ranks that hold the same weights must round them alike, whatever they have drawn before."""
        if self.world.size > 1:
            torch.manual_seed((seed + 1_000_003 * step) % 2 ** 63)

    def wait(self):
        """For the slowest of all ranks. Those that die meanwhile end this too."""
        if self.world.size > 1:
            dist.barrier(group=self.patient)

    @property
    def sent(self):
        """Bytes that this rank has sent so far."""
        groups = (self.pp, self.pp_back, self.dp, self.cp, self.tp, self.ep, self.data, self.expert_data, self.world)
        return sum(group.sent for group in groups)


ALONE = Mesh(*(Group() for _ in range(9)), patient=None, device_mesh=None)   # a single process


def make_mesh(device="cpu", dp=1, cp=1, pp=1, tp=1, ep=1):
    """The mesh of all ranks, once torch.distributed is initialized."""
    mesh = init_device_mesh(device, (pp, dp // ep, ep, cp, tp), mesh_dim_names=("pp", "dp_outer", "ep", "cp", "tp"))
    flat = {name: mesh[axes]._flatten(name) for name, axes in {
        "dp": ("dp_outer", "ep"), "data": ("dp_outer", "ep", "cp"), "expert_data": ("dp_outer", "cp"),
        "world": ("pp", "dp_outer", "ep", "cp", "tp")}.items()}
    rows = mesh.mesh.movedim(0, -1).reshape(-1, pp).tolist()
    pp_back = DeviceMesh.from_group(dist.new_subgroups_by_enumeration(rows)[0], device)
    return Mesh(pp=Group(mesh["pp"]), pp_back=Group(pp_back), dp=Group(flat["dp"]), cp=Group(mesh["cp"]),
                tp=Group(mesh["tp"]),
                ep=Group(mesh["ep"]), data=Group(flat["data"]), expert_data=Group(flat["expert_data"]),
                world=Group(flat["world"]),
                patient=dist.new_group(backend="gloo", timeout=AS_LONG_AS_IT_TAKES), device_mesh=mesh)


def start_ranks(device, arguments):
    """Join the ranks that torchrun has started, if it has, and lay out the mesh. --dp None: as many as there are ranks
    for.

    From here on only rank 0 prints. Raises InputError if the ranks do not fill the mesh, or have been given different
    arguments.
    """
    rank, world = place()
    cp, pp, tp, ep = arguments.cp, arguments.pp, arguments.tp, arguments.ep
    dp = arguments.dp or max(world // (cp * pp * tp), 1)
    if dp * cp * pp * tp != world:
        raise InputError(f"--dp {dp} x --cp {cp} x --pp {pp} x --tp {tp} is {dp * cp * pp * tp} ranks, and torchrun"
                         f" has started {world}; torchrun --nproc_per_node {dp * cp * pp * tp} starts as many as that")
    if dp % ep:
        raise InputError(f"--ep {ep} is a part of --dp {dp}, so it must divide it")
    if "RANK" not in os.environ:
        return ALONE
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    if device == "mps" or device == "cuda" and local > torch.cuda.device_count():
        raise InputError(f"{local} ranks need as many CUDA GPUs in this machine; with --device cpu they share its"
                         " processor")
    tell_when_ended()
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # Of --data only the contents count: it may lie elsewhere on another machine.
    flags = {f"--{name.replace('_', '-')}": str(value) for name, value in vars(arguments).items() if name != "data"}
    join("nccl" if device == "cuda" else "gloo", flags | {"device": device, "torch": torch.__version__})
    # Python at its end would stop threads of gloo's that may just be giving a tensor back to it, and C++ aborts where
    # one of its threads is stopped: "terminate called without an active exception". So a rank that is ready goes before
    # Python ends.
    atexit.register(os._exit, 0)
    mesh = make_mesh(device, dp, cp, pp, tp, ep)
    if not mesh.is_main:
        sys.stdout = open(os.devnull, "w")
    return mesh


def place():
    """(rank, ranks) as torchrun tells them, (0, 1) where it has not started this process."""
    missing = [name for name in TOLD if name not in os.environ]
    if len(missing) == len(TOLD):
        return 0, 1
    if missing:
        given = [name for name in TOLD if name in os.environ]
        raise InputError(f"{', '.join(given)} in the environment, but not {', '.join(missing)}: a rank needs them all,"
                         f" and torchrun sets them; to train in one process, unset {' '.join(given)}")
    rank, world = os.environ["RANK"], os.environ["WORLD_SIZE"]
    if not (rank.isdecimal() and world.isdecimal() and int(rank) < int(world)):
        raise InputError(f"RANK={rank} and WORLD_SIZE={world} in the environment: of n ranks the numbers are 0 to n -"
                         " 1; torchrun sets them")
    return int(rank), int(world)


def join(backend, settings):
    """Meet the other ranks in torchrun's store, where each leaves its address for the others. All must have the same
    settings.

    When torchrun starts all ranks again the store stays, with the addresses of the dead in it, and whoever comes first
    would call those. So every start has a part of the store of its own. But on several machines each torchrun counts
    only its own starts; there put TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 before torchrun, which makes a new store for
    every start.
    """
    # torchrun's store was there before this rank. If it does not answer, torchrun has been killed while torch was
    # imported.
    there = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        store, rank, size = next(dist.rendezvous("env://", timeout=datetime.timedelta(seconds=10) if there
                                                 else PATIENCE))
    except (dist.DistError, ValueError) as error:
        raise InputError(f"no store for the ranks at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}, where"
                         f" torchrun should keep it: {str(error).splitlines()[0]}") from None
    store.set_timeout(PATIENCE)
    if os.environ.get("GROUP_WORLD_SIZE") == "1":   # one machine
        store = dist.PrefixStore(f"start {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    # Before they talk in any other way: with other groups, or one by NCCL and one by gloo, they would wait for each
    # other.
    store.set(f"settings {rank}", json.dumps(settings))
    compare([json.loads(text) for text in store.multi_get([f"settings {other}" for other in range(size)])])
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)


def compare(everyone):
    """everyone: {name: value} of each rank. Raises InputError, on all ranks the same, if they are not all equal."""
    for rank, theirs in enumerate(everyone):
        for name, value in everyone[0].items():
            if theirs[name] != value:
                raise InputError(f"the ranks do not train the same: {name} is {value} on rank 0 and {theirs[name]} on"
                                 f" rank {rank}; all need the same command, data and disk")


def tell_when_ended():
    """Where a rank has died torchrun sends SIGTERM to the others, and Ctrl-C sends SIGINT to all. Rank 0 says why it
    goes.

    In a thread: the main one may be waiting for the dead rank, inside a collective, where no handler of Python's runs.
    And torchrun itself may be killed so that it can tell nobody: then its ranks have another parent.
    """
    pipe, signals = os.pipe()
    os.set_blocking(signals, False)
    signal.set_wakeup_fd(signals)
    saved = "what was saved is complete, --resume goes on from there"
    why = {signal.SIGINT: "interrupted",
           signal.SIGTERM: f"error: torchrun ends all ranks: one of them has died, or torchrun itself was told to end;"
                           f" {saved}",
           signal.SIGKILL: f"error: torchrun has been killed; {saved}"}
    parent = os.getppid()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)

    def wait():
        number = None
        while number not in why:
            if select.select([pipe], [], [], 1)[0]:
                number = os.read(pipe, 1)[0]
            elif os.getppid() != parent:
                number = signal.SIGKILL
        if os.environ["RANK"] == "0":
            print(f"\n{why[number]}", file=sys.stderr, flush=True)   # on a line of its own, not at the end of the bar
        os._exit(128 + number)
    threading.Thread(target=wait, daemon=True).start()


# ------------------------------------------------------------------------------ collectives that gradients pass through
#
# Each has its conjugate: what one does on the way forward, the other does on the way back. To see why, write the
# collective as a matrix that multiplies the ranks' values laid end to end; the gradient is multiplied with its
# transpose. A copy to all is a column of ones, and its transpose a sum. (All take tensors (T, ...) and cut or join the
# tokens, T.)

class Copy(torch.autograd.Function):
    """The same to all; back, the sum of what each found. Megatron-LM's f (Shoeybi et al. 2019)."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dy):
        return ctx.group.all_reduce(dy.clone(memory_format=torch.contiguous_format)), None


class Reduce(torch.autograd.Function):
    """The sum over all; back, the same to all. Megatron-LM's g."""

    @staticmethod
    def forward(ctx, x, group):
        return group.all_reduce(x.clone(memory_format=torch.contiguous_format))

    @staticmethod
    def backward(ctx, dy):
        return dy, None


class Gather(torch.autograd.Function):
    """Everyone's tokens to all; back, the sum, to each for its own tokens. f where activations are cut along T
    (Korthikanti 2022).
    """

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return group.all_gather(x)

    @staticmethod
    def backward(ctx, dy):
        return ctx.group.reduce_scatter(dy), None


class Scatter(torch.autograd.Function):
    """The sum over all, to each for its own tokens; back, everyone's tokens to all. g where activations are cut along
    T.
    """

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return group.reduce_scatter(x)

    @staticmethod
    def backward(ctx, dy):
        return ctx.group.all_gather(dy), None


class AllToAll(torch.autograd.Function):
    """Rows to where they are wanted (Group.all_to_all); back, their gradients to where they came from."""

    @staticmethod
    def forward(ctx, x, group, send, receive):
        ctx.group, ctx.send, ctx.receive = group, send, receive
        return group.all_to_all(x, send, receive)

    @staticmethod
    def backward(ctx, dy):
        return ctx.group.all_to_all(dy, ctx.receive, ctx.send), None, None, None


# --------------------------------------------------------------------------------------------- who holds which weights

@dataclass
class Piece:
    """Which rectangle of which tensor of the whole model a parameter of this rank is.

    Every parameter has one: parameter.piece.
    """
    name: str                # in the whole model, and in a checkpoint
    shape: tuple             # of the tensor in the whole model
    offset: tuple            # where in it this piece begins
    group: Group             # the ranks that hold the same piece and see other tokens: their gradients are to be summed
    partial: bool = False    # whether each rank of tp has only a part of its gradient; then that is to be summed too
    tied: bool = False       # whether another stage of the pipeline has it too: the token table, which reads and scores


def check_ranks(arguments, config, mesh):
    """What these ranks cannot do together, or with a model of this configuration, is an InputError."""
    if mesh.world.size > 1 and (arguments.compile or arguments.profile):
        raise InputError("--compile and --profile are for a single process: the compiler cannot follow what the ranks"
                         " tell each other")
    if arguments.compile and config.num_experts:
        raise InputError("--compile: the compiler cannot follow how many tokens each expert gets; train without it")
    if arguments.precision == "bf16-pure" and (arguments.pp > 1 and config.tie_word_embeddings
                                               or config.vocab_size % arguments.tp):
        raise InputError("--precision bf16-pure rounds by chance, and ranks that hold the same weights would round"
                         " them differently: with --pp where the token table is tied, with --tp where it does not"
                         " divide the vocabulary; use bf16")


def label(model, mesh):
    """Give every parameter of a whole model its piece: all of it. From here on the model knows its mesh: model.mesh."""
    model.mesh, parameters = mesh, model.num_parameters()
    model.num_parameters = lambda: parameters   # of the whole, whatever will be cut from it
    for name, parameter in model.named_parameters():
        group = mesh.expert_data if ".experts." in name else mesh.data
        parameter.piece = Piece(name, tuple(parameter.shape), (0,) * parameter.dim(), group)


def cut(parameter, dim, start, length):
    """Rows (dim 0) or columns (dim 1) start to start + length of a parameter, as a parameter of its own, with its
    piece.
    """
    part = torch.nn.Parameter(parameter.data.narrow(dim, start, length).clone())
    offset = list(parameter.piece.offset)
    offset[dim] += start
    part.piece = Piece(**vars(parameter.piece) | {"offset": tuple(offset)})
    return part


def round_up(T, mesh):
    """The tokens that a pack of T is filled up to, so that it can be cut: over tp, and over cp into two pieces for each
    rank.
    """
    parts = mesh.tp.size * (2 * mesh.cp.size if mesh.cp.size > 1 else 1)
    return -(-T // parts) * parts


def count_copies(parameters, mesh):
    """For each parameter of this rank, how many ranks hold the same piece of the same tensor."""
    pieces = [(parameter.piece.name, parameter.piece.offset, tuple(parameter.shape)) for parameter in parameters]
    held = Counter(piece for one in mesh.gather(pieces) for piece in one)
    return [held[piece] for piece in pieces]


def checksum(tensor):
    """The sum of its bits, taken as integers of 16."""
    return tensor.detach().view(torch.int16).sum().item()


def clip_gradients(parameters, copies, mesh, limit):
    """clip_grad_norm_ over all ranks: scale the gradient of the whole model down to the length limit. Returns its
    length before.

    Each rank adds the squares of what it holds. What several ranks hold would count several times: so divide by the
    copies.
    """
    norms = torch.stack(torch._foreach_norm([parameter.grad for parameter in parameters]))
    norms = norms / torch.tensor(copies, device=norms.device).sqrt()
    norm = torch.linalg.vector_norm(norms)
    if mesh.world.size > 1:
        norm = mesh.world.all_reduce(norm.square()).sqrt()
    torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    return norm
