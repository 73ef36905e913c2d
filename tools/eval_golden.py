"""Makes tests/fixtures/eval.safetensors: what scikit-learn and PyTorch make of given features.

    python tools/eval_golden.py tests/fixtures/eval.safetensors

knn/*        scikit-learn's KNeighborsClassifier with the cosine metric and weights exp(cos / T), in float64: predictions, and
             whether the label is among the five classes with most votes (of those that were voted for).
logistic/*   scikit-learn's LogisticRegression without penalty: how many test rows it gets right.
steps/*      linear heads in PyTorch (float64): full batches, momentum 0.9, cosine by epoch; SGD, and LARS in the formulas of apex's
             LARC with clip=False around torch.optim.SGD.
"""
import json
import math
import sys

import numpy as np
import torch
from safetensors.numpy import save_file
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

KS = [1, 5, 20, 50, 256]
TEMPERATURES = [0.07, 0.2, 1.0]
HEADS = [("lars", 1.0), ("lars", 6.0), ("sgd", 0.25), ("sgd", 4.0)]
EPOCHS = 12


def quantised(rng, labels, centres, noise):
    """Features as bytes, which stand for (byte - 128) / 32."""
    values = centres[labels] + noise * rng.normal(size=(len(labels), centres.shape[1]))
    return np.clip(np.round(values * 32 + 128), 0, 255).astype(np.uint8)


def values(stored):
    return (stored.astype(np.float64) - 128) / 32


def knn(rng):
    dim, classes = 24, 9
    centres = 0.35 * rng.normal(size=(classes, dim))
    bank_labels = rng.choice(classes, size=300, p=np.arange(1, classes + 1) / 45)
    query_labels = rng.integers(classes, size=90)
    bank, queries = quantised(rng, bank_labels, centres, 0.6), quantised(rng, query_labels, centres, 0.6)
    cosines = -np.sort(-(unit(values(queries)) @ unit(values(bank)).T), axis=1)
    predictions, among_five, kept = [], [], np.ones(len(queries), bool)
    for k in KS:
        # A query is left out where rounding to float32 could decide.
        if k < len(bank):
            kept &= cosines[:, k - 1] - cosines[:, k] > 1e-6
        for temperature in TEMPERATURES:
            model = KNeighborsClassifier(k, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / temperature))
            votes = model.fit(values(bank), bank_labels).predict_proba(values(queries))
            assert model.classes_.tolist() == list(range(classes))
            ordered = -np.sort(-votes, axis=1)
            kept &= ordered[:, 0] - ordered[:, 1] > 1e-6
            kept &= (ordered[:, 4] - ordered[:, 5] > 1e-6) | (ordered[:, 4] == 0)
            predictions.append(model.predict(values(queries)))
            own = votes[np.arange(len(queries)), query_labels]
            among_five.append((own > 0) & ((votes > own[:, None]).sum(1) < 5))
    print(f"knn: {kept.sum()} of {len(queries)} queries are kept")
    predictions, among_five = np.stack(predictions)[:, kept], np.stack(among_five)[:, kept]
    for (k, t), row in zip([(k, t) for k in KS for t in TEMPERATURES], predictions):
        print(f"  k {k}, T {t}: {(row == query_labels[kept]).mean():.3f}")
    return {
        "knn/bank": bank,
        "knn/bank_labels": bank_labels.astype(np.uint8),
        "knn/queries": queries[kept],
        "knn/query_labels": query_labels[kept].astype(np.uint8),
        "knn/predictions": predictions.astype(np.uint8),
        "knn/among_five": among_five.astype(np.uint8),
    }


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def logistic(rng):
    dim, classes = 16, 5
    centres = 0.5 * rng.normal(size=(classes, dim))
    labels, test_labels = rng.integers(classes, size=700), rng.integers(classes, size=1000)
    train, test = quantised(rng, labels, centres, 0.8), quantised(rng, test_labels, centres, 0.8)
    model = LogisticRegression(C=np.inf, max_iter=10_000, tol=1e-8).fit(values(train), labels)
    right = int((model.predict(values(test)) == test_labels).sum())
    print(f"logistic: {right} of {len(test)} right, train {model.score(values(train), labels):.3f}")
    return {
        "logistic/train": train,
        "logistic/train_labels": labels.astype(np.uint8),
        "logistic/test": test,
        "logistic/test_labels": test_labels.astype(np.uint8),
    }, right


def larc(weights, trust=0.001, eps=1e-8):
    """The gradients as LARC (clip=False, weight decay 0) scales them."""
    for w in weights:
        w_norm, g_norm = torch.linalg.vector_norm(w.data), torch.linalg.vector_norm(w.grad)
        if w_norm != 0 and g_norm != 0:
            w.grad.mul_(trust * w_norm / (g_norm + eps))


def steps(rng):
    dim, classes, rows = 21, 7, 130
    labels = rng.integers(classes, size=rows)
    features = quantised(rng, labels, 0.5 * rng.normal(size=(classes, dim)), 0.7)
    start = (0.01 * rng.normal(size=(classes, dim))).astype(np.float32)
    x, y = torch.from_numpy(values(features)), torch.from_numpy(labels)
    out = {"steps/features": features, "steps/labels": labels.astype(np.uint8), "steps/weight": start}
    for number, (name, lr) in enumerate(HEADS):
        weight = torch.nn.Parameter(torch.from_numpy(start.astype(np.float64)))
        bias = torch.nn.Parameter(torch.zeros(classes, dtype=torch.float64))
        optimiser = torch.optim.SGD([weight, bias], lr, momentum=0.9)
        losses = []
        for epoch in range(EPOCHS):
            optimiser.param_groups[0]["lr"] = lr / 2 * (1 + math.cos(math.pi * epoch / EPOCHS))
            optimiser.zero_grad()
            loss = torch.nn.functional.cross_entropy(x @ weight.T + bias, y)
            loss.backward()
            if name == "lars":
                larc([weight, bias])
            optimiser.step()
            losses.append(loss.item())
        print(f"steps: {name} {lr}: loss {losses[0]:.4f} to {losses[-1]:.4f}")
        out |= {f"steps/{number}/weight": weight.detach().numpy(), f"steps/{number}/bias": bias.detach().numpy()}
        out |= {f"steps/{number}/losses": np.array(losses)}
    return out


def main(path):
    rng = np.random.default_rng(20201120)
    tensors = knn(rng)
    logistic_tensors, right = logistic(rng)
    tensors |= logistic_tensors | steps(rng)
    facts = dict(ks=KS, temperatures=TEMPERATURES, heads=HEADS, epochs=EPOCHS, logistic_right=right)
    save_file({name: np.ascontiguousarray(t) for name, t in tensors.items()}, path, {"facts": json.dumps(facts)})


if __name__ == "__main__":
    main(sys.argv[1])
