"""Pointwise arithmetic of the world model's memory, compiled for one CPU thread.

A step of M is two matrix products and some hundreds of exponentials per row. torch does the products at the machine's
limit; done one operation at a time, the exponentials would cost as much again, so they are fused here. Arrays that meet
a matrix product may be float32 or bfloat16; numpy has no bfloat16, so those come as its bits in uint16
(`bits(tensor)` gives such a view without a copy) and are widened on load and rounded to nearest even on store.

Legend: B rows, T steps, H hidden units, Z latent dimensions, K mixtures, R noise rows (row b uses b // (B // R)).
Everything releases the GIL, allocates nothing large, and gives the same bytes for the same input.
"""

# mypy: disable-error-code="call-arg, var-annotated"

import math
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload

f32, i32, u64 = np.float32, np.int32, np.uint64
# Reordering and contraction let loops vectorise; "nnan" and "ninf" stay out, so that a NaN is seen as a NaN.
_FAST: Any = {"nogil": True, "fastmath": {"reassoc", "contract", "arcp", "nsz"}, "error_model": "numpy", "cache": True}
LOG_SIGMA_MIN = (
    -6.0
)  # a narrower Gaussian makes gradients of 1/sigma^2 > 10^5: the floor keeps noise-free data trainable
_HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


def bits(tensor: torch.Tensor) -> np.ndarray:
    """The tensor's memory as numpy: float32 stays, bfloat16 becomes its bits as uint16. CPU only, no copy."""
    tensor = tensor.detach()
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


@intrinsic
def _as_float(typing_context, value):
    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.int32), generate


@intrinsic
def _as_bits(typing_context, value):
    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.int32(types.float32), generate


def _load(array, index):
    """array[index] as float32, whatever the array holds."""


def _store(array, index, value):
    """array[index] = value, rounded to what the array holds."""


@overload(_load, inline="always")
def _load_overload(array, index):
    if array.dtype == types.uint16:
        return lambda array, index: _as_float(i32(array[index]) << i32(16))
    return lambda array, index: array[index]


@overload(_store, inline="always")
def _store_overload(array, index, value):
    if array.dtype == types.uint16:

        def round_to_even(array, index, value):
            b = _as_bits(f32(value))
            array[index] = np.uint16((b + i32(0x7FFF) + ((b >> i32(16)) & i32(1))) >> i32(16))

        return round_to_even

    def plain(array, index, value):
        array[index] = value

    return plain


@numba.njit(inline="always", **_FAST)
def exp(x):
    """e^x in float32, relative error < 4e-6: 2^n times a polynomial on [-ln2/2, ln2/2]. Vectorises, unlike libm's."""
    x = f32(-87.0) if x < f32(-87.0) else x  # comparisons as written let a NaN through
    x = f32(88.0) if x > f32(88.0) else x
    n = np.floor(x * f32(1.4426950408889634) + f32(0.5))
    r = x - n * f32(0.6931471805599453)
    p = f32(1 / 120)
    p = p * r + f32(1 / 24)
    p = p * r + f32(1 / 6)
    p = p * r + f32(0.5)
    p = p * r + f32(1.0)
    p = p * r + f32(1.0)
    return p * _as_float((i32(n) + i32(127)) << i32(23))


@numba.njit(inline="always", **_FAST)
def sigmoid(x):
    return f32(1) / (f32(1) + exp(-x))


@numba.njit(inline="always", **_FAST)
def tanh(x):
    return f32(2) / (f32(1) + exp(f32(-2) * x)) - f32(1)


@numba.njit(**_FAST)
def lstm_train_forward(pre, t, activation, cell, hidden, hidden_low):
    """One LSTM step that keeps what its gradient needs. Gate order i, f, g, o, as torch's.

    Args:
        pre: [B, 4H] pre-activations, biases included. t: the step.
        activation: [T, B, 4H] float32, written at t. cell, hidden: [T+1, B, H] float32, read at t, written at t + 1.
        hidden_low: [T+1, B, H] hidden in the precision of the products.
    """
    num_rows, size = cell.shape[1], cell.shape[2]
    for b in range(num_rows):
        row, act = pre[b], activation[t, b]
        c_old, c_new, h_new, h_low = cell[t, b], cell[t + 1, b], hidden[t + 1, b], hidden_low[t + 1, b]
        pre_i, pre_f, pre_g, pre_o = row[:size], row[size : 2 * size], row[2 * size : 3 * size], row[3 * size :]
        i, f, g, o = act[:size], act[size : 2 * size], act[2 * size : 3 * size], act[3 * size :]
        for j in range(size):
            i[j] = sigmoid(_load(pre_i, j))
            g[j] = tanh(_load(pre_g, j))
        for j in range(size):
            f[j] = sigmoid(_load(pre_f, j))
            o[j] = sigmoid(_load(pre_o, j))
        for j in range(size):
            c_new[j] = f[j] * c_old[j] + i[j] * g[j]
        for j in range(size):
            h_new[j] = o[j] * tanh(c_new[j])
            _store(h_low, j, h_new[j])


@numba.njit(**_FAST)
def lstm_train_backward(grad_hidden, grad_recurrent, t, activation, cell, grad_cell, grad_pre):
    """Gradient of `lstm_train_forward` at step t.

    Args:
        grad_hidden: [T, B, H] float32 from above. grad_recurrent: [B, H] from step t + 1.
        grad_cell: [B, H] float32, updated to step t - 1's. grad_pre: [T, B, 4H], written at t.
    """
    num_rows, size = cell.shape[1], cell.shape[2]
    grad_h = np.empty(size, np.float32)
    for b in range(num_rows):
        act, out = activation[t, b], grad_pre[t, b]
        c_old, c_new, grad_c = cell[t, b], cell[t + 1, b], grad_cell[b]
        above, later = grad_hidden[t, b], grad_recurrent[b]
        i, f, g, o = act[:size], act[size : 2 * size], act[2 * size : 3 * size], act[3 * size :]
        out_i, out_f, out_g, out_o = out[:size], out[size : 2 * size], out[2 * size : 3 * size], out[3 * size :]
        for j in range(size):
            grad_h[j] = above[j] + _load(later, j)
        for j in range(size):
            tanh_c = tanh(c_new[j])
            _store(out_o, j, grad_h[j] * tanh_c * o[j] * (f32(1) - o[j]))
            grad_c[j] += grad_h[j] * o[j] * (f32(1) - tanh_c * tanh_c)
        for j in range(size):
            _store(out_i, j, grad_c[j] * g[j] * i[j] * (f32(1) - i[j]))
            _store(out_g, j, grad_c[j] * i[j] * (f32(1) - g[j] * g[j]))
        for j in range(size):
            _store(out_f, j, grad_c[j] * c_old[j] * f[j] * (f32(1) - f[j]))
            grad_c[j] *= f[j]


@numba.njit(**_FAST)
def mixture_nll(raw, target, weight, num_mixtures, grad):
    """Weighted negative log-likelihood of Gaussian mixtures and its gradient, in one pass.

    Args:
        raw: [N, 3*K*Z] as logits [K, Z], means [K, Z], log-sigmas [K, Z]. target: [N, Z]. weight: [N] float32.
        grad: like raw, written: d(sum)/d(raw). Rows of weight 0 get 0.

    Returns:
        float64: sum over n of weight_n * (sum over z of -log p(target_nz)).
    """
    num_rows, size = target.shape
    part = num_mixtures * size
    log_w, log_p, inverse = np.empty(part, np.float32), np.empty(part, np.float32), np.empty(part, np.float32)
    error, top, total = np.empty(part, np.float32), np.empty(size, np.float32), np.empty(size, np.float32)
    top_p, total_p = np.empty(size, np.float32), np.empty(size, np.float32)
    loss = 0.0
    for n in range(num_rows):
        out, y, w = grad[n], target[n], weight[n]
        if w == 0.0:
            out[:] = 0
            continue
        logits, means, spreads = raw[n, :part], raw[n, part : 2 * part], raw[n, 2 * part :]
        top[:], total[:], top_p[:], total_p[:] = f32(-1e30), f32(0), f32(-1e30), f32(0)
        for k in range(num_mixtures):
            low = k * size
            for j in range(size):
                log_w[low + j] = _load(logits, low + j)
                top[j] = max(top[j], log_w[low + j])
        for k in range(num_mixtures):
            low = k * size
            for j in range(size):
                log_sigma = max(_load(spreads, low + j), f32(LOG_SIGMA_MIN))
                inverse[low + j] = exp(-log_sigma)
                error[low + j] = (y[j] - _load(means, low + j)) * inverse[low + j]
                log_p[low + j] = log_w[low + j] - log_sigma - f32(0.5) * error[low + j] * error[low + j]
            for j in range(size):
                total[j] += exp(log_w[low + j] - top[j])
                top_p[j] = max(top_p[j], log_p[low + j])
        for k in range(num_mixtures):
            low = k * size
            for j in range(size):
                total_p[j] += exp(log_p[low + j] - top_p[j])
        row_loss = 0.0
        for j in range(size):
            row_loss += math.log(total[j]) + top[j] - math.log(total_p[j]) - top_p[j] + _HALF_LOG_2PI
        loss += w * row_loss
        out_logits, out_means, out_spreads = out[:part], out[part : 2 * part], out[2 * part :]
        for k in range(num_mixtures):
            low = k * size
            for j in range(size):
                posterior = exp(log_p[low + j] - top_p[j]) / total_p[j]
                log_p[low + j] = w * posterior
                log_w[low + j] = w * (exp(log_w[low + j] - top[j]) / total[j] - posterior)
            for j in range(size):
                _store(out_logits, low + j, log_w[low + j])
                _store(out_means, low + j, -log_p[low + j] * error[low + j] * inverse[low + j])
            for j in range(size):
                free = f32(1) if _load(spreads, low + j) > f32(LOG_SIGMA_MIN) else f32(0)
                _store(out_spreads, low + j, free * log_p[low + j] * (f32(1) - error[low + j] * error[low + j]))
    return loss


@numba.njit(**_FAST)
def lstm_dream(gates, bias, cell, features, low, size_z):
    """One LSTM step in place: gates [B, 4H], bias [4H], cell [B, H]; h goes to features and low at columns Z..Z+H."""
    num_rows, size = cell.shape
    bias_i, bias_f, bias_g, bias_o = bias[:size], bias[size : 2 * size], bias[2 * size : 3 * size], bias[3 * size :]
    for b in range(num_rows):
        row, c = gates[b], cell[b]
        h, h_low = features[b, size_z : size_z + size], low[b, size_z : size_z + size]
        row_i, row_f, row_g, row_o = row[:size], row[size : 2 * size], row[2 * size : 3 * size], row[3 * size :]
        for j in range(size):
            i = sigmoid(_load(row_i, j) + bias_i[j])
            f = sigmoid(_load(row_f, j) + bias_f[j])
            c[j] = f * c[j] + i * tanh(_load(row_g, j) + bias_g[j])
        for j in range(size):
            h[j] = sigmoid(_load(row_o, j) + bias_o[j]) * tanh(c[j])
        for j in range(size):
            _store(h_low, j, h[j])


@numba.njit(**_FAST)
def outcome_dream(features, weight, bias, size_z, scale, reward, done):
    """Reward (in the world's units) and done probability, float32 [B], from h in features; weight [2, H]."""
    size = weight.shape[1]
    weight_r, weight_d = weight[0], weight[1]
    for b in range(features.shape[0]):
        h = features[b, size_z : size_z + size]
        r, d = bias[0], bias[1]
        for j in range(size):
            r += h[j] * weight_r[j]
            d += h[j] * weight_d[j]
        reward[b] = r * scale
        done[b] = sigmoid(d)


@numba.njit(**_FAST)
def sample_mixture(raw, bias, num_mixtures, size_z, tau, uniform, normal, features, low):
    """Draw z' into columns 0..Z of features and low: Ha & Schmidhuber 2018, section A.2.

    A component by its logits / tau, then mean + sigma * sqrt(tau) * noise. raw [B, 3*K*Z], uniform and normal [R, Z].
    """
    num_rows, per_noise = raw.shape[0], raw.shape[0] // uniform.shape[0]
    part = num_mixtures * size_z
    inverse_tau, root_tau = f32(1) / max(f32(tau), f32(1e-6)), np.sqrt(f32(tau))
    log_w, top, bound = np.empty(part, np.float32), np.empty(size_z, np.float32), np.empty(size_z, np.float32)
    mean, spread = np.empty(size_z, np.float32), np.empty(size_z, np.float32)
    bias_w, bias_m, bias_s = bias[:part], bias[part : 2 * part], bias[2 * part :]
    for b in range(num_rows):
        u, noise = uniform[b // per_noise], normal[b // per_noise]
        logits, means, spreads = raw[b, :part], raw[b, part : 2 * part], raw[b, 2 * part :]
        z, z_low = features[b, :size_z], low[b, :size_z]
        top[:], bound[:] = f32(-1e30), f32(0)
        for k in range(num_mixtures):
            at = k * size_z
            for j in range(size_z):
                log_w[at + j] = _load(logits, at + j) + bias_w[at + j]
                top[j] = max(top[j], log_w[at + j])
        for k in range(num_mixtures):
            at = k * size_z
            for j in range(size_z):
                log_w[at + j] = exp((log_w[at + j] - top[j]) * inverse_tau)
                bound[j] += log_w[at + j]
        for j in range(size_z):
            bound[j] *= u[j]
            mean[j] = _load(means, j) + bias_m[j]
            spread[j] = _load(spreads, j) + bias_s[j]
        # Walk the cumulative weights: component k holds when the bound lies beyond the weights of those before it.
        for k in range(1, num_mixtures):
            at = k * size_z
            for j in range(size_z):
                bound[j] -= log_w[at - size_z + j]
                beyond = bound[j] > f32(0)
                mean[j] = _load(means, at + j) + bias_m[at + j] if beyond else mean[j]
                spread[j] = _load(spreads, at + j) + bias_s[at + j] if beyond else spread[j]
        for j in range(size_z):
            z[j] = mean[j] + exp(max(spread[j], f32(LOG_SIGMA_MIN))) * root_tau * noise[j]
        for j in range(size_z):
            _store(z_low, j, z[j])


@numba.njit(nogil=True, cache=True)
def _mix(x):
    """SplitMix64's finaliser (Steele, Lea & Flood 2014): a bijection of 64 bits with every output bit balanced."""
    x = (x ^ (x >> u64(30))) * u64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> u64(27))) * u64(0x94D049BB133111EB)
    return x ^ (x >> u64(31))


@numba.njit(nogil=True, cache=True)
def row_keys(seed, num_rows):
    """uint64 [num_rows]: one key per row, fixed by (seed, row)."""
    keys = np.empty(num_rows, np.uint64)
    base = _mix(u64(seed) + u64(0x9E3779B97F4A7C15))
    for r in range(num_rows):
        keys[r] = _mix(base + u64(r) * u64(0x9E3779B97F4A7C15))
    return keys


@numba.njit(nogil=True, cache=True)
def draw_noise(keys, steps, uniform, normal, done):
    """Counter-based noise: what a row gets depends on its key and its step only.

    Args:
        keys: uint64 [R]. steps: int64 [R], not negative.
        uniform in [0, 1), normal: float32 [R, Z]; done: float32 [R] in [0, 1). Written.
    """
    num_rows, size = uniform.shape
    for r in range(num_rows):
        counter = u64(steps[r]) * u64(size + 1)
        for j in range(size + 1):
            word = _mix(keys[r] + (counter + u64(j + 1)) * u64(0x9E3779B97F4A7C15))
            coin = f32(word >> u64(40)) * f32(2.0**-24)
            if j == size:
                done[r] = coin
                break
            # Box-Muller: the angle from the 40 bits the coin left over, the radius from a second word.
            radius = (float(_mix(word) >> u64(11)) + 0.5) * 2.0**-53
            angle = float(word & u64(0xFFFFFFFFFF)) * 2.0**-40
            uniform[r, j] = coin
            normal[r, j] = f32(math.sqrt(-2.0 * math.log(radius)) * math.cos(2.0 * math.pi * angle))
