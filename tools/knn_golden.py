"""Makes tests/fixtures/knn.json: a weighted kNN classifier in numpy float64, straight from its definition.

    python tools/knn_golden.py tests/fixtures/knn.json
"""
import json
import sys

import numpy as np


def weighted_knn(bank, labels, queries, classes, k, temperature):
    """Scores (queries x classes): the k bank rows of highest cosine vote for their class with weight exp(cos / T)."""
    bank = bank / np.linalg.norm(bank, axis=1, keepdims=True)
    queries = queries / np.linalg.norm(queries, axis=1, keepdims=True)
    scores = np.zeros((len(queries), classes))
    for row, cosines in enumerate(queries @ bank.T):
        for neighbour in np.argsort(-cosines, kind="stable")[:k]:
            scores[row, labels[neighbour]] += np.exp(cosines[neighbour] / temperature)
    return scores


def main(path):
    rng = np.random.default_rng(20201120)
    dim, classes, bank_rows, query_rows = 7, 4, 61, 23
    centres = rng.normal(size=(classes, dim))
    draw = lambda labels: np.round(centres[labels] + 1.1 * rng.normal(size=(len(labels), dim)), 3) * rng.uniform(
        0.5, 8.0, size=(len(labels), 1)
    ).round(1)
    labels = rng.choice(classes, size=bank_rows, p=[0.4, 0.3, 0.2, 0.1])
    query_labels = rng.integers(classes, size=query_rows)
    # Stored and computed as the float32 values that the engine sees.
    bank, queries = (draw(l).astype(np.float32) for l in (labels, query_labels))
    cases = []
    for k, temperature in [(1, 0.1), (5, 0.1), (20, 0.1), (20, 1.0), (61, 0.2), (61, 5.0)]:
        scores = weighted_knn(bank.astype(np.float64), labels, queries.astype(np.float64), classes, k, temperature)
        ordered = np.sort(scores, axis=1)
        assert (ordered[:, -1] > ordered[:, -2] * 1.0001).all(), "too close to a tie to test in float32"
        predictions = scores.argmax(axis=1)
        cases.append(
            dict(k=k, temperature=temperature, predictions=predictions.tolist(), correct=int((predictions == query_labels).sum()))
        )
    golden = dict(
        dim=dim,
        classes=classes,
        bank=[float(x) for x in bank.ravel()],
        bank_labels=labels.tolist(),
        queries=[float(x) for x in queries.ravel()],
        query_labels=query_labels.tolist(),
        cases=cases,
    )
    with open(path, "w") as file:
        json.dump(golden, file)
        file.write("\n")
    for case in cases:
        print(f"k {case['k']}, T {case['temperature']}: {case['correct']} of {query_rows} correct")


if __name__ == "__main__":
    main(sys.argv[1])
