"""
English prose for experiments without a network beyond Debian's mirrors: documentation packages as plain text files.

    python benchmarks/texts.py OUT        # writes OUT/{anarchism,perl-doc,postgresql-doc-15}.txt

Documents are separated by form feeds, which is how `dynamoe --text` tells them apart. `versions.json` says which packages they are from:
those of the records in benchmarks/results where Debian still has them, else the current ones. Needs apt-get and dpkg-deb.
"""

import argparse
import json
import random
import re
import subprocess
import tempfile
from html.parser import HTMLParser
from pathlib import Path


PACKAGES = {"anarchism": "*.html", "perl-doc": "*.pod", "postgresql-doc-15": "*.html"}
# A perplexity is that of one text: from 15.18 to 15.20 of PostgreSQL's it moved by 3%.
VERSIONS = {"anarchism": "15.3-3", "perl-doc": "5.36.0-7+deb12u4", "postgresql-doc-15": "15.18-0+deb12u1"}


class Prose(HTMLParser):
    """The text of paragraphs, list items, headings and code of an HTML page."""

    def __init__(self):
        super().__init__()
        self.parts, self.skipping = [], 0

    def handle_starttag(self, tag, attributes):
        self.skipping += tag in ("script", "style", "title", "table")
        if tag in ("p", "li", "dt", "dd", "h1", "h2", "h3", "h4", "pre", "div", "br"):
            self.parts.append("\n\n")

    def handle_endtag(self, tag):
        self.skipping -= tag in ("script", "style", "title", "table")

    def handle_data(self, data):
        if not self.skipping:
            self.parts.append(data)


def html_text(source: str) -> str:
    parser = Prose()
    parser.feed(source)
    paragraphs = (" ".join(part.split()) for part in "".join(parser.parts).split("\n\n"))
    return "\n\n".join(paragraph for paragraph in paragraphs if len(paragraph) > 40)


def pod_text(source: str) -> str:
    """Perl's documentation format: drop the commands, unwrap the formatting codes (`B<bold>`)."""
    source = re.sub(r"^=\w+.*$", "", source, flags=re.M)
    for _ in range(3):
        source = re.sub(r"[A-Z]<(?:<\s)?([^<>]*)(?:\s>)?>", r"\1", source)
    paragraphs = (part.strip() for part in source.split("\n\n"))
    return "\n\n".join(paragraph for paragraph in paragraphs if len(paragraph) > 40)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    write_texts(parser.parse_args().out)


def write_texts(out: Path):
    """One text file for each of `PACKAGES`."""
    out.mkdir(parents=True, exist_ok=True)
    versions = {}
    for package, pattern in PACKAGES.items():
        with tempfile.TemporaryDirectory() as folder:
            download = ["apt-get", "download", "-qq"]
            if subprocess.run([*download, f"{package}={VERSIONS[package]}"], cwd=folder, capture_output=True).returncode:
                subprocess.run([*download, package], cwd=folder, check=True)
            archive = next(Path(folder).glob("*.deb"))
            versions[package] = archive.name.split("_")[1]
            subprocess.run(["dpkg-deb", "-x", archive, f"{folder}/x"], check=True)
            reader = pod_text if pattern == "*.pod" else html_text
            documents = [reader(path.read_text(errors="replace")) for path in sorted(Path(folder, "x").rglob(pattern))]
        documents = [document.replace("\f", " ") for document in documents if len(document) > 500]
        random.Random(0).shuffle(documents)  # so that any first part of the file is a fair sample
        (out / f"{package}.txt").write_text("\f".join(documents))
        about = f"{len(documents)} documents, {sum(map(len, documents)) / 1e6:.1f} million characters"
        print(f"{package} {versions[package]}: {about}")
    (out / "versions.json").write_text(json.dumps(versions, indent=2) + "\n")


if __name__ == "__main__":
    main()
