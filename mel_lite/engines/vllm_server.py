"""Generation with a vLLM server of its own, on this or another machine; every state of the adapter is loaded into it.

    VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 vllm serve BASE --enable-lora --max-lora-rank 32 \\
        --logprobs-mode processed_logprobs --port 8000
    mel-lite train ... --engine-url http://localhost:8000

The adapter goes through a folder that trainer and server both see. A state of the adapter has a name that no other
state ever has, so the server cannot answer with an older one under that name.
"""

from __future__ import annotations

import itertools
import logging
import math
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path

import httpx

from mel_lite import signals
from mel_lite.engines.base import Completion, Engine, Request, Sampling
from mel_lite.engines.distributed import on_first
from mel_lite.errors import ConfigError, EngineError
from mel_lite.types import Finish

logger = logging.getLogger(__name__)

CONNECT_S = 10.0
"""Seconds to wait for a connection."""
SILENCE_S = 600.0
"""Seconds a sequence or an adapter may take before the server counts as hung."""
POLL_S = 0.2
"""Seconds between looks for a signal while sequences are sampled."""
DEFAULT_IN_FLIGHT = 256
"""Requests sent at once; the server queues what it cannot sample yet."""
START = (
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 vllm serve BASE --enable-lora --max-lora-rank RANK --logprobs-mode "
    "processed_logprobs"
)


class VLLMServerEngine(Engine):
    """Samples with a vLLM server through its OpenAI API. Each request names the current state of the adapter.

    Args:
        url: address of the server, such as `http://localhost:8000`.
        base: name or folder of the base model that is trained.
        save_adapter: writes the current adapter into a folder, as PEFT does.
        version: returns a value that changes with the adapter's weights or the optimizer step.
        eos_ids: every id that ends a completion.
        exchange: folder for adapters that the server sees under the same path.
        in_flight: requests sent at once.
        cpu: True when training on CPUs; several processes then talk by gloo.

    Raises: ConfigError for an address that cannot be used, a server that does not answer, serves another base, or
        serves it without LoRA or with unprocessed log-probs.
    """

    name = "vllm-server"
    own_kernels = True
    mixes = True

    def __init__(
        self,
        url: str,
        *,
        base: str,
        save_adapter: Callable[[Path], None],
        version: Callable[[], object],
        eos_ids: Sequence[int],
        exchange: Path,
        in_flight: int = DEFAULT_IN_FLIGHT,
        cpu: bool = False,
    ) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self._save_adapter, self._current = save_adapter, version
        self._eos_ids = tuple(eos_ids)
        self._exchange = exchange.resolve()
        self._in_flight, self._cpu = in_flight, cpu
        self._nonce = uuid.uuid4().hex[:8]
        self._sequence = itertools.count(1)
        self._sent: object = None
        self._loaded = ""
        self._client = httpx.Client(
            base_url=self.url,
            timeout=httpx.Timeout(SILENCE_S, connect=CONNECT_S),
            limits=httpx.Limits(max_connections=in_flight),
            trust_env=False,  # a proxy for the internet must not see rollouts
        )
        self.context_tokens = self._check_base(base)

    # ---- what the server serves ----

    def _check_base(self, base: str) -> int | None:
        """Return the server's context length. Raises: ConfigError for a server that cannot be used."""
        field = f"engine_url={self.url!r}"
        try:
            answer = self._client.get("/v1/models")
            answer.raise_for_status()
            served = [card for card in answer.json()["data"] if card.get("parent") is None]
        except httpx.InvalidURL as error:
            raise ConfigError(f"{field} is no address ({error}). Set it like http://localhost:8000.") from error
        except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{field}: no vLLM server answers there ({type(error).__name__}: {error}). Start one: {START}"
            ) from error
        names = {str(card.get(key)) for card in served for key in ("id", "root")}
        if not any(_same_model(base, name) for name in names):
            raise ConfigError(
                f"{field} serves {', '.join(sorted(names))}, but the model that is trained is {base}. Start the server "
                "with that base, or set model.name to the served one."
            )
        lengths = [card["max_model_len"] for card in served if card.get("max_model_len")]
        return int(lengths[0]) if lengths else None

    # ---- the adapter ----

    def wake(self) -> None:
        """Load the current adapter into the server; rank 0 does, for all ranks. Raises: EngineError."""
        current = self._current()
        if not self._loaded or current != self._sent:
            self._loaded = on_first(self._publish, cpu=self._cpu)
            self._sent = current

    def _publish(self) -> str:
        """Load the current adapter under a new name, and take the one before it out. Returns: the name."""
        name = f"mel-{self._nonce}-{next(self._sequence)}"
        folder = self._exchange / name
        self._save_adapter(folder)
        with self._talking("load an adapter"):
            answer = self._client.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": str(folder)})
        if answer.status_code == httpx.codes.NOT_FOUND and name not in answer.text:
            raise EngineError(
                f"The vLLM server at {self.url} takes no adapters while it runs ({_said(answer)}). Start it so: {START}"
            )
        if answer.is_error:
            raise EngineError(
                f"The vLLM server at {self.url} refused the adapter in {folder} ({_said(answer)}). It must see that "
                "folder under the same path, and its --max-lora-rank must reach the adapter's rank."
            )
        self._drop(self._loaded)
        return name

    def sleep(self) -> None:
        """Do nothing: the server's memory is its own."""

    def _drop(self, name: str) -> None:
        """Take an older state of the adapter out of the server."""
        if not name:
            return
        try:
            self._client.post("/v1/unload_lora_adapter", json={"lora_name": name})
        except httpx.HTTPError as error:
            logger.warning("The vLLM server kept adapter %s: %s", name, error)
        shutil.rmtree(self._exchange / name, ignore_errors=True)

    # ---- sampling ----

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        """Sample one completion per request, in their order.

        Raises: EngineError when the server fails, hangs, or returns what cannot be a sample of the policy: another
            prompt, another adapter, log-probs that are not numbers.
        """
        self.wake()
        self._check_lengths(requests)
        pool = ThreadPoolExecutor(max_workers=min(self._in_flight, max(1, len(requests))))
        try:
            asked = [pool.submit(self._complete, request, request.options(sampling)) for request in requests]
            _wait_for(asked)
            return [each.result() for each in asked]
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _check_lengths(self, requests: Sequence[Request]) -> None:
        longest = max((len(request.prompt_ids) for request in requests), default=0)
        if self.context_tokens is not None and longest >= self.context_tokens:
            raise EngineError(
                f"A prompt of {longest} tokens does not fit the context of {self.context_tokens} tokens of the vLLM "
                f"server at {self.url}. Raise its --max-model-len, or lower data.max_prompt_tokens or "
                "train.max_context_tokens."
            )

    def _complete(self, request: Request, sampling: Sampling) -> Completion:
        body = {
            "model": self._loaded,
            "prompt": list(request.prompt_ids),
            "seed": request.seed,
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "min_p": sampling.min_p or 0.0,
            "repetition_penalty": sampling.repetition_penalty,
            "stop_token_ids": [] if sampling.ignore_eos else list(self._eos_ids),
            "ignore_eos": sampling.ignore_eos,
            "logprobs": 0,  # of the sampled id alone
            "return_token_ids": True,
            "add_special_tokens": False,
            "skip_special_tokens": False,
        }
        with self._talking("sample"):
            answer = self._client.post("/v1/completions", json=body)
        if answer.is_error:
            raise EngineError(f"The vLLM server at {self.url} failed to sample ({_said(answer)}).")
        return self._checked(request, sampling, answer)

    def _checked(self, request: Request, sampling: Sampling, answer: httpx.Response) -> Completion:
        """Convert the server's answer. Raises: EngineError for one that is no sample of the policy."""
        try:
            found = answer.json()
            (choice,) = found["choices"]
            ids = tuple(map(int, choice["token_ids"]))
            prompt = tuple(map(int, choice["prompt_token_ids"]))
            logprobs = tuple(choice["logprobs"]["token_logprobs"])
            model = found["model"]
        except (ValueError, KeyError, TypeError) as error:
            raise EngineError(
                f"The vLLM server at {self.url} answered without ids or log-probs ({type(error).__name__}: {error}). "
                "Use vLLM 0.10.2 or newer."
            ) from error
        if model != self._loaded:
            raise EngineError(
                f"The vLLM server at {self.url} answered with {model!r}, but {self._loaded!r} is the current adapter."
            )
        if prompt != request.prompt_ids:
            raise EngineError(
                f"The vLLM server at {self.url} answered a prompt of {len(prompt)} tokens, but "
                f"{len(request.prompt_ids)} were sent: it changed the ids."
            )
        if not 0 < len(ids) <= sampling.max_new_tokens or len(logprobs) != len(ids):
            raise EngineError(
                f"The vLLM server at {self.url} returned {len(ids)} ids with {len(logprobs)} log-probs; at most "
                f"{sampling.max_new_tokens} were asked for."
            )
        if bad := [value for value in logprobs if value is None or not math.isfinite(value)]:
            raise EngineError(
                f"The vLLM server at {self.url} returned {len(bad)} of {len(logprobs)} log-probs of a completion as "
                f"{bad[0]}. Look for a diverged adapter in grad_norm and mel/nll."
            )
        return Completion(ids, logprobs, Finish.STOP if ids[-1] in self._eos_ids else Finish.LENGTH)

    @contextmanager
    def _talking(self, what: str) -> Iterator[None]:
        """Turn a broken or silent connection into an EngineError."""
        try:
            yield
        except httpx.TimeoutException as error:
            raise EngineError(
                f"The vLLM server at {self.url} did not {what} within {SILENCE_S:.0f} s. Restart it, then continue "
                "with --resume."
            ) from error
        except httpx.HTTPError as error:
            raise EngineError(
                f"The vLLM server at {self.url} could not {what} ({type(error).__name__}: {error}). Restart it, then "
                "continue with --resume."
            ) from error


def _wait_for(asked: Sequence[Future[Completion]]) -> None:
    """Wait until all are done, or one has failed; a signal is noticed meanwhile."""
    pending = set(asked)
    while pending:
        done, pending = wait(pending, timeout=POLL_S, return_when=FIRST_COMPLETED)
        signals.poll()
        for each in done:
            each.result()


def _same_model(one: str, other: str) -> bool:
    """Return True for equal Hub ids, or for paths of one folder."""
    if one == other:
        return True
    folders = Path(one), Path(other)
    return all(folder.exists() for folder in folders) and folders[0].resolve() == folders[1].resolve()


def _said(answer: httpx.Response) -> str:
    return f"HTTP {answer.status_code}: {' '.join(answer.text.split())[:300]}"
