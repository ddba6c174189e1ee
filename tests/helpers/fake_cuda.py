"""Whether tensors on a fake CUDA device can be made here."""

import pytest
import torch

TRACES_CUDA = torch.cuda.is_available() or torch.__version__ >= "2.14"
"""2.14 is the oldest torch on which these tests ran without a GPU; 2.6 asks the driver for fake tensors too."""
traces_cuda = pytest.mark.skipif(not TRACES_CUDA, reason="this torch needs a CUDA driver even for fake CUDA tensors")
