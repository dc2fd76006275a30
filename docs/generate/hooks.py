"""MkDocs hooks: pages of the site that are not files in docs/, and links out of docs/.

README.md, CONTRIBUTING.md and CHANGELOG.md stay where every reader of the repository looks for them, and are pages of
the site too. The reference is generated from the code (reference.py). Pages link to source files by their path in the
repository; on the site each such file is a page below source/.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

import reference
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
FRONT = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
"""Pages of the site that are files of the repository outside of docs/."""

LANGUAGES = {".py": "python", ".json": "json", ".yaml": "yaml", ".sbatch": "bash", ".sh": "bash"}
CODE = re.compile(r"^(`{3,}).*?^\1$|`[^`\n]+`", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\[([^\]]*)\]\(([^)\s]+)\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the front pages, the reference, and a page for every source file that a page links to."""
    for uri, path in FRONT.items():
        files.append(File.generated(config, uri, abs_src_path=str(ROOT / path)))
    for uri, content in reference.pages().items():
        files.append(File.generated(config, uri, content=content))
    sources: set[str] = set()
    for file in files.documentation_pages():
        sources.update(path for path in linked_paths(file.content_string, file.src_uri) if is_source(path))
    for path in sorted(sources):
        page = File.generated(config, source_uri(path), content=source_page(path), inclusion=InclusionLevel.NOT_IN_NAV)
        files.append(page)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links at pages of the site."""
    uri = page.file.src_uri
    if uri.startswith("source/"):
        return markdown

    def link(match: re.Match[str]) -> str:
        label, (target, hash, anchor) = match[1], match[2].partition("#")
        path = repository_path(target, uri)
        if path is None:
            return match[0]
        if (ROOT / path).is_dir():
            return label  # a folder has no page
        return f"[{label}]({posixpath.relpath(page_uri(path), posixpath.dirname(uri) or '.')}{hash}{anchor})"

    return outside_code(markdown, lambda text: LINK.sub(link, text))


def linked_paths(markdown: str, uri: str) -> Iterator[str]:
    """Paths in the repository that a page links to."""
    for match in LINK.finditer(outside_code(markdown, lambda text: text, code="")):
        path = repository_path(match[2].partition("#")[0], uri)
        if path is not None:
            yield path


def repository_path(target: str, uri: str) -> str | None:
    """The path in the repository that a link from page `uri` means; None for web addresses and anchors."""
    if not target or re.match(r"[a-z]+:", target):
        return None
    page = FRONT.get(uri, f"docs/{uri}")
    return posixpath.normpath(posixpath.join(posixpath.dirname(page), target))


def page_uri(path: str) -> str:
    """The page, or other file of the site, that shows a file of the repository."""
    for uri, front in FRONT.items():
        if path == front:
            return uri
    return path.removeprefix("docs/") if path.startswith("docs/") else source_uri(path)


def is_source(path: str) -> bool:
    """Whether a file of the repository gets a page below source/. MkDocs reports links to missing ones."""
    return (ROOT / path).is_file() and page_uri(path) == source_uri(path)


def source_uri(path: str) -> str:
    return f"source/{path}.md"


def source_page(path: str) -> str:
    """A file of the repository as a page. Searching the site does not find it."""
    language = LANGUAGES.get(PurePosixPath(path).suffix, "text")
    content = (ROOT / path).read_text(encoding="utf-8").rstrip()
    return f"---\nsearch:\n  exclude: true\n---\n# {path}\n\n``````{language}\n{content}\n``````\n"


def outside_code(markdown: str, change: Callable[[str], str], code: str | None = None) -> str:
    """Markdown with `change` applied outside of code, and code kept or replaced by `code`."""
    parts, end = [], 0
    for match in CODE.finditer(markdown):
        parts += [change(markdown[end : match.start()]), match[0] if code is None else code]
        end = match.end()
    return "".join([*parts, change(markdown[end:])])
