"""Render the tables of the READMEs from results/*.json, so that no number is ever typed by hand.

    python tests/readmes.py --write     render all tables in place (test_readmes.py only compares)

A table stands between <!-- results:NAME --> and <!-- /results -->; NAME is results/NAME.json beside the README. In the
root README, NAME is CHAPTER/NAME.
"""
import json
import re

from chapters import CHAPTERS_ROOT, chapter1

MARKER = re.compile(r"(<!-- results:(\S+) -->\n).*?(<!-- /results -->)", re.DOTALL)


def all_readmes():
    return [CHAPTERS_ROOT / "README.md", *sorted(CHAPTERS_ROOT.glob("chapter-*/README.md"))]


def result_file(readme, name):
    chapter, _, name = name.rpartition("/")
    return readme.parent / chapter / "results" / f"{name}.json"


def cell(value):
    """A number as a person reads it; what nobody measured says so."""
    if value is None:
        return "not measured"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.3f}"
    if is_text(value):   # what Markdown or HTML would read as theirs becomes a number
        return re.sub(r"[^\w\s.,:;!?'-]|_", lambda match: f"&#{ord(match[0])};", value).replace("\n", "<br>")
    return f"{value:,}" if isinstance(value, int) else str(value)


def is_text(value):
    """Of several lines, as a sample of a model is."""
    return isinstance(value, str) and "\n" in value


def table(path):
    """The Markdown table of a results file, followed by where its numbers come from."""
    if not path.is_file():
        return "Not measured yet.\n"
    result = json.loads(path.read_text(encoding="utf-8"))
    columns = result["columns"]
    first, *others = columns
    sides = ["---" if any(is_text(row.get(key)) for row in result["rows"]) else "---:" for key in others]
    rows = [list(columns.values()), ["---", *sides]]
    rows += [[cell(row.get(key)) for key in columns] for row in result["rows"]]
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    data = f" with {result['data']}" if result.get("data") else ""
    source = f"`{result['command']}`{data} on {result['machine']}, torch {result['torch']}, {result['date']}"
    return "\n".join([*lines, "", f"<sub>{source}</sub>"]) + "\n"


def render(readme):
    """The text of a README with its tables made anew."""
    return MARKER.sub(lambda match: match[1] + table(result_file(readme, match[2])) + match[3],
                      readme.read_text(encoding="utf-8"))


def main():
    parser = chapter1.cli.ArgumentParser("Render the tables of the READMEs from results/*.json.")
    parser.add_argument("--write", action="store_true", required=True, help="render all tables in place")
    parser.parse_args()
    for path in all_readmes():
        path.write_text(render(path), encoding="utf-8")


if __name__ == "__main__":
    chapter1.cli.run(main)
