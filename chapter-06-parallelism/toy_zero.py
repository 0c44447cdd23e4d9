"""ZeRO stage 1 with two ranks and one matrix: each keeps Adam's moments for half of its rows, and updates only these.

    torchrun --nproc_per_node 2 toy_zero.py        (in this folder)
"""
import torch
import torch.distributed as dist

dist.init_process_group("gloo")
rank, ranks = dist.get_rank(), dist.get_world_size()
torch.manual_seed(0)   # the same numbers on both ranks
torch.set_default_dtype(torch.float64)
weight, batches = torch.randn(6, 4), torch.randn(3, ranks, 5, 4)   # 3 steps; each rank has a batch of 5 rows in each

# One process sees the batches of both ranks in every step.
alone = weight.clone().requires_grad_()
adam = torch.optim.Adam([alone], lr=0.1)
for step in batches:
    adam.zero_grad()
    (step.flatten(0, 1) @ alone.T).square().sum().backward()
    adam.step()

# Two ranks. Both hold the whole weight, because forward needs it, but the optimizer knows three of the six rows only.
copy, rows = weight.clone().requires_grad_(), slice(rank * 6 // ranks, (rank + 1) * 6 // ranks)
shard = copy.detach()[rows].requires_grad_()           # shares its memory with copy
adam = torch.optim.Adam([shard], lr=0.1)               # moments for 3 rows instead of 6
for step in batches:
    copy.grad = None
    (step[rank] @ copy.T).square().sum().backward()    # of this rank's batch only
    shard.grad = torch.empty_like(shard)
    dist.reduce_scatter(shard.grad, list(copy.grad.chunk(ranks)))   # the sum over the ranks, of it my rows
    adam.step()
    dist.all_gather(list(copy.detach().chunk(ranks)), shard.detach().clone())   # and now the rows of the others

torch.testing.assert_close(copy, alone)
moments = sum(tensor.numel() for tensor in adam.state[shard].values() if tensor.dim())
print(f"rank {rank}: the weight after 3 steps equals one process; moments held here: {moments} of {2 * weight.numel()}"
      " numbers")
dist.destroy_process_group()
