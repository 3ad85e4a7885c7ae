"""The project's documents, and their sections, tables and pieces of code."""

import re
from pathlib import Path

ROOT = next(
    folder for folder in Path(__file__).resolve().parents if (folder / "pyproject.toml").exists()
)
README = "README.md"
EXAMPLES = "examples/README.md"
ON_CALL = "sharedpool/cli/README.md"
ARCHITECTURE = "sharedpool/README.md"
DOCUMENTS = (
    README,
    EXAMPLES,
    ON_CALL,
    ARCHITECTURE,
    "tests/README.md",
    "tests/faults/README.md",
    "tests/hosts/README.md",
    "tests/bench/README.md",
    "CHANGELOG.md",
    ".github/CONTRIBUTING.md",
    ".github/SECURITY.md",
)


def text(document: str) -> str:
    """Return a document's text."""
    return (ROOT / document).read_text()


def section(document: str, heading: str) -> str:
    """Return the text between a heading and the next heading of its level or above.

    A line of code that begins with # is no heading."""
    lines = text(document).splitlines(keepends=True)
    start = next(
        at for at, line in enumerate(lines) if re.fullmatch(rf"#+ {re.escape(heading)}\n", line)
    )
    level = len(lines[start].split()[0])
    end = start + 1
    code = False
    while end < len(lines) and (code or not re.match(rf"#{{1,{level}}} ", lines[end])):
        code ^= lines[end].lstrip().startswith("```")
        end += 1
    return "".join(lines[start + 1 : end])


def blocks(markdown: str, language: str) -> list[str]:
    """Return the pieces of code in one language ("" for no language), without their indentation."""
    found = re.findall(r"^( *)```(\w*)\n(.*?)^ *```$", markdown, flags=re.MULTILINE | re.DOTALL)
    return [
        re.sub(rf"^{indent}", "", code, flags=re.MULTILINE)
        for indent, of, code in found
        if of == language
    ]


def without_code(markdown: str) -> str:
    """Return the prose and the tables."""
    return re.sub(r"^ *```.*?^ *```$", "", markdown, flags=re.MULTILINE | re.DOTALL)


def rows(document: str, header: str) -> list[list[str]]:
    """Return the rows of the table with this header, as lists of cells."""
    lines = text(document).split(header + "\n")[1].split("\n\n")[0].splitlines()[1:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def quoted(markdown: str) -> set[str]:
    """Return every `code` span of the text."""
    return set(re.findall(r"`([^`\n]+)`", without_code(markdown)))
