"""Generation with vLLM on the weights that are being trained: only the adapter is passed to vLLM.

Nothing here imports vLLM. The engine wraps an `LLM` object that shares its weights with the trainer, so that tests can
substitute a scripted one. `mel_lite.engines.unsloth` creates the real one.
"""

from __future__ import annotations

import io
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from tqdm import tqdm

from mel_lite import signals
from mel_lite.engines.base import LOOK_TOKENS, Completion, Engine, Request, Sampling
from mel_lite.errors import EngineError
from mel_lite.types import Finish

logger = logging.getLogger(__name__)

SLEEP_LEVEL = 1
"""vLLM's sleep level that frees the key-value cache. Unsloth's standby keeps the weights, which the trainer uses."""

SWITCH = "Sample with transformers instead: --engine hf (model.engine=hf)."


class WakeError(EngineError):
    """There is not enough free memory for vLLM to wake up."""


@dataclass(frozen=True, slots=True)
class AdapterVersion:
    """One state of the adapter. Equal versions mean equal weights at the same optimizer step."""

    step: int
    fingerprint: tuple[float, ...]
    """Sums over the adapter's matrices. Any update changes them."""


class VLLMEngine(Engine):
    """Samples with vLLM. Every request carries the current adapter.

    All requests of a call are submitted at once (continuous batching), sorted by prompt, so that prompts with a common
    prefix hit the prefix cache. Each state of the adapter gets its own id: vLLM never reuses an adapter or a
    prefix-cache entry of an older state.

    Args:
        llm: vLLM's `LLM`, sharing the trainer's weights, with `logprobs_mode="processed_logprobs"`.
        sampling_params: vLLM's `SamplingParams`.
        load_adapter: passes the current adapter to vLLM in memory, under a new id. Returns the `lora_request` for
            `llm.generate`.
        fingerprint: returns sums over the adapter's current matrices.
        step: returns the trainer's optimizer step.
        eos_ids: every id that ends a completion.
        standby: True if vLLM was started with sleep mode. Without it, `sleep` and `wake` do not change its memory.
        context_tokens: longest sequence vLLM accepts; None = unknown.
        share: share of the GPU's memory that vLLM was started with; None = unknown.
        max_num_seqs: most sequences vLLM samples at once; None = unknown.
        aborted: vLLM's `FinishReason.ABORT`, by which hopeless sequences leave; None = they are sampled to their end.
    """

    name = "unsloth+vllm"
    own_kernels = True
    mixes = True

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
        aborted: Any = None,
    ) -> None:
        self._llm = llm
        self._aborted = aborted
        self.ends_hopeless = aborted is not None
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
        """Allocate vLLM's memory again and pass it the current adapter. Raises: WakeError."""
        if self._standby and self._asleep:
            torch.cuda.empty_cache()  # vLLM cannot map memory that PyTorch has cached from the training phase
            try:
                self._llm.wake_up()
            except RuntimeError as error:  # vLLM's allocator does not raise PyTorch's OutOfMemoryError
                if "out of memory" in str(error):
                    raise WakeError(
                        f"vLLM's share of the GPU's memory is no longer free ({error}). Continue with --resume and a "
                        "smaller --set model.gpu_memory_utilization, or with --engine hf."
                    ) from error
                raise
        self._asleep = False
        self._update_adapter()

    def sleep(self) -> None:
        """Free the key-value cache, and the prefix cache with it."""
        self._drop_unfinished()
        if self._standby and not self._asleep:
            self._llm.sleep(level=SLEEP_LEVEL)
        self._asleep = True

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        """Sample one completion per request, in their order.

        Raises: EngineError when there is not enough memory for a single sequence, and when vLLM's output cannot be a
            sample of the policy: missing completions, log-probs that are not numbers, another prompt, no adapter.
        """
        if self._asleep:
            self.wake()
        self._update_adapter()
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

    def _update_adapter(self) -> None:
        """Pass the adapter to vLLM under a new id if the adapter or the step has changed."""
        current = AdapterVersion(self._step(), self._fingerprint())
        if current != self._version:
            previous_id = getattr(self._lora_request, "lora_int_id", None)
            self._lora_request = self._load_adapter()
            self._version = current
            # Under a known id, vLLM would continue to use the adapter and the prefix cache it has.
            assert previous_id is None or getattr(self._lora_request, "lora_int_id", None) != previous_id, previous_id
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
        samplings = [r.options(sampling) for r in requests]
        looks = _Looks(getattr(self._llm, "llm_engine", None), samplings, self._aborted)
        try:
            with looks.between_steps():
                outputs = self._llm.generate(
                    [{"prompt_token_ids": list(r.prompt_ids)} for r in requests],
                    sampling_params=[self._params(r, own) for r, own in zip(requests, samplings, strict=True)],
                    lora_request=self._lora_request,
                    use_tqdm=partial(_Interruptible, watch=self.watch),
                )
        except BaseException:
            self._drop_unfinished()
            raise
        if len(outputs) != len(requests):
            raise EngineError(f"vLLM returned {len(outputs)} completions for {len(requests)} requests. {SWITCH}")
        answers = zip(requests, outputs, samplings, strict=True)
        return [self._completion(r, o, own, looks.ended.get(i)) for i, (r, o, own) in enumerate(answers)]

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

    def _completion(self, request: Request, output: Any, sampling: Sampling, ended: int | None) -> Completion:
        """Check vLLM's output for one request and convert it. Raises: EngineError.

        `ended`: tokens that it keeps if it was hopeless.
        """
        self._check_origin(request, output)
        (sampled,) = output.outputs
        ids = tuple(sampled.token_ids)
        expected = ("stop", "length") if ended is None else ("abort",)
        if sampled.finish_reason not in expected or not 0 < len(ids) <= sampling.max_new_tokens:
            raise EngineError(
                f"vLLM ended a completion of {len(ids)} tokens (at most {sampling.max_new_tokens} were requested) with "
                f"finish_reason={sampled.finish_reason!r}. See its log. {SWITCH}"
            )
        if sampled.logprobs is None or len(sampled.logprobs) != len(ids):
            raise EngineError(f"vLLM returned no log-probs for a completion of {len(ids)} tokens. {SWITCH}")
        logprobs = tuple(at[token].logprob for at, token in zip(sampled.logprobs, ids, strict=True))
        if bad := [value for value in logprobs if value is None or not math.isfinite(value)]:
            raise EngineError(
                f"vLLM returned {len(bad)} of {len(logprobs)} log-probs of a completion as {bad[0]}: its logits were "
                "not finite. In float16 activations can overflow: use model.dtype=bfloat16 if the GPU supports it. "
                f"Look for a diverged adapter in grad_norm and mel/nll. {SWITCH}"
            )
        if ended is not None:
            return Completion(ids[:ended], logprobs[:ended], Finish.ENDED)
        return Completion(ids, logprobs, Finish.STOP if ids[-1] in self._eos_ids else Finish.LENGTH)

    def _check_origin(self, request: Request, output: Any) -> None:
        """Reject output for another prompt, or output sampled without the current adapter. Raises: EngineError."""
        if tuple(output.prompt_token_ids) != request.prompt_ids:
            raise EngineError(
                f"vLLM answered a prompt of {len(output.prompt_token_ids)} tokens, but {len(request.prompt_ids)} were "
                f"sent: it truncated or changed the ids. {SWITCH}"
            )
        expected = getattr(self._lora_request, "lora_int_id", None)
        # Unsloth may merge the adapter into the weights for the call instead; then there is no id to compare.
        if expected is not None and getattr(output.lora_request, "lora_int_id", None) != expected:
            raise EngineError(
                f"vLLM sampled with adapter {getattr(output.lora_request, 'lora_int_id', None)} instead of {expected} "
                f"(step {self._step()}): that is not the policy being trained. {SWITCH}"
            )

    def _lower_concurrency(
        self, rows: Sequence[int], requests: Sequence[Request], sampling: Sampling, error: BaseException
    ) -> None:
        if len(rows) == 1:
            only = requests[rows[0]]
            raise EngineError(
                f"Out of memory in vLLM while sampling one sequence of {len(only.prompt_ids)} prompt and up to "
                f"{only.options(sampling).max_new_tokens} new tokens. Lower model.gpu_memory_utilization, "
                "max_completion_length or analysis_max_tokens, or use a smaller model."
            ) from error
        torch.cuda.empty_cache()
        self._at_once = max(1, len(rows) // 2)
        logger.warning("Out of memory in vLLM: at most %s sequences at once from now on.", self._at_once)

    def _drop_unfinished(self) -> None:
        """Abort requests that an error or a signal left in vLLM's queue: the next call would sample them as well."""
        engine = getattr(self._llm, "llm_engine", None)
        states = getattr(getattr(engine, "output_processor", None), "request_states", None)
        if engine is not None and states:
            engine.abort_request(list(states), internal=True)


class _Looks:
    """Ends hopeless sequences between two steps of vLLM's engine: they leave with the tokens they have."""

    def __init__(self, engine: Any, samplings: Sequence[Sampling], aborted: Any) -> None:
        self.ended: dict[int, int] = {}
        """Tokens that a hopeless sequence keeps, by its number in the call."""
        self._engine, self._aborted = engine, aborted
        self._is_hopeless = {i: each.is_hopeless for i, each in enumerate(samplings) if each.is_hopeless is not None}
        self._looked: dict[int, int] = {}

    @contextmanager
    def between_steps(self) -> Iterator[None]:
        """Look after each step of the engine inside the block."""
        if self._aborted is None or not self._is_hopeless:
            yield
            return
        original, unfinished = self._engine.step, self._engine.output_processor.request_states
        watched: dict[int, Any] = {}

        def step() -> list[Any]:
            if not watched:  # the first step: all requests of the call, and no others, are there
                in_order = sorted(unfinished.values(), key=lambda state: int(state.external_req_id))
                watched.update({i: in_order[i] for i in self._is_hopeless})
            outputs = original()
            return outputs + [
                self._end(i, s) for i, s in watched.items() if s.request_id in unfinished and self._sees(i, s)
            ]

        self._engine.step = step
        try:
            yield
        finally:
            del self._engine.step

    def _sees(self, number: int, state: Any) -> bool:
        """Return True when a sequence has come to its next look and is hopeless."""
        tokens = state.detokenizer.num_output_tokens() // LOOK_TOKENS * LOOK_TOKENS
        if tokens == self._looked.get(number, 0):
            return False
        self._looked[number] = tokens
        return bool(self._is_hopeless[number](state.detokenizer.output_token_ids[:tokens]))

    def _end(self, number: int, state: Any) -> Any:
        """Return vLLM's output of a sequence that ends here."""
        self.ended[number] = self._looked[number]
        output = state.make_request_output([], None, self._aborted, None)
        self._engine.abort_request([state.request_id], internal=True)
        return output


class _Interruptible(tqdm):
    """Progress bar for vLLM that shows nothing and polls for signals whenever a sequence is finished."""

    def __init__(self, *args: Any, watch: Callable[[int, int], None] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **(kwargs | {"file": io.StringIO()}))
        self._watch = watch

    def update(self, n: float | None = 1) -> bool | None:
        signals.poll()
        shown = super().update(n)
        if self._watch is not None:
            self._watch(int(self.n), 0)
        return shown
