"""Puts a benchmark's table where a page of the documentation keeps it."""

from pathlib import Path


def put(page: Path, name: str, table: str) -> None:
    """Replaces what stands between <!-- NAME --> and the next <!-- end --> of a page.

    Args:
        page: A Markdown file.
        name: Of the place.
        table: Whole lines.

    Raises:
        SystemExit: The page has no such place.
    """
    begin, end = f"<!-- {name} -->\n", "<!-- end -->"
    before, found, rest = page.read_text("utf-8").partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise SystemExit(f"{page} has no place for the table: lines {begin.strip()} and {end}")
    page.write_text(before + begin + table + end + after, "utf-8")
