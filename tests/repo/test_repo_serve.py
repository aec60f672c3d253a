"""`lightning-rlhf serve` with a fake vLLM: what the server is given, and how the command ends."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from stopped import refused

from lightning_rlhf.cli import main
from lightning_rlhf.engines import EngineError, LocalServer, VLLMServer
from lightning_rlhf.engines.vllm import ServerProcess, process
from lightning_rlhf.models import PolicyModel

FAKE = '''
"""Answers /health, tells what it was started with, and does what it is told by `FAKE_VLLM`."""
import json, os, pathlib, signal, subprocess, sys, threading
from http.server import BaseHTTPRequestHandler, HTTPServer

does, record = os.environ["FAKE_VLLM"], pathlib.Path(os.environ["FAKE_RECORD"])
given = dict(zip(sys.argv[1:], sys.argv[2:]))
folder = pathlib.Path(given["--model"])
record.write_text(json.dumps({
    "words": sys.argv[1:], "variables": dict(os.environ), "files": sorted(file.name for file in folder.iterdir()),
    "config": json.loads((folder / "config.json").read_text()), "group": os.getpgrp(),
}))
if does == "dies":
    print("ValueError: no room for the cache", file=sys.stderr)
    sys.exit(3)
if does == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
subprocess.Popen(["sleep", "600"])


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        if does == "ends":
            threading.Timer(1.0, os._exit, [7]).start()


HTTPServer((given["--host"], int(given["--port"])), Handler).serve_forever()
'''


class Fake:
    """An environment with a fake vLLM.

    Attributes:
        python: its Python.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.record = folder, folder / "record.json"
        self.python = str(folder / "python")
        self.set()

    def set(self, *, does: str = "serves", gpu: bool = False, installed: bool = True) -> None:
        """Write it anew."""
        modules = self.folder / f"modules-{does}-{gpu}-{installed}"
        server = modules / "vllm" / "entrypoints" / "openai" / "api_server.py"
        (modules if not installed else server.parent).mkdir(parents=True, exist_ok=True)
        if installed:
            server.write_text(FAKE)
        (modules / "torch.py").write_text(f"class cuda:\n    is_available = staticmethod(lambda: {gpu})\n")
        variables = f"PYTHONPATH={modules} FAKE_VLLM={does} FAKE_RECORD={self.record}"
        Path(self.python).write_text(f'#!/bin/sh\n{variables} exec {sys.executable} "$@"\n')
        Path(self.python).chmod(stat.S_IRWXU)

    @property
    def told(self) -> dict[str, Any]:
        """What the server was started with."""
        return json.loads(self.record.read_text())

    @property
    def options(self) -> dict[str, str]:
        """Words of the server by the word before."""
        words = self.told["words"]
        return dict(zip(words, words[1:], strict=False))


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: Any) -> Fake:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    return Fake(tmp_path)


@pytest.fixture
def served(fake: Fake, make_folder: Callable[..., str]) -> Callable[..., Fake]:
    """Runs a server of a policy until it answers."""

    def run(*, tied: bool = False, server: LocalServer | None = None, tokenizer: bool = True, **does: Any) -> Fake:
        fake.set(**does)
        policy = make_folder("llama", tie_word_embeddings=tied)
        if not tokenizer:
            for file in Path(policy).glob("*token*"):
                file.unlink()
        with ServerProcess(policy, replace(server or LocalServer(), python=fake.python)) as running:
            assert running.is_running
        assert not running.is_running
        assert left(fake) == []
        return fake

    return run


def left(fake: Fake) -> list[str]:
    return [str(path) for path in (fake.folder / "temporary").iterdir()]


def taken() -> socket.socket:
    return socket.create_server(("127.0.0.1", 0))


def test_server_gets_what_it_needs(served):
    server = LocalServer(dtype="float32", max_model_len=64, max_num_seqs=5, options=["--seed", "3"], devices="1")
    fake = served(server=server, gpu=True)
    expected = {
        "--dtype": "float32",
        "--host": "127.0.0.1",
        "--logprobs-mode": "processed_logprobs",
        "--max-model-len": "64",
        "--max-num-seqs": "5",
        "--seed": "3",
        "--served-model-name": "policy",
    }
    assert fake.options.items() >= expected.items()
    assert "--enable-scale-out" in fake.told["words"]
    assert not {"--enforce-eager", "--tensor-parallel-size", "--skip-tokenizer-init"} & set(fake.told["words"])
    variables = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}
    assert fake.told["variables"].items() >= (variables | {"CUDA_VISIBLE_DEVICES": "1"}).items()
    assert "VLLM_CPU_KVCACHE_SPACE" not in fake.told["variables"]


def test_server_without_gpu_is_eager_with_a_cache(served, monkeypatch):
    fake = served()
    assert "--enforce-eager" in fake.told["words"]
    assert fake.told["variables"]["VLLM_CPU_KVCACHE_SPACE"] == "2"
    assert fake.options["--served-model-name"] == "policy"
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    monkeypatch.setenv("RANK", "3")
    assert served().told["variables"]["VLLM_CPU_KVCACHE_SPACE"] == "1"
    assert "RANK" not in fake.told["variables"]


def test_tied_output_layer_is_untied_on_a_cpu_alone(served):
    fake = served(tied=True)
    assert fake.options["--served-model-name"] == "policy-untied"
    assert fake.told["config"]["tie_word_embeddings"] is False
    assert {"model.safetensors", "output_layer.safetensors", "tokenizer.json"} <= set(fake.told["files"])
    fake = served(tied=True, gpu=True)
    assert fake.options["--served-model-name"] == "policy"
    assert fake.told["config"]["tie_word_embeddings"] is True
    assert "output_layer.safetensors" not in fake.told["files"]


def test_untied_copy_is_the_same_model(make_folder, tmp_path):
    from lightning_rlhf.engines.vllm.untied import write_untied_copy

    folder = Path(make_folder("llama", tie_word_embeddings=True))
    write_untied_copy(folder, tmp_path)
    embeddings = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(load_file(tmp_path / "output_layer.safetensors")["lm_head.weight"], embeddings)
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is True


def test_policy_without_tokenizer_is_served(served):
    assert "--skip-tokenizer-init" in served(tokenizer=False).told["words"]


def test_children_end_with_the_server(served):
    assert not lives(served().told["group"])


def test_deaf_server_is_killed(served, monkeypatch):
    monkeypatch.setattr(process, "GRACE", 0.3)
    assert not lives(served(does="deaf").told["group"])


def command(fake: Fake, policy: str, *words: str, port: int) -> list[str]:
    return ["serve", policy, f"--python={fake.python}", f"--port={port}", *words]


def free() -> int:
    with taken() as listener:
        return listener.getsockname()[1]


def test_command_says_how_to_train_and_ends_with_the_servers_status(fake, make_folder, capsys):
    fake.set(does="ends")
    policy, port = make_folder("llama"), free()
    words = ("--dtype=bfloat16", "--max-model-len=9", "--max-num-seqs=8", "--tensor-parallel-size=2", "--", "--seed=1")
    with pytest.raises(SystemExit) as stopped:
        main(command(fake, policy, *words, port=port))
    assert stopped.value.code == 7
    [line] = capsys.readouterr().out.splitlines()
    assert f"--model.engine=VLLMServer --model.engine.urls='[http://127.0.0.1:{port}]'" in line
    expected = {"--dtype": "bfloat16", "--max-model-len": "9", "--max-num-seqs": "8", "--tensor-parallel-size": "2"}
    assert fake.options.items() >= expected.items()
    assert fake.told["words"][-1] == "--seed=1"
    assert left(fake) == []


def test_signals_reach_the_server(fake, make_folder, capsys):
    for number in (signal.SIGINT, signal.SIGTERM):
        fake.record.unlink(missing_ok=True)
        port = free()
        threading.Thread(target=send_when_healthy, args=(number, port), daemon=True).start()
        before = signal.getsignal(number)
        with pytest.raises(SystemExit) as stopped:
            main(command(fake, make_folder("llama", tie_word_embeddings=True), port=port))
        assert stopped.value.code == 128 + number
        assert signal.getsignal(number) is before
        assert not lives(fake.told["group"])
        assert left(fake) == []


def send_when_healthy(number: int, port: int) -> None:
    while not process._answers(f"http://127.0.0.1:{port}/health"):
        time.sleep(0.1)
    time.sleep(0.5)
    os.kill(os.getpid(), number)


def test_server_ends_when_the_command_is_killed(fake, make_folder):
    """By -9, when nothing of the command runs any more."""
    policy = make_folder("llama")
    words = [sys.executable, "-m", "lightning_rlhf", *command(fake, policy, port=free())]
    variables = os.environ | {"TMPDIR": str(fake.folder / "temporary")}
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=variables) as started:
        assert "train with" in started.stdout.readline()
        started.kill()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and (left(fake) or lives(fake.told["group"])):
        time.sleep(0.1)
    assert left(fake) == []
    assert not lives(fake.told["group"])


def lives(group: int) -> bool:
    """Whether a group has a process that is no zombie."""
    for each in psutil.process_iter():
        with suppress(OSError, psutil.Error):
            if os.getpgid(each.pid) == group and each.status() != psutil.STATUS_ZOMBIE:
                return True
    return False


def test_taken_port_is_refused_before_the_start(fake, make_folder):
    with taken() as listener, pytest.raises(ValueError, match="no server can listen at 127.0.0.1:.*another port"):
        main(command(fake, make_folder("llama"), port=listener.getsockname()[1]))
    assert not fake.record.exists()
    assert left(fake) == []


def test_server_that_dies_shows_the_end_of_its_log(fake, make_folder):
    fake.set(does="dies")
    with pytest.raises(EngineError, match="ended while it started, status 3; its log ends:\nValueError: no room"):
        main(command(fake, make_folder("llama", tie_word_embeddings=True), port=free()))
    assert left(fake) == []


def test_missing_vllm_is_refused_with_its_installation(fake, make_folder):
    fake.set(installed=False)
    with pytest.raises(
        ValueError, match="vLLM is not installed in .*: `python3 -m venv .venv-vllm && .venv-vllm/bin/pip install"
    ):
        main(command(fake, make_folder("llama"), port=free()))
    with pytest.raises(ValueError, match="nowhere/python does not run"):
        main(["serve", make_folder("llama"), "--python=nowhere/python"])


def test_other_hosts_need_a_private_network(fake, make_folder, capsys):
    policy = make_folder("llama")
    said = refused(capsys, "serve", policy, "--host=0.0.0.0")
    assert "--host 0.0.0.0" in said
    assert "add --private-network if only your machines reach it" in said
    fake.set(does="ends")
    with pytest.raises(SystemExit):
        main(command(fake, policy, "--host=0.0.0.0", "--private-network", port=free()))
    said = capsys.readouterr().out
    assert "--model.engine.private_network=true" in said
    assert f"http://{socket.gethostname()}:" in said


def test_what_is_no_whole_policy_is_refused(fake, make_lm, tmp_path):
    from peft import get_peft_model

    adapter = get_peft_model(make_lm("llama"), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    PolicyModel(adapter).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="holds an adapter.*merge_adapter"):
        main(["serve", str(tmp_path / "adapter")])
    with pytest.raises(ValueError, match="there is no folder"):
        main(["serve", str(tmp_path / "nowhere")])
    with pytest.raises(ValueError, match="config.json"):
        main(["serve", str(tmp_path / "temporary")])


def test_server_of_a_run_needs_no_url():
    with pytest.raises(ValueError, match="`urls` is empty.*`serve`"):
        VLLMServer()
    assert VLLMServer(serve=LocalServer()).urls == ()


@pytest.mark.parametrize("wrong", [{"port": 0}, {"max_model_len": 0}, {"max_num_seqs": -1}])
def test_options_are_checked(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        LocalServer(**wrong)
