"""Rankings that people wrote into a spreadsheet, as rows for the reward model: one row a prompt, however many raters.

Columns: prompt, response, rater, rank (1 is best, equal is a tie). The raters who saw both responses of a pair vote on
it, half a vote each way for a tie; a score is the mean share of votes over the responses met, so two who disagree tie.

    python examples/human_rankings/human_rankings.py examples/human_rankings/rankings.csv rankings.jsonl
"""

import csv
import json
import sys
from collections import defaultdict
from fractions import Fraction
from itertools import permutations
from statistics import mean


def read(path: str) -> dict[str, dict[str, dict[str, float]]]:
    ranks = defaultdict(lambda: defaultdict(dict))  # by prompt, rater and response
    with open(path, newline="", encoding="utf-8-sig") as file:  # line breaks in cells; Excel's mark at the start
        for row in (rows := csv.DictReader(file, strict=True)):
            if row["response"] in ranks[row["prompt"]][row["rater"]]:
                raise ValueError(f"{path}:{rows.line_num}: {row['rater']} ranks this response again: keep one line")
            ranks[row["prompt"]][row["rater"]][row["response"]] = float(row["rank"])
    return ranks


def scores(raters: dict[str, dict[str, float]]) -> dict[str, float]:
    votes = defaultdict(lambda: defaultdict(list))
    for ranks in raters.values():
        for one, other in permutations(ranks, 2):
            votes[one][other].append(Fraction((ranks[one] < ranks[other]) + (ranks[one] <= ranks[other]), 2))
    return {response: float(mean(map(mean, met.values()))) for response, met in votes.items()}


if __name__ == "__main__":
    found = {prompt: scores(raters) for prompt, raters in read(sys.argv[1]).items()}
    rows = [{"prompt": p, "responses": list(s), "scores": list(s.values())} for p, s in found.items() if s]
    with open(sys.argv[2], "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
