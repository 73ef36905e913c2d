"""Inputs too large for a file: made by Python and by the engine from the same random numbers (src/selftest/op_table/generated.rs).

Of what comes out the file holds samples: all values of a small result, else SAMPLES values anywhere.
"""

import numpy as np
import torch

SAMPLES = 128
_VALUES, _PLACES = 0x6F707331, 0x6F707332


def words(seed, domain, count):
    """The first `count` words of the engine's Philox4x32-10 stream (seed, domain, 0), see src/rng.rs."""
    blocks = -(-count // 4)
    mask = np.uint64(0xFFFFFFFF)
    zero = np.zeros(blocks, np.uint64)
    c = [np.arange(blocks, dtype=np.uint64), zero, zero, zero + np.uint64(domain)]
    key = [np.uint64(seed & 0xFFFFFFFF), np.uint64(seed >> 32)]
    for number in range(10):
        if number > 0:
            key = [(key[0] + np.uint64(0x9E3779B9)) & mask, (key[1] + np.uint64(0xBB67AE85)) & mask]
        p0, p1 = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [(p1 >> np.uint64(32)) ^ c[1] ^ key[0], p1 & mask, (p0 >> np.uint64(32)) ^ c[3] ^ key[1], p0 & mask]
    return np.stack(c, 1).reshape(-1)[:count]


def _seed(name):
    """FNV-1a."""
    value = 0xCBF29CE484222325
    for byte in name.encode():
        value = (value ^ byte) * 0x100000001B3 % 2**64
    return value


def _unit(word):
    return (word >> np.uint64(8)).astype(np.float64) * (1.0 / 16777216.0)


def _below(word, n):
    return ((word * np.uint64(n)) >> np.uint64(32)).astype(np.int64)


def values(case, key, shape, kind):
    """The float64 tensor `key` of `case`; every value is exactly a float32."""
    count = int(np.prod(shape))
    drawn = words(_seed(f"{case}/{key}"), _VALUES, count)
    channel = np.arange(count) % shape[-1]
    u = _unit(drawn)
    centred = 2.0 * u - 1.0
    if kind == "uniform":
        result = centred
    elif kind == "gapped":
        spread = 0.5 + (channel * 7919 % 13) / 13.0
        offset = (channel * 104729 % 17) / 8.0 - 1.0
        result = (centred + np.where(centred < 0.0, -0.3, 0.3)) * spread + offset
    elif kind == "gain":
        result = (0.5 + u) * np.where(channel % 2 == 0, 1.0, -1.0)
    elif kind == "small":
        result = 0.05 * u
    elif kind == "positive":
        result = 0.5 + u
    elif kind == "eighths":
        result = _below(drawn, 256) / 8.0 - 16.0
    else:
        raise ValueError(f"no kind {kind}")
    return torch.from_numpy(result.astype(np.float32).astype(np.float64).reshape(shape))


def samples(tensor):
    """What the file holds of a result."""
    flat = tensor.reshape(-1)
    if len(flat) <= SAMPLES:
        return flat
    return flat[torch.from_numpy(_below(words(len(flat), _PLACES, SAMPLES), len(flat)))]
