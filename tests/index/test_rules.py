"""The rules of the index layer: each is named in the documentation with tests that exist and guard it."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LINE = re.compile(r"^\| (\d+) \| (.+?) \| (.+?) \|$", re.MULTILINE)


def rules() -> dict[int, list[tuple[str, str]]]:
    """Number of a rule -> (file, test) of each test that the table names."""
    text = (ROOT / "docs" / "indexes.md").read_text(encoding="utf-8")
    table = text[text.index("## Rules and their tests") :]
    return {int(n): re.findall(r"`(test_\w+)::(test_\w+)`", tests) for n, _, tests in LINE.findall(table)}


def test_there_are_twelve() -> None:
    assert list(rules()) == list(range(1, 13))


@pytest.mark.parametrize("number", range(1, 13))
def test_every_rule_has_tests_that_exist(number: int) -> None:
    named = rules()[number]
    assert named
    for file, test in named:
        source = (ROOT / "tests" / "index" / f"{file}.py").read_text(encoding="utf-8")
        assert f"\ndef {test}(" in source, f"{file}::{test}"
