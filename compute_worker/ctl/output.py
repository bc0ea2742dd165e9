"""Where results go: tables for people, one JSON document for programs. Nothing here trusts what it prints."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from compute_worker import objects
from compute_worker.ctl.exits import advice, code_of
from compute_worker.ctl.text import fraction, progress_line, safe
from compute_worker.errors import ComputeError
from compute_worker.objects import Operation

DOCUMENT_VERSION = 1
By = Callable[[Operation], str]
WIDE = 1000
"""Columns of a table that goes into a file or a pipe, where nothing is to be cut or wrapped."""


def console_for(stream: TextIO) -> Console:
    """A console that takes nothing in its text for markup, and cuts nothing when no terminal is behind it."""
    width = None if stream.isatty() else WIDE
    return Console(file=stream, markup=False, highlight=False, emoji=False, width=width, soft_wrap=False)


def cell(value: object) -> Text:
    """A cell of a table: made harmless, not read as markup."""
    return Text("" if value is None else safe(value))


def table_of(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> Table:
    """A plain table; cells that are :class:`rich.text.Text` or another renderable stay as they are."""
    table = Table(box=None, pad_edge=False, header_style="bold", show_edge=False)
    for name in columns:
        table.add_column(name, no_wrap=name in ("uuid", "operation", "instance", "host"), overflow="fold")
    for row in rows:
        table.add_row(*(item if hasattr(item, "__rich_console__") else cell(item) for item in row))
    return table


class Output:
    """Standard output for results, standard error for what goes on meanwhile.

    :param as_json: results and errors are JSON documents on standard output, and nothing else is said.
    """

    def __init__(self, as_json: bool = False, stdout: TextIO | None = None, stderr: TextIO | None = None) -> None:
        self.as_json = as_json
        self.stdout = stdout or sys.stdout
        self.stderr = stderr or sys.stderr
        self.console = console_for(self.stdout)
        self.notes = console_for(self.stderr)

    def document(self, content: dict[str, Any]) -> None:
        """One JSON document on one line; keys stay, new ones may come."""
        text = json.dumps({"version": DOCUMENT_VERSION, **objects.encode(content)})
        # ASCII throughout, so that no terminal obeys it; JSON lets this one control character through.
        self.raw(text.replace("\x7f", "\\u007f") + "\n")

    def table(self, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        """A table on standard output."""
        self.show(table_of(columns, rows))

    def show(self, renderable: Any) -> None:
        """Anything rich can draw, without the blanks that fill its lines."""
        with self.console.capture() as capture:
            self.console.print(renderable)
        self.raw("".join(f"{line.rstrip()}\n" for line in capture.get().splitlines()))

    def line(self, text: str) -> None:
        """A line of a result."""
        self.raw(safe(text) + "\n")

    def raw(self, text: str) -> None:
        """Text that is harmless already."""
        self.stdout.write(text)
        self.stdout.flush()

    def note(self, text: str) -> None:
        """Something worth knowing that is no result."""
        if not self.as_json:
            self.stderr.write(safe(text) + "\n")
            self.stderr.flush()

    def error(self, error: Exception, program: str) -> None:
        """What went wrong, and what to do about it."""
        hint = advice(error, program)
        if self.as_json:
            told = {"class": type(error).__name__, "message": str(error)}
            if isinstance(error, ComputeError):
                told = error.to_dict()
            self.document({"error": told, "advice": hint, "exit_code": int(code_of(error))})
            return
        self.stderr.write(f"{program}: {safe(error)}\n" + (f"  {safe(hint)}\n" if hint else ""))
        self.stderr.flush()

    def following(self, title: str, by: By | None = None) -> Following:
        """Shows how far an operation is while somebody waits for it; ``by`` tells several apart."""
        return Following(self, title, by)


class Following:
    """A progress bar on a terminal, a line for each new phase elsewhere, nothing with JSON.

    :param by: names the operation, where several are followed at once: a bar for each that is open.
    """

    def __init__(self, output: Output, title: str, by: By | None = None) -> None:
        self._output = output
        self._title = safe(title)
        self._by = by
        self._phases: dict[str, str] = {}
        self._tasks: dict[str, TaskID] = {}
        self._bar: Progress | None = None
        if output.stderr.isatty() and not output.as_json:
            columns = (
                TextColumn("{task.description}", markup=False),
                BarColumn(24),
                TextColumn("{task.fields[said]}", markup=False),
            )
            self._bar = Progress(*columns, TimeElapsedColumn(), console=output.notes, transient=True)
            self._first = self._bar.add_task(self._title, total=None, said="accepted")

    def __enter__(self) -> Following:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, operation: Operation) -> None:
        """Show where the operation is now."""
        said, name = describe(operation), self._by(operation) if self._by is not None else ""
        if self._bar is not None:
            share = fraction(operation.progress)
            total = None if share is None else 1.0
            shown = not name or not operation.state.final
            task = self._task_of(self._bar, name)
            self._bar.update(task, total=total, completed=share or 0.0, said=said, visible=shown)
        elif operation.phase != self._phases.get(name) and not operation.state.final:
            self._output.note(f"{self._title}: {f'{safe(name)}: ' if name else ''}{said}")
        self._phases[name] = operation.phase

    def _task_of(self, bar: Progress, name: str) -> TaskID:
        if name not in self._tasks:
            if name:
                bar.update(self._first, said="")
            self._tasks[name] = bar.add_task(f"  {safe(name)}", total=None, said="") if name else self._first
        return self._tasks[name]


def describe(operation: Operation) -> str:
    """Where an operation is, in one short line."""
    said = progress_line(operation.progress) or safe(operation.phase)
    if operation.state.final:
        said = operation.state.value
    if operation.waiting_for:
        said += f"; waits: {safe(operation.waiting_for)}"
    return said
