"""What Megatron-Core 0.19 asks of Transformer Engine, in plain torch, since the real one runs on GPUs alone.

Names, signatures and what is refused are those of release 2.20. Tests put the folder above on PYTHONPATH.
"""

from transformer_engine import common, pytorch

__all__ = ["common", "pytorch"]
__version__ = "2.20.2"
