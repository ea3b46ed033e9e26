"""The documentation holds: its examples run, its links lead somewhere, its lists are those of the code."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import nvrar.cli
import yalis.cli

ROOT = Path(__file__).parents[2]
SRC = ROOT / "src"
README = (ROOT / "README.md").read_text()
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text()
# A block that runs begins with its file name and the commands that run it.
EXAMPLES = {
    match[1]: (match[2], match[0])
    for match in re.finditer(r"(?<=```python\n)# (\S+\.py): (.+)\n(?:.*\n)*?(?=```)", README)
}
PROGRAMS = {
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone"],  # any free port
    "python": [sys.executable],
    "yalis": [sys.executable, "-m", "yalis"],
}


def run(command: str, folder: Path) -> str:
    """What ``command`` prints, with this test's own interpreter and sources."""
    for part in command.split(" && "):
        program, *arguments = shlex.split(part)
        done = subprocess.run(
            [*PROGRAMS[program], *arguments],
            cwd=folder,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SRC)},
            capture_output=True,
            text=True,
            timeout=100,
        )
        assert done.returncode == 0, f"{part}: {done.stdout}{done.stderr}"
    return done.stdout


def test_every_python_block_of_the_readme_says_how_to_run_it() -> None:
    assert set(EXAMPLES) == {"sum.py", "generate.py"}
    assert README.count("```python") == len(EXAMPLES)


def test_the_nvrar_example_runs(tmp_path: Path) -> None:
    command, code = EXAMPLES["sum.py"]
    (tmp_path / "sum.py").write_text(code)
    assert run(command, tmp_path).startswith("1x4 ranks, 6 by ")


def test_the_yalis_example_runs(tmp_path: Path) -> None:
    command, code = EXAMPLES["generate.py"]
    (tmp_path / "generate.py").write_text(code)
    said = run(command, tmp_path).splitlines()
    assert len(said) == 2
    assert all(line.endswith((" length", " stop")) for line in said)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if link.startswith(("http://", "https://", "mailto:")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name} links to {link}"
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target.read_text()), f"{page.name} links to {link}"


def anchors(text: str) -> set[str]:
    """Of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_that_a_page_names_are_there(page: Path) -> None:
    named = re.findall(r"`([a-zA-Z][\w.]*(?:/[\w.-]+)+)`", page.read_text())
    for path in named:
        roots = (ROOT, SRC, SRC / "nvrar")
        assert any((root / path).exists() for root in roots), f"{page.name} names {path}"


def test_the_architecture_lists_every_module_once() -> None:
    there = {str(p.relative_to(SRC)) for kind in ("*.py", "*.cuh") for p in SRC.rglob(kind)}
    listed = re.findall(r"^- `((?:nvrar|yalis)/\S+)`: ", ARCHITECTURE, re.MULTILINE)
    assert set(listed) == there
    assert len(listed) == len(set(listed))


@pytest.mark.parametrize(
    ("program", "main"), [("nvrar", nvrar.cli.main), ("yalis", yalis.cli.main)]
)
def test_the_commands_of_the_readme_are_those_of_the_programs(
    program: str, main: Callable[[list[str]], int], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    have = re.findall(r"^    ([a-z][\w-]*)(?:  +\S|$)", capsys.readouterr().out, re.MULTILINE)
    assert re.findall(rf"^\| `{program} ([\w-]+)` \|", README, re.MULTILINE) == have


def test_the_measured_table_is_that_of_its_results() -> None:
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        from readme_table import with_table
    finally:
        sys.path.pop(0)
    assert "<!-- table: " in README
    assert with_table(README) == README, "run python scripts/readme_table.py"
