"""The projection: orthonormal, exact where the vectors lie in few dimensions, and better than any other on real ones."""

from __future__ import annotations

import numpy as np
import pytest

from rar.memory import reduced
from tests.stores import lying_low, needs_data, real, unit


def test_a_ninth_rounded_up_and_never_below_what_milvus_takes() -> None:
    assert [reduced.reduced_dim(dim, 9) for dim in (512, 1024, 10, 9, 2)] == [57, 114, 2, 2, 2]


def test_vectors_that_lie_in_few_dimensions_keep_their_products() -> None:
    vectors, others = lying_low(50), lying_low(20, seed=1)
    projection = reduced.fit(vectors, 4)
    assert projection.shape == (36, 4) and projection.dtype == np.float32
    np.testing.assert_allclose((others @ projection) @ (vectors @ projection).T, others @ vectors.T, atol=1e-5)


def test_fewer_vectors_than_dimensions_are_fitted_all_the_same() -> None:
    projection = reduced.fit(unit(2, 36), 4)
    np.testing.assert_allclose(projection.T @ projection, np.eye(4), atol=1e-5)


def test_a_large_sample_is_thinned_out_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reduced, "MAX_SAMPLE", 10)
    vectors = np.repeat(np.eye(4, dtype=np.float32), 10, axis=0) * np.repeat([[4], [3], [2], [1]], 10, axis=0)
    axes = np.abs(reduced.fit(vectors, 4)).argmax(axis=0)
    assert axes.tolist() == [0, 1, 2, 3]  # a sample of the first ten would know one axis


@needs_data
def test_no_random_projection_keeps_real_products_as_well() -> None:
    vectors = real("cub200")[0]
    entries, queries = vectors[::2], vectors[1::2]
    errors = [
        float(np.square((queries @ one) @ (entries @ one).T - queries @ entries.T).mean())
        for one in (reduced.fit(entries, 57), *(np.linalg.qr(unit(512, 57, seed=n))[0] for n in range(3)))
    ]
    assert errors[0] * 10 < min(errors[1:])


@pytest.mark.parametrize("dim", [1, 2, 3, 512, 1024])
def test_text_is_exact(dim: int) -> None:
    vectors = unit(5, dim)
    texts = reduced.to_text(vectors)
    assert {len(text) for text in texts} == {reduced.text_length(dim)}
    assert (reduced.from_text(texts, dim) == vectors).all()
    assert reduced.from_text([], dim).shape == (0, dim)


def test_fingerprints_tell_projections_apart() -> None:
    one = reduced.fit(unit(50, 36), 4)
    assert reduced.fingerprint(one) == reduced.fingerprint(np.asfortranarray(one.copy())) != reduced.fingerprint(one[:, ::-1])
