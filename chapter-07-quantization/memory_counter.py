"""How many bytes does torch hold? On a GPU torch.cuda counts; this counts anywhere, even where nothing is computed.

    with Held() as held:
        loss = ...
        loss.backward()
    held.peak        # bytes of tensors made inside that lived at the same time, the most there were

Every operator's results pass by. Each result lives in a storage, a piece of memory that views of it share; its bytes
count from the operator that made it until the last tensor that uses it is gone. What an operator needs for itself and
gives back before it returns is not seen. Under FakeTensorMode tensors have shapes but no memory: then a model can be
counted that fits nowhere.
"""
import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class Held(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.living = set()

    def add(self, tensor):
        """Count a tensor that was there before, e.g. a weight."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self.living:   # a view adds nothing
            self.living.add(storage._cdata)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.forget, storage._cdata, storage.nbytes())

    def forget(self, storage, size):
        self.living.discard(storage)
        self.now -= size

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        results = operator(*args, **(kwargs or {}))
        for result in tree_iter(results):
            if isinstance(result, torch.Tensor):
                self.add(result)
        return results
