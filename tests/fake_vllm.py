"""A vLLM server's routes over a small network, with faults and lies on request."""

from __future__ import annotations

import contextlib
import copy
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from lightning_rlhf.engines import SamplingParams, sample
from lightning_rlhf.models import PolicyModel
from lightning_rlhf.types import PromptBatch

GENERATE = "/inference/v1/generate"
Fault = Callable[[str, dict], Any]
Lie = Callable[[str, dict, dict], dict]


class FakeVLLM:
    """Server on loopback.

    `fault(path, body)` may return a number (status), `"drop"`, `"half"`, or seconds as a float to wait.
    `lie(path, body, answer)` returns what is answered instead.
    """

    def __init__(self, network: nn.Module, *, max_model_len: int = 64) -> None:
        self.network = copy.deepcopy(network).eval().requires_grad_(False)
        self.version = "default"
        self.max_model_len = max_model_len
        self.calls: list[tuple[str, dict]] = []
        self.fault: Fault = lambda path, body: None
        self.lie: Lie = lambda path, body, answer: answer
        self.reads = True
        self.workers = 1
        self.adapters: dict[str, nn.Module] = {}
        self.busy = self.busiest = 0
        self._lock = threading.Lock()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.port = self._http.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    def bodies(self, path: str = GENERATE) -> list[dict]:
        return [body for of, body in self.calls if of == path]

    def answer(self, path: str, body: dict) -> dict:
        if path == "/version":
            return {"version": "0.32.0"}
        if path == "/v1/models":
            return {"data": [{"id": "policy", "max_model_len": self.max_model_len}]}
        if path == "/weight_info":
            return {"weight_version": self.version}
        if path == "/update_weight_version":
            self.version = body["new_version"]
            return {"success": True}
        if path == "/v1/load_lora_adapter":
            self.adapters[body["lora_name"]] = self.with_adapter(Path(body["lora_path"]))
            return {}
        if path == "/v1/unload_lora_adapter":
            del self.adapters[body["lora_name"]]
            return {}
        if path == "/get_world_size":
            return {"world_size": self.workers}
        if path in ("/init_weight_transfer_engine", "/start_weight_update", "/update_weights"):
            return {"message": "done"}
        if path == "/finish_weight_update":
            self.version = body["weight_version"]
            return {"message": "done"}
        if path == "/reset_prefix_cache":
            return {"success": True}
        if path == "/collective_rpc":
            if self.reads:
                self.read(Path(body["kwargs"]["weights_path"]))
            return {}
        if path == GENERATE:
            with self._lock:
                self.busy += 1
                self.busiest = max(self.busy, self.busiest)
            try:
                return self.generate(body)
            finally:
                self.busy -= 1
        raise KeyError(path)

    def read(self, folder: Path) -> None:
        state = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
        missing, unexpected = self.network.load_state_dict(state, strict=False)
        assert not unexpected, unexpected
        assert set(missing) <= {"lm_head.weight"}, missing  # tied

    def with_adapter(self, folder: Path) -> nn.Module:
        import peft

        return peft.PeftModel.from_pretrained(copy.deepcopy(self.network), folder).merge_and_unload().eval()

    def generate(self, body: dict) -> dict:
        network = self.network if body.get("model") is None else self.adapters[body["model"]]
        ids, wanted = body["token_ids"], body["sampling_params"]
        answer: dict[str, Any] = {"request_id": f"generate-tokens-{body.get('request_id', 'x')}", "choices": []}
        if "prompt_logprobs" in wanted:
            logprobs = network(torch.tensor([ids])).logits[0].double().log_softmax(-1)
            pairs = enumerate(ids[1:])
            answer["prompt_logprobs"] = [None] + [{str(t): {"logprob": float(logprobs[i, t])}} for i, t in pairs]
            return answer
        row = torch.tensor([ids])
        batch = PromptBatch(row, torch.ones_like(row, dtype=torch.bool), torch.tensor([True]), [{}])
        greedy = wanted["temperature"] == 0
        params = SamplingParams(max_new_tokens=wanted["max_tokens"], temperature=wanted["temperature"] or 1.0)
        policy = PolicyModel(network)
        policy.__class__ = type("Ending", (PolicyModel,), {"end_tokens": list(wanted["stop_token_ids"])})
        uniforms = None if greedy else torch.rand(wanted["n"], wanted["max_tokens"], dtype=torch.float64)
        drawn = sample(policy, batch, uniforms, params, samples=wanted["n"])
        for i, (tokens, mask, ended, numbers, *_) in enumerate(zip(*drawn, strict=True)):
            kept, told = tokens[mask].tolist(), numbers[mask].tolist()
            pairs = zip(kept, told, strict=True)
            answer["choices"].append(
                {
                    "index": i,
                    "finish_reason": "stop" if ended else "length",
                    "token_ids": kept,
                    "weight_versions": [{"version": self.version, "start": 0, "end": len(kept)}],
                    "logprobs": {"content": [{"token_id": t, "logprob": number} for t, number in pairs]},
                }
            )
        answer["choices"].reverse()  # in no order
        return answer


def _handler(fake: FakeVLLM) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def do_GET(self) -> None:
            self.reply({})

        def do_POST(self) -> None:
            self.reply(json.loads(self.rfile.read(int(self.headers["Content-Length"])) or b"{}"))

        def reply(self, body: dict) -> None:
            fake.calls.append((self.path, body))
            fault = fake.fault(self.path, body)
            if isinstance(fault, float):
                time.sleep(fault)
            if fault == "drop":
                self.close_connection = True
                return
            if isinstance(fault, int):
                self.send(fault, b'{"error": {"message": "on purpose"}}')
                return
            payload = json.dumps(fake.lie(self.path, body, fake.answer(self.path, body))).encode()
            if fault == "text" or self.path.endswith("_lora_adapter"):  # vLLM says "Success: ..."
                payload = b"<html>"
            self.send(200, payload, half=fault == "half")

        def send(self, status: int, payload: bytes, *, half: bool = False) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(payload)))
            self.end_headers()
            with contextlib.suppress(BrokenPipeError):  # nobody waited
                self.wfile.write(payload[: len(payload) // 2] if half else payload)
            self.close_connection = half

    return Handler


@contextmanager
def serving(network: nn.Module, **options: Any) -> Iterator[FakeVLLM]:
    fake = FakeVLLM(network, **options)
    try:
        yield fake
    finally:
        fake.stop()


@dataclass
class InitInfo:
    """As `NCCLTrainerInitInfo` of vLLM 0.32."""

    master_address: str
    master_port: int
    world_size: int
    packed: bool = True
    rank: int = 0


class TrainerEngine:
    """As `NCCLTrainerWeightTransferEngine` of vLLM 0.32, but for the broadcast."""

    made: list[TrainerEngine] = []
    servers: list[FakeVLLM] = []
    loses: set[str] = set()

    def __init__(self, info: InitInfo, client: Any, source: Any) -> None:
        self.info, self.client, self.source, self.open = info, client, source, True
        self.made.append(self)

    @classmethod
    def trainer_init(cls, info: InitInfo, *, client: Any, source: Any) -> TrainerEngine:
        engine = cls(info, client, source)
        if info.rank == 0:
            client.init_weight_transfer_engine(asdict(info) | {"rank_offset": 1})
        return engine

    @torch.no_grad()
    def send_weights(self) -> None:
        meta = self.source.metadata()
        tensors = list(self.source)
        assert [(m.name, m.dtype, m.shape) for m in meta] == [(n, t.dtype, tuple(t.shape)) for n, t in tensors]
        if self.info.rank != 0:
            return
        self.client.start_weight_update()
        names = [m.name for m in meta]
        self.client.update_weights({"names": names, "dtype_names": [str(m.dtype)[6:] for m in meta]})
        for server in self.servers:
            state = {name: tensor for name, tensor in tensors if name not in self.loses}
            server.network.load_state_dict(state, strict=False)
        self.client.finish_weight_update()

    def shutdown(self) -> None:
        self.open = False


@contextmanager
def vllm_installed() -> Iterator[type[TrainerEngine]]:
    """A package `vllm` with the module that the trainer of `NCCL` imports."""
    TrainerEngine.made, TrainerEngine.servers, TrainerEngine.loses = [], [], set()
    names = ["vllm", "vllm.distributed", "vllm.distributed.weight_transfer"]
    names.append(f"{names[-1]}.nccl_engine")
    modules: dict[str, Any] = {name: ModuleType(name) for name in names}
    modules[names[-1]].NCCLTrainerInitInfo = InitInfo
    modules[names[-1]].NCCLTrainerWeightTransferEngine = TrainerEngine
    modules[names[-2]].nccl_engine = modules[names[-1]]
    before = {name: sys.modules.get(name) for name in names}
    sys.modules.update(modules)
    try:
        yield TrainerEngine
    finally:  # these alone: what was imported meanwhile must not be imported a second time
        for name, module in before.items():
            del sys.modules[name]
            if module is not None:
                sys.modules[name] = module
