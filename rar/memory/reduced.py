"""The 1/9 index's projection: d dimensions to d/9 that keep inner products, and vectors as text for the rescoring.

Hard choices, and what they cost:
- PCA without centring: the top eigenvectors of the second moments E[v v^T]. Inner products are to be kept, not variances, and
  the subspace that keeps them best for queries distributed like the entries is this one. It is linear, so queries and entries
  are projected alike, with no mean to carry along. On the real embeddings centring (with one more dimension for the entries'
  product with the mean) changed the recall before rescoring by less than a point, up or down.
- How long a shortlist must be grows with the memory. On drawn vectors that lie as CLIP's do (`rar.bench.embeddings`), 512
  dimensions, recall@10 after rescoring was 0.96 with 10 entries a neighbor, 0.985 with 20, 0.99 with 30 at 20,000 entries; at
  60,000 the projection itself allows no more than 0.89, 0.94, 0.97. The recorded memories, of some thousand, need no more
  than 10. A search takes time in proportion.
- The full vector travels as text, base64 of float32, in a string field. A Milvus of 2.3 holds one vector field a collection,
  and a string costs one Python object where a vector would cost one a dimension. The price is a third more bytes.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence

import numpy as np

MAX_SAMPLE = 20_000  # vectors that a projection is fitted on; their second moments cost MAX_SAMPLE * d^2 operations
MIN_DIM = 2  # of a Milvus vector field


def reduced_dim(dim: int, reduction: int) -> int:
    return max(MIN_DIM, -(-dim // reduction))


def fit(sample: np.ndarray, dim: int) -> np.ndarray:
    """The projection (D, dim) float32, orthonormal columns, of a sample (N, D) float32; reduced = vectors @ projection.

    More than MAX_SAMPLE vectors are thinned out evenly. Fewer vectors than `dim` are enough to be run, not to be good.
    """
    thinned = sample[:: max(1, -(-len(sample) // MAX_SAMPLE))].astype(np.float64)
    _, vectors = np.linalg.eigh(thinned.T @ thinned)  # ascending
    return np.ascontiguousarray(vectors[:, ::-1][:, :dim], np.float32)


def fingerprint(projection: np.ndarray) -> str:
    """16 hex digits that tell one projection from another."""
    return hashlib.sha256(np.ascontiguousarray(projection, np.float32).tobytes()).hexdigest()[:16]


def text_length(dim: int) -> int:
    """Characters of one vector as text: 16 for 3 dimensions, padded, so that texts can be joined and decoded in one go."""
    return 16 * -(-dim // 3)


def to_text(vectors: np.ndarray) -> list[str]:
    """(N, D) float32 -> N texts of `text_length(D)` characters, exact."""
    padded = np.pad(np.asarray(vectors, "<f4"), ((0, 0), (0, -vectors.shape[1] % 3)))
    return [base64.b64encode(row.tobytes()).decode() for row in padded]


def from_text(texts: Sequence[str], dim: int) -> np.ndarray:
    """The inverse of `to_text`: (N, dim) float32."""
    flat = np.frombuffer(base64.b64decode("".join(texts)), "<f4")
    return flat.reshape(len(texts), 3 * -(-dim // 3))[:, :dim]
