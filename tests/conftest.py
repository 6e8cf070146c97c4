import torch
from processes import mixmo, server

__all__ = ["mixmo", "server"]

torch.set_num_threads(1)
