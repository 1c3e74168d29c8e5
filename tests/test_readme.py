"""README.md stays short: lines, numbers in its prose, and links that lead somewhere."""

import re
from pathlib import Path


ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
OUTSIDE_CODE = re.sub(r"^```.*?^```\n", "", README, flags=re.M | re.S)


def test_it_fits_on_a_few_screens():
    assert len(README.splitlines()) <= 120
    assert len(re.findall(r"^\|", OUTSIDE_CODE, flags=re.M)) == 7, "one table: a head, a rule and five rows"


def test_its_prose_is_words():
    """At most three words with a digit in a hundred, tables, code blocks and the targets of links aside."""
    prose = re.sub(r"^\|.*\n", "", OUTSIDE_CODE, flags=re.M)
    words = re.sub(r"\]\([^)]*\)", "]", prose).split()
    numbers = [word for word in words if re.search(r"\d", word)]
    assert len(numbers) <= 0.03 * len(words), f"{len(numbers)} in {len(words)} words: {numbers}"


def test_links_lead_somewhere():
    links = re.findall(r"\]\(([^)]+)\)", OUTSIDE_CODE)
    assert len(links) > 10
    for link in links:
        path, _, anchor = link.partition("#")
        if not link.startswith("https://"):
            assert (ROOT / path).exists(), f"README links to {path}, which is not on disk"
            if anchor:
                titles = re.findall(r"^#+ (.+)", (ROOT / path).read_text(), flags=re.M)
                assert anchor in {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}, link


def test_it_tells_what_it_has_to():
    assert "make demo" in README and "make test" in README
    first = README.index("```python")
    assert "from_dense" in README[first : README.index("```", first + 3)], "the first code needs no download"
