"""YAML is read as jsonargparse reads it, where it has one meaning and an end."""

from __future__ import annotations

import pytest
import yaml

from lightning_rlhf.cli.documents import LARGEST, load

BOTH = "usual: &u {lr: 1e-6, eps: 1.0}\nmine:\n  <<: *u\n  eps: 2.0\nyours: {<<: *u}\nlist: [*u, *u]\n"


def test_anchors_and_merges_keep_their_meaning():
    found = load(BOTH)
    assert found["mine"] == {"lr": 1e-6, "eps": 2.0}
    assert found["yours"] == found["usual"] == {"lr": 1e-6, "eps": 1.0}
    assert found["list"] == [found["usual"]] * 2


@pytest.mark.parametrize(
    ("text", "value"),
    [("3", 3), ("1e-6", 1e-6), ("a", "a"), ("", None), ("[1, {a: 2}]", [1, {"a": 2}]), ("2020-01-01", "2020-01-01")],
)
def test_values_are_those_of_jsonargparse(text, value):
    assert load(text) == value


def test_same_key_in_two_mappings_is_no_repetition():
    assert load("a: {x: 1}\nb: {x: 2}\nx: [{x: 3}, {x: 4}]")["x"] == [{"x": 3}, {"x": 4}]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: 1\nb: 2\na: 1", "the key `a` stands twice, again in line 3: keep one of them"),
        ("a: {b: {c: 1, c: 2}}", "the key `c` stands twice"),
        ("[{a: 1, 'a': 2}]", "the key `a` stands twice"),
        ("a: &a [*a]", "an alias contains itself"),
        ("a: &a {b: {c: *a}}", "an alias contains itself"),
        ("[*y]", "undefined alias"),
        ("a: [", "did not find expected node content|expected the node content"),
    ],
)
def test_what_has_no_one_meaning_is_refused(text, said):
    with pytest.raises(yaml.YAMLError, match=said):
        load(text)


def test_limit_counts_aliases_written_out():
    """The list, 100 values in it, and that many times each of its copies."""
    copies = LARGEST // 101 - 1
    assert len(load(f"a: &a [{'1, ' * 100}]\nb: [{'*a, ' * (copies - 1)}]")["b"]) == copies - 1
    with pytest.raises(yaml.YAMLError, match=f"more than {LARGEST} values"):
        load(f"a: &a [{'1, ' * 100}]\nb: [{'*a, ' * (copies + 1)}]")
