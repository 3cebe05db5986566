import torch


class QuantizedTensor(torch.Tensor):
    """Of weights that are kept in fp8, which nothing here does."""
