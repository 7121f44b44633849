"""The paged cache: what stands in a page is in one piece."""

import mlx.core as mx
import numpy as np

from marlin_cli.engine.cache import ROWS_PER_PAGE, Pages


def test_pages_of_a_prompt_are_no_views_into_it():
    keys = mx.random.normal((1, 2, 2 * ROWS_PER_PAGE + 3, 8))
    pages = Pages(16).append(keys)
    mx.eval(pages)
    assert [page.shape[2] for page in pages] == [ROWS_PER_PAGE, ROWS_PER_PAGE, 3]
    assert all(np.array(page, copy=False).flags.c_contiguous for page in pages[:2])
    np.testing.assert_array_equal(np.concatenate([np.array(page) for page in pages], axis=2), np.array(keys))
