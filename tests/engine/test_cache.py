"""The paged cache: what stands in a page is in one piece."""

import mlx.core as mx
import numpy as np
import pytest

from marlin_cli.engine.cache import ROWS_PER_PAGE, Pages


def test_pages_of_a_prompt_are_no_views_into_it():
    keys = mx.random.normal((1, 2, 2 * ROWS_PER_PAGE + 3, 8))
    pages = Pages(16).append(keys)
    mx.eval(pages)
    assert [page.shape[2] for page in pages] == [ROWS_PER_PAGE, ROWS_PER_PAGE, 3]
    assert all(np.array(page, copy=False).flags.c_contiguous for page in pages[:2])
    np.testing.assert_array_equal(np.concatenate([np.array(page) for page in pages], axis=2), np.array(keys))


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_rows_that_are_written_in_place(bits):
    """Room is in the last page alone, a page that is full is whole, and what was taken back is gone."""
    keys = mx.random.normal((1, 2, ROWS_PER_PAGE - 2, 32))
    pages = Pages(bits)
    pages.append(keys)
    before = [[np.array(part) for part in page] for page in pages.with_room()]
    assert len(before) == 1 and before[0][0].shape[2] == ROWS_PER_PAGE
    pages.wrote(2)
    assert len(pages.pages) == 1 and pages.stored()[0].shape[2] == ROWS_PER_PAGE
    pages.wrote(-1)
    assert pages.stored()[0].shape[2] == ROWS_PER_PAGE - 1
    pages.wrote(1)
    full, last = pages.with_room()
    assert [part.shape for part in last] == [part.shape for part in full] and len(pages.pages) == 1
    assert pages.stored()[0].shape[2] == ROWS_PER_PAGE and pages.nbytes == sum(part.nbytes for part in full)
    pages.wrote(1)
    pages.wrote(-1)
    assert len(pages.pages) == 1
    pages.append(keys[:, :, :3])
    found = pages.stored()
    assert found[0].shape[2] == ROWS_PER_PAGE + 3
    for mine, begun in zip(found, before[0], strict=True):
        assert np.array_equal(np.array(mine)[:, :, : ROWS_PER_PAGE - 2], begun[:, :, : ROWS_PER_PAGE - 2])
