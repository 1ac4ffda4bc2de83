"""What a row of `docs/lecture.md` is, for the modules that write some of them."""

from typing import NamedTuple


class Section(NamedTuple):
    """One row of the lecture: its number in the list of ten, a title, and what stands below it, as markdown."""

    number: int
    title: str
    body: str
