"""What a file holds. The ending of its name says it, in upper or lower case; .gz behind it says that it is compressed.

    .txt .text .md       text, with blank lines between the documents
    .jsonl .ndjson       one JSON object a line
    .parquet             a table; each row is like such an object

Any other ending is refused. Read as text, a table of commas or a web page would be trained on without a word.
"""
import gzip
import io
import json
import zlib
from pathlib import Path

from cli import InputError

ENDINGS = (".txt", ".text", ".md", ".jsonl", ".ndjson", ".parquet")


def ending(path):
    """The one of ENDINGS that a file's name has. Raises InputError for another."""
    path = Path(path)
    found = Path(path.name.lower().removesuffix(".gz")).suffix
    if found not in ENDINGS:
        raise InputError(f"{path}: {found or 'a file without an ending'} is not read, only {' '.join(ENDINGS)};"
                         " unpack it,"
                         ' or convert it to .jsonl with an object like {"text": "..."} on each line, or to .txt')
    return found


def read_bytes(path):
    """What a file holds, uncompressed."""
    try:
        with (gzip.open if Path(path).suffix.lower() == ".gz" else open)(path, "rb") as file:
            return file.read()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{path} is damaged or not compressed by gzip: {error}") from None
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None


def read_utf8(path):
    """The text of a file.

    The line ends of Windows become \\n, and the mark at the beginning, which is no text, goes.
    """
    try:
        return io.TextIOWrapper(io.BytesIO(read_bytes(path)), encoding="utf-8-sig").read()
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: byte {error.start} is not UTF-8; convert the file to UTF-8") from None


def json_lines(path):
    """("line N", what stands there) of each line that is not blank."""
    for number, line in enumerate(read_utf8(path).split("\n"), start=1):   # splitlines() would also split at U+2028
        if line.strip():
            try:
                yield f"line {number}", json.loads(line)
            except (ValueError, RecursionError):
                raise InputError(f"{path}, line {number}: not JSON; each line has to hold one whole object") from None


def table_rows(path):
    """("row N", {column: value}) of each row of a .parquet file."""
    import pyarrow.parquet   # comes with `datasets`, which writes such files; here, because most runs read text
    try:
        rows = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(read_bytes(path))).read().to_pylist()
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is damaged or no Parquet file: {str(error).partition(chr(10))[0]}") from None
    for number, row in enumerate(rows, start=1):
        yield f"row {number}", row


def excerpt(value):
    """The beginning of a value as JSON writes it, for a message in one line."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else f"{text[:80]}..."
