"""Fake vLLM: `LLM.generate` on a tiny PEFT model, with the faults that real engines have shown.

It samples like the transformers engine, so that results can be compared with that engine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch

from mel_lite.engines.base import Completion, Engine, Request, Sampling
from mel_lite.engines.hf import HFEngine
from mel_lite.engines.unsloth import adapter_fingerprint
from mel_lite.engines.vllm import VLLMEngine
from mel_lite.types import Finish

EOS, PAD = 2, 0


class FakeLLM:
    """Fake `vllm.LLM` with the same arguments. `fault` names its fault, which starts at the `since`-th call."""

    def __init__(self, model: Any, *, fault: str | None = None, since: int = 1, eos: int = EOS) -> None:
        self.model, self.fault, self.since = model, fault, since
        self.calls: list[SimpleNamespace] = []
        self.events: list[str] = []
        self.asleep = False
        self.sampler = HFEngine(model, eos_ids=[eos], pad_id=PAD)
        self.unfinished: dict[str, Any] = {}
        states = SimpleNamespace(request_states=self.unfinished)
        self.llm_engine = SimpleNamespace(output_processor=states, abort_request=self._abort)

    def generate(self, prompts: Any, *, sampling_params: Any, lora_request: Any, use_tqdm: Any) -> list[Any]:
        assert not self.asleep, "sampled while asleep"
        ids = [tuple(p["prompt_token_ids"]) for p in prompts]
        self.calls.append(SimpleNamespace(prompts=ids, params=sampling_params, lora=lora_request))
        fault = self.fault if len(self.calls) >= self.since else None
        self.unfinished.update({str(i): None for i in range(len(ids))})
        if fault == "dies" or (fault == "fails" and len(self.calls) == self.since):
            raise RuntimeError("EngineCore encountered an issue")
        if fault == "memory" and len(ids) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        bar = use_tqdm(total=len(ids), desc="", dynamic_ncols=True, postfix="")
        with self._adapter(fault):
            sampled = self._sample(ids, sampling_params)
        outputs = [self._answer(i, done, fault, lora_request) for i, done in zip(ids, sampled, strict=True)]
        bar.update(len(ids))
        self.unfinished.clear()
        return outputs[:-1] if fault == "fewer" else outputs

    def sleep(self, level: int) -> None:
        self.events.append(f"sleep {level}")
        self.asleep = True

    def wake_up(self) -> None:
        if self.fault == "does not wake":  # message of vLLM's allocator
            raise RuntimeError("CUDA Error: out of memory at /workspace/csrc/cumem_allocator.cpp:62")
        self.events.append("wake")
        self.asleep = False

    def _abort(self, ids: list[str], internal: bool) -> None:
        self.events.append(f"abort {len(ids)}")
        for i in ids:
            self.unfinished.pop(i)

    @contextmanager
    def _adapter(self, fault: str | None) -> Iterator[None]:
        layers = [m for m in self.model.modules() if isinstance(getattr(m, "scaling", None), dict)]
        factor = 2.0 if fault == "twice" else 1.0
        with self.model.disable_adapter() if fault == "ignores" else nullcontext():
            for layer in layers:
                layer.scaling["default"] *= factor
            try:
                yield
            finally:
                for layer in layers:
                    layer.scaling["default"] /= factor

    def _sample(self, ids: list[tuple[int, ...]], sampling_params: Sequence[Any]) -> list[Completion]:
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "ignore_eos")
        for params in sampling_params:
            assert params.stop_token_ids or params.ignore_eos, "stop tokens end a sequence whatever ignore_eos says"
        samplings = [Sampling(p.max_tokens, **{name: getattr(p, name) for name in names}) for p in sampling_params]
        asked = zip(ids, sampling_params, samplings, strict=True)
        return self.sampler.generate([Request(i, p.seed, own) for i, p, own in asked], samplings[0])

    def _answer(self, ids: tuple[int, ...], done: Completion, fault: str | None, lora_request: Any) -> Any:
        logprobs = [{t: SimpleNamespace(logprob=x)} for t, x in zip(done.ids, done.logprobs, strict=True)]
        if fault == "other dtype":
            for at, sign in zip(logprobs, (1, -1) * len(logprobs), strict=False):
                next(iter(at.values())).logprob += 0.2 * sign
        if fault == "nan":
            logprobs[-1][done.ids[-1]].logprob = float("nan")
        sampled = SimpleNamespace(
            token_ids=list(done.ids),
            logprobs=None if fault == "no log-probs" else logprobs,
            finish_reason="abort" if fault == "aborts" else "stop" if done.finish is Finish.STOP else "length",
        )
        return SimpleNamespace(
            prompt_token_ids=list(ids[1:] if fault == "cuts prompts" else ids),
            outputs=[sampled],
            lora_request=None if fault == "drops request" else lora_request,
        )


def fake_vllm_engine(
    model: Any,
    *,
    step: Callable[[], int] = lambda: 0,
    eos_ids: Sequence[int] = (EOS,),
    standby: bool = True,
    **fault: Any,
) -> tuple[VLLMEngine, FakeLLM]:
    """Build the real engine with a fake vLLM, whose adapter ids count up like vLLM's."""
    llm = FakeLLM(model, eos=eos_ids[0], **fault)
    adapter_ids = iter(range(1, 10**6))
    engine = VLLMEngine(
        llm,
        sampling_params=SimpleNamespace,
        load_adapter=lambda: SimpleNamespace(lora_int_id=next(adapter_ids)),
        fingerprint=lambda: adapter_fingerprint(model),
        step=step,
        eos_ids=eos_ids,
        standby=standby,
        context_tokens=4096,
    )
    return engine, llm


class LateEngine(Engine):
    """Engine to build a trainer with before the model that it samples from exists."""

    name, own_kernels, mixes = VLLMEngine.name, True, True

    def __init__(self) -> None:
        self.inner: VLLMEngine | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def wake(self) -> None:
        assert self.inner is not None
        self.inner.wake()

    def sleep(self) -> None:
        assert self.inner is not None
        self.inner.sleep()

    def generate(self, asked: Sequence[Request], sampling: Sampling) -> Any:
        assert self.inner is not None
        return self.inner.generate(asked, sampling)


def trainer_with_fake_vllm(build: Callable[..., Any], folder: Any, **options: Any) -> tuple[Any, FakeLLM]:
    """Build a trainer that samples with the vLLM engine; `fault` and `since` go to the fake vLLM."""
    fault = {key: options.pop(key) for key in ("fault", "since") if key in options}
    late = LateEngine()
    trainer = build(folder, engine=late, **options)
    late.inner, llm = fake_vllm_engine(trainer.model, step=lambda: trainer.state.global_step, **fault)
    return trainer, llm
