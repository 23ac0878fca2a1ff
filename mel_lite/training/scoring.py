"""Scoring: one forward of the model over blocks of rows, ending in the fused log-prob operator, with gradient or not.

B rows of a block, T tokens, H hidden size, V vocabulary, N scored positions of all blocks in order, K of them with a
teacher.
"""

from __future__ import annotations

import functools
import itertools
import sys
import types
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch.distributed.fsdp import FSDPModule
from torch.utils.checkpoint import checkpoint
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from mel_lite.errors import ModelError
from mel_lite.kernels import HeadSpec, check_head_spec, head_kl, head_logprobs, head_spec
from mel_lite.lessons.reading import Reading
from mel_lite.models.modes import evaluating
from mel_lite.models.placeholders import has_placeholders
from mel_lite.training.batches.packing import Block, Packed, Row, lesson_row, pack
from mel_lite.training.batches.shared_prompts import pack_shared
from mel_lite.types import Lesson


class Scores(NamedTuple):
    """Per scored position, in block order, float32. The entropy carries a gradient only on request."""

    logp_N: torch.Tensor
    entropy_N: torch.Tensor
    aux_loss: torch.Tensor | None = None
    """Load-balancing loss () of a mixture of experts over the rows that balance; None unless requested."""
    kl_N: torch.Tensor | None = None
    """KL(policy || teacher) in nats, with a gradient; 0 where there is no teacher; None when no row has one."""
    hidden_NH: torch.Tensor | None = None
    """Last hidden states, in the dtype of the head; None unless requested."""


class RowScores(NamedTuple):
    """`Scores` by row, in row order: lists of (scored_tokens,), and of (scored_tokens, H) for the hidden states."""

    logps: list[torch.Tensor]
    entropies: list[torch.Tensor]
    aux_loss: torch.Tensor | None = None
    kls: list[torch.Tensor] | None = None
    hiddens: list[torch.Tensor] | None = None


def install_scoring_heads(trainer: Any) -> None:
    """Install the scoring head on a trainer's model and its reference. Raises: ModelError."""
    for scored in filter(None, (trainer.model, trainer.ref_model)):
        base = scored.get_base_model() if hasattr(scored, "get_base_model") else scored
        install_scoring_head(base, checked=scored is trainer.model)


def install_scoring_head(model: Any, *, checked: bool = True) -> None:
    """Teach a causal language model `model(score_blocks=...) -> Scores`; its other calls are unchanged.

    The blocks go through the backbone one after another and their scored hidden states through one call of the fused
    operator per temperature, all inside the model's own forward, so that DDP's hooks fire as for any forward. Install
    it on the base model before anything wraps it; head and backbone are looked up at each call, since wrappers replace
    them.

    `checked`: compare fused with plain scores once. Not for a reference model, which TRL has already wrapped in
    autocast, so that the two differ by rounding; it has the class and config of the model that was checked.

    Raises: ModelError when the model's logits are not what its config says, so that fused scores would be wrong.
    """
    original_forward = model.forward
    try:
        spec = head_spec(model)
        # ZeRO-3 has spread the weights by now, and FSDP may load them on rank 0 only.
        if checked and not is_deepspeed_zero3_enabled() and not has_placeholders():
            check_head_spec(model, spec)
    except (TypeError, ValueError) as error:
        raise ModelError(f"{type(model).__name__}: {error}. Train it with TRL's GRPOTrainer instead.") from error

    # Keep the signature: `generate` checks its model arguments against it.
    @functools.wraps(type(model).forward)
    def forward(
        self: Any,
        *args: Any,
        score_blocks: Any = None,
        entropy_grad: bool = False,
        recompute: bool = False,
        load_balancing: bool = False,
        want_hidden: bool = False,
        **kwargs: Any,
    ) -> Any:
        if score_blocks is None:
            return original_forward(*args, **kwargs)
        parts = []
        routers: list[tuple[torch.Tensor, ...]] | None = [] if load_balancing else None
        for temperature, group in itertools.groupby(score_blocks, key=lambda block: block.temperature):
            blocks = list(group)
            hidden_NH, target_N = _scored_hidden(self, blocks, recompute, routers)
            work = functools.partial(
                _head_pass, spec=spec, blocks=blocks, target_N=target_N, temperature=temperature,
                entropy_grad=entropy_grad,
            )  # fmt: skip
            parts.append(_through_head(self, work, hidden_NH))
        logp_N, entropy_N, kl_N, hidden_NH = (torch.cat(column) for column in zip(*parts, strict=True))
        taught = any(block.teacher_KH is not None for block in score_blocks)
        return Scores(
            logp_N,
            entropy_N,
            None if routers is None else _load_balancing_loss(self, routers),
            kl_N if taught else None,
            hidden_NH if want_hidden else None,
        )

    model.forward = types.MethodType(forward, model)


def _scored_hidden(
    model: Any, blocks: Sequence[Any], recompute: bool, routers: list[tuple[torch.Tensor, ...]] | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the hidden states that predict a scored id, and those ids.

    `recompute`: keep no activations of a block; compute them again in the backward, one block at a time.
    `routers`: receives, per block and layer, the router logits (tokens, experts) of the rows that balance.
    """
    options = {} if routers is None else {"output_router_logits": True}

    def forward(block: Any) -> tuple[torch.Tensor, ...]:
        output = model.base_model(input_ids=block.input_ids_BT, use_cache=False, **_attending(block), **options)
        return (output.last_hidden_state, *(() if routers is None else output.router_logits))

    hidden, targets = [], []
    for block in blocks:
        again = recompute and torch.is_grad_enabled()
        hidden_BTH, *logits = checkpoint(forward, block, use_reentrant=False) if again else forward(block)
        if routers is not None:
            balances_B = torch.tensor(block.balances, device=hidden_BTH.device)
            counted = (block.attention_mask_BT.bool() & balances_B[:, None]).flatten()
            routers.append(tuple(layer.reshape(len(counted), -1)[counted] for layer in logits))
        hidden_NH, target_N = block.scored(hidden_BTH)
        hidden.append(hidden_NH)
        targets.append(target_N)
    return torch.cat(hidden), torch.cat(targets)


def _attending(block: Any) -> dict[str, Any]:
    """Return the arguments of a backbone that say which tokens of a block attend to which."""
    if isinstance(block, Block):
        return {"attention_mask": block.attention_mask_BT}
    # A mask of four dimensions is passed on as it is: without one, transformers would build a (T, T) mask.
    mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=block.input_ids_BT.device)
    return {"attention_mask": mask, "position_ids": block.position_ids_BT, "shared_prompts": block.layout}


def _through_head(model: Any, work: Callable[..., Any], *hidden_NH: torch.Tensor) -> Any:
    """Return work(head, *hidden) with the head's weight gathered and autocast off: it would round the products.

    The hooks of FSDP2 and ZeRO-3 gather a spread weight for a call of the head, again for its backward, and reduce its
    gradient. The operators call no head, so they run inside such a call.
    """
    head = model.get_output_embeddings()
    device = hidden_NH[0].device.type
    no_autocast = torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()
    with no_autocast:
        if not _is_spread(head):
            return work(head, *hidden_NH)
        replaced = vars(head).get("forward")
        own_forward = head.forward
        head.forward = lambda *args: work(_without_hooks(head, own_forward), *args)
        try:
            return head(*hidden_NH)
        finally:
            del head.forward
            if replaced is not None:
                head.forward = replaced


def _is_spread(head: Any) -> bool:
    """Return True for a head whose own hooks gather its weight."""
    return isinstance(head, FSDPModule) or any(hasattr(weight, "ds_id") for weight in head.parameters())


def _without_hooks(head: Any, forward: Callable[..., Any]) -> Any:
    """Return what computes like the head while its weight is gathered: an nn.Linear where the head is one."""
    if not isinstance(head, torch.nn.Linear) or type(head).forward is not torch.nn.Linear.forward:
        return _Callable(head, forward)
    plain = torch.nn.Linear(1, 1, bias=False, device="meta")
    plain.in_features, plain.out_features = head.in_features, head.out_features
    plain.weight, plain.bias = head.weight, head.bias
    return plain


class _Callable:
    """A head that is called by its forward alone."""

    def __init__(self, head: Any, forward: Callable[..., Any]) -> None:
        self._head, self._own_forward = head, forward

    def __call__(self, *args: Any) -> Any:
        return self._own_forward(*args)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._head, name)


def _head_pass(
    head: Any, hidden_NH: torch.Tensor, *, spec: HeadSpec, blocks: Sequence[Any], target_N: torch.Tensor,
    temperature: float, entropy_grad: bool,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """Return log-probability, entropy and divergence (N,) of the blocks' targets, and the hidden states."""
    hidden_NH = _for_head(head, hidden_NH)
    logp_N, entropy_N = _score(head, spec, hidden_NH, target_N, temperature, entropy_grad)
    return logp_N, entropy_N, _divergence(head, spec, hidden_NH, blocks, temperature), hidden_NH


def _for_head(head: Any, hidden_NH: torch.Tensor) -> torch.Tensor:
    """Return hidden states on the device and in the dtype of the head's weight."""
    weight = head.weight
    return hidden_NH.to(weight.device, weight.dtype if weight.dtype.is_floating_point else None)


def _score(
    head: Any, spec: HeadSpec, hidden_NH: torch.Tensor, target_N: torch.Tensor, temperature: float, entropy_grad: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log-probability and entropy (N,) of the targets."""
    logp_N, entropy_N, _ = head_logprobs(
        head,
        hidden_NH,
        target_N.to(hidden_NH.device),
        spec=spec,
        temperature=temperature,
        compute_u=torch.is_grad_enabled() and hidden_NH.requires_grad,
        entropy_grad=entropy_grad,
    )
    return logp_N, entropy_N


def _divergence(
    head: Any, spec: HeadSpec, hidden_NH: torch.Tensor, blocks: Sequence[Any], temperature: float
) -> torch.Tensor:
    """Return KL(policy || teacher) (N,), 0 where there is no teacher."""
    kl_N = hidden_NH.new_zeros(len(hidden_NH), dtype=torch.float32)
    teachers = [block.teacher_KH for block in blocks if block.teacher_KH is not None]
    if not teachers:
        return kl_N
    taught_N = torch.cat([block.teaches_N for block in blocks]).to(hidden_NH.device)
    teacher_KH = torch.cat(teachers).to(hidden_NH)
    return kl_N.masked_scatter(
        taught_N, head_kl(head, hidden_NH[taught_N], teacher_KH, spec=spec, temperature=temperature)
    )


def divergence(model: Any, hidden_NH: torch.Tensor, other_NH: torch.Tensor, *, temperature: float) -> torch.Tensor:
    """Return KL(p || q) (N,) in nats of the distributions that two hidden states give under the model's head."""

    def work(head: Any, *hidden_NH: torch.Tensor) -> torch.Tensor:
        one_NH, two_NH = (_for_head(head, each_NH) for each_NH in hidden_NH)
        return head_kl(head, one_NH, two_NH, spec=head_spec(model), temperature=temperature)

    return _through_head(model, work, hidden_NH, other_NH)


def balances_experts(model: Any) -> bool:
    """Return True when the load-balancing loss of this mixture of experts is known."""
    known = hasattr(model, "num_experts") and hasattr(model, "num_experts_per_tok")
    return known and hasattr(sys.modules[type(model).__module__], "load_balancing_loss_func")


def _load_balancing_loss(model: Any, routers: Sequence[tuple[torch.Tensor, ...]]) -> torch.Tensor:
    """Return the architecture's own loss over the tokens of all blocks, padding excluded."""
    layers = tuple(torch.cat(parts) for parts in zip(*routers, strict=True))
    if not len(layers[0]):
        return layers[0].sum()
    loss = sys.modules[type(model).__module__].load_balancing_loss_func
    return loss(layers, model.num_experts, model.num_experts_per_tok)


def score(
    model: Any,
    packed: Packed,
    *,
    entropy_grad: bool = False,
    recompute: bool = False,
    load_balancing: bool = False,
    want_hidden: bool = False,
) -> RowScores:
    """Return log-probability, entropy and divergence of every row's scored ids, in row order.

    Equals log softmax(z/T)[id], the entropy of softmax(z/T), and KL(softmax(z/T) || softmax(z'/T)), with z the model's
    logits, z' its teacher's, and T the row's temperature. `recompute` trades time for memory: the activations of one
    block at a time.
    """
    found: Scores = model(
        score_blocks=packed.blocks,
        entropy_grad=entropy_grad,
        recompute=recompute,
        load_balancing=load_balancing,
        want_hidden=want_hidden,
    )
    return RowScores(
        packed.unpack(found.logp_N),
        packed.unpack(found.entropy_N),
        found.aux_loss,
        None if found.kl_N is None else packed.unpack(found.kl_N),
        None if found.hidden_NH is None else packed.unpack(found.hidden_NH),
    )


class Scorer:
    """The trained model as a reader of texts. Dropout is off, and no gradient is kept."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def __call__(
        self, texts: Sequence[Lesson], *, temperature: float = 1.0, adapter: bool = True
    ) -> list[torch.Tensor]:
        """Return log pi(target_ids | context_ids) of each text (T,); `adapter=False` scores the base model."""
        return self.rows(self._rows(texts, temperature), adapter=adapter)

    def rows(self, rows: Sequence[Row], *, adapter: bool = True) -> list[torch.Tensor]:
        """Return each row's log-probs (T,); `adapter=False` scores the base model."""
        model = self._trainer.model
        off = not adapter and hasattr(model, "disable_adapter")
        # Limit blocks to the longest row, as training did.
        longest = max((len(row.ids) for row in rows), default=0)
        # Enter eval mode first: `disable_adapter` restores requires_grad, not train mode.
        with evaluating(model), model.disable_adapter() if off else nullcontext():
            return self._score(rows, longest).logps if rows else []

    def logps(self, texts: Sequence[Lesson], *, frozen: bool = False) -> list[torch.Tensor]:
        """Return log pi(target_ids | context_ids) of each text (T,) at the policy's temperature.

        `frozen`: of the policy as it was at the start of the run.
        """
        return self._policy(texts, frozen=frozen, want_hidden=False).logps

    def read(self, texts: Sequence[Lesson], *, frozen: bool = False) -> list[Reading]:
        """Return the same log-probs with the hidden states that give the whole distributions."""
        scores = self._policy(texts, frozen=frozen, want_hidden=True)
        return [Reading(*each) for each in zip(scores.logps, scores.hiddens or [], strict=True)]

    def kl(self, hidden_NH: torch.Tensor, other_NH: torch.Tensor) -> torch.Tensor:
        """Return KL(p || q) (N,) in nats between the next-token distributions of two readings' hidden states."""
        trainer = self._trainer
        with torch.no_grad():
            return divergence(trainer.model, hidden_NH, other_NH, temperature=trainer.policy_temperature)

    def _policy(self, texts: Sequence[Lesson], *, frozen: bool, want_hidden: bool) -> RowScores:
        """Score texts at the policy's temperature, in blocks of a micro-batch's size."""
        trainer = self._trainer
        if not texts:
            return RowScores([], [])
        rows = self._rows(texts, trainer.policy_temperature)
        longest = max(len(row.ids) for row in rows)
        tokens = trainer.budget_tokens or trainer.args.per_device_train_batch_size * longest
        with evaluating(trainer.model), trainer.frozen_reader.reading() if frozen else nullcontext():
            return self._score(rows, max(tokens, longest), want_hidden=want_hidden)

    def _rows(self, texts: Sequence[Lesson], temperature: float) -> list[Row]:
        return [lesson_row(text, self._trainer.accelerator.device, temperature=temperature) for text in texts]

    def _score(self, rows: Sequence[Row], max_tokens: int, *, want_hidden: bool = False) -> RowScores:
        trainer = self._trainer
        if trainer.savings.shares_prompts:
            packed = pack_shared(rows, max_tokens=max_tokens)
        else:
            packed = pack(rows, pad_id=trainer._tokenizer.pad_token_id, max_tokens=max_tokens)
        with torch.no_grad(), trainer.accelerator.autocast():
            return score(trainer.model, packed, want_hidden=want_hidden)
