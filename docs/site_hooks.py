# SPDX-License-Identifier: Apache-2.0
"""What the site needs beside the pages of this folder: the records that pages link to, and the package in one place."""

import re
from pathlib import Path

from mkdocs.structure.files import File


ROOT = Path(__file__).parent.parent
RECORDS = "benchmarks/results"


def on_startup(command, dirty):
    """
    Links to the files of the package in build/docs, for mkdocstrings: `dynamoe_hf.modeling` is the folder modeling/, and only an
    installed package has it in its place.
    """
    package = ROOT / "build" / "docs" / "dynamoe_hf"
    for source, target in (("dynamoe_hf", package), ("modeling", package / "modeling")):
        target.mkdir(parents=True, exist_ok=True)
        for link in target.glob("*.py"):
            link.unlink()
        for path in (ROOT / source).glob("*.py"):
            (target / path.name).symlink_to(path)


def on_files(files, config):
    """The records of benchmarks, which are no part of docs/, join the site under their own path, with a list of them."""
    names = sorted(path.name for path in (ROOT / RECORDS).iterdir() if path.suffix in (".json", ".md", ".png"))
    for name in names:
        files.append(File(f"{RECORDS}/{name}", str(ROOT), config.site_dir, config.use_directory_urls))
    index = "# Records of the benchmarks\n\n" + "\n".join(f"- [{name}]({name})" for name in names)
    files.append(File.generated(config, f"{RECORDS}/index.md", content=index))
    return files


def on_page_markdown(markdown, page, config, files):
    """`../benchmarks` beside docs/, as GitHub reads it, is `benchmarks` on the site; above docs/ there is nothing."""
    if page.file.src_uri.startswith("benchmarks/"):
        return markdown
    markdown = re.sub(r"\]\(\.\./((?:\.\./)*)benchmarks/results/", r"](\1benchmarks/results/", markdown)
    return re.sub(r"\]\(\.\./((?:\.\./)*)benchmarks/results\)", r"](\1benchmarks/results/index.md)", markdown)


def on_page_content(html, page, config, files):
    """Types in docstrings of the Hugging Face kind, such as `int`, *optional*, are shown in code: without their marks."""
    if page.file.src_uri != "api.md":
        return html
    return re.sub(r"<code>(`[^<]+)</code>", lambda match: f"<code>{re.sub('[`*]', '', match[1])}</code>", html)
