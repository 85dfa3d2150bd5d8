"""What the tests watch PyTorch's operations with."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode


WAITING = ("_local_scalar_dense", "nonzero", "bincount", "masked_select", "_unique2", "equal", "is_nonzero")


class Recorder(TorchDispatchMode):
    """Attributes: waits: the operations that make the host wait for the device (reading a value, or a result whose size
    depends on values); largest: how many numbers the largest tensor made has; operations: all of them, by name."""

    def __init__(self):
        super().__init__()
        self.waits, self.largest, self.operations = [], 0, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        by_mask = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        if name in WAITING or by_mask:
            self.waits.append(name)
        self.operations.add(str(function))
        result = function(*args, **(kwargs or {}))
        made = result if isinstance(result, (tuple, list)) else [result]
        self.largest = max(self.largest, *(one.numel() for one in made if isinstance(one, torch.Tensor)), 0)
        return result
