"""A hook of MkDocs: the site has the paths of the repository, so that links hold in both.

README.md is its first page, and pages of docs/ find pictures in benchmarks/results where they lie.
"""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

PATTERNS = ("*.md", "docs/**/*.md", "docs/**/*.svg", "benchmarks/results/*.png")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Put the repository's files in place of those of docs/; the theme's own stay."""
    root = Path(config.config_file_path).parent
    found = sorted(path for pattern in PATTERNS for path in root.glob(pattern))
    mirrored = [
        File.generated(config, path.relative_to(root).as_posix(), abs_src_path=str(path))
        for path in found
    ]
    return Files([*(file for file in files if file.src_dir != config.docs_dir), *mirrored])
