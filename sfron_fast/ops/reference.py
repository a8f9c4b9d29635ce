"""Every formula of the package in plain PyTorch: the truth the tests use and the kernel of last
resort.

Each function takes the arguments of the op of the same name in ``ops.py``. Only single operations
(mul, add, sub, div, sqrt, maximum) are used, in the order the native kernels use, so that in fp32
the elementwise results are the same bits everywhere. Low-precision tensors are computed in fp32 and
rounded once, on the store; fp64 stays fp64. Lists may be empty where the schema says so (=
"absent"), or flat (``flat.py``).

``[n]`` is the shape of a tensor flattened in logical order, ``[bytes]`` its packed mask of ceil(n /
8) bytes. Equation numbers are those of the README.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .lists import spread, spread_masks, spread_scalars

CLIP_EPS = 1e-6  # torch.nn.utils.clip_grad_norm_ divides by (norm + 1e-6)
FISHER_EPS = 1e-15  # the authors' epsilon in the saliency ratio


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type a formula is computed in: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _wide(x: Tensor) -> Tensor:
    return x.to(accumulate_dtype(x.dtype))


# --- masks: element i of the flattened tensor is bit i % 8 of byte i // 8 -------------------------


def pack_bits(selected: Tensor) -> Tensor:
    """bool of any shape, n elements -> uint8 [ceil(n / 8)], unused high bits zero."""
    flat = selected.reshape(-1)
    padded = torch.zeros((flat.numel() + 7) // 8 * 8, dtype=torch.uint8, device=flat.device)
    padded[: flat.numel()] = flat
    shifts = torch.arange(8, dtype=torch.uint8, device=flat.device)
    return (padded.view(-1, 8) << shifts).sum(dim=1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """uint8 [ceil(n / 8)] -> bool of ``shape``."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    bits = (packed.unsqueeze(1) >> shifts).bitwise_and(1).to(torch.bool)
    return bits.view(-1)[: math.prod(shape)].view(tuple(shape))


def _selected(masks: Sequence[Tensor], i: int, like: Tensor) -> Tensor | None:
    """The i-th mask as bool shaped like the tensor, or None where every weight is selected."""
    if not masks or (masks[i].numel() == 0 and like.numel() > 0):
        return None
    return unpack_bits(masks[i], like.shape)


# --- the masked gradient: equation 6 --------------------------------------------------------------


def masked_grad_norm(
    grads: Sequence[Tensor], masks: Sequence[Tensor], grad_scale: Tensor | None
) -> Tensor:
    """L2 norm [] of the selected, unscaled gradients; inf or NaN if one of them is not finite."""
    device = grads[0].device if grads else torch.device("cpu")
    total = torch.zeros((), dtype=torch.float64, device=device)
    masks = spread_masks(masks, grads)
    for i, grad in enumerate(grads):
        selected = _selected(masks, i, grad)
        wide = grad.to(torch.float64)
        if grad_scale is not None:  # unscale as the update does: in the formula's own type
            wide = (_wide(grad) * (1.0 / _scalar(grad_scale, grad))).to(torch.float64)
        if selected is not None:  # select, never multiply: 0 * inf is NaN
            wide = torch.where(selected, wide, 0.0)
        total = total + (wide * wide).sum()
    return total.sqrt().to(torch.float32)


def _scalar(value: Tensor, like: Tensor) -> Tensor:
    return value.reshape(()).to(device=like.device, dtype=accumulate_dtype(like.dtype))


def grad_multiplier(
    norm: Tensor | None,
    grad_scale: Tensor | None,
    max_norm: float,
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor:
    """[]: unscale and clip in one factor, min(1, max_norm / (norm + 1e-6)) / grad_scale."""
    factor = torch.ones((), dtype=dtype, device=device)
    if grad_scale is not None:
        factor = factor / grad_scale.reshape(()).to(device=device, dtype=dtype)
    if norm is not None:
        limit = torch.full((), max_norm, dtype=torch.float64, device=device).to(
            dtype
        )  # beyond its range: inf
        factor = factor * (
            limit / (norm.reshape(()).to(device=device, dtype=dtype) + CLIP_EPS)
        ).clamp(max=1.0)
    return factor


def skip_step(norm: Tensor | None, found_inf: Tensor | None, skipped: Tensor | None) -> bool:
    """True, and counted in ``skipped``, if this step must not be applied: a non-finite norm, or an
    overflow found.
    """
    overflow = found_inf is not None and bool(found_inf != 0)
    skip = overflow or (norm is not None and not bool(torch.isfinite(norm)))
    if skipped is not None:
        skipped += skip
    return skip


def _masked_grad(grad: Tensor, selected: Tensor | None, factor: Tensor, maximize: bool) -> Tensor:
    g = _wide(grad) * factor.to(accumulate_dtype(grad.dtype))
    if maximize:
        g = -g
    return g if selected is None else torch.where(selected, g, 0.0)


def _store(target: Tensor, value: Tensor, frozen: Tensor | None) -> None:
    """Write ``value``; where ``frozen`` (a mask of selected weights) is given, only the selected
    elements.
    """
    value = value.to(target.dtype)
    target.copy_(value if frozen is None else torch.where(frozen, value, target))


def dithered(x: Tensor, step: int) -> Tensor:
    """x, fp32, in bf16 and of the same shape: rounded up where what is cut off reaches a threshold
    in
    place of a half.

    For an average that moves by less than half a unit a step: rounded to nearest it would stand
    still. An element's thresholds are spread evenly over the steps (by the golden ratio), so what
    single steps lose adds up to nothing.
    They depend on where it lies in x: of a shard, or of a weight in another layout, the bits
    differ.
    """
    index = torch.arange(x.numel(), device=x.device)
    threshold = ((index * 0x85EBCA77 + (step & 0xFFFFFFFF) * 0x9E3779B9) & 0xFFFFFFFF) >> 16
    bits = (x.flatten().view(torch.int32).to(torch.int64) & 0xFFFFFFFF) + threshold >> 16
    half = (
        torch.where(bits < 1 << 15, bits, bits - (1 << 16))
        .to(torch.int16)
        .view(torch.bfloat16)
        .view(x.shape)
    )
    return torch.where(x.isnan(), torch.full_like(half, math.nan), half)


def lerp(start: Tensor, end: Tensor, weight: float) -> Tensor:
    """start + weight (end - start), from the nearer end, as torch.lerp does."""
    if weight < 0.5:
        return start + (end - start) * weight
    return end - (end - start) * (1.0 - weight)


def _slow_from(new: Tensor, i: int, slow_from: Sequence[Tensor], slow_lr: float) -> Tensor:
    """The slow step (equation 9), folded into the last retain step: slow + alpha (fast - slow)."""
    return lerp(_wide(slow_from[i]), new, slow_lr) if slow_from else new


def _each(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    masks: Sequence[Tensor],
    slow_save: Sequence[Tensor],
) -> Iterator[tuple[int, Tensor, Tensor, Tensor | None]]:
    grads, slow_save, masks = (
        spread(grads, params),
        spread(slow_save, params),
        spread_masks(masks, params),
    )
    for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
        if slow_save:
            slow_save[i].copy_(
                param
            )  # lazily: the weights a cycle starts from, stored by its forget step
        yield i, param, grad, _selected(masks, i, param)


# --- optimizer steps ------------------------------------------------------------------------------


def sgd_step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    slow_save: Sequence[Tensor],
    slow_from: Sequence[Tensor],
    masks: Sequence[Tensor],
    norm: Tensor | None,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    *,
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
    first: bool,
    freeze_masked: bool,
    max_norm: float,
    slow_lr: float,
    numbers: Tensor | None = None,
    skipped: Tensor | None = None,
) -> None:
    """torch.optim.SGD on the masked, clipped gradient; ``first`` = the momentum buffers are
    uninitialised.
    """
    lr, weight_decay, slow_lr = (lr, weight_decay, slow_lr) if numbers is None else numbers.tolist()
    skip = skip_step(norm, found_inf, skipped)
    momentum_buffers, slow_from = spread(momentum_buffers, params), spread(slow_from, params)
    for i, param, grad, selected in _each(params, grads, masks, slow_save):
        frozen = selected if freeze_masked else None
        p = _wide(param)
        if not skip:
            factor = grad_multiplier(norm, grad_scale, max_norm, param.device, p.dtype)
            g = _masked_grad(grad, selected, factor, maximize)
            if weight_decay != 0.0:
                g = g + p * weight_decay
            if momentum_buffers:
                m = g if first else _wide(momentum_buffers[i]) * momentum + g * (1.0 - dampening)
                # frozen weights of an uninitialised buffer still need a defined value
                _store(
                    momentum_buffers[i],
                    torch.where(frozen, m, 0.0) if first and frozen is not None else m,
                    None if first else frozen,
                )
                g = g + m * momentum if nesterov else m
            new = p - g * lr
            p = new if frozen is None else torch.where(frozen, new, p)
        elif first and momentum_buffers:
            momentum_buffers[i].zero_()
        param.copy_(_slow_from(p, i, slow_from, slow_lr))


def adamw_step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    slow_save: Sequence[Tensor],
    slow_from: Sequence[Tensor],
    masks: Sequence[Tensor],
    norm: Tensor | None,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled: bool,
    maximize: bool,
    freeze_masked: bool,
    max_norm: float,
    slow_lr: float,
    numbers: Tensor | None = None,
    skipped: Tensor | None = None,
) -> None:
    """torch.optim.AdamW (decoupled) or Adam (L2) on the masked, clipped gradient.

    ``steps`` are fp32 scalars [] beside their parameters; each counts the updates applied, so a
    skipped step leaves it. ``max_exp_avg_sqs`` empty = no AMSGrad.
    """
    lr, weight_decay, slow_lr = (lr, weight_decay, slow_lr) if numbers is None else numbers.tolist()
    skip = skip_step(norm, found_inf, skipped)
    exp_avgs, exp_avg_sqs = spread(exp_avgs, params), spread(exp_avg_sqs, params)
    max_exp_avg_sqs, slow_from = spread(max_exp_avg_sqs, params), spread(slow_from, params)
    steps = spread_scalars(steps, params)
    for i, param, grad, selected in _each(params, grads, masks, slow_save):
        frozen = selected if freeze_masked else None
        p = _wide(param)
        if not skip:
            steps[i].add_(1)
            step = int(steps[i])
            scale, eps_now = adam_corrections(lr, beta1, beta2, eps, step)
            factor = grad_multiplier(norm, grad_scale, max_norm, param.device, p.dtype)
            g = _masked_grad(grad, selected, factor, maximize)
            new = p * (1.0 - lr * weight_decay) if decoupled else p
            if not decoupled and weight_decay != 0.0:
                g = g + p * weight_decay
            m = lerp(_wide(exp_avgs[i]), g, 1.0 - beta1)
            v = _wide(exp_avg_sqs[i]) * beta2 + (g * (1.0 - beta2)) * g
            narrow = exp_avgs[i].dtype == torch.bfloat16 and param.dtype == torch.float32
            for state, value in ((exp_avgs[i], m), (exp_avg_sqs[i], v)):
                _store(state, dithered(value, step) if narrow else value, frozen)
            if max_exp_avg_sqs:
                v = torch.maximum(_wide(max_exp_avg_sqs[i]), v)
                _store(max_exp_avg_sqs[i], v, frozen)
            new = new - (m * scale) / (_sqrt(v) + eps_now)
            p = new if frozen is None else torch.where(frozen, new, p)
        param.copy_(_slow_from(p, i, slow_from, slow_lr))


def _sqrt(x: Tensor) -> Tensor:
    """IEEE sqrt: torch's fp32 one may be MKL's, an ulp off; fp64, even an ulp off, rounds to the
    right fp32.
    """
    return x.to(torch.float64).sqrt().to(x.dtype)


def adam_corrections(
    lr: float, beta1: float, beta2: float, eps: float, step: int
) -> tuple[float, float]:
    """Adam's bias corrections, moved into lr and eps (Kingma and Ba, end of section 2), in double."""
    bias, root = 1.0 - int_power(beta1, step), math.sqrt(1.0 - int_power(beta2, step))
    return lr * root / bias if bias != 0.0 else lr * root * math.inf, eps * root


def int_power(base: float, exponent: int) -> float:
    """base ** exponent by squaring: the same bits on every processor, unlike a library's pow."""
    result = 1.0
    while exponent > 0:
        if exponent & 1:
            result *= base
        base *= base
        exponent >>= 1
    return result


def interpolate_(
    slow: Sequence[Tensor], fast: Sequence[Tensor], slow_lr: float, numbers: Tensor | None = None
) -> None:
    """slow += alpha (fast - slow); fast = slow (equation 9)."""
    slow_lr = slow_lr if numbers is None else numbers.item()
    for s, f in zip(slow, spread(fast, slow), strict=True):
        s.copy_(lerp(_wide(s), _wide(f), slow_lr))
        f.copy_(s)


# --- saliency: equation 3 -------------------------------------------------------------------------


def fisher_accumulate_(
    fisher: Sequence[Tensor], grads: Sequence[Tensor], weight: float, numbers: Tensor | None = None
) -> None:
    """F += weight * g^2, F in fp32 (fp64 for fp64)."""
    weight = weight if numbers is None else numbers.item()
    for f, g in zip(spread(fisher, grads), grads, strict=True):
        wide = g.to(f.dtype)
        f.add_((wide * wide) * weight)


def saliency_mask(
    forget: Sequence[Tensor], retain: Sequence[Tensor], threshold: float, eps: float
) -> tuple[list[Tensor], Tensor]:
    """F_forget + eps >= gamma (F_retain + eps), packed; and how many weights each tensor selects,
    int64 [tensors].
    """
    retain = spread(retain, forget)
    selected = [f + eps >= (r + eps) * threshold for f, r in zip(forget, retain, strict=True)]
    device = forget[0].device if forget else torch.device("cpu")
    counts = torch.zeros(len(selected), dtype=torch.int64, device=device)
    for i, s in enumerate(selected):
        counts[i] = s.sum()
    return [pack_bits(s) for s in selected], counts


# --- adaptive losses: equations 4 and 5 -----------------------------------------------------------


def adaptive_weights(
    losses: Tensor, temperature: float, floor: float, counted: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """losses [samples] -> weights b_i^-lambda / sum_j b_j^-lambda [samples], b = max(l, floor), and
    that sum's log.

    In fp64, and relative to the least b, so that no power overflows and the largest is 1; the
    logarithm [] stays fp64. Samples that are not ``counted`` (bool [samples]) weigh 0, and if none
    is, the logarithm is -inf. One NaN among the others makes them all NaN.
    """
    base = losses.to(torch.float64).clamp_min(floor)
    if counted is not None:
        base = torch.where(counted, base, math.inf)
    least = torch.cat([base, base.new_full((1,), math.inf)]).amin()  # samples may be none
    least = torch.where(least == math.inf, 1.0, least)
    raw = (base / least).pow(-temperature)
    if counted is not None:
        raw = torch.where(counted, raw, 0.0)
    total = raw.sum()
    weights = torch.where(raw == 0, 0.0, raw / total)  # also if no sample has a label: not 0 / 0
    return weights.to(losses.dtype), total.log() - temperature * least.log()


def row_shift(x: Tensor) -> Tensor:
    """The maximum over the last dimension, which log-sum-exps subtract; 0 where it is infinite, as
    inf - inf is NaN.
    """
    maximum = x.detach().amax(dim=-1)
    return torch.where(maximum.isinf(), 0.0, maximum)


def cross_entropy_log_sums(wide: Tensor, labels: Tensor) -> Tensor:
    """wide [samples, tokens, classes], labels [samples, tokens] -> [2, samples, tokens]: shift, log
    sum e^(x - shift).

    The classes beside the label are added apart: what is small beside the e^0 of a label that is
    the maximum, the loss of a remembered sample, keeps its digits.
    """
    shift = row_shift(wide)
    relative, label = wide - shift.unsqueeze(2), labels.unsqueeze(2)
    rest = relative.exp().scatter(2, label, 0.0).sum(dim=2)
    return torch.stack(
        [shift, torch.log1p(rest + torch.expm1(relative.gather(2, label).squeeze(2)))]
    )


def adaptive_cross_entropy(
    logits: Tensor, labels: Tensor, temperature: float, floor: float, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """logits [samples, tokens, classes], labels [samples, tokens] -> loss, losses, weights,
    log_normaliser, log_sums.

    A sample's loss is the mean over its tokens with a label; a sample without one has loss and
    weight 0. losses, weights [samples], log_sums [2, samples, tokens] (a row's maximum, or 0 where
    that is infinite, and log sum e^(x - maximum)) in fp32 (fp64 for fp64); log_normaliser [] as
    ``adaptive_weights``, fp64.
    """
    wide = _wide(logits)
    counted = labels != ignore_index
    known = torch.where(counted, labels, 0)
    shift, log_sum = log_sums = cross_entropy_log_sums(wide, known)
    picked = wide.gather(2, known.unsqueeze(2)).squeeze(2)
    tokens = counted.sum(dim=1)
    losses = torch.where(counted, log_sum - (picked - shift), 0.0).sum(dim=1) / tokens.clamp_min(1)
    weights, log_normaliser = adaptive_weights(losses, temperature, floor, tokens > 0)
    return (weights * losses).sum(), losses, weights, log_normaliser, log_sums


def adaptive_cross_entropy_backward(
    grad: Tensor,
    logits: Tensor,
    labels: Tensor,
    weights: Tensor,
    log_sums: Tensor,
    ignore_index: int,
) -> Tensor:
    """d loss / d logits = grad * w_i / tokens_i * (softmax - onehot); weights are constants.

    At the label softmax - 1 = expm1(-loss), which keeps the digits of a small loss.
    """
    counted = (labels != ignore_index).unsqueeze(2)
    label = torch.where(counted, labels.unsqueeze(2), 0)
    row = (
        torch.where(
            counted, (weights / counted.sum(dim=1).clamp_min(1).squeeze(1)).view(-1, 1, 1), 0.0
        )
        * grad
    )
    shift, log_sum = log_sums.unsqueeze(3)
    log_softmax = (_wide(logits) - shift) - log_sum
    delta = log_softmax.exp().scatter(2, label, log_softmax.gather(2, label).expm1())
    return torch.where(counted, delta * row, 0.0).to(logits.dtype)


def adaptive_cross_entropy_backward_(
    grad: Tensor,
    logits: Tensor,
    labels: Tensor,
    weights: Tensor,
    log_sums: Tensor,
    ignore_index: int,
) -> None:
    """As above, written over the logits."""
    logits.copy_(
        adaptive_cross_entropy_backward(grad, logits, labels, weights, log_sums, ignore_index)
    )


def adaptive_cross_entropy_sum_(
    logits: Tensor,
    labels: Tensor,
    temperature: float,
    floor: float,
    ignore_index: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One token a sample: total = scale * sum_i raw_i l_i with raw_i = max(l_i, floor)^-lambda ->
    total, losses, weights, normaliser = sum_i raw_i. Writes d total / d logits over the logits, the
    raw_i constant.
    """
    outputs = adaptive_cross_entropy(logits, labels, temperature, floor, ignore_index)
    loss, losses, weights, log_normaliser, log_sums = outputs
    raw = losses.to(torch.float64).clamp_min(floor).pow(-temperature).to(losses.dtype)
    raw = torch.where(labels[:, 0] != ignore_index, raw, 0.0)
    factor = torch.full_like(loss, scale)
    adaptive_cross_entropy_backward_(factor, logits, labels, raw, log_sums, ignore_index)
    return (raw * losses).sum() * factor, losses, weights, log_normaliser.exp().to(losses.dtype)


def adaptive_cross_entropy_scale_(gradient: Tensor, factor: Tensor) -> None:
    """gradient *= factor, rounded once."""
    gradient.copy_(_wide(gradient) * factor)


def adaptive_mse(
    prediction: Tensor, target: Tensor, temperature: float, floor: float, mean: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """prediction, target [samples, elements] -> loss, losses [samples], weights [samples],
    log_normaliser.
    """
    difference = _wide(prediction) - _wide(target)
    losses = (difference * difference).sum(dim=1)
    if mean:
        losses = losses / max(prediction.shape[1], 1)
    weights, log_normaliser = adaptive_weights(losses, temperature, floor)
    return (weights * losses).sum(), losses, weights, log_normaliser


def adaptive_mse_backward(
    grad: Tensor, prediction: Tensor, target: Tensor, weights: Tensor, mean: bool
) -> Tensor:
    """d loss / d prediction = grad * w_i * 2 (prediction - target) [/ elements]."""
    scale = 2.0 / max(prediction.shape[1], 1) if mean else 2.0
    difference = _wide(prediction) - _wide(target)
    return (difference * (weights * scale * grad).unsqueeze(1)).to(prediction.dtype)


# --- soft targets: teachers of BT and SCRUB -------------------------------------------------------


def soft_target_kl(
    logits: Tensor, teacher_logits: Tensor, weights: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """sum_i w_i l_i, l_i = T^2 KL(softmax(teacher_i / T) || softmax(logits_i / T)) -> loss, losses,
    log_sums.

    logits, teacher_logits [samples, classes]; weights [samples] of any sign, None = 1 / samples.
    losses [samples] and log_sums [4, samples] are 0 where the weight is; the latter are the logits'
    maximum (0 where that is infinite) and log sum e^((x - maximum) / T), then the teacher's. All in
    fp32 (fp64 for fp64). A class without probability for the teacher adds nothing, whatever its
    logit.
    """
    weights = _row_weights(weights, logits)
    counted = (weights != 0).unsqueeze(1)
    pair = [torch.where(counted, _wide(x), 0.0) for x in (logits, teacher_logits)]
    shifts = [row_shift(x) for x in pair]
    relative = [(x - s.unsqueeze(1)) / temperature for x, s in zip(pair, shifts, strict=True)]
    sums = [torch.where(counted.squeeze(1), x.exp().sum(dim=1).log(), 0.0) for x in relative]
    log_q, log_p = (x - s.unsqueeze(1) for x, s in zip(relative, sums, strict=True))
    p = log_p.exp()
    losses = torch.where(counted & (p != 0), p * (log_p - log_q), 0.0).sum(dim=1) * temperature**2
    return (weights * losses).sum(), losses, torch.stack([shifts[0], sums[0], shifts[1], sums[1]])


def soft_target_kl_backward(
    grad: Tensor,
    logits: Tensor,
    teacher_logits: Tensor,
    weights: Tensor | None,
    log_sums: Tensor,
    temperature: float,
) -> Tensor:
    """d loss / d logits = grad * w_i * T * (softmax(logits / T) - softmax(teacher / T)); 0 where
    the weight is 0.
    """
    weights = _row_weights(weights, logits)
    row = (weights * temperature * grad).unsqueeze(1)
    q, p = (
        ((_wide(x) - shift.unsqueeze(1)) / temperature - log_sum.unsqueeze(1)).exp()
        for x, shift, log_sum in ((logits, *log_sums[:2]), (teacher_logits, *log_sums[2:]))
    )
    return torch.where(weights.unsqueeze(1) != 0, (q - p) * row, 0.0).to(logits.dtype)


def _row_weights(weights: Tensor | None, logits: Tensor) -> Tensor:
    """[samples]"""
    if weights is not None:
        return weights
    samples = logits.shape[0]
    return logits.new_full((samples,), 1.0 / max(samples, 1), dtype=accumulate_dtype(logits.dtype))
