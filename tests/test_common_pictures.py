"""Images between [-1, 1] and bytes, grids of images, and masks as pictures."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from common.pictures import captioned_sheet, class_color, from_uint8, grid_image, mask_picture, to_uint8


@pytest.mark.parametrize(("value", "byte"), [(-1.0, 0), (1.0, 255), (0.0, 128), (-3.0, 0), (7.0, 255)])
def test_images_are_rounded_and_clipped_to_bytes(value, byte):
    assert np.all(to_uint8(torch.full((3, 2, 4), value)) == byte)
    assert to_uint8(torch.zeros(3, 2, 4)).shape == (2, 4, 3)


def test_grid_places_rows_and_columns():
    dark, bright = torch.full((3, 4, 6), -1.0), torch.full((3, 4, 6), 0.0)
    grid = grid_image([[dark, bright], [bright, dark]])
    assert grid.shape == (2 * 6 + 2, 2 * 8 + 2, 3)
    assert grid[3, 3, 0] == 0 and grid[3, 11, 0] == 128 and grid[9, 3, 0] == 128 and grid[0, 0, 0] == 255


def test_mask_picture_shows_background_black_and_cells_white():
    prob_map = torch.tensor([[[1.0, 0.0, 0.5]], [[0.0, 1.0, 0.5]]])
    assert torch.allclose(mask_picture(prob_map), torch.tensor([-1.0, 1.0, 0.0]).expand(3, 1, 3), atol=1e-6)


def test_from_uint8_undoes_to_uint8_for_every_byte_and_any_strides():
    every = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, 2)
    for image in (every, every[::-1, 3:9], np.rot90(every, 1)):
        assert np.array_equal(to_uint8(from_uint8(image)), image)
    scaled = from_uint8(every[:2])
    assert scaled.shape == (3, 2, 16) and scaled.dtype == torch.float32 and scaled.min() == -1
    assert from_uint8(every).max() == 1


@pytest.mark.parametrize(("side", "shown"), [(16, 128), (64, 128), (100, 100), (512, 512), (1024, 512)])
def test_small_pictures_are_magnified_and_large_ones_made_smaller(side, shown):
    white, black = torch.ones(1, side, side), -torch.ones(1, side, side)
    sheet = captioned_sheet(("a", "b"), [[white, black]] * 2)[..., 0]
    dark = sheet[-shown // 2] < 10
    assert dark[76:].sum() == 2 * shown  # left of it stands the caption


def test_every_row_has_its_caption():
    picture = torch.ones(3, 64, 64)
    sheet = captioned_sheet(("mask", "real", "synthetic"), [[picture] * 3])[..., 0]
    rows = np.flatnonzero((sheet < 128).any(axis=1))
    assert len(np.split(rows, np.flatnonzero(np.diff(rows) > 60) + 1)) == 3


def test_no_two_of_sixteen_classes_look_alike_and_the_background_alone_is_black():
    colors = [class_color(number) for number in range(16)]
    assert len(set(colors)) == 16
    assert class_color(0) == (0, 0, 0) and all(max(class_color(number)) > 100 for number in range(1, 256))
