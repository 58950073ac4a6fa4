"""Vocabulary-free recognition, where the memory's names are guesses and a right answer may be spelled otherwise: two measures.

- Clustering accuracy (cACC): predicted names are clusters, whatever they say. Each true class is paired with at most one of
  them so that most images agree (the Hungarian method); the share that agrees counts. Consistently wrong names do well.
- Semantic similarity (sACC): the mean cosine of the embeddings of predicted and true name. It is no accuracy: unrelated names
  have a cosine well above 0, and each encoder has its own scale. FineR uses all-mpnet-base-v2; here any local sentence encoder
  serves (encoder.sentences), or a CLIP's own text tower, and numbers of two encoders must not be held against each other.

Definitions after FineR (arXiv 2401.13837); RAR's Table 1 has both, as percentages.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np


def cluster_accuracy(predicted: Sequence[str], truth: Sequence[str]) -> float:
    """cACC of N images, a fraction; NaN for none. Names are compared as they stand: another spelling is another cluster."""
    from scipy.optimize import linear_sum_assignment

    if len(predicted) != len(truth):
        raise ValueError(f"{len(predicted)} predictions but {len(truth)} labels")
    if not len(truth):
        return float("nan")
    clusters, cluster_of = np.unique(np.asarray(predicted, dtype=str), return_inverse=True)
    classes, class_of = np.unique(np.asarray(truth, dtype=str), return_inverse=True)
    together = np.zeros((len(clusters), len(classes)), np.int64)
    np.add.at(together, (cluster_of, class_of), 1)
    rows, columns = linear_sum_assignment(together, maximize=True)
    return float(together[rows, columns].sum() / len(truth))


def semantic_similarity(predicted: Sequence[str], truth: Sequence[str], embed: Callable[[list[str]], np.ndarray]) -> float:
    """sACC of N images: the mean cosine of both names' embeddings, in -1..1; NaN for none.

    embed: M texts -> (M, D), any length but zero; called once, with every distinct name. NaN also where most names share their
    embedding with another: an encoder that does not know the words would call everything the same.
    """
    if len(predicted) != len(truth):
        raise ValueError(f"{len(predicted)} predictions but {len(truth)} labels")
    if not len(truth):
        return float("nan")
    names, places = np.unique(np.asarray([*predicted, *truth], dtype=str), return_inverse=True)
    vectors = np.asarray(embed(names.tolist()), np.float64)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    if 2 * len(np.unique(vectors.round(4), axis=0)) < len(names):
        return float("nan")
    left, right = vectors[places[: len(truth)]], vectors[places[len(truth) :]]
    return float((left * right).sum(axis=1).mean())
