"""The documentation holds: its examples run, its links lead somewhere, its lists are those of the code."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import nvrar.cli
import yalis.cli
from doc_blocks import NEEDS, PAGES, ROOT, SRC, TUTORIALS, blocks, read_options, split_command
from doc_blocks import README as README_PATH

README = README_PATH.read_text()
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text()
# With the strings that are written in several pieces in one.
CODE = re.sub(r'"\s*\n\s*f?"', "", "\n".join(path.read_text() for path in SRC.rglob("*.py")))


def test_every_python_block_of_the_readme_says_how_to_run_it() -> None:
    named = [block.file_name for block in blocks(README_PATH) if block.language == "python"]
    assert named == ["sum.py", "generate.py"]  # tests/host/test_docs_run.py runs them


@pytest.mark.parametrize("page", TUTORIALS, ids=lambda page: page.stem)
def test_what_a_tutorial_does_not_run_can_be_read(page: Path) -> None:
    for block in blocks(page):
        if block.language == "sh" and block.needs:
            assert block.needs in NEEDS
            subprocess.run(["bash", "-n"], input=block.text, text=True, check=True)
            for line in block.lines if block.needs != "install" else ():
                read_options(split_command(line)[1])
        elif block.language == "python" and not block.file_name:
            assert is_of_an_example(block.text), f"{page.name}: no example has\n{block.text}"


def is_of_an_example(code: str) -> bool:
    sources = [path.read_text() for path in (ROOT / "examples").glob("*.py")]
    return any(textwrap.indent(code, " " * by) in source for source in sources for by in (0, 4, 8))


@pytest.mark.parametrize("page", TUTORIALS, ids=lambda page: page.stem)
def test_what_a_tutorial_says_that_we_say_we_say(page: Path) -> None:
    _, _, table = page.read_text().partition("| it says | do this |\n")
    rows = re.findall(r"^\|(.+?)\|", table, re.MULTILINE)[1:]
    assert rows
    for quote in re.findall(r"`(.+?)`", " ".join(rows)):
        for words in filter(None, map(str.strip, quote.split("..."))):
            assert words in CODE, f"{page.name} quotes {quote!r}, and nothing says {words!r}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_variables_that_a_page_names_are_read(page: Path) -> None:
    for name in set(re.findall(r"NVRAR_[A-Z_]+[A-Z]", page.read_text())):
        assert name in CODE, f"{page.name} names {name}"


@pytest.mark.parametrize("name", ["two_nodes.sh", "two_nodes.sbatch"])
def test_shell_examples_parse(name: str) -> None:
    subprocess.run(["bash", "-n", ROOT / "examples" / name], check=True)


def test_the_graph_example_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(SystemExit, match="needs an NVIDIA GPU for each rank, and torch sees 0"):
        runpy.run_path(str(ROOT / "examples" / "graph.py"), run_name="__main__")


def test_the_examples_say_what_they_need(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["generate.py"])
    with pytest.raises(SystemExit, match=r"a checkpoint and a prompt: .* MODEL"):
        runpy.run_path(str(ROOT / "examples" / "generate.py"), run_name="__main__")
    monkeypatch.delenv("HEAD", raising=False)
    script = ["bash", ROOT / "examples" / "two_nodes.sh"]
    ran = subprocess.run(script, capture_output=True, text=True, timeout=60)
    assert (ran.returncode, ran.stdout, ran.stderr.count("\n")) == (2, "", 1)
    assert "HEAD is not set; give a name or address" in ran.stderr
    monkeypatch.setenv("HEAD", "node.invalid")  # a name that nobody may have
    ran = subprocess.run(script, capture_output=True, text=True, timeout=60)
    assert (ran.returncode, ran.stdout, ran.stderr.count("\n")) == (2, "", 1)
    assert "HEAD=node.invalid is no host" in ran.stderr


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


def test_every_file_of_the_packages_names_its_licence() -> None:
    line = "SPDX-License-Identifier: Apache-2.0"
    without = [p for kind in ("*.py", "*.cuh") for p in SRC.rglob(kind) if line not in _head(p)]
    assert not without


def _head(path: Path) -> str:
    return path.read_text().partition("\n")[0]


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
