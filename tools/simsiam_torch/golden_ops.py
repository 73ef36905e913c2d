"""The op table's goldens: every op and every gradient of it, alone, by PyTorch in float64.

One safetensors file, metadata `kind=simsiam-ops` and `cases`, a JSON object {case: {"op": name, attributes...}}. Tensors, all F64:

    <case>/in/<name>     inputs; every value is exactly a float32, so all precisions start from the same numbers
    <case>/out/<name>    outputs
    <case>/d_out/<name>  gradients that arrive at the outputs (random, exactly float32)
    <case>/d_in/<name>   gradients of the inputs

Layouts are the engine's: activations NHWC, convolution weights [c_out][kh][kw][c_in], linear weights [out][in].

Besides the attributes each case has
    smooth      false where finite differences do not apply (ties, norms below eps)
    err32       {"out/y": e, "d_in/x": e, ...}: largest absolute error of PyTorch's own float32 run
    err16       the same for bfloat16: activations, weights and arriving gradients rounded to bfloat16; statistics, batch norm's
                parameters and losses in float32 (only for ops that run in bfloat16)
    err_f16     the same for float16, without tensors that overflow
"""

import json

import torch

from . import op_cases, tensor_file, torch_ops


def _error(got, want):
    return float((got - want).abs().max())


def own_errors(op, attributes, inputs, d_out, results):
    """Yields ("err32", {tensor: error}) and, where the op runs in them, the same in low precisions: PyTorch's own errors.

    In low precision a rounding can happen to undo that of the inputs; what exact arithmetic makes of the rounded inputs then counts.
    """

    def errors(inputs, d_out, dtype):
        outputs, d_in = torch_ops.run(op, attributes, inputs, d_out, dtype)
        got = {f"out/{n}": t for n, t in outputs.items()} | {f"d_in/{n}": t for n, t in d_in.items()}
        return {name: _error(got[name], tensor) for name, tensor in results.items()}

    yield "err32", _shown(errors(inputs, d_out, torch.float32))
    if op in torch_ops.NO_BFLOAT16:
        return
    for key, dtype in (("err16", torch.bfloat16), ("err_f16", torch.float16)):
        own = errors(inputs, d_out, dtype)
        exact = errors(_rounded(inputs, dtype), _rounded(d_out, dtype), torch.float64)
        yield key, _shown({name: max(error, exact[name]) for name, error in own.items()})


def _rounded(tensors, dtype):
    return {name: tensor if name in torch_ops.FLOAT32_NAMES else tensor.to(dtype).to(tensor.dtype) for name, tensor in tensors.items()}


def _shown(errors):
    """With three digits; without those that are not finite, of types that overflow."""
    return {name: float(f"{error:.3g}") for name, error in errors.items() if error < float("inf")}


def make(path):
    """Writes the op goldens."""
    tensors, table = {}, {}
    for case, op, attributes, inputs in op_cases.cases():
        outputs, _ = torch_ops.run(op, attributes, inputs, {}) if torch_ops.OPS[op][1] is None else (torch_ops.OPS[op][0](inputs, attributes), None)
        d_out = {}
        if torch_ops.OPS[op][1] is not None:
            name = torch_ops.OPS[op][1]
            d_out[name] = op_cases.Draw(case + "/d_out").normal(*outputs[name].shape)
        outputs, d_in = torch_ops.run(op, attributes, inputs, d_out)

        row = {"op": op, **attributes, "smooth": case not in op_cases.NOT_SMOOTH}
        results = {f"out/{n}": t for n, t in outputs.items()} | {f"d_in/{n}": t for n, t in d_in.items()}
        row |= dict(own_errors(op, attributes, inputs, d_out, results))
        table[case] = row
        for role, group in (("in", inputs), ("out", outputs), ("d_out", d_out), ("d_in", d_in)):
            tensors |= {f"{case}/{role}/{name}": tensor for name, tensor in group.items()}
    metadata = {"kind": "simsiam-ops", "cases": json.dumps(table, separators=(",", ":")), "torch": torch.__version__}
    tensor_file.write(path, tensors, metadata)
    return len(table)


def verify(tensors, metadata):
    """Recomputes every case of a file; returns a list of (case, worst relative error, finite-difference error or None)."""
    results = []
    for case, row in json.loads(metadata["cases"]).items():
        groups = {}
        for role in ("in", "out", "d_out", "d_in"):
            prefix = f"{case}/{role}/"
            groups[role] = {n[len(prefix) :]: t for n, t in tensors.items() if n.startswith(prefix)}
        for name, tensor in (groups["in"] | groups["d_out"]).items():
            if not torch.equal(tensor, tensor.float().double()):
                raise ValueError(f"{case}: {name} is not exactly representable in float32")
        outputs, d_in = torch_ops.run(row["op"], row, groups["in"], groups["d_out"])
        if outputs.keys() != groups["out"].keys() or d_in.keys() != groups["d_in"].keys():
            raise ValueError(f"{case}: the file has other tensors than the op")
        worst = 0.0
        for got, want in ((outputs, groups["out"]), (d_in, groups["d_in"])):
            for name, tensor in want.items():
                if tensor.isnan().any() or tensor.isinf().any():
                    raise ValueError(f"{case}: {name} is not finite")
                worst = max(worst, _error(got[name], tensor) / (float(tensor.abs().max()) + 1e-30))
        differences = _finite_differences(row, groups) if d_in and row["smooth"] else None
        results.append((case, worst, differences))
    return results


def _finite_differences(row, groups):
    """Worst relative error of the stored gradients against central differences along random directions."""
    function, name, _ = torch_ops.OPS[row["op"]]
    generator = torch.Generator().manual_seed(1)
    worst = 0.0
    for wanted, gradient in groups["d_in"].items():
        x = groups["in"][wanted]
        # Steps in proportion to each value, so that rows of small norm keep their shape.
        direction = torch.randn(x.shape, generator=generator, dtype=torch.float64) * x.abs()
        h = 1e-6 if x.abs().max() < 50 else 1e-8

        def along(step):
            out = function(groups["in"] | {wanted: x + step * direction}, row)[name]
            return float((out * groups["d_out"][name]).sum())

        difference = (along(h) - along(-h)) / (2 * h)
        products = gradient * direction
        worst = max(worst, abs(float(products.sum()) - difference) / (float(products.abs().sum()) + 1e-30))
    return worst
