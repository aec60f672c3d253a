"""Base class of the data modules: reads files into examples once and serves examples by loaders."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from lightning import LightningDataModule
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from lightning_rlhf.core.checks import MOST
from lightning_rlhf.core.settings import accept_differences, seed_of_run
from lightning_rlhf.data.columns import ColumnNames
from lightning_rlhf.data.drop_report import DropReport
from lightning_rlhf.data.loader import JointStream, ResumableLoader, Stream, make_loader
from lightning_rlhf.data.records import HashedRecords, Located, digest_of_tokens
from lightning_rlhf.data.sampling_order import FileOrder, ShuffledOrder
from lightning_rlhf.data.sources import Source, read_records
from lightning_rlhf.text import Encoder, load_tokenizer

Reader = Callable[[Sequence[Located], Encoder, ColumnNames, DropReport], Sequence[Any]]
Collate = Callable[..., Any]
TOKENS = "tokens, as the chat template writes them today"
"""Key of the digest that changes with a template, the date in it, or a limit on lengths."""


@dataclass(kw_only=True, eq=False, repr=False)
class TextDataModule(LightningDataModule):
    """Base class for rows that are read and tokenized when a stage first needs them, served by step number.

    Args:
        batch_size: rows per process and batch; in PPO, prompts per process and rollout.
        eval_batch_size: rows per process and evaluation batch; None for `batch_size`.
        prompt_role: role under which a text prompt becomes a message for the chat template; None leaves it plain text.
        chat_template_kwargs: arguments of the chat template for every dialogue, such as `{"enable_thinking": false}`; a
            row's own come first.
        columns: names of the keys in the files.
        tokenizer: a tokenizer, its folder or hub name; None for that of the module being trained.
        num_workers: processes that assemble batches; 0 for none.
        seed: seed of the order of the rows; None is that of `seed_everything`, else 0.

    Attributes:
        tallies: what was dropped, by argument name.
    """

    batch_size: int = 64
    eval_batch_size: int | None = None
    prompt_role: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    columns: ColumnNames = ColumnNames()
    tokenizer: str | PreTrainedTokenizerBase | None = None
    num_workers: int = 0
    seed: int | None = None

    def __post_init__(self) -> None:
        super().__init__()
        if self.eval_batch_size is None:
            self.eval_batch_size = self.batch_size
        check_least(1, batch_size=self.batch_size, eval_batch_size=self.eval_batch_size)
        check_least(0, most=1024, num_workers=self.num_workers)
        self.seed = seed_of_run(self.seed)
        self.tallies: dict[str, DropReport] = {}
        self._encoder: Encoder | None = None
        self._examples: dict[str, Sequence[Any]] = {}
        self._digests: dict[str, dict[str, str]] = {}

    @property
    def dropped(self) -> dict[str, int]:
        """Reports of dropped rows by argument name."""
        return {name: tally.dropped for name, tally in self.tallies.items()}

    @property
    def encoder(self) -> Encoder:
        """Encoder of text with the given tokenizer or that of the module being trained.

        Raises:
            ValueError: there is neither.
        """
        if self._encoder is None:
            module = None if self.trainer is None else self.trainer.lightning_module
            source = self.tokenizer if self.tokenizer is not None else getattr(module, "tokenizer", None)
            if source is None:
                raise ValueError(
                    f"{type(self).__name__} has no tokenizer: pass tokenizer=<folder, hub name or tokenizer>, or train "
                    "a module that has a `tokenizer`"
                )
            self._encoder = Encoder(
                load_tokenizer(source),
                prompt_role=self.prompt_role,
                chat_template_kwargs=self.chat_template_kwargs,
            )
        return self._encoder

    def load(self, name: str, read: Reader, *, limit: str, required: bool = False, source: Source = None) -> None:
        """Read and tokenize the rows of argument `name` once.

        Args:
            name: the argument that says where they are.
            read: records to examples.
            limit: the argument that holds the longest length that is kept.
            required: whether the argument must be given.
            source: where they are, if not in the attribute of that name.

        Raises:
            ValueError: it must be and is not, or the files cannot be read.
        """
        source = getattr(self, name) if source is None else source
        if source is None and required:
            raise ValueError(f"{type(self).__name__} needs `{name}` for this: pass {name}=<path of a JSONL file>")
        if source is None or name in self._examples:
            return
        tally = DropReport(name=name, limit_name=limit, limit=getattr(self, limit))
        records = HashedRecords(read_records(source))
        self._examples[name] = read(records, self.encoder, self.columns, tally)
        self.tallies[name] = tally
        if "val" not in name:
            self._digests[name] = {"content": records.digest, TOKENS: digest_of_tokens(self._examples[name])}

    def state_dict(self) -> dict[str, Any]:
        """Return the digests and settings that decide the order of the rows; the loader saves its position."""
        _, world = self._place()
        rows = {name: len(self._examples[name]) for name in self._digests}
        digests = {kind: {name: digest[kind] for name, digest in self._digests.items()} for kind in ("content", TOKENS)}
        return {"seed": self.seed, "batch_size of all processes": self.batch_size * world, "rows": rows} | digests

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raise if the checkpoint was trained on other rows or in another order.

        The same rows may have become other tokens, or other rows may be too long: a warning says so.

        Raises:
            ValueError: the state is of other data.
        """
        if self.trainer is not None and self.trainer.state.fn == "fit":
            accept_differences(
                state_dict,
                self.state_dict(),
                of="data",
                is_future=lambda difference: difference.name.startswith(("rows.", TOKENS)),
            )

    def training_stream(self, name: str, collate: Collate, *, batch_size: int, order: str | None = None) -> Stream:
        """Endless shuffled batches of this process from the examples of `name`.

        Args:
            name: argument that says where the rows are.
            collate: examples to a batch.
            batch_size: rows of a batch.
            order: names the permutations; None for `name`.
        """
        rank, world = self._place()
        examples = self._loaded(name)
        place: dict[str, Any] = {"rank": rank, "world": world, "seed": self.seed, "stream": order or name}
        shuffled = ShuffledOrder(len(examples), batch_size=batch_size, **place)
        return Stream(examples, shuffled, partial(collate, pad=self.encoder.pad))

    def training_loader(self, stream: Stream | JointStream) -> ResumableLoader:
        """Build a loader of `stream` whose position is saved with a checkpoint."""
        return make_loader(ResumableLoader, stream, num_workers=self.num_workers)

    def evaluation_loader(self, name: str, collate: Collate) -> DataLoader[Any]:
        """Build a loader of every example of `name`, once over all processes in file order."""
        rank, world = self._place()
        examples = self._loaded(name)
        order = FileOrder(len(examples), batch_size=self.eval_batch_size or self.batch_size, rank=rank, world=world)
        stream = Stream(examples, order, partial(collate, pad=self.encoder.pad))
        return make_loader(DataLoader, stream, num_workers=self.num_workers)

    def _loaded(self, name: str) -> Sequence[Any]:
        if name not in self._examples:
            missing = getattr(self, name, None) is None
            todo = f"pass {name}=<path of a JSONL file>" if missing else "call setup() with the stage first"
            raise ValueError(f"{type(self).__name__} has no examples of `{name}`: {todo}")
        return self._examples[name]

    def _place(self) -> tuple[int, int]:
        """Rank of this process among those that share the data, with their number."""
        place = None if self.trainer is None else self.trainer.distributed_sampler_kwargs  # None on a single device
        return (0, 1) if place is None else (place["rank"], place["num_replicas"])


def check_least(least: int, *, most: int = MOST, **arguments: int) -> None:
    """Raise ValueError unless every named argument is from `least` to `most`."""
    for name, value in arguments.items():
        if not isinstance(value, int) or value < least:  # a config's null passes for any type
            raise ValueError(f"`{name}` must be at least {least}, got {value}")
        if value > most:
            raise ValueError(f"`{name}` must be at most {most}, got {value}")
