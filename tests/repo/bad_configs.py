"""Command lines and configs that no run can follow."""

from __future__ import annotations

from bad_bench import Bench, Case, case


def flag(name: str, *flags: str, says: tuple[str, ...], kind: str = "sft") -> Case:
    return case(f"flag-{name}", lambda bench: getattr(bench, kind)(*flags), *says, code=2)


def yaml(name: str, text: str | bytes, *says: str, kind: str = "sft") -> Case:
    """A config file after all flags, so that it wins."""

    def arguments(bench: Bench) -> list[str]:
        return getattr(bench, kind)("--config", bench.file(text, "bad.yaml"))

    return case(f"yaml-{name}", arguments, *says, code=2)


ADAM = ("--model.optimizer=torch.optim.AdamW",)
GAE = ("--model.algorithm.advantage=GAE", "--model.algorithm.level=TokenLevel")
COMMANDS = [
    case("command-unknown", lambda b: ["train"], "train", code=2),
    case("command-no-model", lambda b: ["fit"], "model", code=2),
    case("command-no-data-file", lambda b: b.ppo("--data=PromptDataModule", "--data.train=null"), "needs `train`"),
]
JUDGE = "{class_path: WinRate, init_args: {judge: math.nothing}}"
BEST_OF_NONE = "{class_path: BestOfN, init_args: {n: [0, 4]}}"
FLAGS = [
    flag("unknown", "--modell=3", says=("--modell=3",)),
    flag("prefix", "--trainer.max_step=3", says=("trainer.max_step",)),
    flag("unknown-argument", "--model.sceduler=3", says=("'sceduler'",)),
    flag("unknown-class", "--model.schedule=Cosinus", says=("`model.schedule`", "no Cosinus")),
    flag("unknown-model", "--model=SFTModul", says=("SFTModul",)),
    flag("class-of-another-kind", "--model.schedule=Clip", says=("`model.schedule`",)),
    flag("module-missing", "--model.reward=nowhere.fn", says=("nowhere",), kind="ppo"),
    flag("attribute-missing", "--model.reward=math.nothing", says=("nothing",), kind="ppo"),
    flag("text-for-number", "--data.batch_size=many", says=("`data.batch_size`", "expected int", "many")),
    flag("fraction-for-number", "--data.batch_size=1.5", says=("`data.batch_size`", "expected int")),
    flag("null-for-number", "--data.batch_size=null", says=("batch_size`", "None")),
    flag("list-for-number", "--data.batch_size=[1]", says=("`data.batch_size`",)),
    flag("number-for-truth", "--data.loss_on_prompt=7", says=("`data.loss_on_prompt`", "expected bool")),
    flag("numbers-for-paths", "--data.train=[1,2]", says=("`data.train`", "expected str")),
    flag("unknown-choice", "--model.model.dtype=int8", says=("dtype", "'bfloat16'")),
    flag("unknown-column", "--data.columns.promt=x", says=("columns.promt",)),
    flag("batch-of-nothing", "--data.batch_size=0", says=("`batch_size` must be at least 1, got 0",)),
    flag("negative-workers", "--data.num_workers=-1", says=("`num_workers` must be at least 0",)),
    flag("one-token", "--data.max_tokens=1", says=("`max_tokens` must be at least 2",)),
    flag("floor", "--model.schedule.floor=-3", says=("`floor` must lie in",)),
    flag("no-response", "--model.generation.max_new_tokens=0", says=("`max_new_tokens`",), kind="ppo"),
    flag("cold", "--model.generation.temperature=0", says=("`temperature`",), kind="ppo"),
    flag("temperature-nan", "--model.generation.temperature=.nan", says=("temperature",), kind="ppo"),
    flag("negative-beta", "--model.algorithm.beta=-1", says=("`beta`",), kind="ppo"),
    flag(
        "negative-gamma",
        "--model.algorithm.ptx_coef=-1",
        says=("`ptx_coef` must be a number of at least 0",),
        kind="ppo",
    ),
    flag("no-samples", "--model.generation.samples_per_prompt=0", says=("samples_per_prompt",), kind="ppo"),
    flag("no-texts", "--data.pretrain_ratio=0", says=("`pretrain_ratio`",), kind="ppo"),
    flag(
        "group-of-one",
        *("--model.algorithm=GRPO", "--model.generation.samples_per_prompt=1"),
        says=("samples_per_prompt",),
        kind="ppo",
    ),
    flag("huge-batch", "--data.batch_size=1" + "0" * 30, says=("`batch_size` must be at most 1048576",)),
    flag("huge-response", "--model.generation.max_new_tokens=9999999", says=("`max_new_tokens` must be",), kind="ppo"),
    flag("huge-group", "--model.generation.samples_per_prompt=9999999", says=("at most 1048576",), kind="ppo"),
    flag("army-of-workers", "--data.num_workers=2000", says=("`num_workers` must be at most 1024, got 2000",)),
    flag("rate-infinite", *ADAM, "--model.optimizer.lr=1e400", says=("`lr` must be .* got inf",)),
    flag("rate-of-value-nan", *GAE, "--model.value_lr=.nan", says=("`value_lr` must be .* got nan",), kind="ppo"),
    flag("evaluation", "--model.evaluations=[Winrate]", says=("`model.evaluations`", "no Winrate"), kind="ppo"),
    flag("evaluated-twice", "--model.evaluations=[WinRate, WinRate]", says=("`name`",), kind="ppo"),
    flag("no-judge", f"--model.evaluations=[{JUDGE}]", says=("evaluations", "nothing"), kind="ppo"),
    flag("best-of-none", f"--model.evaluations=[{BEST_OF_NONE}]", says=("`n` must be a number above 0",), kind="ppo"),
    flag("accelerator", "--trainer.accelerator=abacus", says=("abacus",)),
    flag("no-devices", "--trainer.devices=0", says=("devices",)),
    flag("precision", "--trainer.precision=99", says=("`trainer.precision`", "99")),
    flag("strategy", "--trainer.strategy=hope", says=("hope",)),
    flag("epochs", "--trainer.max_epochs=-7", says=("max_epochs",)),
    flag("batches", "--trainer.limit_train_batches=-3", says=("limit_train_batches",)),
    flag("callback", "--trainer.callbacks=[{class_path: Nobody}]", says=("`trainer.callbacks`", "no Nobody")),
    flag("logger", "--trainer.logger=nowhere.Logger", says=("`trainer.logger`",)),
    flag("optimizer", "--model.optimizer=torch.optim.Adamm", says=("`model.optimizer`",)),
    flag("kernel-of-a-hub", "--model.model.attention=some/kernel", says=("`attention` names code of a hub",)),
    flag("pickles", "--weights_only=false", says=("`weights_only`", "without pickle")),
    flag("config-missing", "--config=no.yaml", says=("no.yaml", "not exist")),
    flag("config-folder", "--config=.", says=("config",)),
    case("flag-learning-rate", lambda b: b.sft(*ADAM, "--model.optimizer.lr=-1"), "-1", code=2),
    case(
        "flag-gamma-nan",
        lambda b: b.ppo("--model.algorithm.ptx_coef=.nan", f"--data.pretrain={b.tiny.file('texts')}"),
        "`ptx_coef` must be a number of at least 0: got nan",
        code=2,
    ),
]
TRUSTED = "trust_remote_code: true"
TRUST = f"model: {{init_args: {{model: {{{TRUSTED}}}}}}}"
LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n + 1}: &a{n + 1} [{', '.join([f'*a{n}'] * 8)}]\n" for n in range(30)
)
LOADER = f"{{class_path: transformers.AutoModelForCausalLM.from_pretrained, dict_kwargs: {{{TRUSTED}}}}}"
FILES = [
    yaml("unknown-key", "modell: 3", "modell"),
    yaml("unknown-argument", "data: {init_args: {batchsize: 3}}", "batchsize"),
    yaml("list", "[1, 2]", "bad.yaml|config"),
    yaml("text", "hello", "bad.yaml|config"),
    yaml("broken", "data: {init_args: [", "bad.yaml|config"),
    yaml("tab", "data:\n\tinit_args: 3", "bad.yaml|config"),
    yaml("key-twice-nested", "data: {init_args: {batch_size: x}}", "batch_size"),
    yaml("key-twice", "data: {}\nseed_everything: 3\ndata: {}", "the key `data` stands twice, again in line 3"),
    yaml("key-twice-inside", "data: {init_args: {batch_size: 2, batch_size: 4}}", "the key `batch_size` stands twice"),
    yaml("contains-itself", "data: &d\n  init_args: *d", "an alias contains itself"),
    yaml("explodes", LAUGHS, "an alias contains itself, or repeats too often"),
    yaml("deep", "data: " + "[" * 9000 + "]" * 9000, "nesting depth|nested too deeply"),
    yaml("utf16", "data: {}".encode("utf-16"), "no UTF-8 text"),
    yaml("marked", b"\xef\xbb\xbfdata: {init_args: {batch_size: x}}", "`data.batch_size`"),
    yaml("two-documents", "seed_everything: 1\n---\nseed_everything: 2", "single document"),
    yaml("number-for-key", "3: 4", "must be a string, got: 3"),
    yaml("infinity-for-number", "data: {init_args: {batch_size: .inf}}", "`data.batch_size`", "expected int; got inf"),
    yaml("binary", b"\x00\x01\xff\xfe", "bad.yaml|config"),
    yaml("python-object", "data: !!python/object/apply:os.system ['true']", "bad.yaml|config|tag"),
    yaml("text-for-object", "trainer: fast", "trainer"),
    yaml("trust", TRUST, "no matter of a config file", "--model.model.trust_remote_code=true"),
    yaml(
        "trust-of-reference", f"model: {{init_args: {{reference: {{path: x, {TRUSTED}}}}}}}", "config file", kind="ppo"
    ),
    yaml("trust-of-a-loader", f"model: {{init_args: {{policy: {LOADER}}}}}", "`model.policy`", kind="ppo"),
    yaml("pickles", "weights_only: false", "without pickle"),
]
CASES = [*COMMANDS, *FLAGS, *FILES]
