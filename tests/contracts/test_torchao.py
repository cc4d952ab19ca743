"""Private names of torchao."""

import pytest
import torch

from tests.contracts.contract import contract


@contract(
    "_precomputed_scale", needed_by="owl/precision/fp8.py: a validation forgets the scales of the trained weights"
)
def test_a_weight_without_a_precomputed_scale_computes_its_own() -> None:
    fsdp_utils = pytest.importorskip("torchao.float8.fsdp_utils")
    from torchao.float8.float8_training_tensor import LinearMMConfig

    weight = fsdp_utils.WeightWithDynamicFloat8CastTensor(torch.ones(16, 16), LinearMMConfig(), torch.float8_e4m3fn)
    assert weight._precomputed_scale is None
    assert "_precomputed_scale" not in weight.__tensor_flatten__()[0]
    weight._precomputed_scale = torch.ones(())
    assert "_precomputed_scale" in weight.__tensor_flatten__()[0]
