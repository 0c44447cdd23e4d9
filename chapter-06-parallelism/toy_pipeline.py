"""Pipeline parallelism with two ranks and two layers: activations go to the right, gradients come back to the left.

    torchrun --nproc_per_node 2 toy_pipeline.py        (in this folder)
"""
import torch
import torch.distributed as dist

dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(0)   # the same numbers on both ranks
torch.set_default_dtype(torch.float64)
first, second = torch.randn(8, 4, requires_grad=True), torch.randn(4, 8, requires_grad=True)
packs = torch.randn(3, 5, 4)

# One process: two layers, three microbatches, their gradients added up.
for x in packs:
    (torch.tanh(x @ first.T) @ second.T).square().sum().backward()
expected = [first.grad, second.grad][rank]
first.grad = second.grad = None

if rank == 0:   # the first stage: all forwards, then all backwards (GPipe)
    kept = []
    for x in packs:
        h = torch.tanh(x @ first.T)                 # (5, 8)
        dist.send(h.detach(), dst=1)                # while rank 1 works on it, this one begins the next
        kept.append(h)
    for h in kept:
        dh = torch.empty_like(h)
        dist.recv(dh, src=1)
        h.backward(dh)
else:           # the last stage: forward and backward of a microbatch as soon as it is there
    sending = []
    for _ in packs:
        h = torch.empty(5, 8)
        dist.recv(h, src=0)
        h.requires_grad_()                          # so that backward ends here, with a gradient to send back
        (h @ second.T).square().sum().backward()
        # Not send: rank 0 still sends too, and both would wait for the other for ever.
        sending.append(dist.isend(h.grad, dst=0))
    for send in sending:
        send.wait()

torch.testing.assert_close([first.grad, second.grad][rank], expected)
print(f"rank {rank}: the gradient of its layer equals one process")
dist.destroy_process_group()
