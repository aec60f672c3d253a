"""The quickstart's PPO stage with its responses drawn by a vLLM server, in an environment that has vLLM.

python examples/vllm/ppo.py .venv-vllm/bin/python

What the stage starts from is made first where it is missing: the quickstart's data, SFT and reward model (5 minutes).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "quickstart"))


def main(python: str) -> None:
    import run as quickstart

    if not (quickstart.RUN / "reward/model").is_dir():
        quickstart.until_reward_model({})
    server = [f"--config={HERE / 'server.yaml'}", f"--model.engine.serve.python={python}"]
    quickstart.fit("ppo_ptx.yaml", "ppo.yaml", *server, "--run=runs/vllm/ppo")


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    main(sys.argv[1])
