"""The op table at awkward and at large shapes: inputs made from random numbers on both sides, results as samples.

A file of the same kind as golden_ops.py writes, but for two things: metadata `cases` names the inputs and arriving gradients in
`generated`, {"in/x": {"shape": [...], "kind": ...}, ...}, instead of holding them; and of every result it holds samples
(generated.py).
"""

import json

import torch

from . import generated, golden_ops, op_cases, tensor_file, torch_ops

CHANNELS = (3, 7, 8, 24, 64, 2048)
MANY = 100_003


def cases():
    """Yields (case, op, attributes, {input: (shape, kind)})."""
    yield from _norm_cases()
    yield from _pool_cases()
    yield from _matmul_cases()
    yield from _loss_cases()
    yield from _elementwise_cases()


def _norm(name, shape, groups=1, affine=True, relu=True, residual=False):
    attributes = {"groups": groups, "eps": 1e-5, "momentum": 0.1, "relu": relu, "residual": residual, "affine": affine}
    return f"batch_norm/{name}", "batch_norm", attributes, _norm_inputs(shape, affine, residual)


def _norm_inputs(shape, affine, residual):
    c = shape[-1:]
    inputs = {"x": (shape, "gapped"), "running_mean": (c, "uniform"), "running_var": (c, "positive")}
    if affine:
        inputs |= {"gamma": (c, "gain"), "beta": (c, "small")}
    if residual:
        inputs["residual"] = (shape, "small")
    return inputs


def _norm_cases():
    for c in CHANNELS:
        yield _norm(f"groups_of_31x{c}", (2, 31, c), groups=2, residual=c % 2 == 0)
        yield _norm(f"groups_of_33x{c}", (3, 33, c), groups=3, relu=c != 24, affine=c != 7)
    for c in CHANNELS[:-1]:
        yield _norm(f"rows_{MANY}x{c}", (MANY, c), residual=c in (7, 64), affine=c != 24, relu=c != 24)
    yield _norm("stage1", (2, 56, 56, 64), groups=2)
    yield _norm("stage4", (2, 7, 7, 2048), groups=2, residual=True)
    for rows, c in [(1, 3), (1, 2048), (31, 7), (33, 24), (MANY, 64)]:
        attributes = {"eps": 1e-5, "relu": True, "residual": c == 24, "affine": c != 7}
        inputs = _norm_inputs((rows, c), attributes["affine"], attributes["residual"])
        yield f"batch_norm_eval/{rows}x{c}", "batch_norm_eval", attributes, inputs


def _pool_cases():
    pool = {"kernel": 3, "stride": 2, "padding": 1}
    for c in CHANNELS:
        yield f"max_pool/17x19x{c}", "max_pool", pool, {"x": ((1, 17, 19, c), "eighths")}
        yield f"global_avg_pool/7x7x{c}", "global_avg_pool", {}, {"x": ((31, 7, 7, c), "gapped")}
    yield "max_pool/stem", "max_pool", pool, {"x": ((2, 112, 112, 64), "eighths")}
    yield "global_avg_pool/100489_pixels", "global_avg_pool", {}, {"x": ((2, 317, 317, 3), "gapped")}


def _matmul_cases():
    #        case                        groups a     shape of a       b     shape of b      options
    table = [
        ("folded_56x56x64_256",          2, "",   (2, 56, 56, 64),  "T",  (2, 256, 64),   "bias addend relu"),
        ("folded_7x7x512_2048",          2, "",   (4, 7, 7, 512),   "T",  (2, 2048, 512), "bias addend relu"),
        ("folded_2001x7_24",             3, "",   (6003, 7),        "T",  (3, 24, 7),     "bias relu"),
        ("gram_3_groups_of_33335x24",    3, "T",  (100_005, 24),    "",   None,           "same widened"),
        ("gram_100005x7",                1, "T",  (100_005, 7),     "",   None,           "same widened"),
        ("gram_28x28x130",               2, "T",  (4, 28, 28, 130), "",   None,           "same widened"),
        ("gram_7x7x512",                 2, "T",  (2, 7, 7, 512),   "",   None,           "same widened"),
        ("two_weights_2048x512",         2, "S",  (2048, 512),      "",   (2, 512, 512),  ""),
        ("raw_wgrad_28x28x512x128",      2, "T",  (2, 28, 28, 512), "",   (2, 28, 28, 128), "widened"),
        ("raw_wgrad_100005x24x3",        3, "T",  (100_005, 24),    "",   (100_005, 3),   "widened"),
        ("weight_transposed_2048x512",   2, "TS", (2048, 512),      "",   (2, 2048, 512), ""),
        ("mean_part_14x14x256",          2, "",   (4, 14, 14, 256), "",   (2, 256, 256),  "bias"),
        ("through_weight_7x7x2048_512",  2, "",   (2, 7, 7, 2048),  "",   (2, 2048, 512), ""),
    ]  # fmt: skip
    for case, groups, a, a_shape, b, b_shape, options in table:
        attributes = op_cases.matmul_attributes(groups, a, b, options)
        inputs = {"a": (a_shape, "gapped")}
        if b_shape is not None:
            inputs["b"] = (b_shape, "uniform")
        if "bias" in options:
            inputs["bias"] = ((groups, b_shape[1]), "uniform")
        if "addend" in options:
            inputs["addend"] = ((*a_shape[:-1], b_shape[1]), "gapped")
        yield f"matmul/{case}", "matmul", attributes, inputs


def _loss_cases():
    for rows, d in [(1, 2048), (31, 2048), (33, 24), (1000, 3), (31, 7), (33, 8), (1000, 64)]:
        inputs = {"p": ((rows, d), "uniform"), "z": ((rows, d), "gapped")}
        for op in ("negative_cosine", "softmax_xent"):
            yield f"{op}/{rows}x{d}", op, {"z_shift": rows // 2}, inputs
        if rows > 1:
            yield f"z_std/{rows}x{d}", "z_std", {}, {"z": ((rows, d), "gapped")}
            yield f"cosine_loss/{rows}x{d}", "cosine_loss", {"z_shift": rows // 2}, inputs
    yield f"z_std/{MANY}x3", "z_std", {}, {"z": ((MANY, 3), "gapped")}


def _elementwise_cases():
    for shape in [(1, 2048), (31, 7), (MANY, 3), (33, 24)]:
        name = "x".join(map(str, shape))
        yield f"relu/{name}", "relu", {}, {"x": (shape, "uniform")}
        yield f"add/{name}", "add", {}, {"a": (shape, "uniform"), "b": (shape, "gapped")}
    for shape in [(33, 2048), (31, 7), (MANY, 3), (1, 24)]:
        yield f"add_bias/{'x'.join(map(str, shape))}", "add_bias", {}, {"x": (shape, "uniform"), "b": (shape[-1:], "gapped")}
    for shape, start, length in [((33, 24), 31, 1), ((MANY, 3), 1, 100_000)]:
        yield f"slice_rows/{shape[0]}x{shape[1]}", "slice_rows", {"start": start, "len": length}, {"x": (shape, "uniform")}
    for shape in [(MANY,), (2048, 24), (1,)]:
        inputs = {"w": (shape, "uniform"), "g": (shape, "small"), "v": (shape, "uniform")}
        attributes = {"lr": 0.0625, "momentum": 0.9, "weight_decay": 1e-4}
        yield f"sgd/{'x'.join(map(str, shape))}", "sgd", attributes, inputs


def make(path):
    """Writes the goldens; returns the number of cases."""
    tensors, table = {}, {}
    for case, op, attributes, recipe in cases():
        row, results = _run(case, op, attributes, recipe)
        table[case] = row
        tensors |= {f"{case}/{key}": generated.samples(tensor).contiguous() for key, tensor in results.items()}
    metadata = {"kind": "simsiam-ops", "cases": json.dumps(table, separators=(",", ":")), "torch": torch.__version__}
    tensor_file.write(path, tensors, metadata)
    return len(table)


def _run(case, op, attributes, recipe):
    """The row of a case for the table, and its results in full: {"out/y": ..., "d_in/x": ...}."""
    inputs = {name: generated.values(case, f"in/{name}", shape, kind) for name, (shape, kind) in recipe.items()}
    row = {"op": op, **attributes, "generated": {f"in/{n}": {"shape": s, "kind": k} for n, (s, k) in recipe.items()}}
    name, d_out = torch_ops.OPS[op][1], {}
    if name is not None:
        shape = list(torch_ops.OPS[op][0](inputs, attributes)[name].shape)
        row["generated"][f"d_out/{name}"] = {"shape": shape, "kind": "uniform"}
        d_out[name] = generated.values(case, f"d_out/{name}", shape or [1], "uniform").reshape(shape)
    outputs, d_in = torch_ops.run(op, attributes, inputs, d_out)
    results = _named(outputs, d_in)
    row |= {key: errors for key, errors in golden_ops.own_errors(op, attributes, inputs, d_out, results)}
    return row, results


def _named(outputs, d_in):
    return {f"out/{n}": t for n, t in outputs.items()} | {f"d_in/{n}": t for n, t in d_in.items()}


def is_generated(metadata):
    """Whether a file of op goldens is one of these."""
    return any("generated" in row for row in json.loads(metadata["cases"]).values())


def verify(tensors, metadata):
    """Recomputes every case of a file; returns a list of (case, worst relative error, None)."""
    results = []
    for case, row in json.loads(metadata["cases"]).items():
        recipe = {key[3:]: (value["shape"], value["kind"]) for key, value in row["generated"].items() if key.startswith("in/")}
        _, got = _run(case, row["op"], row, recipe)
        wanted = {name[len(case) + 1 :]: tensor for name, tensor in tensors.items() if name.startswith(f"{case}/")}
        if got.keys() != wanted.keys():
            raise ValueError(f"{case}: the file has other tensors than the op")
        worst = 0.0
        for name, tensor in wanted.items():
            difference = (generated.samples(got[name]) - tensor).abs().max()
            worst = max(worst, float(difference) / (float(tensor.abs().max()) + 1e-30))
        results.append((case, worst, None))
    return results
