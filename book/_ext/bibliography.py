"""Style of the bibliography: entries carry the labels that the text uses, such as "He et al., 2016a"."""

from collections import Counter
from pathlib import Path

from pybtex.database import Entry, parse_file
from pybtex.plugin import register_plugin
from pybtex.style.formatting.plain import Style
from pybtex.style.labels import BaseLabelStyle
from pybtex.style.sorting import BaseSortingStyle


def authors_and_year(entry: Entry) -> tuple[str, str]:
    """Return the authors as a sentence names them, "Wu and He" or "He et al.", and the year."""
    authors = entry.persons["author"]
    names = ["".join(str(part) for part in author.rich_last_names) for author in authors]
    return f"{names[0]} et al." if len(names) > 2 else " and ".join(names), entry.fields["year"]


def labels(entries: list[Entry]) -> list[str]:
    """Return a label for each entry, with letters after the year where authors and year are the same."""
    found = [authors_and_year(entry) for entry in entries]
    total, seen = Counter(found), Counter()
    result = []
    for authors, year in found:
        letter = chr(ord("a") + seen[authors, year]) if total[authors, year] > 1 else ""
        seen[authors, year] += 1
        result.append(f"{authors}, {year}{letter}")
    return result


def labels_by_address(path: Path) -> dict[str, str]:
    """Return the label of each entry of a BibTeX file by its `url`. Raises KeyError for an entry without one."""
    entries = list(parse_file(str(path)).entries.values())
    ordered = BookStyle().sort(entries)
    return {entry.fields["url"]: label for entry, label in zip(ordered, labels(ordered))}


class AuthorYearLabels(BaseLabelStyle):
    """Labels such as "Wu and He, 2018"."""

    def format_labels(self, sorted_entries: list[Entry]) -> list[str]:
        return labels(sorted_entries)


class LabelOrder(BaseSortingStyle):
    """The order of the labels; by title where they are the same."""

    def sorting_key(self, entry: Entry) -> tuple[str, str, str]:
        authors, year = authors_and_year(entry)
        return authors.casefold(), year, entry.fields["title"]


class BookStyle(Style):
    """Plain entries with labels of authors and year."""

    default_sorting_style = LabelOrder
    default_label_style = AuthorYearLabels


def setup(app) -> dict:
    register_plugin("pybtex.style.formatting", "book", BookStyle)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
