"""mkdocs hook: no text stands twice. A line that is only a link to a section of another file shows that section.

`[Install](../README.md#install)` alone on its line is a link on GitHub; on the site the section's text stands there, its
relative links resolved against the file that it comes from.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.exceptions import PluginError

ROOT = Path(__file__).resolve().parents[1]
SOURCES = "https://github.com/twinconv/twinconv/blob/main/"
INCLUDE = re.compile(r"^\[[^\]]+\]\(\.\./(?P<file>[\w./]+\.md)#(?P<anchor>[\w-]+)\)$", re.M)


def anchor(heading):
    """The name under which GitHub finds a heading."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


def section(file, name):
    """The text below the heading called `name` of a file, up to the next heading of that level or above."""
    level, found, fenced = 0, [], False
    for line in (ROOT / file).read_text().splitlines():
        fenced ^= line.startswith("```")
        heading = None if fenced else re.match(r"(#+) (.*)", line)
        if heading and level and len(heading[1]) <= level:
            break
        if level:
            found.append(line)
        elif heading and anchor(heading[2]) == name:
            level = len(heading[1])
    if not level:
        raise PluginError(f"{file}: expected a heading #{name}, found none")
    return "\n".join(found).strip()


def resolved(text, file):
    """The section with links that hold on the site: to its pages, or to the sources."""

    def link(match):
        target = match[2]
        if "://" in target or target.startswith("#"):
            return match[0]
        path, hash_, rest = target.partition("#")
        path = posixpath.normpath(posixpath.join(posixpath.dirname(file), path))
        is_page = path.startswith("docs/") and path.endswith(".md")
        return f"{match[1]}({path.removeprefix('docs/') if is_page else SOURCES + path}{hash_}{rest})"

    return re.sub(r"(\[[^\]]*\])\(([^)\s]+)\)", link, text)


def on_page_markdown(markdown, **_):
    return INCLUDE.sub(
        lambda match: resolved(section(match["file"], match["anchor"]), match["file"]), markdown
    )
