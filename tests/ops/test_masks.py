from __future__ import annotations

import pytest
import torch

from lorasculpt.ops.masks import kept, magnitude_mask, pack, unpack


@pytest.mark.parametrize(("numel", "density", "count"), [(10, 0.1, 1), (19, 0.1, 1), (256, 0.04, 10), (7, 1.0, 7)])
def test_the_count_is_rounded_down(numel, density, count):
    assert kept(numel, density) == count


def test_a_density_that_keeps_nothing_is_refused_and_the_least_possible_one_named():
    with pytest.raises(ValueError, match=r"keeps no entry of a tensor of 9; use at least 0\.11$"):
        kept(9, 0.1)


@pytest.mark.parametrize("shape", [(8, 32), (32, 8), (7, 5)])
@pytest.mark.parametrize("density", [0.04, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_largest_magnitudes_are_kept_exactly_counted(shape, density, dtype):
    weight = torch.randn(shape).to(dtype)
    mask = magnitude_mask(weight, density)
    assert mask.shape == weight.shape
    assert mask.dtype == torch.bool
    assert int(mask.sum()) == int(density * weight.numel())
    left_out = weight[~mask].abs()
    assert not left_out.numel() or weight[mask].abs().min() >= left_out.max()


@pytest.mark.parametrize("weight", [torch.zeros(6, 5), torch.ones(6, 5), torch.tensor([[1.0, -1.0, 1.0, -1.0, 0.5]])])
def test_ties_do_not_change_the_count(weight):
    assert int(magnitude_mask(weight, 0.4).sum()) == int(0.4 * weight.numel())


def test_the_sign_does_not_matter_and_the_weight_is_left_alone():
    weight = torch.tensor([[-4.0, 1.0], [2.0, -3.0]], requires_grad=True)
    mask = magnitude_mask(weight, 0.5)
    assert mask.tolist() == [[True, False], [False, True]]
    assert not mask.requires_grad
    assert weight.tolist() == [[-4.0, 1.0], [2.0, -3.0]]


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (8, 1), (3, 3), (4, 16), (5, 13), (32, 33)])
def test_packed_masks_come_back(shape):
    mask = torch.rand(shape) < 0.4
    packed = pack(mask)
    assert packed.dtype == torch.uint8
    assert packed.numel() == -(-mask.numel() // 8)
    assert torch.equal(unpack(packed, mask.shape), mask)


def test_the_first_entry_is_the_lowest_bit():
    """The layout is in files, so it may not change."""
    mask = torch.zeros(2, 5, dtype=torch.bool)
    mask[0, 0] = mask[1, 4] = True
    assert pack(mask).tolist() == [0b00000001, 0b00000010]
