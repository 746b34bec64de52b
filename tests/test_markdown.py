"""Markdown tables."""

from utils.core.markdown import make_table


def test_columns_are_aligned():
    """Texts at the left, numbers at the right, and a rule that says so."""
    table = make_table(("name", "n"), [("a", "1"), ("longer", "2.50")])
    assert table.split("\n") == [
        "| name   |    n |",
        "| ------ | ---: |",
        "| a      |    1 |",
        "| longer | 2.50 |",
    ]


def test_a_short_row_ends_in_a_sentence():
    """It does not widen the columns that it leaves out."""
    rows = [("a", "left", "1", "2"), ("b", "right", "failed: no reason given")]
    table = make_table(("name", "side", "n", "m"), rows, texts=2)
    assert table.split("\n")[2:] == ["| a    | left  |   1 |   2 |", "| b    | right | failed: no reason given |"]


def test_a_table_without_rows_has_a_head():
    """So that it shows what would be there."""
    assert make_table(("name",), []).split("\n") == ["| name |", "| ---- |"]
