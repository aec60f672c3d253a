"""SmolLM2 learns a text game that an OpenEnv server plays: three rooms, in each the door that a voice names.

SmolLM2-135M-Instruct comes from a PyPI package; the server runs on loopback in a process of its own.

    python examples/openenv/run.py
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from argparse import ArgumentParser
from pathlib import Path

HERE, RUN = Path(__file__).parent, Path("runs/openenv")
CONFIGS = HERE.parent.parent / "configs"
PROMPT = "You are in a house with many rooms. Answer with the color of a door, one word."
GAMES, HELD_OUT = 600, 48


def prepare(folder: Path) -> dict[str, Path]:
    """Write the prompts: all alike, since a game is told apart by the seed of its episode."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, count in {"train": GAMES, "val": HELD_OUT}.items():
        rows = [{"prompt": PROMPT, "game": i} for i in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {name: folder / f"{name}.jsonl" for name in ("train", "val")}


def serve() -> tuple[subprocess.Popen[bytes], str]:
    """Start the server, wait until it listens, and return it with its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen([sys.executable, str(HERE / "rooms.py"), str(port)])
    for _ in range(300):
        with socket.socket() as client:
            if client.connect_ex(("127.0.0.1", port)) == 0:
                return server, f"http://127.0.0.1:{port}"
        if server.poll() is not None:
            raise SystemExit("the server did not start: pip install 'lightning-rlhf[openenv]'")
        time.sleep(0.2)
    raise SystemExit("the server does not listen after a minute")


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--precision", default="bf16-mixed", help="32-true is faster on a CPU without bfloat16 units")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.path.insert(0, str(HERE.parent / "quickstart"))
    from ingredients import smollm2

    from lightning_rlhf.cli import main as lightning_rlhf

    gguf, files = smollm2(), prepare(RUN / "data")
    server, address = serve()
    words = [f"--config={CONFIGS / 'grpo.yaml'}", f"--config={HERE / 'openenv.yaml'}"]
    words += [f"--model.policy.path={gguf.parent}", f"--model.policy.gguf_file={gguf.name}"]
    words += [f"--model.environment.factory.init_args.url={address}", f"--seed_everything={given.seed}"]
    words += [f"--trainer.precision={given.precision}", *(f"--data.{part}={path}" for part, path in files.items())]
    try:
        lightning_rlhf(["validate", f"--run={RUN / 'before'}", *words])
        lightning_rlhf(["fit", f"--run={RUN / 'run'}", *words])
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
