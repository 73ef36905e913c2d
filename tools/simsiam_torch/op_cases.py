"""The cases of the op table: awkward shapes, asymmetric values."""

import zlib

import numpy as np
import torch

from . import torch_ops

# How far from zero everything that enters a ReLU or a maximum stays, so that no rounding changes which side it is on.
_MARGIN = 2e-4


class Draw:
    """Random inputs of one case: seeded by its name, exactly representable in float32."""

    def __init__(self, case, attempt=0):
        self.generator = np.random.default_rng([zlib.crc32(case.encode()), attempt])

    def normal(self, *shape, mean=0.0, std=1.0):
        return self._widen(self.generator.standard_normal(shape) * std + mean)

    def uniform(self, low, high, *shape):
        return self._widen(self.generator.uniform(low, high, shape))

    def integers(self, low, high, *shape):
        return self._widen(self.generator.integers(low, high, shape))

    @staticmethod
    def _widen(values):
        return torch.from_numpy(np.asarray(values, np.float32).astype(np.float64))


def cases():
    """Yields (case, op, attributes, inputs)."""
    yield from _conv_cases()
    yield from _norm_cases()
    yield from _norm_pair_cases()
    yield from _conv_norm_cases()
    yield from _pool_and_linear_cases()
    yield from _matmul_cases()
    yield from _loss_cases()
    yield from _cosine_loss_cases()
    yield from _cross_entropy_cases()
    yield from _small_cases()


def _conv_cases():
    #        case                    x shape           w shape         stride  padding
    table = [
        ("conv2d/3x3",              (2, 7, 9, 5),     (7, 3, 3, 5),   (1, 1), (1, 1)),
        ("conv2d/3x3_wide",         (2, 9, 17, 16),   (33, 3, 3, 16), (1, 1), (1, 1)),
        ("conv2d/3x3_stride2",      (3, 8, 11, 5),    (24, 3, 3, 5),  (2, 2), (1, 1)),
        ("conv2d/3x3_stride2_even", (2, 8, 6, 8),     (9, 3, 3, 8),   (2, 2), (1, 1)),
        ("conv2d/3x3_one_pixel",    (5, 1, 1, 24),    (17, 3, 3, 24), (1, 1), (1, 1)),
        ("conv2d/3x3_no_padding",   (1, 5, 6, 3),     (4, 3, 3, 3),   (1, 1), (0, 0)),
        ("conv2d/7x7_stem",         (2, 18, 15, 3),   (10, 7, 7, 3),  (2, 2), (3, 3)),
        ("conv2d/7x7_smaller_than_kernel", (1, 4, 3, 3), (8, 7, 7, 3), (2, 2), (3, 3)),
        ("conv2d/1x1",              (2, 5, 3, 24),    (31, 1, 1, 24), (1, 1), (0, 0)),
        ("conv2d/1x1_one_channel",  (3, 4, 5, 1),     (3, 1, 1, 1),   (1, 1), (0, 0)),
        ("conv2d/1x1_stride2",      (2, 7, 6, 15),    (17, 1, 1, 15), (2, 2), (0, 0)),
        ("conv2d/5x3_asymmetric",   (2, 9, 11, 3),    (5, 5, 3, 3),   (2, 1), (2, 0)),
        ("conv2d/3x5_asymmetric",   (2, 6, 10, 7),    (3, 3, 5, 7),   (1, 3), (0, 2)),
        ("conv2d/batch1",           (1, 6, 7, 7),     (16, 3, 3, 7),  (1, 1), (1, 1)),
    ]  # fmt: skip
    for case, x, w, stride, padding in table:
        draw = Draw(case)
        fan_in = w[1] * w[2] * w[3]
        inputs = {"x": draw.normal(*x, mean=0.3), "w": draw.normal(*w, mean=0.1 / fan_in**0.5, std=fan_in**-0.5)}
        yield case, "conv2d", {"stride": list(stride), "padding": list(padding)}, inputs


def _norm_inputs(draw, shape, affine, residual, mean, std):
    c = shape[-1]
    # A mean and a spread of its own for every channel, so that a swapped channel shows.
    x = draw.normal(*shape) * draw.uniform(0.5, 1.5, c) * std + draw.normal(c) + mean
    inputs = {"x": x.float().double(), "running_mean": draw.normal(c), "running_var": draw.uniform(0.5, 2.0, c)}
    if affine:
        inputs["gamma"] = draw.uniform(-1.5, 1.5, c)
        inputs["beta"] = draw.normal(c, std=0.5)
    if residual:
        inputs["residual"] = draw.normal(*shape, mean=0.2)
    return inputs


def _norm_cases():
    #        case                            x shape          groups affine relu   residual mean   std
    table = [
        ("batch_norm/4d",                   (4, 3, 5, 7),    1, True,  False, False, 0.0,   1.0),
        ("batch_norm/4d_two_groups_relu",   (6, 3, 2, 5),    2, True,  True,  False, 0.5,   1.0),
        ("batch_norm/4d_two_groups_residual_relu", (2, 3, 4, 24), 2, True, True, True, 0.0, 1.0),
        ("batch_norm/4d_residual",          (3, 2, 3, 5),    1, True,  False, True,  0.0,   1.0),
        ("batch_norm/4d_three_groups",      (3, 5, 1, 3),    3, True,  False, False, 0.0,   1.0),
        ("batch_norm/2d_two_groups_relu",   (14, 17),        2, True,  True,  False, 0.0,   1.0),
        ("batch_norm/2d_no_affine",         (10, 33),        2, False, False, False, -0.5,  1.0),
        ("batch_norm/2d_no_affine_relu",    (9, 5),          1, False, True,  False, 0.0,   1.0),
        ("batch_norm/2d_two_rows",          (4, 7),          2, True,  False, False, 0.0,   1.0),
        ("batch_norm/2d_many_rows",         (131, 3),        1, True,  True,  False, 0.0,   1.0),
        ("batch_norm/2d_one_channel",       (33, 1),         1, True,  False, False, 0.0,   1.0),
        ("batch_norm/2d_large_mean",        (32, 5),         2, True,  False, False, 100.0, 1.0),
        ("batch_norm/4d_large_mean_small_spread", (4, 4, 4, 3), 2, True, True, False, -16.0, 0.05),
        ("batch_norm/2d_spread_below_eps",  (8, 3),          1, True,  False, False, 0.0,   1e-3),
    ]  # fmt: skip
    for case, shape, groups, affine, relu_, residual, mean, std in table:
        attributes = {"groups": groups, "eps": 1e-5, "momentum": 0.1, "relu": relu_, "residual": residual, "affine": affine}
        yield case, "batch_norm", attributes, _clear_of_relu(
            case, "batch_norm", attributes, lambda draw: _norm_inputs(draw, shape, affine, residual, mean, std)
        )
    table = [
        ("batch_norm_eval/4d_residual_relu", (2, 3, 5, 7), True, True, True),
        ("batch_norm_eval/4d_batch1", (1, 4, 3, 5), True, False, False),
        ("batch_norm_eval/2d_one_row_relu", (1, 24), True, True, False),
        ("batch_norm_eval/2d_no_affine", (3, 17), False, False, False),
    ]
    for case, shape, affine, relu_, residual in table:
        attributes = {"eps": 1e-5, "relu": relu_, "residual": residual, "affine": affine}
        yield case, "batch_norm_eval", attributes, _clear_of_relu(
            case, "batch_norm_eval", attributes, lambda draw: _norm_inputs(draw, shape, affine, residual, 0.0, 1.0)
        )


def _norm_pair_cases():
    #        case                              x shape        groups mean
    table = [
        ("batch_norm_pair/4d_two_groups",      (4, 3, 2, 24), 2,     0.0),
        ("batch_norm_pair/4d_three_groups",    (3, 5, 3, 7),  3,     0.3),
        ("batch_norm_pair/4d_large_mean",      (3, 4, 3, 8),  1,     30.0),
        ("batch_norm_pair/2d_many_rows",       (131, 3),      1,     -0.5),
    ]  # fmt: skip
    for case, shape, groups, mean in table:
        attributes = {"groups": groups, "eps": 1e-5, "momentum": 0.1}

        def inputs(draw):
            of_x, of_r = (_norm_inputs(draw, shape, True, False, m, std) for m, std in ((mean, 0.8), (-0.4 * mean, 1.7)))
            return of_x | {"r": of_r.pop("x")} | {f"{name}_r": value for name, value in of_r.items()}

        yield case, "batch_norm_pair", attributes, _clear_of_relu(case, "batch_norm_pair", attributes | {"relu": True}, inputs)


def _conv_norm_cases():
    #        case                         x shape           c_out stride groups relu  residual mean  std
    table = [
        ("conv_norm/two_groups_residual_relu", (4, 3, 5, 6), 24,  1,     2,     True,  True,    0.5,  1.0),
        ("conv_norm/relu",                (4, 3, 3, 8),      5,   1,     2,     True,  False,   0.3,  1.0),
        ("conv_norm/stride2_three_groups", (3, 7, 4, 5),     7,   2,     3,     False, False,   0.0,  1.0),
        ("conv_norm/residual",            (3, 4, 3, 3),      17,  1,     1,     False, True,    0.0,  1.0),
        ("conv_norm/large_mean",          (4, 6, 5, 4),      9,   1,     2,     False, False,   20.0, 0.3),
        ("conv_norm/many_channels",       (2, 9, 8, 31),     65,  1,     1,     True,  True,    0.2,  1.0),
    ]  # fmt: skip
    for case, shape, c_out, stride, groups, relu_, residual, mean, std in table:
        attributes = {"groups": groups, "eps": 1e-5, "momentum": 0.1, "relu": relu_, "residual": residual, "stride": stride}
        yield case, "conv_norm", attributes, _conv_norm_clear_of_relu(case, attributes, shape, c_out, mean, std)


def _conv_norm_clear_of_relu(case, attributes, shape, c_out, mean, std):
    """Inputs of which nothing enters the ReLU within a margin of zero that the roundings of low precision keep too: those of the
    convolution's result are not the same in every way to compute it. A residual is moved away; else it is drawn again."""
    margin = 0.05
    for attempt in range(100_000):
        inputs = _conv_norm_inputs(Draw(case, attempt), shape, c_out, attributes["stride"], attributes["residual"], mean, std)
        before = torch_ops.conv_norm(inputs, attributes | {"relu": False})["y"]
        if attributes["relu"] and attributes["residual"]:
            away = torch.where(before.abs() < margin, 2 * margin * before.sign(), 0.0)
            inputs["residual"] = (inputs["residual"] + away).float().double()
            return inputs
        if not attributes["relu"] or before.abs().min() > margin:
            return inputs
    raise RuntimeError(f"{case}: no draw keeps clear of the ReLU's corner")


def _conv_norm_inputs(draw, shape, c_out, stride, residual, mean, std):
    n, h, w, c = shape
    x = draw.normal(*shape) * draw.uniform(0.5, 1.5, c) * std + draw.normal(c) + mean
    inputs = {
        "x": x.float().double(),
        "w": draw.normal(c_out, 1, 1, c, mean=0.1 / c**0.5, std=c**-0.5),
        "gamma": draw.uniform(-1.5, 1.5, c_out),
        "beta": draw.normal(c_out, std=0.5),
        "running_mean": draw.normal(c_out),
        "running_var": draw.uniform(0.5, 2.0, c_out),
    }
    if residual:
        inputs["residual"] = draw.normal(n, -(-h // stride), -(-w // stride), c_out, mean=0.2)
    return inputs


def _clear_of_relu(case, op, attributes, make_inputs):
    """Draws until nothing that enters the ReLU lies within the margin of zero."""
    for attempt in range(10_000):
        inputs = make_inputs(Draw(case, attempt))
        before, _ = torch_ops.run(op, attributes | {"relu": False}, inputs, {"y": torch.zeros_like(inputs["x"])})
        if not attributes["relu"] or before["y"].abs().min() > _MARGIN:
            return inputs
    raise RuntimeError(f"{case}: no draw keeps clear of the ReLU's corner")


def _pool_and_linear_cases():
    draw = Draw("relu")
    x = draw.normal(3, 5, 4, 7)
    yield "relu/4d", "relu", {}, {"x": x.where(x.abs() > _MARGIN, torch.ones(()).double())}
    yield "relu/zeros", "relu", {}, {"x": Draw("relu/zeros").integers(-2, 3, 5, 33)}

    # In each plane distinct multiples of 1/8 below 32: exact in bfloat16, so no precision may move a maximum.
    def distinct(case, shape, offset):
        generator = Draw(case).generator
        n, h, w, c = shape
        planes = [generator.permutation(h * w).reshape(h, w) for _ in range(n * c)]
        return torch.from_numpy(np.stack(planes).reshape(n, c, h, w) / 8.0 + offset).permute(0, 2, 3, 1).contiguous()

    pool = {"kernel": 3, "stride": 2, "padding": 1}
    yield "max_pool/odd", "max_pool", pool, {"x": distinct("max_pool/odd", (2, 7, 9, 3), -3.0)}
    yield "max_pool/even", "max_pool", pool, {"x": distinct("max_pool/even", (3, 8, 6, 5), -2.5)}
    yield "max_pool/batch1_wide", "max_pool", pool, {"x": distinct("max_pool/batch1_wide", (1, 5, 4, 24), -1.0)}
    yield "max_pool/all_negative", "max_pool", pool, {"x": distinct("max_pool/all_negative", (2, 5, 6, 7), -31.0)}
    yield "max_pool/one_pixel", "max_pool", pool, {"x": distinct("max_pool/one_pixel", (2, 1, 1, 5), -7.0)}
    yield "max_pool/ties", "max_pool", pool, {"x": Draw("max_pool/ties").integers(-2, 2, 2, 7, 8, 3)}
    yield "max_pool/2x2", "max_pool", {"kernel": 2, "stride": 2, "padding": 0}, {"x": distinct("max_pool/2x2", (2, 5, 6, 3), 0.0)}

    for case, shape in [("4x3", (2, 4, 3, 5)), ("7x7", (3, 7, 7, 24)), ("one_pixel_batch1", (1, 1, 1, 7))]:
        case = f"global_avg_pool/{case}"
        yield case, "global_avg_pool", {}, {"x": Draw(case).normal(*shape, mean=0.4)}

    #        case           rows in  out  bias
    table = [
        ("linear/plain",     5, 24,  7, False),
        ("linear/bias",      3,  7, 17, True),
        ("linear/one_row",   1, 33,  5, True),
        ("linear/tile_edge", 17, 31, 33, False),
        ("linear/narrow",    16, 3,  1, True),
    ]  # fmt: skip
    for case, rows, k, n, bias in table:
        draw = Draw(case)
        inputs = {"x": draw.normal(rows, k, mean=0.3), "w": draw.normal(n, k, std=k**-0.5)}
        if bias:
            inputs["b"] = draw.normal(n)
        yield case, "linear", {"bias": bias}, inputs


def matmul_attributes(groups, a, b, options=""):
    """Of a factor: T transposed, S shared."""
    factor = lambda letters: {"transposed": "T" in letters, "shared": "S" in letters}
    named = {name: name in options.split() for name in ("same", "bias", "addend", "relu", "widened")}
    return {"groups": groups, "a": factor(a), "b": factor(b), **named}


def _matmul_cases():
    #        case                 groups a     shape of a     b     shape of b    n   options
    table = [
        ("folded",                2, "",   (2, 3, 5, 7),   "T",  (2, 24, 7),    24, "bias addend relu"),
        ("folded_one_row",        3, "",   (3, 7),         "T",  (3, 3, 7),     3,  "bias addend relu"),
        ("folded_one_group",      1, "",   (31, 24),       "T",  (33, 24),      33, "bias relu"),
        ("folded_plain",          3, "",   (3, 11, 3, 24), "T",  (3, 7, 24),    7,  "bias"),
        ("folded_no_bias",        2, "",   (2, 31, 1, 3),  "T",  (2, 33, 3),    33, "addend relu"),
        ("folded_shared",         2, "",   (62, 7),        "TS", (24, 1, 1, 7), 24, "bias addend"),
        ("relu_widened",          2, "",   (66, 24),       "T",  (2, 7, 24),    7,  "bias addend relu widened"),
        ("gram",                  2, "T",  (62, 24),       "",   None,          24, "same widened"),
        ("gram_4d",               2, "T",  (4, 3, 11, 33), "",   None,          33, "same widened"),
        ("gram_three_groups",     3, "T",  (99, 7),        "",   None,          7,  "same widened"),
        ("gram_one_row",          3, "T",  (3, 3),         "",   None,          3,  "same widened"),
        ("gram_wide",             1, "T",  (33, 71),       "",   None,          71, "same widened"),
        ("two_weights",           3, "S",  (31, 1, 1, 7),  "",   (3, 7, 7),     7,  ""),
        ("two_weights_one_group", 1, "S",  (33, 24),       "",   (24, 24),      24, ""),
        ("raw_wgrad",             2, "T",  (62, 24),       "",   (62, 7),       7,  "widened"),
        ("raw_wgrad_4d",          3, "T",  (3, 11, 3, 33), "",   (3, 3, 11, 3), 3,  "widened"),
        ("raw_wgrad_one_row",     2, "T",  (2, 7),         "",   (2, 24),       24, "widened"),
        ("weight_transposed",     2, "TS", (33, 1, 1, 7),  "",   (2, 33, 7),    7,  ""),
        ("weight_transposed_bias", 3, "TS", (31, 3),       "",   (3, 31, 24),   24, "bias addend relu"),
        ("both_transposed",       2, "T",  (62, 7),        "T",  (48, 31),      24, "bias"),
        ("both_shared",           3, "S",  (7, 24),        "TS", (33, 24),      33, "bias"),
        ("mean_part",             2, "",   (2, 3, 11, 24), "",   (2, 24, 24),   24, "bias"),
        ("mean_part_one_row",     3, "",   (3, 33),        "",   (3, 33, 33),   33, "bias"),
        ("through_weight",        2, "",   (2, 1, 31, 24), "",   (2, 24, 7),    7,  ""),
        ("through_weight_one_channel", 3, "", (93, 3),     "",   (3, 3, 1),     1,  ""),
    ]  # fmt: skip
    for case, groups, a, a_shape, b, b_shape, n, options in table:
        case = f"matmul/{case}"
        draw = Draw(case)
        attributes = matmul_attributes(groups, a, b, options)
        # Away from zero, so that a sign or a group that is left out shows.
        inputs = {"a": draw.normal(*a_shape, mean=0.3)}
        if b_shape is not None:
            inputs["b"] = draw.normal(*b_shape, mean=-0.1, std=a_shape[-1] ** -0.5)
        if "bias" in options:
            inputs["bias"] = draw.normal(groups, n)
        if "addend" in options:
            shape = torch_ops.matmul(inputs, attributes | {"addend": False})["c"].shape
            inputs["addend"] = draw.normal(*shape, mean=-0.2)
        yield case, "matmul", attributes, inputs


def _loss_cases():
    #        case            rows of p, of z, dims, shift
    table = [
        ("symmetric",        (10, 10, 17, 5)),
        ("asymmetric",       (5, 10, 24, 5)),
        ("no_shift",         (3, 3, 7, 0)),
        ("shift_wraps",      (7, 7, 5, 3)),
        ("one_row",          (1, 2, 33, 1)),
    ]  # fmt: skip
    for op in ("negative_cosine", "softmax_xent"):
        for case, (m, r, d, shift) in table:
            case = f"{op}/{case}"
            draw = Draw(case)
            inputs = {"p": draw.normal(m, d, mean=0.2), "z": draw.normal(r, d, mean=-0.1, std=1.5)}
            yield case, op, {"z_shift": shift}, inputs

    case = "softmax_xent/large_values"
    draw = Draw(case)
    yield case, "softmax_xent", {"z_shift": 2}, {"p": draw.normal(4, 9, mean=200.0, std=20.0), "z": draw.normal(4, 9, mean=-90.0, std=10.0)}

    # One odd row among ordinary ones, in p (row 1) and in z (row 0, the target of p's row 2).
    for case, scale in [("small_norm", 1e-4), ("below_eps", 1e-10), ("zero_row", 0.0)]:
        case = f"negative_cosine/{case}"
        draw = Draw(case)
        p, z = draw.normal(3, 5), draw.normal(3, 5)
        p[1] *= scale
        z[0] *= scale
        yield case, "negative_cosine", {"z_shift": 1}, {"p": p.float().double(), "z": z.float().double()}

    for case, shape, mean in [("random", (14, 33), 0.0), ("nearly_collapsed", (9, 17), 8.0), ("two_rows", (2, 5), 0.0)]:
        case = f"z_std/{case}"
        yield case, "z_std", {}, {"z": Draw(case).normal(*shape, mean=mean)}


def _cosine_loss_cases():
    #        case                 rows of p, of z, dims, shift, mean of z
    table = [
        ("symmetric",             (10, 10, 17, 5), -0.1),
        ("asymmetric",            (5, 10, 24, 5), 0.3),
        ("shift_wraps",           (7, 9, 5, 6), 0.0),
        ("two_columns",           (1, 2, 2, 1), 0.4),
        ("three_columns",         (31, 33, 3, 16), -0.2),
        ("wide_row",              (1, 2, 2048, 1), 0.1),
        ("wide_odd_row",          (1, 2, 1031, 0), -0.3),
        ("nearly_collapsed",      (9, 12, 64, 3), 8.0),
    ]  # fmt: skip
    for case, (m, r, d, shift), mean in table:
        case = f"cosine_loss/{case}"
        draw = Draw(case)
        inputs = {"p": draw.normal(m, d, mean=0.2), "z": draw.normal(r, d, mean=mean, std=1.5)}
        yield case, "cosine_loss", {"z_shift": shift}, inputs

    # One odd row among ordinary ones, in p (row 1) and in z (row 0, the target of p's row 2).
    for case, scale in [("small_norm", 1e-4), ("below_eps", 1e-10), ("below_both_eps", 1e-14), ("zero_row", 0.0)]:
        case = f"cosine_loss/{case}"
        draw = Draw(case)
        p, z = draw.normal(3, 5), draw.normal(4, 5)
        p[1] *= scale
        z[0] *= scale
        yield case, "cosine_loss", {"z_shift": 2}, {"p": p.float().double(), "z": z.float().double()}


def _cross_entropy_cases():
    #        case                rows, classes, std of logits
    table = [
        ("ten_classes",          (33, 10), 2.0),
        ("three_classes",        (7, 3), 1.0),
        ("one_class",            (2, 1), 1.0),
        ("one_row",              (1, 24), 3.0),
        ("thousand_classes",     (5, 1000), 4.0),
        ("odd_thousands",        (1, 2049), 1.0),
        ("wide",                 (1, 4104), 1.0),
        ("large_values",         (5, 17), 60.0),
    ]  # fmt: skip
    for case, (m, classes), std in table:
        case = f"cross_entropy/{case}"
        draw = Draw(case)
        logits, labels = draw.normal(m, classes, mean=-0.5, std=std), draw.integers(0, classes, m)
        # Every second label has one of the larger logits, so that some are right.
        for row in range(0, m, 2):
            labels[row] = logits[row].argsort(descending=True)[min(row // 2 % 7, classes - 1)]
        yield case, "cross_entropy", {}, {"logits": logits, "labels": labels}

    # Few distinct logits: the rank of a label is decided by its place among equals.
    case = "cross_entropy/equal_logits"
    draw = Draw(case)
    yield case, "cross_entropy", {}, {"logits": draw.integers(0, 3, 40, 9), "labels": draw.integers(0, 9, 40)}


def _small_cases():
    for case, shape, decay, first in [
        ("first_step", (33,), 1e-4, True),
        ("second_step", (33,), 1e-4, False),
        ("heavy_decay_4d", (5, 3, 3, 7), 0.5, False),
        ("no_decay", (17, 3), 0.0, False),
    ]:
        case = f"sgd/{case}"
        draw = Draw(case)
        inputs = {"w": draw.normal(*shape), "g": draw.normal(*shape, std=0.1)}
        inputs["v"] = torch.zeros_like(inputs["w"]) if first else draw.normal(*shape, std=0.3)
        yield case, "sgd", {"lr": 0.0625, "momentum": 0.9, "weight_decay": decay}, inputs

    #        case            shapes                        weight decay  all adapted
    table = [
        ("linear_head",      [(10, 33), (10,)],            0.0,  True),
        ("weight_decay",     [(7, 3, 3, 5), (31,), (4, 7)], 0.05, True),
        ("without_vectors",  [(5, 24), (5,), (24, 2)],     0.01, False),
    ]  # fmt: skip
    for case, shapes, decay, all_adapted in table:
        case = f"lars/{case}"
        draw = Draw(case)
        inputs = {}
        for k, shape in enumerate(shapes):
            inputs |= {f"w{k}": draw.normal(*shape), f"g{k}": draw.normal(*shape, std=0.1), f"v{k}": draw.normal(*shape, std=0.01)}
        if decay == 0.0:
            inputs["w1"] = torch.zeros_like(inputs["w1"])  # a bias at its start: no ratio
        adapted = [all_adapted or len(shape) > 1 for shape in shapes]
        attributes = {"lr": 1.6, "momentum": 0.9, "weight_decay": decay, "trust": 0.001, "eps": 1e-8, "adapted": adapted}
        yield case, "lars", attributes, inputs

    for case, shape in [("narrow", (33, 3)), ("one_row", (1, 24)), ("odd", (67, 31)), ("wide", (5, 264)), ("long", (1031, 8))]:
        case = f"add_bias/{case}"
        draw = Draw(case)
        yield case, "add_bias", {}, {"x": draw.normal(*shape, mean=0.3), "b": draw.normal(shape[1])}

    for case, shape, channels in [("image", (2, 5, 3, 3), 8), ("stem", (7, 3, 3, 3), 4), ("same", (3, 1, 2, 8), 8), ("odd", (33, 7), 31)]:
        case = f"pad_channels/{case}"
        yield case, "pad_channels", {"channels": channels}, {"x": Draw(case).normal(*shape)}

    for case, shape, channels in [("image", (3, 3, 7, 5), 8), ("many_channels", (2, 37, 5, 9), 40), ("pixel", (1, 1, 1, 1), 1)]:
        for op, there in (("nchw_to_nhwc", lambda n, c, h, w: (n, c, h, w)), ("nhwc_to_nchw", lambda n, c, h, w: (n, h, w, channels))):
            case_name = f"{op}/{case}"
            wanted = channels if op == "nchw_to_nhwc" else shape[1]
            yield case_name, op, {"channels": wanted}, {"x": Draw(case_name).normal(*there(*shape))}

    for case, shape, start, length in [("4d", (5, 2, 3, 7), 2, 2), ("2d_first", (6, 5), 0, 3), ("2d_last", (6, 5), 3, 3)]:
        case = f"slice_rows/{case}"
        yield case, "slice_rows", {"start": start, "len": length}, {"x": Draw(case).normal(*shape)}

    for case, shape in [("4d", (2, 3, 5, 7)), ("2d", (1, 33))]:
        case = f"add/{case}"
        draw = Draw(case)
        yield case, "add", {}, {"a": draw.normal(*shape), "b": draw.normal(*shape)}


NOT_SMOOTH = {
    "max_pool/ties",
    "relu/zeros",
    "negative_cosine/below_eps",
    "negative_cosine/zero_row",
    "cosine_loss/below_eps",
    "cosine_loss/below_both_eps",
    "cosine_loss/zero_row",
}


# ---------------------------------------------------------------------------------------------------------------------------
# File.
