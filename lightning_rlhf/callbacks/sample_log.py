"""Log of responses to held-out prompts, from before training to its end."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng

from lightning_rlhf.callbacks.rollout_log import responses, turns
from lightning_rlhf.callbacks.run_file import FileCallback, Keyed, RunFile
from lightning_rlhf.callbacks.sample_table import show
from lightning_rlhf.types import PromptBatch


class SampleLog(FileCallback):
    """Writes `samples.jsonl`: one held-out response a line, at every validation of a training run and at every test.

    A new run first answers the whole validation set, so that there is a state before training (`iteration` 0) to
    compare with. The random numbers of a prompt are the same each time. A line has `iteration` (rollouts trained so
    far), `stage` (`val` or `test`), `index` (which held-out prompt), `prompt`, `response`, `length`, `ended`,
    `raw_score`, `score`, `score/NAME`, `kl` and `entropy`, and of an episode `failed` and `turns` as in
    `rollouts.jsonl`. A test replaces the lines of an earlier one; `validate` by
    itself writes nothing. Loggers that have tables, TensorBoard's and W&B's, get the first prompts before and after.

    Args:
        folder: as of `RolloutLog`.
        table: prompts in the loggers' table; 0 for none.

    Raises:
        ValueError: `table` is negative.
    """

    def __init__(self, folder: str | None = None, table: int = 8) -> None:
        if table < 0:
            raise ValueError(f"`table` must be at least 0 prompts: got {table}")
        self.file, self.table = RunFile(folder, "samples.jsonl"), table
        self._taken: list[Keyed] = []
        self._evaluated: int | None = None  # `iteration` of the last validation that was written

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Open the log; in a new run also write the responses before training."""
        if not hasattr(pl_module, "outcome"):
            return
        fresh = pl_module.iteration == 0
        last = pl_module.iteration if self._evaluated is None else self._evaluated
        self.file.begin(trainer, before=0 if fresh else last + 1)
        if fresh and self.file.path is not None:
            with isolate_rng():
                self._answer(trainer, pl_module)
            self._write(trainer, pl_module, "val")

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the log without cutting it."""
        if hasattr(pl_module, "outcome"):
            self.file.begin(trainer, before=float("inf"))

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Discard the responses of an interrupted evaluation."""
        self._taken = []

    on_test_epoch_start = on_validation_epoch_start

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Collect the responses of the batch."""
        if self.file.path is not None and not trainer.sanity_checking:
            self._take(trainer, pl_module, batch_idx, dataloader_idx)

    on_test_batch_end = on_validation_batch_end

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the collected responses."""
        if self.file.path is not None and not trainer.sanity_checking:
            self._write(trainer, pl_module, "val")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the collected responses."""
        if self.file.path is not None:
            self._write(trainer, pl_module, "test")

    def state_dict(self) -> dict[str, Any]:
        """Iteration of the last validation that was written."""
        return {"evaluated": self._evaluated}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore it, so that validations after the checkpoint are cut off."""
        self._evaluated = state_dict["evaluated"]

    def _answer(self, trainer: Trainer, module: LightningModule) -> None:
        """Answer the validation set outside the trainer's validation, whose callbacks would count it."""
        module.on_validation_epoch_start()  # without a check of the loaders nothing has begun yet
        loop = trainer.fit_loop.epoch_loop.val_loop
        trainer.validating = True
        loop.setup_data()
        trainer.training = True
        loaders = [] if loop._combined_loader is None else loop._combined_loader.flattened
        for place, (loader, most) in enumerate(zip(loaders, loop.max_batches, strict=False)):
            for number, batch in enumerate(islice(loader, None if most == float("inf") else int(most))):
                if not isinstance(batch, PromptBatch):
                    break  # texts, of which there are no samples
                batch = trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(batch))
                with torch.no_grad(), trainer.precision_plugin.val_step_context():
                    module.validation_step(batch, number)
                self._take(trainer, module, number, place)

    def _take(self, trainer: Trainer, module: Any, batch_idx: int, loader: int) -> None:
        outcome = module.outcome
        if outcome is None:
            return
        texts = responses(module, outcome.tokens())
        said = zip(outcome.rows, texts, outcome.numbers(), turns(module, outcome), strict=True)
        counts = outcome.is_real.tolist()
        for i, (row, response, numbers, episode) in enumerate(said):
            if counts[i]:
                key = (loader, batch_idx, i, trainer.global_rank)  # the order of the file, dealt out to the processes
                held_out = {"set": outcome.name} if outcome.name else {}
                text = {"prompt": row.get("prompt"), "response": response}
                self._taken.append((key, held_out | text | numbers | episode))

    def _write(self, trainer: Trainer, module: Any, stage: str) -> None:
        records, self._taken = self.file.gathered(trainer, self._taken), []
        if stage == "val":
            self._evaluated = module.iteration
        if not trainer.is_global_zero or not records:
            return
        opening = {"iteration": module.iteration, "stage": stage}
        lines = [opening | {"index": index} | record for index, record in enumerate(records)]
        if stage == "test":
            self.file.drop(lambda line: line["stage"] == "test")
        self.file.append(lines)
        if self.table and stage == "val":
            before = list(islice(_before_training(self.file), self.table))
            show(trainer.loggers, before, lines[: self.table], step=module.iteration)


def _before_training(file: RunFile) -> Iterator[dict[str, Any]]:
    with file.path.open(encoding="ascii") as lines:  # type: ignore[union-attr]
        for line in lines:
            record = json.loads(line)
            if record["iteration"] > 0:
                return
            yield record
