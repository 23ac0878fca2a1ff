"""Generation with vLLM over the weights that are being trained: only the adapter is handed over.

Nothing here imports vLLM. The engine is built around an `LLM` object that shares its weights with the trainer, so that
a test can put a scripted one in its place; `mel_lite.engines.unsloth` makes the real one.
"""

from __future__ import annotations

import io
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from mel_lite import signals
from mel_lite.engines.base import Completion, Request, Sampling
from mel_lite.errors import EngineError
from mel_lite.types import Finish

logger = logging.getLogger(__name__)

SLEEP_LEVEL = 1
"""vLLM's level that forgets the key-value cache; Unsloth's standby keeps the weights, which are the trainer's."""

SWITCH = "Sample with transformers instead: --engine hf (model.engine=hf)."


class WakeError(EngineError):
    """Memory does not suffice for vLLM to wake up."""


@dataclass(frozen=True, slots=True)
class AdapterVersion:
    """One state of the adapter: equal versions are equal weights at one optimiser step."""

    step: int
    fingerprint: tuple[float, ...]
    """Sums over the adapter's matrices; any update changes them."""


class VLLMEngine:
    """Samples with vLLM; every request carries the adapter as it is at that moment.

    All requests of a call are submitted at once (continuous batching). They are sorted by prompt, so that those which
    share a prefix are neighbours and find it in the prefix cache. Each state of the adapter goes out under an id of its
    own: neither vLLM's adapters nor its cached prefixes of an older state can be met again.

    Args:
        llm: vLLM's `LLM`, sharing the trainer's weights, with `logprobs_mode="processed_logprobs"`.
        sampling_params: vLLM's `SamplingParams`.
        load_adapter: Hands the adapter over in memory, under an id not used before. Returns what `llm.generate` takes
            as `lora_request`.
        fingerprint: Sums over the adapter's matrices as they are now.
        step: The trainer's optimiser step.
        eos_ids: Every id that ends a completion.
        standby: Whether vLLM was started with sleep mode; without it `sleep` and `wake` leave its memory alone.
        context_tokens: Longest sequence vLLM takes; None = not known.
        share: Of the GPU's memory, as it was started with; None = not known.
        max_num_seqs: Most sequences it samples at once; None = not known.
    """

    name = "unsloth+vllm"
    own_kernels = True
    """Log-probs differ from the trainer's by rounding, so that importance sampling corrects for it."""

    def __init__(
        self,
        llm: Any,
        *,
        sampling_params: Callable[..., Any],
        load_adapter: Callable[[], Any],
        fingerprint: Callable[[], tuple[float, ...]],
        step: Callable[[], int],
        eos_ids: Sequence[int],
        standby: bool,
        context_tokens: int | None = None,
        share: float | None = None,
        max_num_seqs: int | None = None,
    ) -> None:
        self._llm = llm
        self._sampling_params = sampling_params
        self._load_adapter = load_adapter
        self._fingerprint = fingerprint
        self._step = step
        self._eos_ids = tuple(eos_ids)
        self._standby = standby
        self.context_tokens = context_tokens
        self.share, self.max_num_seqs = share, max_num_seqs
        self._at_once: int | None = None
        self._asleep = False
        self._version: AdapterVersion | None = None
        self._lora_request: Any = None

    def wake(self) -> None:
        """Take the memory back and hand over the adapter as it is now. Raises: WakeError."""
        if self._standby and self._asleep:
            torch.cuda.empty_cache()  # what PyTorch keeps of the training phase, vLLM cannot map
            try:
                self._llm.wake_up()
            except RuntimeError as error:  # its allocator is no PyTorch's
                if "out of memory" in str(error):
                    raise WakeError(
                        f"vLLM does not find its share of the GPU's memory any more ({error}). Go on with --resume and "
                        "a smaller --set model.gpu_memory_utilization, or with --engine hf."
                    ) from error
                raise
        self._asleep = False
        self._hand_over()

    def sleep(self) -> None:
        """Give up the key-value cache, and with it what was cached of prompts."""
        self._drop_unfinished()
        if self._standby and not self._asleep:
            self._llm.sleep(level=SLEEP_LEVEL)
        self._asleep = True

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        """Sample one completion per request, in their order.

        Raises: EngineError when memory does not suffice for a single sequence, and when vLLM's answer cannot be a
            sample of the policy: completions missing, log-probs that are not numbers, another prompt, no adapter.
        """
        if self._asleep:
            self.wake()
        self._hand_over()
        self._check_lengths(requests)
        order = sorted(range(len(requests)), key=lambda i: requests[i].prompt_ids)
        done: dict[int, Completion] = {}
        while order:
            rows = order[: self._at_once]
            try:
                completions = self._submit([requests[i] for i in rows], sampling)
            except torch.OutOfMemoryError as error:
                self._lower_concurrency(rows, requests, sampling, error)
                continue
            done.update(zip(rows, completions, strict=True))
            order = order[len(rows) :]
        return [done[i] for i in range(len(requests))]

    def _hand_over(self) -> None:
        """Hand the adapter over under a new id if it, or the step, is not what vLLM has."""
        now = AdapterVersion(self._step(), self._fingerprint())
        if now != self._version:
            before = getattr(self._lora_request, "lora_int_id", None)
            self._lora_request = self._load_adapter()
            self._version = now
            # Under an id it knows, vLLM would go on with the adapter and the cached prefixes it has.
            assert before is None or getattr(self._lora_request, "lora_int_id", None) != before, before
        assert self._lora_request is not None, "without a LoRARequest vLLM samples from the base model"
        assert self._version.step == self._step(), (self._version, self._step())

    def _check_lengths(self, requests: Sequence[Request]) -> None:
        longest = max((len(r.prompt_ids) for r in requests), default=0)
        if self.context_tokens is not None and longest >= self.context_tokens:
            raise EngineError(
                f"A prompt of {longest} tokens does not fit vLLM's context of {self.context_tokens} tokens. "
                "Raise model.max_seq_length, or lower data.max_prompt_tokens or train.max_context_tokens."
            )

    def _submit(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        try:
            outputs = self._llm.generate(
                [{"prompt_token_ids": list(r.prompt_ids)} for r in requests],
                sampling_params=[self._params(r, sampling) for r in requests],
                lora_request=self._lora_request,
                use_tqdm=_Interruptible,
            )
        except BaseException:
            self._drop_unfinished()
            raise
        if len(outputs) != len(requests):
            raise EngineError(f"vLLM returned {len(outputs)} completions for {len(requests)} requests. {SWITCH}")
        return [self._completion(r, o, sampling) for r, o in zip(requests, outputs, strict=True)]

    def _params(self, request: Request, sampling: Sampling) -> Any:
        return self._sampling_params(
            n=1,
            seed=request.seed,
            max_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p or 0.0,
            repetition_penalty=sampling.repetition_penalty,
            stop_token_ids=[] if sampling.ignore_eos else list(self._eos_ids),
            ignore_eos=sampling.ignore_eos,
            logprobs=0,  # of the sampled id alone
            detokenize=False,
        )

    def _completion(self, request: Request, output: Any, sampling: Sampling) -> Completion:
        """vLLM's answer to one request, checked. Raises: EngineError."""
        self._check_origin(request, output)
        (sampled,) = output.outputs
        ids = tuple(sampled.token_ids)
        if sampled.finish_reason not in ("stop", "length") or not 0 < len(ids) <= sampling.max_new_tokens:
            raise EngineError(
                f"vLLM ended a completion of {len(ids)} tokens (at most {sampling.max_new_tokens} were asked for) with "
                f"finish_reason={sampled.finish_reason!r}. See its log. {SWITCH}"
            )
        if sampled.logprobs is None or len(sampled.logprobs) != len(ids):
            raise EngineError(f"vLLM returned no log-probs for a completion of {len(ids)} tokens. {SWITCH}")
        logprobs = tuple(at[token].logprob for at, token in zip(sampled.logprobs, ids, strict=True))
        if bad := [value for value in logprobs if value is None or not math.isfinite(value)]:
            raise EngineError(
                f"vLLM returned {len(bad)} of {len(logprobs)} log-probs of a completion as {bad[0]}: its logits were "
                "not finite. In float16 activations can overflow: use model.dtype=bfloat16 where the GPU has it; look "
                f"for a diverged adapter in grad_norm and mel/nll. {SWITCH}"
            )
        return Completion(ids, logprobs, Finish.STOP if ids[-1] in self._eos_ids else Finish.LENGTH)

    def _check_origin(self, request: Request, output: Any) -> None:
        """Refuse an answer to another prompt, or one that was sampled without the adapter handed over."""
        if tuple(output.prompt_token_ids) != request.prompt_ids:
            raise EngineError(
                f"vLLM answered a prompt of {len(output.prompt_token_ids)} tokens where {len(request.prompt_ids)} were "
                f"sent: it cut or changed the ids. {SWITCH}"
            )
        wanted = getattr(self._lora_request, "lora_int_id", None)
        # Unsloth may fold the adapter into the weights for the call instead; then there is no id to compare.
        if wanted is not None and getattr(output.lora_request, "lora_int_id", None) != wanted:
            raise EngineError(
                f"vLLM sampled with adapter {getattr(output.lora_request, 'lora_int_id', None)} where {wanted} was "
                f"handed over (step {self._step()}): that is not the policy being trained. {SWITCH}"
            )

    def _lower_concurrency(
        self, rows: Sequence[int], requests: Sequence[Request], sampling: Sampling, error: BaseException
    ) -> None:
        if len(rows) == 1:
            raise EngineError(
                f"Out of memory in vLLM while sampling one sequence of {len(requests[rows[0]].prompt_ids)} prompt and "
                f"up to {sampling.max_new_tokens} new tokens. Lower model.gpu_memory_utilization, "
                "max_completion_length or analysis_max_tokens, or use a smaller model."
            ) from error
        torch.cuda.empty_cache()
        self._at_once = max(1, len(rows) // 2)
        logger.warning("Out of memory in vLLM: at most %s sequences at once from now on.", self._at_once)

    def _drop_unfinished(self) -> None:
        """Take back requests that an error or a signal left in vLLM's queue: the next call would sample them, too."""
        engine = getattr(self._llm, "llm_engine", None)
        states = getattr(getattr(engine, "output_processor", None), "request_states", None)
        if engine is not None and states:
            engine.abort_request(list(states), internal=True)


class _Interruptible(tqdm):
    """vLLM's progress bar: shows nothing, and lets a signal stop the sampling whenever a sequence is done."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **(kwargs | {"file": io.StringIO()}))

    def update(self, n: float | None = 1) -> bool | None:
        signals.poll()
        return super().update(n)
