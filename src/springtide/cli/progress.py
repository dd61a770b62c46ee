"""One progress line for people: a bar on a terminal, a line a phase elsewhere."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn


class Bar:
    """A single bar whose text says what is being done. `update(what, done, total)`; total None is a pulse."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=32),
            TextColumn("{task.fields[amount]}"),
            TimeElapsedColumn(),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._task = self._progress.add_task("starting", total=None, amount="")
        self._said = ""

    def update(self, what: str, done: int, total: int | None) -> None:
        if not self._console.is_terminal and what != self._said:
            self._console.print(f"{what}{f' ({_size(total)})' if total else ''} ...", highlight=False)
        amount = f"{_size(done)} of {_size(total)}" if total else ""
        self._progress.update(self._task, description=what, completed=done, total=total, amount=amount)
        self._said = what

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()


def _size(count: int) -> str:
    return f"{count / 1e6:.0f} MB" if count >= 1_000_000 else str(count)
