"""A language model's head and its loss in one, within the model's forward pass.

There FSDP2 has gathered the head's weights and DDP looks at what comes out: labels go in by a
keyword of ``model(...)`` that a hook takes off, the head computes the loss of the hidden states it
gets, and a hook puts that in the place of the output's logits. That hook runs before FSDP2's own,
which prepares the backward pass of what it sees in the output.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._compile import _disable_dynamo  # torch.compiler's imports Dynamo at once

from ..errors import require
from ..ops.layout import is_sharded
from ..ops.linear_adaptive_cross_entropy import LinearLoss, linear_adaptive_cross_entropy
from ..ops.linear_logp import linear_logp
from ..ops.linear_tiles import Head

HANDED = "to_fused_head"  # the keyword
ROWS, PROBE = 4, 64.0  # of the first batch that are compared; a cap or scale shows in such logits
SLACK = 1e-3  # of the largest logit: products in TF32


class FusedHead(nn.Linear):
    """An nn.Linear that with labels returns ``linear_logp`` and no logits.

    ``fuse_head`` puts it into a Hugging Face model. In a model of your own, call it in the forward
    pass, ``self.head(hidden, labels)``; under FSDP2 leave it to the group of the model's root.

    Args:
        softcap, logit_scale: as of ``linear_logp``, where there are labels. Without, logits are
            nn.Linear's, and the model does to them what it always does.
        others: as of nn.Linear.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self.softcap, self.logit_scale = softcap, logit_scale
        self._handed: dict[str, Any] | None = None  # arguments of forward, for the next call
        self._found: Any = None  # what that returned
        self._rows: dict[str, Tensor] | None = None  # of the first batch, to be compared
        self._compared = False

    def forward(  # type: ignore[override]
        self,
        hidden: Tensor,
        labels: Tensor | None = None,
        *,
        loss: Callable[..., Any] = linear_logp,
        **settings: Any,
    ) -> Any:
        """Logits [..., classes], or with labels int64 [...], already shifted, what ``loss`` makes
        of all rows: ``linear_logp``, ``linear_adaptive_cross_entropy``, ``linear_logp_stats``.
        """
        if labels is None:
            return super().forward(hidden) if self._handed is None else self._within(hidden)
        return loss(
            hidden.flatten(0, -2),
            self.weight,
            labels.flatten(),
            bias=self.bias,
            softcap=self.softcap,
            logit_scale=self.logit_scale,
            **settings,
        )

    def _within(self, hidden: Tensor) -> Tensor:
        """Called by a model that expects logits; what it gets is for the hook alone."""
        handed: Any = self._handed
        remedy = "leave the head to the group of the model's root"
        require(type(self) is FusedHead, "head", "no group of its own", type(self).__name__, remedy)
        require(self._found is None, "model", "one call of its head", "two")
        self._found = self.forward(hidden, **handed)
        if self._compared:
            return hidden.new_zeros(1, 1, 1)
        return self._first_rows(hidden.detach().flatten(0, -2), handed["labels"].flatten())

    @_disable_dynamo
    @torch.no_grad()
    def _first_rows(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Logits [1, rows, classes] of a few labelled rows and a last one of large numbers, for the
        model to do to them what it does to logits.
        """
        index = (labels != -100).nonzero().squeeze(1)[:ROWS]
        # detached: what looks on, as the Fisher of samples does, has nothing to see here
        weight, bias = self.weight.detach(), None if self.bias is None else self.bias.detach()
        numbers: dict[str, Any] = {"softcap": self.softcap, "logit_scale": self.logit_scale}
        raw = F.linear(hidden[index], weight, bias)
        probe = torch.linspace(-PROBE, PROBE, raw.shape[1], dtype=raw.dtype, device=raw.device)
        raw = torch.cat([raw, probe.unsqueeze(0)])
        expected = Head(weight, None, **numbers).scaled(raw.double())
        logp, lse = linear_logp(hidden[index], weight, labels[index], bias=bias, **numbers)
        self._rows = {"logits": expected, "labels": labels[index], "logp": logp, "lse": lse}
        return raw.unsqueeze(0)

    @_disable_dynamo
    def compare(self, logits: Any) -> None:
        """The model's logits of the rows that ``_first_rows`` chose, with what is computed here.

        Raises:
            ValueError: they differ.
        """
        rows: Any = self._rows
        self._rows = None
        remedy = (
            "the model does to its logits what its config does not say by final_logit_softcapping, "
            "logit_scale or logits_scaling: set softcap and logit_scale of "
            "model.get_output_embeddings() if those can express it"
        )
        wanted, shape = rows["logits"], (1, *rows["logits"].shape)
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        require(found == shape, "model", f"logits of shape {shape}", found, remedy)
        precision, logits = torch.finfo(logits.dtype).eps, logits[0].detach().double()
        logp = logits[:-1].log_softmax(1).gather(1, rows["labels"].unsqueeze(1)).squeeze(1)
        pairs = (
            (logits, wanted),
            (logp, rows["logp"]),
            (logits[:-1].logsumexp(1), rows["lse"]),
        )
        worst = max(float((a - b).abs().amax()) for a, b in pairs if a.numel())
        size = max(float(wanted.abs().amax()), 1.0)
        near = worst <= (4 * precision + SLACK) * size
        require(near, "model", "the logits of its head", f"a difference of {worst:.3g}", remedy)
        self._compared = len(logp) > 0


def fuse_head(model: nn.Module) -> nn.Module:
    """Let ``label_logp`` and ``label_adaptive_cross_entropy`` compute a causal language model's
    head and loss in one; its logits are then never all in memory.

    The output embedding is replaced by a ``FusedHead`` with the same parameters: tied weights stay
    tied, names in the state dict what they are. Without labels the model does what it did. Soft cap
    and scale of the logits are those of the config (final_logit_softcapping, logit_scale, 1 /
    logits_scaling).

    Before ``fully_shard``, DistributedDataParallel, torch.compile and the optimizer. Layers may be
    sharded, checkpointed, or have adapters; the head itself may not.

    Returns:
        model.

    Raises:
        ValueError: a head that is no plain nn.Linear (an adapter's, a quantised or sharded one, one
            with hooks), or an encoder-decoder. In the first forward pass with labels: a model whose
            logits are other ones than its head and config tell, as a few rows of them show.
    """
    find = getattr(model, "get_output_embeddings", None)
    old: Any = None if find is None else find()
    remedy = "fuse the head before fully_shard and quantisation, and leave it out of the adapters"
    found = type(old).__name__
    require(type(old) is nn.Linear, "model", "an nn.Linear as output embedding", found, remedy)
    require(not is_sharded(old.weight), "model", "a head of plain weights", "a DTensor", remedy)
    hooked = old._forward_hooks or old._forward_pre_hooks or "forward" in vars(old)
    require(not hooked, "model", "a head without hooks", "hooks", remedy)
    config: Any = getattr(model, "config", None)
    paired = getattr(config, "is_encoder_decoder", False)
    require(not paired, "model", "a causal language model", "an encoder and decoder")
    softcap, logit_scale = _numbers(config)
    bias = old.bias is not None
    head = FusedHead(
        old.in_features,
        old.out_features,
        bias,
        softcap=softcap,
        logit_scale=logit_scale,
        device="meta",
    )
    head.weight, head.bias = old.weight, old.bias
    head.train(old.training)
    model.set_output_embeddings(head)  # type: ignore[operator]
    model.register_forward_pre_hook(_hand_over, with_kwargs=True)
    model.register_forward_hook(_put_in_output, prepend=True)
    return model


def _numbers(config: Any) -> tuple[float | None, float]:
    """softcap, logit_scale."""
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    names = ("final_logit_softcapping", "logit_scale", "logits_scaling")
    softcap, scale, divisor = (getattr(config, name, None) for name in names)
    scale = scale if isinstance(scale, int | float) else 1.0
    return softcap, scale / divisor if divisor else scale


def _hand_over(model: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Before the model's forward pass: labels go to the head."""
    head, handed = model.get_output_embeddings(), kwargs.get(HANDED)
    fused = isinstance(head, FusedHead)
    if fused:
        head._handed, head._found, head._rows = handed, None, None
    require(
        fused or handed is None,
        "model",
        "the head of fuse_head()",
        type(head).__name__,
        "something has replaced it since: call fuse_head(model) after that",
    )
    return args, {key: value for key, value in kwargs.items() if key != HANDED}


def _put_in_output(model: Any, args: Any, output: Any) -> Any:
    """After it: the loss takes the place of the logits."""
    head = model.get_output_embeddings()
    if not isinstance(head, FusedHead) or head._handed is None:
        return output
    found, head._found, head._handed = head._found, None, None
    require(found is not None, "model", "a call of its head", "none")
    there = hasattr(output, "logits")
    require(there, "model", "an output with logits", type(output).__name__, "use return_dict=True")
    if head._rows is not None:
        head.compare(output.logits)
    output.logits = found
    return output


def is_fused(model: nn.Module) -> bool:
    """Whether ``fuse_head`` has replaced the head of the model, or of what is wrapped in it."""
    return any(isinstance(module, FusedHead) for module in model.modules())


def label_logp(
    model: nn.Module, inputs: Mapping[str, Any], labels: Tensor
) -> tuple[Tensor, Tensor]:
    """Each token's log-probability and log-sum-exp by a model that ``fuse_head`` has seen.

    Args:
        model: it, or DistributedDataParallel, PEFT, torch.compile around it.
        inputs: of ``model(**inputs)``, without labels.
        labels: int64 [samples, tokens], as the model takes them: position i's is what i - 1
            predicts; -100 has none.

    Returns:
        logp, lse: fp32 (fp64 for fp64) [samples, tokens], both differentiable as of
        ``linear_logp``; position i tells of the label at i + 1. 0 where there is none.

    Raises:
        ValueError: as ``linear_logp``; a model without a fused head; see ``fuse_head`` for what the
            first batch may show.
    """
    logp, lse = _through(model, inputs, labels, loss=linear_logp)
    return logp.view(labels.shape), lse.view(labels.shape)


def label_adaptive_cross_entropy(
    model: nn.Module,
    inputs: Mapping[str, Any],
    labels: Tensor,
    temperature: float = 0.5,
    **settings: Any,
) -> LinearLoss:
    """``linear_adaptive_cross_entropy`` of sequences by a model that ``fuse_head`` has seen.

    Args:
        model, inputs, labels: as of ``label_logp``; a sample is a sequence.
        temperature, settings: ``linear_adaptive_cross_entropy``'s temperature, floor, weigh,
            normalise, workspace.

    Returns:
        loss, losses [samples], weights [samples], normaliser.

    Raises:
        ValueError: as ``label_logp`` and ``linear_adaptive_cross_entropy``.
    """
    samples, tokens = labels.shape
    index = torch.arange(samples, device=labels.device).repeat_interleave(tokens)
    settings |= {"temperature": temperature, "sample_index": index}
    return _through(model, inputs, labels, loss=linear_adaptive_cross_entropy, **settings)


def _through(model: nn.Module, inputs: Mapping[str, Any], labels: Tensor, **handed: Any) -> Any:
    """``through``, position i predicting the label at i + 1."""
    require(labels.dim() == 2, "labels", "[samples, tokens]", tuple(labels.shape))
    return through(model, inputs, F.pad(labels[:, 1:], (0, 1), value=-100), **handed)


def through(model: nn.Module, inputs: Mapping[str, Any], labels: Tensor, **handed: Any) -> Any:
    """What ``FusedHead.forward`` returns for labels already shifted, within ``model(...)``."""
    remedy = "call fuse_head(model) first"
    require(is_fused(model), "model", "one with a fused head", type(model).__name__, remedy)
    require("labels" not in inputs, "inputs", "none named labels", "labels", "hand them over apart")
    handed["labels"] = labels
    found = model(**inputs, **{HANDED: handed})["logits"]
    wrapped = "a wrapper calls model.forward, past the model's hooks: fuse_head() the wrapper"
    right = isinstance(found, tuple)
    require(right, "model", "the loss of its head", type(found).__name__, wrapped)
    return found
