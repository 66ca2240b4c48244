"""Rewrite the repository's address or the version wherever they are written: `make address`, `make version`."""

import argparse
import re
import subprocess
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]


def repository(url: str) -> str:
    """Return "owner/name" of a GitHub address. Raises ValueError for any other address."""
    match = re.fullmatch(r"https://github\.com/([\w.-]+/[\w.-]+?)(\.git)?/?", url)
    if match is None:
        raise ValueError(f"the address {url!r} is not like https://github.com/you/fork")
    return match[1]


def pages(name: str) -> str:
    """Return the address, without https://, at which GitHub serves the pages of the repository `name`."""
    owner, _, project = name.partition("/")
    site = f"{owner.lower()}.github.io"
    return site if project.lower() == site else f"{site}/{project}"


def configuration() -> dict[str, str]:
    """Return url and branch (the tag of the release) of the repository, as _config.yml has them."""
    return yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))["repository"]


def texts() -> list[Path]:
    """Return the tracked files that may hold the address or the version: all but recorded results and licences."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    suffixes = {".md", ".py", ".yml", ".cff", ".toml", ".ipynb", ".txt", ""}
    recorded = re.compile(r"book/results/(?!README\.md)|book/_static/|LICENSE|CHANGELOG\.md")
    return [ROOT / name for name in listed.split("\0") if Path(name).suffix in suffixes and not recorded.match(name)]


def rewrite(replacements: dict[str, str]) -> list[Path]:
    """Replace regular expressions in all texts. Returns the files that changed."""
    changed = []
    for path in filter(Path.is_file, texts()):
        old = new = path.read_bytes().decode()
        for pattern, replacement in replacements.items():
            new = re.sub(pattern, replacement, new)
        if new != old:
            path.write_bytes(new.encode())
            changed.append(path)
    return changed


def set_address(url: str) -> list[Path]:
    """Replace the address of the repository, and with it the address of the published book. Returns changed files."""
    old, new = repository(configuration()["url"]), repository(url)
    return rewrite({rf"{re.escape(pages(old))}\b": pages(new), rf"(?<=/){re.escape(old)}(?![\w-])": new})


def set_version(version: str) -> list[Path]:
    """Replace the version of the package, and with it the tag of the release. Returns changed files."""
    if not re.fullmatch(r"\d+\.\d+\.\d+", version):
        raise ValueError(f"the version {version!r} is not like 1.2.3")
    old = re.escape(configuration()["branch"].removeprefix("v"))
    return rewrite(
        {
            rf"\bv{old}\b": f"v{version}",
            rf'(?m)^(__version__ = "|version: ){old}\b': rf"\g<1>{version}",
        }
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    choice = parser.add_mutually_exclusive_group(required=True)
    choice.add_argument("--url", help="the new address of the repository, such as https://github.com/you/fork")
    choice.add_argument("--version", help="the new version, such as 1.2.3")
    args = parser.parse_args(argv)
    try:
        changed = set_address(args.url) if args.url else set_version(args.version)
    except ValueError as error:
        parser.error(str(error))
    print(f"{len(changed)} files changed:", *(str(path.relative_to(ROOT)) for path in changed), sep="\n  ")


if __name__ == "__main__":
    main()
