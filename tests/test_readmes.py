"""What the READMEs say is there: tables, commands, flags, links, paths, tests and file trees."""
import json
import re
import shlex

import pytest

import readmes
from chapters import CHAPTERS_ROOT

READMES = readmes.all_readmes()
readme_test = pytest.mark.parametrize("readme", READMES, ids=lambda path: path.parent.name)


def code_blocks(text, *languages):
    return [block for language, block in re.findall(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
            if language in languages]


@readme_test
def test_tables_are_those_of_the_results_files(readme):
    assert readme.read_text() == readmes.render(readme), "run: python tests/readmes.py --write"


def test_a_text_of_several_lines_is_one_cell(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({
        "command": "c", "machine": "m", "torch": "t", "date": "d", "columns": {"n": "n", "text": "text", "x": "x"},
        "rows": [{"n": 1, "text": "KING:\nO | <b> *a* _b_ `c` [d](e) & f, 'tis", "x": "a|b"}]}))
    head, sides, row, *_ = readmes.table(tmp_path / "a.json").splitlines()
    assert sides == "| --- | --- | ---: |"
    assert row == ("| 1 | KING:<br>O &#124; &#60;b&#62; &#42;a&#42; &#95;b&#95; &#96;c&#96; &#91;d&#93;&#40;e&#41;"
                   " &#38; f, 'tis | a|b |")


def test_the_command_that_renders_has_a_help(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["readmes.py", "--help"])
    with pytest.raises(SystemExit, match="^0$"):
        readmes.main()
    assert "--write" in capsys.readouterr().out


@readme_test
def test_links_and_pictures_exist(readme):
    text = readme.read_text()
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)
    for target in targets:
        if not target.startswith(("http://", "https://", "#")):
            assert (readme.parent / target.partition("#")[0]).exists(), f"{readme}: {target}"
    headings = {re.sub(r"[^\w\- ]", "", line.lstrip("#").strip().lower()).replace(" ", "-")
                for line in text.splitlines() if line.startswith("#")}
    for anchor in (target[1:] for target in targets if target.startswith("#")):
        assert anchor in headings, f"{readme}: #{anchor} is no heading"


@readme_test
def test_commands_name_scripts_and_flags_that_exist(readme):
    """Commands are written for the root of the repository."""
    commands = [part.strip() for block in code_blocks(readme.read_text(), "sh") for line in block.splitlines()
                for part in line.partition("#")[0].split("&&") if part.strip()]
    assert commands
    for command in commands:
        words = shlex.split(command)
        scripts = [word for word in words if word.endswith(".py")]
        for path in [word for word in words if "/" in word and not word.startswith("-")]:
            # A hub name has a pinned revision in pretrained.py.
            known = ((CHAPTERS_ROOT / path).exists() or "/out" in path or path.startswith(("http", "out"))
                     or f'"{path}":' in (readme.parent / "pretrained.py").read_text())
            assert known, f"{readme}: {command}: no {path}"
        own = words[words.index(scripts[-1]):] if scripts else []   # what stands before the script is torchrun's
        for flag in [word.partition("=")[0] for word in own if word.startswith("--")]:
            assert flag in (CHAPTERS_ROOT
                            / scripts[-1]).read_text(), f"{readme}: {command}: {scripts[-1]} has no {flag}"


@readme_test
def test_files_and_tests_named_in_the_text_exist(readme):
    text = readme.read_text()
    for path in re.findall(r"`((?:tests|data|chapter-\d\d-[\w-]+)/[\w./-]+\.\w+)`", text):
        assert (CHAPTERS_ROOT / path).exists(), f"{readme}: {path}"
    for name in re.findall(r"`(\w+\.(?:py|json|png|patch))`", text):
        found = [*CHAPTERS_ROOT.glob(f"*/{name}"), *CHAPTERS_ROOT.glob(f"*/*/{name}")]
        assert found or name in ("config.json", "summary.json", "tokenizer.json"), f"{readme}: {name}"
    for name in re.findall(r"`(test_\w+)`", text):
        files = (CHAPTERS_ROOT / "tests").glob("*.py")
        assert any(f"def {name}(" in path.read_text() for path in files), f"{readme}: {name}"


@readme_test
def test_the_file_tree_is_complete(readme):
    """A block that begins with the folder's name lists all of its files, each line beginning with the name."""
    if readme.parent == CHAPTERS_ROOT:
        return
    listed = [line.split()[0] for block in code_blocks(readme.read_text(), "text")
              if block.startswith(readme.parent.name)
              for line in block.splitlines()[1:] if line.strip()]
    scripts = {str(path.relative_to(readme.parent)) for path in readme.parent.rglob("*.py")
               if path.name != "__init__.py"}
    assert scripts == {name for name in listed if name.endswith(".py")}


@pytest.mark.parametrize("path", sorted(CHAPTERS_ROOT.glob("chapter-*/results/*.json")), ids=lambda path: path.stem)
def test_results_say_where_they_come_from_and_are_shown(path):
    result = json.loads(path.read_text())
    assert all(result[key] for key in ("command", "machine", "torch", "date", "columns", "rows"))
    assert any(f"results:{path.stem} -->" in readme.read_text() for readme in READMES), f"{path} is in no README"
    assert all(set(row) <= set(result["columns"]) for row in result["rows"]), "a value that no column shows"
