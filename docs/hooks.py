"""MkDocs hook: READMEs outside docs/ are pages of the site, and relative links work in both places."""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
FOLDERS = ("experiments/*", "launch", "notebooks")  # with a README.md, and what it shows or links


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the READMEs, pictures and notebooks under their paths in the repository."""
    for folder in FOLDERS:
        for pattern in ("README.md", "*.png", "*.ipynb"):
            for path in sorted(ROOT.glob(f"{folder}/{pattern}")):
                src_uri = path.relative_to(ROOT).as_posix()
                files.append(File.generated(config, src_uri, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Translate links between docs/ and the other folders: in the site, docs/ is the root."""
    if page.file.src_uri.startswith(("experiments/", "launch/", "notebooks/")):
        return re.sub(r"\]\(((?:\.\./)+)docs/", r"](\1", markdown)
    return re.sub(r"\]\(\.\./(experiments|launch|notebooks)/", r"](\1/", markdown)
