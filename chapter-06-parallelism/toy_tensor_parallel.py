"""Tensor parallelism with two ranks and one MLP: each has half of both matrices, and one all-reduce makes it whole.

    torchrun --nproc_per_node 2 toy_tensor_parallel.py        (in this folder)
"""
import torch
import torch.distributed as dist

dist.init_process_group("gloo")
rank, ranks = dist.get_rank(), dist.get_world_size()
torch.manual_seed(0)   # the same numbers on both ranks
torch.set_default_dtype(torch.float64)
x, up, down = torch.randn(4, 8), torch.randn(32, 8, requires_grad=True), torch.randn(8, 32, requires_grad=True)

# One process: y = down gelu(up x), and a loss.
whole = torch.nn.functional.gelu(x @ up.T) @ down.T     # (4, 8)
whole.square().sum().backward()

# Two ranks. Rank 0 has the first 16 hidden features, rank 1 the others: rows of up, and the columns of down that read
# them. Until here nobody needs the other: gelu looks at one feature at a time.
mine = slice(rank * 32 // ranks, (rank + 1) * 32 // ranks)
my_up, my_down = up[mine].detach().requires_grad_(), down[:, mine].detach().requires_grad_()
part = torch.nn.functional.gelu(x @ my_up.T) @ my_down.T   # (4, 8), a part of each sum over the 32 features
y = part.detach().clone()
dist.all_reduce(y)                                          # now it is the sum over all 32

# Back: y is a sum of the parts, so each part gets y's gradient as it is, and no rank needs the other again.
part.backward(2 * y)
for name, ours, theirs in (("output", y, whole), ("gradient of up", my_up.grad, up.grad[mine]),
                           ("gradient of down", my_down.grad, down.grad[:, mine])):
    torch.testing.assert_close(ours, theirs)
    print(f"rank {rank}: {name} {tuple(ours.shape)} equals one process")
dist.destroy_process_group()
