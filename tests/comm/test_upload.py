from __future__ import annotations

import torch

from hpc_distkv.comm.device import ALIGNMENT, upload


def test_tensors_arrive_as_they_are_and_aligned():
    tensors = [
        torch.tensor([1, 2, 3], dtype=torch.int32),
        torch.empty(0, dtype=torch.int64),
        torch.tensor([[0.5], [1.5]], dtype=torch.float64),
        torch.arange(6, dtype=torch.int32).view(2, 3).T,
        torch.tensor(7),
    ]
    copies = upload(tensors, torch.device("cpu"))
    for copy, tensor in zip(copies, tensors, strict=True):
        assert copy.dtype == tensor.dtype
        assert torch.equal(copy, tensor)
        assert copy.data_ptr() % ALIGNMENT == copies[0].data_ptr() % ALIGNMENT
    assert len({copy.untyped_storage().data_ptr() for copy in copies if copy.numel()}) == 1
    assert upload([], torch.device("cpu")) == []
