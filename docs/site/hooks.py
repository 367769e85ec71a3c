"""Build the pages that are not in ``docs/``: files from elsewhere in the repository, and the CLI.

mkdocs calls the functions named ``on_*``; ``mkdocs.yml`` lists this file under ``hooks``.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import typer
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

from rotormlx.cli.main import app
from rotormlx.cli.options import PANEL

REPOSITORY = Path(__file__).resolve().parents[2]

# Files of the repository outside docs/ that are pages of the site.
INCLUDED = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "examples/README.md": "examples.md",
    "tests/emulator/README.md": "emulator.md",
}
ORIGINS = {page: path for path, page in INCLUDED.items()}

_CODE_OR_LINK = re.compile(
    r"^```.*?^```|`[^`\n]+`|\[(?P<text>[^\]]*)\]\((?P<target>[^)\s]+)\)", re.DOTALL | re.MULTILINE
)
_ROLE = re.compile(r":(?:func|class|meth|mod|attr):<code>~?([\w.]+)</code>")
_FETCHED = re.compile(
    r"<(?:script|img|iframe)\b[^>]*\bsrc=[\"']?(?:https?:)?//[^\s>]*"
    r"|<link\b(?=[^>]*\brel=[\"']?(?:stylesheet|preconnect|icon))[^>]*\bhref=[\"']?(?:https?:)?//[^\s>]*"
)


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that are not files in ``docs/``."""
    for path, page in INCLUDED.items():
        text = (REPOSITORY / path).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=text))
    files.append(File.generated(config, "cli.md", content=command_page()))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Point links at pages of the site, and replace links to other files with file names."""
    uri = page.file.src_uri
    return site_links(markdown, ORIGINS.get(uri, f"docs/{uri}"))


def on_page_content(html: str, **_: Any) -> str:
    """Turn the roles in docstrings, such as ``:func:``, into links."""
    return _ROLE.sub(r'<autoref identifier="\1" optional><code>\1</code></autoref>', html)


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """Refuse a page for which a browser would need a network."""
    found = _FETCHED.search(output)
    if found:
        raise PluginError(f"{page.file.src_uri} must not load from the network, but has {found[0]}")
    return output


def site_links(markdown: str, origin: str) -> str:
    """Rewrite the links of a page for the site.

    Args:
        markdown: Text of the page.
        origin: File of the page, relative to the repository.

    Returns:
        The text with links to pages of the site, and file names in place of other links.

    Raises:
        PluginError: If the target of a link does not exist.
    """

    def rewrite(match: re.Match[str]) -> str:
        text, target = match["text"], match["target"]
        if target is None or re.match(r"#|[a-z]+:", target):
            return match[0]
        path, sign, anchor = target.partition("#")
        path = posixpath.normpath(posixpath.join(posixpath.dirname(origin), path))
        if not (REPOSITORY / path).exists():
            raise PluginError(
                f"Links must lead to files, but {origin} links to {target} and there is no {path}"
            )
        if path in INCLUDED or path.startswith("docs/"):
            relative = posixpath.relpath(_page(path), posixpath.dirname(_page(origin)) or ".")
            return f"[{text}]({relative}{sign}{anchor})"
        if text == posixpath.basename(path):
            return f"`{path}`"
        return text if path in text else f"{text} (`{path}`)"

    return _CODE_OR_LINK.sub(rewrite, markdown)


def _page(path: str) -> str:
    """Return the path of a file's page in the site."""
    return INCLUDED.get(path, path.removeprefix("docs/"))


# ---- commands ------------------------------------------------------------------------------------


def command_page() -> str:
    """Return the reference page of the command line, built from the commands."""
    group: Any = typer.main.get_command(app)
    commands = {name: group.get_command(None, name) for name in group.list_commands(None)}
    # options.py declares these once, so one table holds for all commands that have them.
    shared = dict.fromkeys(
        record
        for name, command in commands.items()
        for record in _records(name, command, "option", panel=PANEL)
    )
    parts = [
        "# Commands",
        "This page lists the commands of rotormlx and their options. `rotormlx COMMAND --help` "
        "shows the same and, for commands that take them, the options of mlx-lm.",
        "## Options of rotormlx",
        "Commands that run a model with compressed caches share these options.",
        _table("option", shared),
    ]
    for name, command in commands.items():
        usage = " ".join(
            (f"rotormlx {name}", *command.collect_usage_pieces(_context(name, command)))
        )
        parts += [f"## {name}", f"```\n{usage}\n```", _prose(command.help or "")]
        for kind in ("argument", "option"):
            if own := [r for r in _records(name, command, kind) if r not in shared]:
                parts.append(_table(kind, own))
        if taken := _records(name, command, "option", panel=PANEL):
            names = ", ".join(f"`{names.split()[0]}`" for names, _ in taken)
            parts.append(f"From the [options of rotormlx](#options-of-rotormlx): {names}.")
    return "\n\n".join(parts) + "\n"


def _context(name: str, command: Any) -> Any:
    return command.context_class(command, info_name=f"rotormlx {name}")


def _records(name: str, command: Any, kind: str, panel: str | None = None) -> list[tuple[str, str]]:
    """Return names and help of a command's parameters of a kind, from one help panel or all."""
    shown = [p for p in command.params if p.param_type_name == kind and "--help" not in p.opts]
    if panel is not None:
        shown = [p for p in shown if p.rich_help_panel == panel]
    records = (p.get_help_record(_context(name, command)) for p in shown)
    return [record for record in records if record]


def _table(kind: str, records: Iterable[tuple[str, str]]) -> str:
    rows = [f"| `{names}` | {_cell(text)} |" for names, text in records]
    return "\n".join([f"| {kind} | meaning |", "|---|---|", *rows])


def _cell(text: str) -> str:
    return _prose(text).replace("|", r"\|").replace("\n", " ")


def _prose(text: str) -> str:
    return (
        text.strip()
        .replace("<", "&lt;")
        .replace("*", r"\*")
        .replace("_", r"\_")
        .replace("[", r"\[")
    )
