"""The engine over a vLLM server: a scripted server for what may go wrong, and the real one on vLLM's CPU backend."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from engine_contract import CLAUSES, EOS
from mel_lite.engines import vllm_server
from mel_lite.engines.base import Request, Sampling
from mel_lite.engines.unsloth import adapter_fingerprint
from mel_lite.engines.vllm_server import VLLMServerEngine
from mel_lite.errors import ConfigError, EngineError
from mel_lite.training.scoring import install_scoring_head
from real_packages import VLLM_SITE, needs_vllm
from tiny_models import save_tiny, set_lora
from trainers import assert_learned, build, even_ids

Answer = dict[str, Any]


class Script:
    """Answers of a scripted server, changed by each test, and what it was asked."""

    def __init__(self) -> None:
        self.served: list[Answer] = [{"id": "base", "root": "base", "max_model_len": 64}]
        self.load: tuple[int, str] = (200, "Success")
        self.choice: Callable[[Answer], Answer] = lambda asked: {}
        self.asked: list[tuple[str, Answer]] = []

    def complete(self, asked: Answer) -> Answer:
        choice = {
            "token_ids": [7, EOS], "prompt_token_ids": asked["prompt"], "logprobs": {"token_logprobs": [-0.5, -0.25]},
        }  # fmt: skip
        changes = self.choice(asked)
        return {"model": changes.pop("model", asked["model"]), "choices": [choice | changes]}


@pytest.fixture
def scripted() -> Iterator[tuple[str, Script]]:
    script = Script()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._send(200, json.dumps({"data": script.served}))

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            script.asked.append((self.path, asked))
            if self.path == "/v1/completions":
                self._send(200, json.dumps(script.complete(asked)))
            else:
                self._send(*script.load)

        def _send(self, status: int, body: str) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", script
    server.shutdown()
    server.server_close()


def engine_of(url: str, folder: Path, *, version: Callable[[], object] = lambda: 0, **options: Any) -> VLLMServerEngine:
    return VLLMServerEngine(
        url, base="base", save_adapter=lambda path: path.mkdir(parents=True), version=version, eos_ids=[EOS],
        exchange=folder, **options,
    )  # fmt: skip


def test_every_request_names_the_current_adapter(scripted: tuple[str, Script], tmp_path: Path) -> None:
    url, script = scripted
    state = [0]
    engine = engine_of(f"{url}/v1/", tmp_path, version=lambda: state[0])
    asked = [Request((5, 6), seed) for seed in (1, 2**62)]
    for state[0] in (0, 0, 1):
        (first, second) = engine.generate(asked, Sampling(4, temperature=0.5))
        assert first.ids == second.ids == (7, EOS) and first.logprobs == (-0.5, -0.25)
    sent = [body for path, body in script.asked if path == "/v1/completions"]
    names = [body["model"] for body in sent]
    assert names[0] == names[3] != names[4] == names[5], "one name per state"
    assert sorted(body["seed"] for body in sent[:2]) == [1, 2**62]
    assert sent[0]["prompt"] == [5, 6] and sent[0]["temperature"] == 0.5 and sent[0]["stop_token_ids"] == [EOS]
    others = [(path, body["lora_name"]) for path, body in script.asked if path != "/v1/completions"]
    assert others == [
        ("/v1/load_lora_adapter", names[0]), ("/v1/load_lora_adapter", names[4]), ("/v1/unload_lora_adapter", names[0]),
    ]  # fmt: skip
    assert [each.name for each in tmp_path.iterdir()] == [names[4]], "older adapters leave the folder"
    assert engine.context_tokens == 64


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": "mel-older"}, "answered with 'mel-older'"),
        ({"prompt_token_ids": [5]}, "answered a prompt of 1 tokens, but 2 were sent"),
        ({"token_ids": None}, "without ids or log-probs"),
        ({"token_ids": []}, "returned 0 ids with 2 log-probs"),
        ({"token_ids": [7] * 5}, "returned 5 ids"),
        ({"logprobs": {"token_logprobs": [-0.5, None]}}, "1 of 2 log-probs of a completion as None"),
        ({"logprobs": {"token_logprobs": [float("nan")] * 2}}, "2 of 2 log-probs of a completion as nan"),
    ],
)
def test_an_answer_that_is_no_sample_of_the_policy_stops_the_step(
    changes: Answer, said: str, scripted: tuple[str, Script], tmp_path: Path
) -> None:
    url, script = scripted
    script.choice = lambda asked: dict(changes)
    with pytest.raises(EngineError, match=said):
        engine_of(url, tmp_path).generate([Request((5, 6), 1)], Sampling(4))


@pytest.mark.parametrize(
    ("load", "said"),
    [
        ((404, '{"detail":"Not Found"}'), "takes no adapters while it runs .*VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"),
        ((400, "rank 64 is too large"), "HTTP 400: rank 64 is too large.*--max-lora-rank"),
    ],
)
def test_a_server_that_refuses_the_adapter_is_named(
    load: tuple[int, str], said: str, scripted: tuple[str, Script], tmp_path: Path
) -> None:
    url, script = scripted
    script.load = load
    with pytest.raises(EngineError, match=said):
        engine_of(url, tmp_path).wake()


def test_a_prompt_over_the_context_is_refused(scripted: tuple[str, Script], tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="A prompt of 64 tokens does not fit the context of 64"):
        engine_of(scripted[0], tmp_path).generate([Request((5,) * 64, 1)], Sampling(4))


def test_a_server_that_cannot_serve_the_run_is_refused_at_the_start(
    scripted: tuple[str, Script], tmp_path: Path
) -> None:
    url, script = scripted
    script.served = [{"id": "other/model", "root": "other/model"}, {"id": "mel-1", "root": "x", "parent": "base"}]
    with pytest.raises(ConfigError, match="serves other/model, but the model that is trained is base"):
        engine_of(url, tmp_path)
    for wrong in ("http://127.0.0.1:9", "nonsense", "http://[broken"):
        with pytest.raises(ConfigError, match="engine_url="):
            engine_of(wrong, tmp_path)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path, subprocess.Popen[bytes]]]:
    """Start the real server, as docs/engines.md says, on a tiny model."""
    home = tmp_path_factory.mktemp("server")
    base, port = save_tiny(home / "base", head_dim=64), free_port()
    environment = os.environ | {
        "PYTHONPATH": str(VLLM_SITE), "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }  # fmt: skip
    arguments = [
        *(sys.executable, "-P", "-m", "vllm.entrypoints.openai.api_server", "--model", str(base), "--port", str(port)),
        *("--host", "127.0.0.1", "--dtype", "float32", "--enforce-eager", "--max-model-len", "256", "--enable-lora"),
        *("--max-lora-rank", "8", "--max-loras", "2", "--logprobs-mode", "processed_logprobs", "--max-num-seqs", "32"),
    ]
    with (home / "log").open("wb") as log:
        server = subprocess.Popen(
            arguments, env=environment, cwd=home, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            assert server.poll() is None, (home / "log").read_text()[-4000:]
            try:
                if httpx.get(f"{url}/health", trust_env=False).is_success:
                    break
            except httpx.HTTPError:
                time.sleep(1)
        else:
            raise AssertionError((home / "log").read_text()[-4000:])
        yield url, base, server
    finally:
        os.killpg(server.pid, signal.SIGCONT)
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


@pytest.fixture(scope="module")
def model(real: tuple[str, Path, Any]) -> Any:
    base = AutoModelForCausalLM.from_pretrained(real[1], dtype=torch.float32)
    install_scoring_head(base)
    adapted = get_peft_model(base, LoraConfig(r=8, target_modules="all-linear"))
    set_lora(adapted, 0.3)
    return adapted


@needs_vllm
@pytest.mark.slow
@pytest.mark.parametrize("clause", CLAUSES)
def test_contract_with_the_real_server(clause: str, real: tuple[str, Path, Any], model: Any, tmp_path: Path) -> None:
    def build_engine(model: Any, *, eos: int = EOS) -> VLLMServerEngine:
        return VLLMServerEngine(
            real[0], base=str(real[1]), save_adapter=model.save_pretrained, eos_ids=[eos], exchange=tmp_path,
            version=lambda: adapter_fingerprint(model),
        )  # fmt: skip

    CLAUSES[clause](build_engine, model)


@needs_vllm
@pytest.mark.slow
def test_a_run_that_samples_with_the_real_server_learns(real: tuple[str, Path, Any], tmp_path: Path) -> None:
    """The server receives each of three updates; trainer and server agree on the log-probs of the trained adapter."""
    shutil.copytree(real[1], tmp_path / "base")
    trainer = build(
        tmp_path, model=AutoModelForCausalLM.from_pretrained(real[1], dtype=torch.float32), algorithm="grpo",
        reward_funcs=even_ids, probe_max_diff=0.01, max_steps=3, engine_url=real[0],
    )  # fmt: skip
    trainer.train()
    assert_learned(trainer)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    diffs = [row["mel/probe_logp_diff"] for row in rows if "mel/probe_logp_diff" in row]
    assert diffs and 0 < max(diffs) < 1e-4, diffs
    (share,) = [row["mel/probe_adapter"] for row in rows if "mel/probe_adapter" in row]
    assert share == pytest.approx(1, abs=0.01)
    assert len(list((tmp_path / "run" / "engine_adapters").iterdir())) == 1


@needs_vllm
@pytest.mark.slow
def test_a_server_that_hangs_or_dies_stops_the_step(
    real: tuple[str, Path, subprocess.Popen[bytes]], model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last test with this server: it does not come back."""
    monkeypatch.setattr(vllm_server, "SILENCE_S", 3.0)
    url, base, server = real
    engine = VLLMServerEngine(
        url, base=str(base), save_adapter=model.save_pretrained, eos_ids=[EOS], exchange=tmp_path, version=lambda: 0
    )
    asked = [Request((10, 11), seed) for seed in range(4)]
    assert len(engine.generate(asked, Sampling(4))) == 4
    os.killpg(server.pid, signal.SIGSTOP)
    with pytest.raises(EngineError, match="did not sample within 3 s.*--resume"):
        engine.generate(asked, Sampling(4))
    os.killpg(server.pid, signal.SIGCONT)
    os.killpg(server.pid, signal.SIGKILL)
    with pytest.raises(EngineError, match="could not sample.*--resume"):
        engine.generate(asked, Sampling(4))
