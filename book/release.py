"""Build a release into dist: wheel, source archive, the book and the weights, with their checksums: `make release`."""

import hashlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
DIST = ROOT / "dist"


def version() -> str:
    """Return the version that convnext_min/__init__.py defines."""
    text = (ROOT / "convnext_min" / "__init__.py").read_text(encoding="utf-8")
    return re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE)[1]


def git(*arguments: str) -> list[str]:
    """Return the lines that a git command prints about this repository."""
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()


def check(release: str) -> None:
    """Exit with one line if the tree has uncommitted changes or the changelog lacks a dated entry for `release`."""
    changed = git("status", "--porcelain")
    if changed:
        sys.exit(f"{len(changed)} files are not committed, the first is {changed[0][3:]}: commit or remove them")
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    if not re.search(rf"^## {re.escape(release)} \(\d{{4}}-\d\d-\d\d\)$", changelog, re.MULTILINE):
        sys.exit(f'CHANGELOG.md has no entry for this release: it needs a heading like "## {release} (2026-01-31)"')


def build(release: str) -> list[Path]:
    """Build all files of the release in an empty DIST and return them."""
    html = ROOT / "_build" / "html"
    if not (html / "index.html").is_file():
        sys.exit(f"there is no book in {html}: run `make book`")
    shutil.rmtree(DIST, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "build", "--outdir", DIST, ROOT], check=True)
    shutil.make_archive(str(DIST / f"convnext-book-{release}-html"), "zip", html)
    copy_weights()
    return sorted(DIST.iterdir())


def copy_weights() -> None:
    """Copy the committed weights into DIST. All are called model.safetensors; a copy has the name of its folder."""
    for weights in git("ls-files", "*.safetensors"):
        shutil.copy(ROOT / weights, DIST / f"{Path(weights).parent.name}.safetensors")


def write_checksums(files: list[Path]) -> None:
    """Write SHA256SUMS beside `files`, in the format of `sha256sum --check`."""
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in files]
    (DIST / "SHA256SUMS").write_text("".join(lines))


def main() -> None:
    release = version()
    check(release)
    write_checksums(build(release))
    print(f"Release {release} is in {DIST}. Tag the commit v{release}, push the tag, and publish these files with it.")


if __name__ == "__main__":
    main()
