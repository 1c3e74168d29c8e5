"""
English prose for experiments without a network beyond Debian's mirrors and a package registry, as plain text files.

    python benchmarks/texts.py OUT

writes OUT/{anarchism,perl-doc,postgresql-doc-15}.txt, documentation; and three kinds that nothing trains on or calibrates with: fortunes
(quotations), bible-kjv-text (scripture), chatterbot-corpus (chat).

Documents are separated by form feeds, which is how `dynamoe --text` tells them apart. `versions.json` says which packages they are from:
those of the records in benchmarks/results where Debian still has them, else the current ones. Needs apt-get, dpkg-deb and pip.
"""

import argparse
import json
import random
import re
import subprocess
import sys
import tempfile
import zipfile
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


def deb_files(package: str, folder: str) -> tuple[Path, str]:
    """Where the files of a Debian package lie, unpacked, and its version."""
    download = ["apt-get", "download", "-qq"]
    wanted = f"{package}={VERSIONS[package]}" if package in VERSIONS else package
    if subprocess.run([*download, wanted], cwd=folder, capture_output=True).returncode:
        subprocess.run([*download, package], cwd=folder, check=True)
    archive = next(Path(folder).glob(f"{package}_*.deb"))
    subprocess.run(["dpkg-deb", "-x", archive, f"{folder}/{package}"], check=True)
    return Path(folder, package), archive.name.split("_")[1]


def documentation(package: str, folder: str) -> tuple[list[str], str]:
    """Pages of a documentation package."""
    files, version = deb_files(package, folder)
    reader = pod_text if PACKAGES[package] == "*.pod" else html_text
    documents = [reader(path.read_text(errors="replace")) for path in sorted(files.rglob(PACKAGES[package]))]
    return [document for document in documents if len(document) > 500], version


def quotations(package: str, folder: str) -> tuple[list[str], str]:
    """Some twenty quotations a document."""
    files, version = deb_files(package, folder)
    names = sorted(path for path in (files / "usr/share/games/fortunes").iterdir() if not path.suffix and path.is_file())
    quotes = [quote.strip() for path in names for quote in path.read_text(errors="replace").split("\n%\n") if quote.strip()]
    random.Random(0).shuffle(quotes)
    return ["\n\n".join(quotes[start : start + 20]) for start in range(0, len(quotes), 20)], version


def scripture(package: str, folder: str) -> tuple[list[str], str]:
    """Chapters of the King James Bible, which a program of its own reads out of a packed file."""
    files, version = deb_files(package, folder)
    program, _ = deb_files("bible-kjv", folder)
    command = [next(program.rglob("bin/bible")), "-f", "-l100", "-p", files / "usr/lib", "Gen1:1-Rev22:21"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL).stdout.splitlines()
    chapters: dict[str, list[str]] = {}
    chapter = ""
    for line in lines:
        if verse := re.match(r"(\d?[A-Za-z]+\d+):\d+ ", line):
            chapter, line = verse[1], line[verse.end() :]
        chapters.setdefault(chapter, []).append(line.strip())
    return [" ".join(verses) for verses in chapters.values() if len(" ".join(verses)) > 500], version


def conversations(package: str, folder: str) -> tuple[list[str], str]:
    """Questions and answers, line by line, of a corpus on PyPI."""
    subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder, package], check=True)
    wheel = next(Path(folder).glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if "/english/" in name and name.endswith(".yml")]
        turns = "\n".join(archive.read(name).decode(errors="replace").partition("conversations:")[2] for name in sorted(names))
    found = [turn.strip() for turn in re.split(r"^- - ", turns, flags=re.M) if turn.strip()]
    lines = [re.sub(r"\n  +- ", "\n", turn) for turn in found]
    random.Random(0).shuffle(lines)
    return ["\n\n".join(lines[start : start + 20]) for start in range(0, len(lines), 20)], wheel.name.split("-")[1]


READERS = {**dict.fromkeys(PACKAGES, documentation), "fortunes": quotations, "bible-kjv-text": scripture,
           "chatterbot-corpus": conversations}  # fmt: skip


def write_texts(out: Path):
    """One text file for each of `READERS`."""
    out.mkdir(parents=True, exist_ok=True)
    versions = {}
    for package, reader in READERS.items():
        with tempfile.TemporaryDirectory() as folder:
            documents, versions[package] = reader(package, folder)
        documents = [document.replace("\f", " ") for document in documents]
        random.Random(0).shuffle(documents)  # so that any first part of the file is a fair sample
        (out / f"{package}.txt").write_text("\f".join(documents))
        about = f"{len(documents)} documents, {sum(map(len, documents)) / 1e6:.1f} million characters"
        print(f"{package} {versions[package]}: {about}")
    (out / "versions.json").write_text(json.dumps(versions, indent=2) + "\n")


if __name__ == "__main__":
    main()
