"""The ops in PyTorch: function(inputs, attributes) -> outputs, in whatever precision the inputs have.

Layouts are the engine's: activations NHWC, convolution weights [c_out][kh][kw][c_in], linear weights [out][in].
"""

import torch
import torch.nn.functional as F

LOW_PRECISION = (torch.bfloat16, torch.float16)
# Kept in float32 when everything else is rounded to low precision.
NORM_NAMES = ("gamma", "beta", "running_mean", "running_var")
FLOAT32_NAMES = {*NORM_NAMES, *(f"{name}_r" for name in NORM_NAMES), "loss", "labels"}


def nchw(x):
    return x.permute(0, 3, 1, 2)


def nhwc(x):
    return x.permute(0, 2, 3, 1)


def conv2d(i, a):
    return {"y": nhwc(F.conv2d(nchw(i["x"]), nchw(i["w"]), stride=a["stride"], padding=a["padding"]))}


def _after_norm(y, i, a):
    """The residual add and ReLU that batch norm can carry."""
    if a["residual"]:
        y = y + i["residual"]
    return F.relu(y) if a["relu"] else y


def _normalise(x, i, a, running_mean, running_var, training):
    """F.batch_norm over the last dimension."""
    rows = x.reshape(-1, x.shape[-1])
    gamma, beta = (i["gamma"], i["beta"]) if a["affine"] else (None, None)
    y = F.batch_norm(rows, running_mean, running_var, gamma, beta, training, a.get("momentum", 0.0), a["eps"])
    return y.reshape(x.shape)


def batch_norm(i, a):
    running_mean, running_var = i["running_mean"].detach().clone(), i["running_var"].detach().clone()
    parts, means, rstds = [], [], []
    for x in i["x"].chunk(a["groups"]):
        parts.append(_normalise(x, i, a, running_mean, running_var, training=True))
        rows = x.detach().reshape(-1, x.shape[-1]).to(running_mean.dtype)
        means.append(rows.mean(0))
        rstds.append((rows.var(0, unbiased=False) + a["eps"]).rsqrt())
    return {
        "y": _after_norm(torch.cat(parts), i, a),
        "mean": torch.stack(means),
        "rstd": torch.stack(rstds),
        "running_mean": running_mean,
        "running_var": running_var,
    }


def batch_norm_pair(i, a):
    """The batch norms of x and of r, each with parameters and statistics of its own, their sum and the ReLU."""
    alone = a | {"affine": True, "residual": False, "relu": False}
    of_x = batch_norm(i, alone)
    of_r = batch_norm({"x": i["r"]} | {name: i[f"{name}_r"] for name in NORM_NAMES}, alone)
    y = of_x.pop("y") + of_r.pop("y")
    return {"y": F.relu(y) if a.get("relu", True) else y} | of_x | {f"{name}_r": value for name, value in of_r.items()}


def conv_norm(i, a):
    """A 1x1 convolution and its batch norm; the statistics of both are the convolution's result's."""
    running_mean, running_var = i["running_mean"].detach().clone(), i["running_var"].detach().clone()
    stride, attributes = a["stride"], a | {"affine": True}
    parts = []
    for x in i["x"].chunk(a["groups"]):
        y = nhwc(F.conv2d(nchw(x), nchw(i["w"]), stride=(stride, stride)))
        parts.append(_normalise(y, i, attributes, running_mean, running_var, training=True))
    return {"y": _after_norm(torch.cat(parts), i, a), "running_mean": running_mean, "running_var": running_var}


def batch_norm_eval(i, a):
    return {"y": _after_norm(_normalise(i["x"], i, a, i["running_mean"], i["running_var"], training=False), i, a)}


def relu(i, a):
    return {"y": F.relu(i["x"])}


def max_pool(i, a):
    return {"y": nhwc(F.max_pool2d(nchw(i["x"]), a["kernel"], a["stride"], a["padding"]))}


def global_avg_pool(i, a):
    return {"y": i["x"].mean((1, 2))}


def linear(i, a):
    return {"y": F.linear(i["x"], i["w"], i["b"] if a["bias"] else None)}


def _group_matrices(tensor, factor, groups):
    """The matrices of all groups as they are multiplied, [groups][rows][columns]: stored one below the other, or one for all."""
    count = 1 if factor["shared"] else groups
    matrices = tensor.reshape(count, -1, tensor.shape[-1])
    matrices = matrices.transpose(1, 2) if factor["transposed"] else matrices
    return matrices.expand(groups, -1, -1)


def matmul(i, a):
    """C_g = act(A_g B_g + bias_g + addend_g). In low precision it is rounded once, at the end, or not at all if it is widened."""
    dtype, wide = i["a"].dtype, {name: t.float() if t.dtype in LOW_PRECISION else t for name, t in i.items()}
    left = _group_matrices(wide["a"], a["a"], a["groups"])
    right = _group_matrices(wide["a" if a["same"] else "b"], a["b"], a["groups"])
    c = torch.bmm(left, right)
    n = c.shape[-1]
    if a["bias"]:
        c = c + wide["bias"][:, None]
    if not (a["a"]["transposed"] or a["a"]["shared"]):
        c = c.reshape(*i["a"].shape[:-1], n)
    if a["addend"]:
        c = c + wide["addend"]
    c = F.relu(c) if a["relu"] else c
    return {"c": c if a["widened"] else c.to(dtype)}


def _targets(i, a):
    """z_{(i + z_shift) mod R} for every row i of p, and p; losses are taken in float32 at least."""
    p, z = i["p"], i["z"]
    if p.dtype in LOW_PRECISION:
        p, z = p.float(), z.float()
    rows = (torch.arange(len(p)) + a["z_shift"]) % len(z)
    return p, z[rows]


def negative_cosine(i, a):
    p, z = _targets(i, a)
    return {"loss": -F.cosine_similarity(p, z, dim=1).mean()}


def softmax_xent(i, a):
    p, z = _targets(i, a)
    return {"loss": -(F.softmax(z, 1) * F.log_softmax(p, 1)).sum(1).mean()}


def z_std(i, a):
    z = i["z"].float() if i["z"].dtype in LOW_PRECISION else i["z"]
    return {"z_std": F.normalize(z, dim=1).std(0).mean()}


def cosine_loss(i, a):
    """One node: the loss to a constant target, and z std."""
    return negative_cosine(i | {"z": i["z"].detach()}, a) | z_std(i, a)


def cross_entropy(i, a):
    logits = i["logits"].float() if i["logits"].dtype in LOW_PRECISION else i["logits"]
    labels = i["labels"].long()
    # topk leaves the order of equal logits open: of those the lower class comes first.
    target = logits.gather(1, labels[:, None])
    classes = torch.arange(logits.shape[1])
    rank = ((logits > target) | ((logits == target) & (classes < labels[:, None]))).sum(1)
    correct = torch.stack([(rank < top).sum() for top in (1, 5)]).to(logits.dtype)
    return {"loss": F.cross_entropy(logits, labels), "correct": correct}


def sgd(i, a):
    w = torch.nn.Parameter(i["w"].detach().clone())
    w.grad = i["g"].detach().clone()
    optimiser = torch.optim.SGD([w], a["lr"], a["momentum"], weight_decay=a["weight_decay"])
    optimiser.state[w]["momentum_buffer"] = i["v"].detach().clone()
    optimiser.step()
    return {"w": w.detach(), "v": optimiser.state[w]["momentum_buffer"]}


def lars(i, a):
    """Apex's LARC (github.com/NVIDIA/apex, apex/parallel/LARC.py) with clip=False, in its formulas: the gradient, with weight
    decay, times trust |w| / (|g| + weight_decay |w| + eps) where both norms are above 0, the bare gradient where not; then
    SGD without weight decay. The trust coefficient is the one of You, Gitman, Ginsburg (arXiv 1708.03888). A parameter that
    is not adapted is treated as one of norm 0."""
    weights = [torch.nn.Parameter(i[f"w{k}"].detach().clone()) for k in range(len(a["adapted"]))]
    optimiser = torch.optim.SGD(weights, a["lr"], a["momentum"])
    for k, (w, adapted) in enumerate(zip(weights, a["adapted"])):
        g = i[f"g{k}"].detach().clone()
        w_norm, g_norm = torch.linalg.vector_norm(w.detach()), torch.linalg.vector_norm(g)
        if adapted and w_norm != 0 and g_norm != 0:
            rate = a["trust"] * w_norm / (g_norm + w_norm * a["weight_decay"] + a["eps"])
            g = (g + a["weight_decay"] * w.detach()) * rate
        w.grad = g
        optimiser.state[w]["momentum_buffer"] = i[f"v{k}"].detach().clone()
    optimiser.step()
    outputs = {f"w{k}": w.detach() for k, w in enumerate(weights)}
    return outputs | {f"v{k}": optimiser.state[w]["momentum_buffer"] for k, w in enumerate(weights)}


def add_bias(i, a):
    return {"y": i["x"] + i["b"]}


def pad_channels(i, a):
    return {"y": F.pad(i["x"], (0, a["channels"] - i["x"].shape[-1]))}


def nchw_to_nhwc(i, a):
    return {"y": pad_channels({"x": nhwc(i["x"])}, a)["y"]}


def nhwc_to_nchw(i, a):
    return {"y": nchw(i["x"][..., : a["channels"]])}


def slice_rows(i, a):
    return {"y": i["x"][a["start"] : a["start"] + a["len"]]}


def add(i, a):
    return {"y": i["a"] + i["b"]}


# op -> (function, the output that has a gradient, the inputs that have one)
OPS = {
    "conv2d": (conv2d, "y", ("x", "w")),
    "batch_norm": (batch_norm, "y", ("x", "gamma", "beta", "residual")),
    "batch_norm_pair": (batch_norm_pair, "y", ("x", "gamma", "beta", "r", "gamma_r", "beta_r")),
    "conv_norm": (conv_norm, "y", ("x", "w", "gamma", "beta", "residual")),
    "batch_norm_eval": (batch_norm_eval, None, ()),
    "relu": (relu, "y", ("x",)),
    "max_pool": (max_pool, "y", ("x",)),
    "global_avg_pool": (global_avg_pool, "y", ("x",)),
    "linear": (linear, "y", ("x", "w", "b")),
    "matmul": (matmul, None, ()),
    "negative_cosine": (negative_cosine, "loss", ("p", "z")),
    "softmax_xent": (softmax_xent, "loss", ("p", "z")),
    "cosine_loss": (cosine_loss, "loss", ("p",)),
    "cross_entropy": (cross_entropy, "loss", ("logits",)),
    "z_std": (z_std, None, ()),
    "sgd": (sgd, None, ()),
    "lars": (lars, None, ()),
    "add_bias": (add_bias, "y", ("x", "b")),
    "pad_channels": (pad_channels, "y", ("x",)),
    "nchw_to_nhwc": (nchw_to_nhwc, "y", ("x",)),
    "nhwc_to_nchw": (nhwc_to_nchw, "y", ("x",)),
    "slice_rows": (slice_rows, "y", ("x",)),
    "add": (add, "y", ("a", "b")),
}
# Optimisers keep float32, and one side of a change of layout is always float32.
NO_BFLOAT16 = {"sgd", "lars", "nchw_to_nhwc", "nhwc_to_nchw"}


def run(op, attributes, inputs, d_out, dtype=torch.float64):
    """Outputs and input gradients of an op in `dtype`, both in float64."""
    function, differentiable, wanted = OPS[op]
    wanted = [name for name in wanted if name in inputs]

    def cast(name, tensor):
        if dtype in LOW_PRECISION:
            tensor = tensor.to(torch.float32 if name in FLOAT32_NAMES else dtype)
        else:
            tensor = tensor.to(dtype)
        return tensor.clone().requires_grad_(name in wanted)

    leaves = {name: cast(name, tensor) for name, tensor in inputs.items()}
    outputs = function(leaves, attributes)
    d_in = {}
    if wanted:
        output = outputs[differentiable]
        grads = torch.autograd.grad(output, [leaves[n] for n in wanted], d_out[differentiable].to(output.dtype))
        d_in = {name: grad.double() for name, grad in zip(wanted, grads)}
    return {name: out.detach().double() for name, out in outputs.items()}, d_in
