"""How far a result may be from the truth in fp64: (operations) x (error of one), each with its derivation.

``U`` is the error of one rounded fp32 operation. Elementwise results have no tolerance: they are compared bitwise.
"""

import torch

U = 2.0**-24
EPS = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10, torch.float64: 2.0**-52}
TINY = {torch.float32: 2.0**-149, torch.bfloat16: 2.0**-133, torch.float16: 2.0**-24, torch.float64: 0.0}
FUNCTION = 4 * U  # exp, log, pow: a good library is within 2 ulp, and 1 ulp is at most 2 U of the value


def roundings(terms: int) -> float:
    """Of a sum of ``terms`` in any order: n - 1 at worst, 4 sqrt(n) but for 1 in 1000 (Higham & Mary 2019)."""
    return min(max(terms - 1, 0), 4 * terms**0.5)


def grad_norm(truth: torch.Tensor, elements: int, scaled: bool) -> torch.Tensor:
    # squares and sums in fp64 (n roundings, halved by the root), one rounding to fp32; unscaling rounds the
    # reciprocal and the product in fp32
    relative = U + (elements + 2) * 2.0**-53 + (2 * U if scaled else 0.0)
    return truth * relative + 2.0**-149


def optimizer_step(steps: int, size: torch.Tensor) -> torch.Tensor:
    # torch fuses a multiply-add where we round twice: 2 ulp a step of the larger of |p| and the step's own terms
    return steps * 2 * EPS[torch.float32] * size


def stored(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    # one rounding to the dtype, and the spacing of subnormals
    return value.abs() * (EPS[dtype] / 2) + TINY[dtype]


def weighted(losses, loss_error, raw_of, temperature: float, floor: float) -> dict[str, torch.Tensor]:
    """Errors of weights, normaliser and sum w_i l_i from those of the losses, all fp64 [samples] or [].

    ``raw_of(base)`` = the unnormalised weights of the clamped losses ``base``.
    """
    low = (losses - loss_error).clamp_min(floor)
    high = (losses + loss_error).clamp_min(floor)
    raw = raw_of(losses.clamp_min(floor))
    # (high / low)^temperature - 1, the power itself, and the rounding of the floor to fp32
    relative = torch.expm1(temperature * torch.log(high / low)) + FUNCTION + temperature * U
    normaliser = raw.sum()
    safe = normaliser if normaliser > 0 else torch.ones_like(normaliser)
    normaliser_relative = (raw * relative).sum() / safe + roundings(raw.numel()) * U
    weights = raw / safe
    weight_relative = relative + normaliser_relative + 2 * U  # first order, division and second-order terms
    products = (weights * losses).abs()
    loss = (products * weight_relative + weights * loss_error * 1.001).sum()
    loss = loss + (roundings(raw.numel()) + 1) * U * products.sum() + 2.0**-149
    return {
        "raw": raw, "weights": weights, "normaliser": normaliser, "loss": (weights * losses).sum(),
        "weight_relative": weight_relative, "normaliser_error": normaliser * normaliser_relative + 2.0**-149,
        "weight_error": weights * weight_relative + 2.0**-149, "loss_error": loss,
    }  # fmt: skip


def log_sum_exp(wide: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    # exp(x - max): the difference rounds once (p-weighted |x - max| U), exp, then the sum; log and the last addition
    top = wide.amax(dim=2, keepdim=True)
    distance = torch.where(wide == -torch.inf, 0.0, wide - top).abs()
    spread = (torch.exp(wide - lse.unsqueeze(2)) * distance).sum(dim=2)
    total = (spread + roundings(wide.shape[2])) * U + FUNCTION
    return total + (lse - top.squeeze(2)).abs() * FUNCTION + lse.abs() * U


def squared_errors(elements: int) -> float:
    # the difference (twice, squared), the square, the sum, the division by the count; relative, as all terms are >= 0
    return (4 + roundings(elements)) * U


def cross_entropy(logits, labels, temperature: float, floor: float, ignore_index=-100, grad: float = 1.0) -> dict:
    """Truths and bounds of loss, losses, weights, normaliser, lse and gradient of the fp32 arithmetic on ``logits``."""
    wide = logits.detach().double()
    lse = torch.logsumexp(wide, dim=2)
    counted = labels != ignore_index
    picked = wide.gather(2, torch.where(counted, labels, 0).unsqueeze(2)).squeeze(2)
    tokens = counted.sum(dim=1)
    rows = torch.where(counted, lse - picked, 0.0)
    losses = rows.sum(dim=1) / tokens.clamp_min(1)
    lse_error = log_sum_exp(wide, lse)
    # the subtraction of the label's logit, the sum over tokens and the division round in fp32
    row_error = torch.where(counted, lse_error + rows.abs() * U * (2 + roundings(labels.shape[1])), 0.0)
    losses_error = row_error.sum(dim=1) / tokens.clamp_min(1)
    result = weighted(losses, losses_error, lambda base: torch.where(tokens > 0, base**-temperature, 0.0),
                      temperature, floor)  # fmt: skip
    row = (grad * result["weights"] / tokens.clamp_min(1)).unsqueeze(1).unsqueeze(2)
    softmax = torch.exp(wide - lse.unsqueeze(2))
    onehot = torch.zeros_like(wide).scatter_(2, torch.where(counted, labels, 0).unsqueeze(2), 1.0)
    gradient = torch.where(counted.unsqueeze(2), row * (softmax - onehot), 0.0)
    # the exponent x - lse has the error of lse and one rounding; exp may flush below 2^-125; softmax - onehot rounds;
    # weight, 1 / tokens, grad, the product round; then the store
    distance = torch.where(wide == -torch.inf, 0.0, (wide - lse.unsqueeze(2)).abs())
    softmax_error = softmax * (torch.expm1(lse_error.unsqueeze(2) + distance * U) + FUNCTION) + 2.0**-125
    gradient_error = row.abs() * (softmax_error + (softmax - onehot).abs() * U)
    gradient_error += gradient.abs() * (result["weight_relative"].view(-1, 1, 1) + 4 * U) * 1.001
    gradient_error = torch.where(counted.unsqueeze(2), gradient_error + stored(gradient, logits.dtype), 0.0)
    return {
        "loss": (result["loss"], result["loss_error"]),
        "losses": (losses, losses_error),
        "weights": (result["weights"], result["weight_error"]),
        "normaliser": (result["normaliser"], result["normaliser_error"]),
        "lse": (lse, torch.where(counted, lse_error, torch.inf)),  # of a token without a label nobody reads it
        "gradient": (gradient, gradient_error),
    }


def cross_entropy_sum(logits, labels, temperature: float, floor: float, ignore_index: int, scale: float) -> dict:
    """Of ``adaptive_cross_entropy_sum_``: as above, times scale and normaliser, whose own error the weights contain."""
    mean = cross_entropy(logits, labels, temperature, floor, ignore_index, scale)
    (loss, loss_error), (normaliser, normaliser_error) = mean["loss"], mean["normaliser"]
    gradient, gradient_error = mean["gradient"]
    # the total: two products; the gradient: its store may round in the subnormal range of the product instead
    total_error = (loss_error * normaliser + loss * normaliser_error) * abs(scale) * 1.001
    return {
        "total": (loss * normaliser * scale, total_error + (loss * normaliser * scale).abs() * 2 * U + 2.0**-149),
        **{name: mean[name] for name in ("losses", "weights", "normaliser")},
        "gradient": (gradient * normaliser, gradient_error * normaliser + (labels != ignore_index).unsqueeze(2)
                     * TINY[logits.dtype]),
    }  # fmt: skip


def mean_squared_error(prediction, target, temperature: float, floor: float, mean: bool, grad: float = 1.0) -> dict:
    """Truths and bounds of loss, losses, weights, normaliser and gradient of the fp32 arithmetic."""
    difference = prediction.detach().double() - target.detach().double()
    elements = prediction.shape[1]
    losses = difference.square().sum(dim=1) / (max(elements, 1) if mean else 1)
    losses_error = losses * squared_errors(elements) + elements * TINY[torch.float32]
    result = weighted(losses, losses_error, lambda base: base**-temperature, temperature, floor)
    sample = grad * result["weights"] * (2.0 / max(elements, 1) if mean else 2.0)
    gradient = difference * sample.unsqueeze(1)
    # the difference, the scale 2 / elements, two products of the sample's factor, the product; then the store
    relative = result["weight_relative"].unsqueeze(1) + 5 * U
    gradient_error = gradient.abs() * relative * 1.001 + stored(gradient, prediction.dtype)
    return {
        "loss": (result["loss"], result["loss_error"]),
        "losses": (losses, losses_error),
        "weights": (result["weights"], result["weight_error"]),
        "normaliser": (result["normaliser"], result["normaliser_error"]),
        "gradient": (gradient, gradient_error),
    }


def soft_target_kl(
    logits, teacher, weights, temperature: float, grad: float = 1.0, pieces: int = 0, exp2: int = 0
) -> dict:
    """Truths and bounds of loss, losses, lse [2, samples] and gradient. Rows of weight 0 are 0 exactly.

    ``pieces`` = how often a long row's running sums may have been scaled anew in fp32; ``exp2`` = 1 where exp is an
    exp2 of a product, which rounds.
    """
    samples, classes = logits.shape
    w = torch.full((samples,), 1.0 / max(samples, 1)).double() if weights is None else weights.double()
    w = w.to(logits.device)
    counted = w != 0
    z = [torch.where(counted.unsqueeze(1), t.detach().double() / temperature, 0.0) for t in (logits, teacher)]
    lse = torch.stack([t.logsumexp(dim=1) for t in z])
    top, parts = [t.amax(dim=1, keepdim=True) for t in z], []
    for t, m, s in zip(z, top, lse, strict=True):
        # over T: the logit rounds before the maximum is subtracted, or the difference, 1 / T and their product after it
        relative = torch.where(t == -torch.inf, 0.0, U * (t.abs() + (3 + exp2) * (t - m).abs()))
        softmax, log_sum = (t - s.unsqueeze(1)).exp(), s - m.squeeze(1)
        total = (softmax * relative).sum(dim=1) + FUNCTION + (roundings(classes) + 5 * pieces) * U
        total = total + log_sum.abs() * FUNCTION
        parts.append((relative, softmax, t - s.unsqueeze(1), total, total + 3 * U * (m.squeeze(1).abs() + s.abs())))
    (dx, q, log_q, x_error, x_lse), (dy, p, log_p, y_error, y_lse) = parts
    inside = p > 0
    ratio = torch.where(inside, log_p - log_q, 0.0)
    shifted = torch.where(inside, (z[1] - top[1]) - (z[0] - top[0]), 0.0).abs()  # before the log-sum-exps meet it
    logs = torch.where(inside, log_p.abs() + log_q.abs(), 0.0)
    losses = (p * ratio).sum(dim=1) * temperature**2
    # p has the error of its exponent and of exp; the ratio that of both logits and of its subtractions; then products
    # and the sum; what exp flushes to 0; both log-sum-exps
    terms = ratio.abs() + shifted
    p_error = torch.expm1(dy + y_error.unsqueeze(1) + U * (1 + exp2) * logs + FUNCTION)
    p_error += (2 + roundings(classes)) * U
    row = (p * (torch.where(inside, p_error * terms + dx + dy, 0.0) + U * (terms + logs))).sum(dim=1)
    # scaling anew: two differences, their products and sums, an exp; no running distance exceeds the final one
    distances = torch.where(inside, (z[1] - top[1]).abs() + (z[0] - top[0]).abs(), 0.0)
    row = row + pieces * 16 * U * (p * distances).sum(dim=1)
    row = row + 2.0**-125 * torch.where(ratio.isfinite(), terms, 0.0).sum(dim=1) + x_error + y_error
    losses_error = torch.where(counted, row * temperature**2 * 1.001 + 4 * U * losses.abs() + 2.0**-149, 0.0)
    loss, size = (w * losses).sum(), (w * losses).abs().sum()
    loss_error = (w.abs() * losses_error).sum() + (roundings(samples) + 3) * U * size + 2.0**-149
    gradient = (q - p) * (w * temperature * grad).unsqueeze(1)
    # the exponent: the logit over T, its log-sum-exp, their difference; exp, which may flush
    softmax_error = torch.zeros_like(q)
    for t, softmax, log, s_error in ((z[0], q, log_q, x_lse), (z[1], p, log_p, y_lse)):
        distance = torch.where(t == -torch.inf, 0.0, 2 * t.abs() + (1 + exp2) * log.abs()) * U
        softmax_error += softmax * (torch.expm1(s_error.unsqueeze(1) + distance) + FUNCTION) + 2.0**-125
    gradient_error = (w * temperature * grad).abs().unsqueeze(1) * (softmax_error + (q - p).abs() * U)
    gradient_error = gradient_error * 1.001 + 5 * U * gradient.abs()
    stored_error = stored(gradient.abs() + gradient_error, logits.dtype)
    gradient_error = torch.where(counted.unsqueeze(1), gradient_error + stored_error, 0.0)
    lse_error = torch.where(counted, torch.stack([x_lse, y_lse]), torch.inf)  # of a row without weight nobody reads it
    return {"loss": (loss, loss_error), "losses": (losses, losses_error), "lse": (lse, lse_error),
            "gradient": (gradient, gradient_error)}  # fmt: skip
