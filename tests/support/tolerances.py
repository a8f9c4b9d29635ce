"""How far a result may be from the truth in fp64: operations x error of one, each derived.

``U`` is the error of one rounded fp32 operation. Elementwise results have no tolerance: they are
compared bitwise.
"""

import math

import torch

U = 2.0**-24
EPS = {
    torch.float32: 2.0**-23,
    torch.bfloat16: 2.0**-7,
    torch.float16: 2.0**-10,
    torch.float64: 2.0**-52,
}
TINY = {
    torch.float32: 2.0**-149,
    torch.bfloat16: 2.0**-133,
    torch.float16: 2.0**-24,
    torch.float64: 0.0,
}
# exp, log, pow: a good library is within 2 ulp, and 1 ulp is at most 2 U of the value
FUNCTION = 4 * U


def roundings(terms: int) -> float:
    """Of a sum of ``terms`` in any order: n - 1 at worst, 4 sqrt(n) but for 1 in 1000 (Higham &
    Mary 2019).
    """
    return min(max(terms - 1, 0), 4 * terms**0.5)


def grad_norm(truth: torch.Tensor, elements: int, scaled: bool) -> torch.Tensor:
    # squares and sums in fp64 (n roundings, halved by the root), one rounding to fp32; unscaling
    # rounds the reciprocal and the product in fp32
    relative = U + (elements + 2) * 2.0**-53 + (2 * U if scaled else 0.0)
    return truth * relative + 2.0**-149


def optimizer_step(steps: int, size: torch.Tensor) -> torch.Tensor:
    # torch fuses a multiply-add where we round twice: 2 ulp a step of the larger of |p| and the
    # step's own terms
    return steps * 2 * EPS[torch.float32] * size


def stored(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    # one rounding to the dtype, and the spacing of subnormals
    return value.abs() * (EPS[dtype] / 2) + TINY[dtype]


def weighted(
    losses, loss_error, raw_of, temperature: float, floor: float
) -> dict[str, torch.Tensor]:
    """Errors of weights, normaliser and sum w_i l_i from those of the losses, all fp64 [samples] or
    [].

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
    # first order, division and second-order terms
    weight_relative = relative + normaliser_relative + 2 * U
    products = (weights * losses).abs()
    loss = (products * weight_relative + weights * loss_error * 1.001).sum()
    loss = loss + (roundings(raw.numel()) + 1) * U * products.sum() + 2.0**-149
    return {
        "raw": raw,
        "weights": weights,
        "normaliser": normaliser,
        "loss": (weights * losses).sum(),
        "log_normaliser": normaliser.log(),
        "log_normaliser_error": 1.001 * normaliser_relative + 2.0**-40,
        "weight_relative": weight_relative,
        "normaliser_error": normaliser * normaliser_relative + 2.0**-149,
        "weight_error": weights * weight_relative + 2.0**-149,
        "loss_error": loss,
    }


def log_sums(wide: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Truth and bound of [2, samples, tokens]: the maximum (0 where infinite), exact, and log sum
    e^(x
    - maximum).

    The bound of a small log-sum is relative to it: the classes beside the label are summed apart.
    """
    shift = wide.amax(dim=2)
    shift = torch.where(shift.isinf(), 0.0, shift)
    relative, label = wide - shift.unsqueeze(2), labels.unsqueeze(2)
    power = relative.exp().scatter(2, label, 0.0)
    own = relative.gather(2, label).squeeze(2).expm1()
    others = power.sum(dim=2) + own
    log_sum = others.log1p()
    # each exponential: its difference rounds once, then exp; the sum; what exp flushes; the label's
    # expm1 and its addition, which may cancel the most; log1p
    distance = torch.where(
        power == 0, 0.0, relative.abs() * U + FUNCTION + roundings(wide.shape[2]) * U
    )
    error = (
        (power * distance).sum(dim=2)
        + own.abs() * FUNCTION
        + others.abs() * U
        + wide.shape[2] * 2.0**-125
    )
    error = error / (1 + others) * 1.001 + log_sum.abs() * FUNCTION
    return torch.stack([shift, log_sum]), torch.stack([torch.zeros_like(error), error])


def squared_errors(elements: int) -> float:
    # the difference (twice, squared), the square, the sum, the division by the count; relative, as
    # all terms are >= 0
    return (4 + roundings(elements)) * U


def cross_entropy(
    logits, labels, temperature: float, floor: float, ignore_index=-100, grad: float = 1.0
) -> dict:
    """Truths and bounds of all outputs and of the gradient of the fp32 arithmetic on ``logits``."""
    wide = logits.detach().double()
    counted = labels != ignore_index
    known = torch.where(counted, labels, 0)
    label = known.unsqueeze(2)
    sums, sums_error = log_sums(wide, known)
    (shift, log_sum), sum_error = sums, sums_error[1]
    below = wide.gather(2, label).squeeze(2) - shift  # of the label
    tokens = counted.sum(dim=1)
    rows = torch.where(counted, log_sum - below, 0.0)
    losses = rows.sum(dim=1) / tokens.clamp_min(1)
    # the differences from the maximum and the log-sum, the sum over tokens and the division round
    # in fp32
    row_error = sum_error + below.abs() * U + rows.abs() * U * (2 + roundings(labels.shape[1]))
    row_error = torch.where(counted, row_error, 0.0)
    losses_error = row_error.sum(dim=1) / tokens.clamp_min(1)
    result = weighted(
        losses,
        losses_error,
        lambda base: torch.where(tokens > 0, base**-temperature, 0.0),
        temperature,
        floor,
    )
    row = (grad * result["weights"] / tokens.clamp_min(1)).unsqueeze(1).unsqueeze(2)
    exponent = (wide - shift.unsqueeze(2)) - log_sum.unsqueeze(2)
    softmax, lacking = exponent.exp(), torch.expm1(-rows).unsqueeze(2)
    gradient = torch.where(counted.unsqueeze(2), row * softmax.scatter(2, label, lacking), 0.0)
    # the exponent: two differences and the log-sum; exp may flush below 2^-125; at the label expm1
    # of the loss; weight, 1 / tokens, grad, the product round; then the store
    relative = (wide - shift.unsqueeze(2)).abs() * U + exponent.abs() * U + sum_error.unsqueeze(2)
    relative = torch.where(wide == -torch.inf, 0.0, relative)
    error = softmax * (torch.expm1(relative) + FUNCTION) + 2.0**-125
    own_error = (-rows).exp() * torch.expm1(row_error) - lacking.squeeze(2) * FUNCTION
    error = row.abs() * error.scatter(2, label, own_error.unsqueeze(2))
    error += gradient.abs() * (result["weight_relative"].view(-1, 1, 1) + 4 * U) * 1.001
    error = torch.where(counted.unsqueeze(2), error + stored(gradient, logits.dtype), 0.0)
    unread = torch.where(counted, 0.0, torch.inf)  # of a token without a label nobody reads it
    return {
        "loss": (result["loss"], result["loss_error"]),
        "losses": (losses, losses_error),
        "weights": (result["weights"], result["weight_error"]),
        "log_normaliser": (result["log_normaliser"], result["log_normaliser_error"]),
        "normaliser": (result["normaliser"], result["normaliser_error"]),
        "log_sums": (sums, sums_error + unread),
        "gradient": (gradient, error),
    }


def cross_entropy_sum(
    logits, labels, temperature: float, floor: float, ignore_index: int, scale: float
) -> dict:
    """Of ``adaptive_cross_entropy_sum_``: as above, times scale and normaliser, whose own error the
    weights contain.
    """
    mean = cross_entropy(logits, labels, temperature, floor, ignore_index, scale)
    (loss, loss_error), (normaliser, normaliser_error) = mean["loss"], mean["normaliser"]
    gradient, gradient_error = mean["gradient"]
    # the total: two products; the gradient: its store may round in the subnormal range of the
    # product instead
    total_error = (loss_error * normaliser + loss * normaliser_error) * abs(scale) * 1.001
    return {
        "total": (
            loss * normaliser * scale,
            total_error + (loss * normaliser * scale).abs() * 2 * U + 2.0**-149,
        ),
        **{name: mean[name] for name in ("losses", "weights", "normaliser")},
        "gradient": (
            gradient * normaliser,
            gradient_error * normaliser
            + (labels != ignore_index).unsqueeze(2) * TINY[logits.dtype],
        ),
    }


def relative(losses, loss_error, reference) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(losses and their errors relative to a reference [samples], or to 1 without one; that)."""
    if reference is None:
        return losses, loss_error, torch.ones_like(losses)
    usual = reference.double()
    # the quotient rounds
    return losses / usual, (loss_error * (1 + U) + losses * U) / usual + TINY[torch.float32], usual


def capped(
    bounds: dict[str, torch.Tensor], own, own_error, floor: float, cap: float, usual
) -> dict[str, torch.Tensor]:
    """``weighted`` of relative losses -> the same of weights over the reference, 0 from the cap on.

    No loss may be so near the cap that its own error decides.
    """
    base, error = own.clamp_min(floor), own_error
    assert not ((base - cap).abs() <= error).any()
    below = base < cap
    weights = torch.where(below, bounds["weights"], 0.0)
    relative = bounds["weight_relative"] + 2 * U
    products = (weights * own).abs()
    loss_error = (products * relative + weights * own_error * 1.001).sum()
    loss_error = loss_error + (roundings(own.numel()) + 2) * U * products.sum() + 2.0**-149
    return bounds | {
        "weights": weights / usual,
        "weight_relative": relative,
        "weight_error": weights / usual * relative + 2.0**-149,
        "loss": (weights * own).sum(),
        "loss_error": loss_error,
    }


def mean_squared_error(
    prediction,
    target,
    reference,
    temperature: float,
    floor: float,
    mean: bool,
    cap: float,
    grad: float = 1.0,
) -> dict:
    """Truths and bounds of all outputs and of the gradient of the fp32 arithmetic."""
    difference = prediction.detach().double() - target.detach().double()
    elements = prediction.shape[1]
    losses = difference.square().sum(dim=1) / (max(elements, 1) if mean else 1)
    losses_error = losses * squared_errors(elements) + elements * TINY[torch.float32]
    own, own_error, usual = relative(losses, losses_error, reference)
    result = weighted(own, own_error, lambda base: base**-temperature, temperature, floor)
    result = capped(result, own, own_error, floor, cap, usual)
    sample = grad * result["weights"] * (2.0 / max(elements, 1) if mean else 2.0)
    gradient = difference * sample.unsqueeze(1)
    # the difference, the scale 2 / elements, two products of the sample's factor, the product; then
    # the store
    share = result["weight_relative"].unsqueeze(1) + 5 * U
    gradient_error = gradient.abs() * share * 1.001 + stored(gradient, prediction.dtype)
    return {
        "loss": (result["loss"], result["loss_error"]),
        "losses": (losses, losses_error),
        "weights": (result["weights"], result["weight_error"]),
        "log_normaliser": (result["log_normaliser"], result["log_normaliser_error"]),
        "gradient": (gradient, gradient_error),
    }


def soft_target_kl(
    logits,
    teacher,
    weights,
    class_bias,
    class_weights,
    temperature: float,
    grad: float = 1.0,
    pieces: int = 0,
    exp2: int = 0,
) -> dict:
    """Truths and bounds of loss, losses, log_sums [4, or 5, samples] and gradient. Rows of weight 0
    are 0 exactly.

    ``pieces`` = how often a long row's running sums may have been scaled anew in fp32; ``exp2`` = 1
    where exp is an exp2 of a product, which rounds.
    """
    samples, classes = logits.shape
    w = (
        torch.full((samples,), 1.0 / max(samples, 1)).double()
        if weights is None
        else weights.double()
    )
    w = w.to(logits.device)
    counted = w != 0
    tilt = 0.0 if class_bias is None else class_bias.double() * temperature
    biased = teacher.detach().double() + tilt
    raw = [torch.where(counted.unsqueeze(1), t, 0.0) for t in (logits.detach().double(), biased)]
    # T, its product with the bias, the sum with the logit
    tilted = torch.zeros_like(biased)
    if class_bias is not None:
        size = 2 * tilt.abs() + biased.abs()
        tilted = torch.where(counted.unsqueeze(1) & size.isfinite(), U * size, 0.0)
    k = torch.ones(classes) if class_weights is None else class_weights
    k = k.double().to(logits.device)
    shifts = [t.amax(dim=1) for t in raw]
    z = [(t - m.unsqueeze(1)) / temperature for t, m in zip(raw, shifts, strict=True)]
    sums, parts = [t.logsumexp(dim=1) for t in z], []
    for t, log_sum, own in zip(z, sums, (0.0, tilted / temperature), strict=True):
        # the difference from the maximum, 1 / T and their product round
        relative = torch.where(t == -torch.inf, 0.0, U * (3 + exp2) * t.abs() + own)
        softmax = (t - log_sum.unsqueeze(1)).exp()
        total = (softmax * relative).sum(dim=1) + FUNCTION + (roundings(classes) + 5 * pieces) * U
        parts.append(
            (relative, softmax, t - log_sum.unsqueeze(1), total + log_sum.abs() * FUNCTION)
        )
    (dx, q, log_q, x_error), (dy, p, log_p, y_error) = parts
    kp, weighted = p * k, class_weights is not None
    inside = kp > 0
    ratio = torch.where(inside, log_p - log_q, 0.0)
    shifted = torch.where(inside, z[1] - z[0], 0.0).abs()  # before the log-sums meet it
    logs = torch.where(inside, log_p.abs() + log_q.abs(), 0.0)
    losses = (kp * ratio).sum(dim=1) * temperature**2
    # p has the error of its exponent and of exp; the ratio that of both logits and of its
    # subtractions; then products and the sum; what exp flushes to 0; both log-sums
    terms = ratio.abs() + shifted
    p_error = torch.expm1(dy + y_error.unsqueeze(1) + U * (1 + exp2) * logs + FUNCTION)
    p_error += (2 + roundings(classes)) * U
    mass = kp.sum(dim=1)
    # a product with k, the sum, the division
    if weighted:
        p_error += (2 + roundings(classes) + 5 * pieces) * U
    mass_error = ((kp * p_error).sum(dim=1) + 2.0**-125 * k.sum()) * weighted
    row = (kp * (torch.where(inside, p_error * terms + dx + dy, 0.0) + U * (terms + logs))).sum(
        dim=1
    )
    # scaling anew: two differences, their products and sums, an exp; no running distance exceeds
    # the final one
    distances = torch.where(inside, z[1].abs() + z[0].abs(), 0.0)
    row = row + pieces * 16 * U * (kp * distances).sum(dim=1)
    row = row + 2.0**-125 * (k * torch.where(ratio.isfinite(), terms, 0.0)).sum(dim=1)
    row = row + mass * (x_error + y_error)
    losses_error = torch.where(
        counted, row * temperature**2 * 1.001 + 4 * U * losses.abs() + 2.0**-149, 0.0
    )
    loss, size = (w * losses).sum(), (w * losses).abs().sum()
    loss_error = (w.abs() * losses_error).sum() + (roundings(samples) + 3) * U * size + 2.0**-149
    gradient = (q * mass.unsqueeze(1) - kp) * (w * temperature * grad).unsqueeze(1)
    # the exponent: that of the sum, the log-sum, their difference; exp, which may flush
    softmax_error = q * mass_error.unsqueeze(1)
    for share, (relative, softmax, log, s_error) in zip((mass.unsqueeze(1), k), parts, strict=True):
        distance = torch.where(log == -torch.inf, 0.0, relative + (1 + exp2) * log.abs() * U)
        softmax_error += share * (
            softmax * (torch.expm1(s_error.unsqueeze(1) + distance) + FUNCTION) + 2.0**-125
        )
    gradient_error = (w * temperature * grad).abs().unsqueeze(1) * (
        softmax_error + (1 + weighted) * (q * mass.unsqueeze(1) + kp) * U
    )
    gradient_error = gradient_error * 1.001 + 5 * U * gradient.abs()
    stored_error = stored(gradient.abs() + gradient_error, logits.dtype)
    gradient_error = torch.where(counted.unsqueeze(1), gradient_error + stored_error, 0.0)
    # of a row without weight
    exact, unread = torch.zeros_like(x_error), torch.where(counted, 0.0, torch.inf)
    moved = tilted.amax(dim=1)  # the maximum, and what is relative to it
    log_sums, sums_error = (
        [shifts[0], sums[0], shifts[1], sums[1]],
        [exact, x_error, moved, y_error + moved / temperature],
    )
    if weighted:
        log_sums.append(mass)
        sums_error.append(mass_error * 1.001)
    return {
        "loss": (loss, loss_error),
        "losses": (losses, losses_error),
        "gradient": (gradient, gradient_error),
        "log_sums": (torch.stack(log_sums), torch.stack(sums_error) + unread),
    }


def sample_squares(
    accumulator, deltas, inputs, weight: float, power: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Truth and bound of the accumulator after ``sample_square_accumulate_``, in the type it is
    computed in.
    """
    # fp64 is judged by sums in fp64, in another order
    unit = 2 * 2.0**-53 if deltas.dtype == torch.float64 else U
    samples, positions = deltas.shape[0], math.prod(deltas.shape[1:-1])
    d = deltas.double().reshape(samples, positions, deltas.shape[-1])
    x = inputs.double().reshape(samples, positions, math.prod(accumulator.shape[1:]))
    sums, sizes = (torch.einsum("sto,sti->soi", *pair) for pair in ((d, x), (d.abs(), x.abs())))
    # each product and each addition rounds; so does what is below the range of fp32
    error = sizes * (1 + roundings(positions)) * unit * 1.001 + positions * 2.0**-149
    terms = sums.abs() ** power
    term_error = error if power == 1 else (2 * sums.abs() + error) * error
    # the square, its product with the weight, the weight itself
    term_error = (term_error + 3 * unit * terms) * 1.001 + 2.0**-149
    old = accumulator.double().reshape(sums.shape[1:])
    total = old.abs() + abs(weight) * (terms + term_error).sum(dim=0)
    bound = abs(weight) * term_error.sum(dim=0) + roundings(samples + 1) * unit * total * 1.001
    truth = old + weight * terms.sum(dim=0)
    bound = bound + (samples + 1) * 2.0**-149
    return truth.view(accumulator.shape), bound.view(accumulator.shape)
