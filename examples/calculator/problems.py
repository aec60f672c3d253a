"""Word problems on whole numbers, the calculator that solves them, and the reward of an answer."""

from __future__ import annotations

import ast
import json
import operator
import random
import re
from pathlib import Path

FORMS = {
    "+": [
        "What is {a} + {b}?",
        "Add {a} and {b}.",
        "A shop had {a} coins and got {b} more. How many coins does it have now?",
        "One town has {a} people and the next has {b}. How many people live in both?",
    ],
    "-": [
        "What is {a} - {b}?",
        "Subtract {b} from {a}.",
        "There were {a} birds on a lake and {b} flew away. How many are left?",
        "A book has {a} pages and I read {b} of them. How many pages remain?",
    ],
    "*": [
        "What is {a} * {b}?",
        "Multiply {a} by {b}.",
        "A box holds {a} pens. How many pens are in {b} boxes?",
        "Each of {b} buses carries {a} people. How many people do they carry together?",
    ],
}
SHOWN = 2
"""Forms of each operation that the demonstrations have; the others are for the policy to find out."""
DEMONSTRATIONS, TRAIN, HELD_OUT = 48, 2000, 60
OPERATIONS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.USub: operator.neg,
}


def calculator(expression: str) -> str:
    """Compute an expression of numbers with + - * / and brackets.

    Args:
        expression: for example "12 * (3 + 4)".
    """
    if len(expression) > 80:
        raise ValueError("the expression is longer than 80 characters")
    return f"{_value(ast.parse(expression, mode='eval').body):.12g}"


def _value(node: ast.AST) -> float:
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return node.value
    if isinstance(node, ast.UnaryOp) and type(node.op) in OPERATIONS:
        return OPERATIONS[type(node.op)](_value(node.operand))
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATIONS:
        return OPERATIONS[type(node.op)](_value(node.left), _value(node.right))
    raise ValueError("only numbers, + - * / and brackets are understood")


def correct(prompts: list[str], responses: list[str], answer: list[str]) -> list[float]:
    """1 where the last number of the last turn is the answer."""
    numbers = [re.findall(r"-?\d+", response.replace(",", "")) for response in responses]
    return [float(bool(said) and said[-1] == right) for said, right in zip(numbers, answer, strict=True)]


def problem(draw: random.Random, forms: slice) -> dict[str, str]:
    """A problem with its expression and answer."""
    sign = draw.choice(list(FORMS))
    a, b = sorted((draw.randint(12, 999), draw.randint(12, 999)), reverse=True)
    return {
        "prompt": draw.choice(FORMS[sign][forms]).format(a=a, b=b),
        "expression": f"{a} {sign} {b}",
        "answer": str({"+": a + b, "-": a - b, "*": a * b}[sign]),
    }


def call(expression: str) -> str:
    """The turn that calls the calculator."""
    written = json.dumps({"name": "calculator", "arguments": {"expression": expression}})
    return f"<tool_call>\n{written}\n</tool_call>"


def demonstrations(row: dict[str, str]) -> list[dict]:
    """The two turns of a dialogue: the call, and the answer after its result."""
    asked = [{"role": "user", "content": row["prompt"]}]
    called = [*asked, {"role": "assistant", "content": call(row["expression"])}]
    told = [*called, {"role": "tool", "content": row["answer"]}]
    return [
        {"prompt": asked, "response": call(row["expression"])},
        {"prompt": told, "response": f"The answer is {row['answer']}."},
    ]


def prepare(folder: Path, *, seed: int) -> dict[str, Path]:
    """Write demonstrations, and problems for training and to hold out; no operands are in two parts."""
    draw = random.Random(seed)
    shown = [problem(draw, slice(SHOWN)) for _ in range(DEMONSTRATIONS)]
    problems = {row["expression"]: row for row in (problem(draw, slice(None)) for _ in range(3 * TRAIN))}
    fresh = [row for expression, row in problems.items() if expression not in {row["expression"] for row in shown}]
    parts = {
        "demonstrations": [turn for row in shown for turn in demonstrations(row)],
        "val": fresh[:HELD_OUT],
        "train": fresh[HELD_OUT : HELD_OUT + TRAIN],
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in parts.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {name: folder / f"{name}.jsonl" for name in parts}
