"""Makes tests/fixtures/pca.json: principal components by numpy's SVD in float64.

    python tools/pca_golden.py tests/fixtures/pca.json
"""
import json
import sys

import numpy as np


def case(rng, n, dim, k, decay):
    """`n` rows in `dim` dimensions whose spread falls by `decay` from one direction to the next, around a mean far from 0."""
    basis = np.linalg.qr(rng.normal(size=(dim, dim)))[0]
    rows = (rng.normal(size=(n, dim)) * decay ** np.arange(dim)) @ basis + rng.uniform(-3, 5, size=dim)
    rows = rows.astype(np.float32)
    centred = rows.astype(np.float64) - rows.astype(np.float64).mean(axis=0)
    _, values, components = np.linalg.svd(centred, full_matrices=False)
    components = components[:k]
    components *= np.sign(components[np.arange(k), np.abs(components).argmax(axis=1)])[:, None]
    return dict(
        dim=dim,
        k=k,
        rows=[float(v) for v in rows.ravel()],
        components=components.ravel().tolist(),
        coordinates=(centred @ components.T).ravel().tolist(),
        explained=(values[:k] ** 2 / (values**2).sum()).tolist(),
    )


def main(path):
    rng = np.random.default_rng(20201120)
    # More rows than dimensions, fewer, no more dimensions than components, and a flat spectrum.
    cases = [case(rng, 61, 7, 2, 0.7), case(rng, 9, 33, 2, 0.9), case(rng, 23, 3, 3, 0.8), case(rng, 40, 19, 4, 0.97)]
    with open(path, "w") as file:
        json.dump(cases, file)
        file.write("\n")


if __name__ == "__main__":
    main(sys.argv[1])
