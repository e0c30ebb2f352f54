"""What mkdocs asks while it builds the site: the pages of the root, and where links lead."""

import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "CHANGELOG.md": "CHANGELOG.md",
}
REPOSITORY = "https://github.com/quantkit/quantkit/blob/main/"
PICTURES = "https://raw.githubusercontent.com/quantkit/quantkit/main/"
WIDE = ".md-grid { max-width: 76rem; }"  # lines of code have up to 100 columns


def on_files(files, config):
    files.append(File.generated(config, "wide.css", content=WIDE))
    for source, name in PAGES.items():
        files.append(File.generated(config, name, content=(ROOT / source).read_text()))
    return files


def on_page_markdown(markdown, page, config, files):
    """The site's own pages by relative links, everything else in the repository."""
    folder = ROOT if page.file.src_uri in PAGES.values() else ROOT / "docs"

    def link(m):
        address, hash_, anchor = m[2].partition("#")
        path = address.removeprefix(REPOSITORY).removeprefix(PICTURES)
        if "://" in path or not path:
            return m[0]
        of_root = path != address
        source = ((ROOT if of_root else folder) / path).resolve().relative_to(ROOT).as_posix()
        if source in PAGES:
            target = PAGES[source]
        else:
            target = source[5:] if source.startswith("docs/") else REPOSITORY + source
        return m[1] + target + hash_ + anchor

    return re.sub(r"(\]\(|\bsrc=\"|\bsrcset=\")([^)\"\s]+)", link, markdown)
