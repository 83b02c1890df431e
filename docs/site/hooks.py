"""What the site does to the pages of docs/, which are written to be read on GitHub as well.

* Texts of other folders become pages: CONTRIBUTING.md, CHANGELOG.md, benchmarks/results.
* Links to files that are no page lead to the repository.
* A picture with a dark version follows the colours that the reader has chosen for the site.
* A page that asks another host for a script, a style, a font or an image ends the build.
"""

import re
from pathlib import Path
from posixpath import dirname, normpath, relpath
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
ELSEWHERE = {  # page of the site: where its text is kept
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    **{f"results/{f.name}": f"benchmarks/results/{f.name}" for f in (ROOT / "benchmarks/results").iterdir()},
}
PAGE_OF = {source: page for page, source in ELSEWHERE.items()} | {"README.md": "index.md"}

PICTURE = re.compile(
    r'<picture><source media="\(prefers-color-scheme: dark\)" srcset="([^"]*)">'
    r'<img src="([^"]*)" alt="([^"]*)"></picture>'
)
FENCE = re.compile(r"(```.*?^```$)", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"(\]\()([^)\s]+)(\))")
FOREIGN = re.compile(
    r"data-md-component=[\"']?source\b|"  # the theme asks GitHub about the repository
    r"<(?:script|img|iframe|source)\b[^>]*\bsrc(?:set)?=[\"']?https?:"
    r"|<link\b[^>]*\brel=[\"']?(?:stylesheet|preload|preconnect)[^>]*\bhref=[\"']?https?:"
    r"|<link\b[^>]*\bhref=[\"']?https?:[^>]*\brel=[\"']?(?:stylesheet|preload|preconnect)"
)


def on_files(files: Files, config: Any) -> Files:
    """Add the texts of other folders."""
    for page, source in ELSEWHERE.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Turn what GitHub shows well into what the site shows well."""
    uri = page.file.src_uri
    source = ELSEWHERE.get(uri, f"docs/{uri}")
    parts = FENCE.split(markdown)
    for i, part in enumerate(parts):
        parts[i] = (
            _fence(part) if part.startswith("```") else _prose(part, uri, source, config.extra["repository"])
        )
    return "".join(parts)


def _prose(text: str, uri: str, source: str, repository: str) -> str:
    text = PICTURE.sub(r"![\3](\2#only-light)![\3](\1#only-dark)", text)
    # In a table `a \| b` is code with a bar; here the bar needs no escape inside of code.
    text = re.sub(r"`[^`\n]*`", lambda code: code[0].replace(r"\|", "|"), text)
    return LINK.sub(lambda link: link[1] + _target(link[2], uri, source, repository) + link[3], text)


def _target(link: str, uri: str, source: str, repository: str) -> str:
    """Where a link of the file `source` leads from the page `uri`."""
    path, _, anchor = link.partition("#")
    if not path or "://" in path or path.startswith("mailto:"):
        return link
    target = normpath(f"{dirname(source)}/{path}").lstrip("/")
    page = PAGE_OF.get(target) or (target.removeprefix("docs/") if target.startswith("docs/") else None)
    anchor = f"#{anchor}" if anchor else ""
    if page is None:
        kind = "tree" if (ROOT / target).is_dir() else "blob"
        return f"{repository}/{kind}/main/{target}{anchor}"
    return relpath(page, dirname(uri) or ".") + anchor


def _fence(block: str) -> str:
    """The blocks of CONTRIBUTING.md say which file they make, as `python new FILE`."""
    return re.sub(
        r"^```python (new|row|check) ?([^\n]*)",
        lambda m: f'```python title="{m[2]}"' if m[2] else "```python",
        block,
    )


def on_post_build(config: Any) -> None:
    """
    Raises:
        PluginError: a page needs another host.
    """
    for file in sorted(Path(config.site_dir).rglob("*.html")):
        if found := FOREIGN.search(file.read_text(encoding="utf-8")):
            raise PluginError(f"{file}: {found[0]} asks another host")
