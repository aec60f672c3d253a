"""Seconds and tokens/s of our step against the number of responses, their length, and k (responses to a prompt).

    python examples/benchmarks/scaling.py

writes scaling.csv. One size moves at a time, the others stay as in step.py. With `--sides ours trl` both take turns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from table import ratio, show, summary, write
from turns import SCRIPTS, alternate, prepared
from work import Work, parsed, parser, works

Row = dict[str, Any]


def arguments(args: Sequence[str] | None) -> Any:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--sides", nargs="+", default=["ours"], choices=tuple(SCRIPTS), help="who takes turns")
    options.add_argument("--responses", nargs="*", type=int, default=[8, 16, 32, 64])
    options.add_argument("--lengths", nargs="*", type=int, default=[12, 24, 48, 96], help="tokens, at 16 responses")
    options.add_argument("--k", nargs="*", type=int, default=[2, 4, 8, 16], help="responses to a prompt, 16 in all")
    options.add_argument("--blocks", type=int, default=2, help="measured turns of each point")
    return parsed(options, args, responses=[2, 4], lengths=[2], k=[4], blocks=1)


def points(base: Work, chosen: Any) -> Iterator[tuple[str, int, Work]]:
    """What moves, to which value, and the work there."""
    for count in chosen.responses:
        yield "responses", count, base.having(prompts=count // base.samples)
    for length in chosen.lengths:
        yield "length", length, base.having(tokens=length)
    for k in chosen.k:
        yield "k", k, base.having(samples=k, prompts=max(base.responses // k, 1))


def main(args: Sequence[str] | None = None) -> None:
    chosen = arguments(args)
    rows: list[Row] = []
    for base in works(chosen):
        with prepared(base) as ready:
            for moved, value, work in points(ready, chosen):
                turns = list(alternate(work, chosen.sides, warmup=1, blocks=chosen.blocks, threads=chosen.threads))
                named = {"model": work.model, "precision": work.precision, "moved": moved, "value": value}
                named["responses"], named["tokens"], named["k"] = work.responses, work.tokens, work.samples
                for side in chosen.sides:
                    found = named | summary(turns, side)
                    rows.append(
                        found | {"cpu/trl": ratio(turns, "cpu", side, "trl") if "trl" in chosen.sides else None}
                    )
                write(chosen.out / "scaling.csv", rows)
    show(rows)
    print(f"\nscaling.csv is in {chosen.out}")


if __name__ == "__main__":
    main()
