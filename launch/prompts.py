"""Prompts in and generated text out: arguments, lines and JSON lines."""

from __future__ import annotations

import gzip
import json
import sys

from t5like.errors import UserError


def read_prompts(arguments: list[str], path: str | None) -> list[str]:
    """Prompts from the arguments, a file or standard input.

    Raises:
      UserError: there is none, the file cannot be read, or a JSON line has no prompt.
    """
    if arguments and path:
        raise UserError(f"prompts both as arguments and in --input={path}: give one of the two")
    if arguments:
        return arguments
    if path is None and sys.stdin.isatty():
        raise UserError("no prompt: give one as an argument, in --input=FILE or on standard input")
    where = "standard input" if path in (None, "-") else path
    text = sys.stdin.read() if path in (None, "-") else read_file(path)
    lines = [(n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise UserError(f"{where} is empty: it needs a prompt a line")
    if where.removesuffix(".gz").endswith((".jsonl", ".json")) or is_prompt(lines[0][1]):
        return [json_prompt(line, f"{where}:{n}") for n, line in lines]
    return [line.removesuffix("\r") for _, line in lines]


def read_file(path: str) -> str:
    """The text of a file, unpacked if it is a .gz."""
    from etils import epath

    try:
        data = epath.Path(path).read_bytes()
        return (gzip.decompress(data) if path.endswith(".gz") else data).decode()
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise UserError(f"--input={path} cannot be read: {error}") from error


def is_prompt(line: str) -> bool:
    """Whether a line is a JSON object that holds a prompt."""
    try:
        json_prompt(line, "")
    except UserError:
        return False
    return True


def json_prompt(line: str, place: str) -> str:
    """The prompt of a JSON line at `place`."""
    try:
        fields = json.loads(line)
    except ValueError as error:
        raise UserError(f"{place}: not a JSON line ({error})") from error
    for name in ("prompt", "text"):
        if isinstance(fields, dict) and isinstance(fields.get(name), str):
            return fields[name]
    raise UserError(f'{place}: no string field "prompt" or "text" in this JSON line')


def as_jsonl(records: list[dict]) -> str:
    """One JSON object a line."""
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def as_text(records: list[dict]) -> str:
    """The texts, under headings where there are several."""
    if len(records) == 1:
        return records[0]["text"] + "\n"
    return "\n".join(
        f"--- prompt {r['index'] + 1}, sequence {r['sample'] + 1}, "
        f"log-probability {r['log_prob']:.2f}\n{r['text']}\n"
        for r in records
    )


def write(text: str, path: str | None) -> None:
    """Writes to a file, or to standard output."""
    if path is None:
        sys.stdout.write(text)
        return
    from etils import epath

    try:
        epath.Path(path).write_text(text)
    except OSError as error:
        raise UserError(f"--output={path} cannot be written: {error}") from error
