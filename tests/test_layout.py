"""Test files have names of their own: pytest cannot import two modules of one name."""

from collections import Counter
from pathlib import Path


def test_no_two_test_files_have_the_same_name():
    names = Counter(path.name for path in Path(__file__).parent.rglob("test_*.py"))
    assert not [name for name, count in names.items() if count > 1]
