"""Tables on the terminal. A narrow one is wrapped by the terminal itself: no value is cut to fit."""

from collections.abc import Sequence


def print_table(title: str, headers: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> None:
    """Print rows under their headers, the first ``left`` columns to the left, figures to the right."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console, JustifyMethod
    from rich.measure import Measurement
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for number, header in enumerate(headers):
        widest = max((len(row[number]) for row in rows), default=0)  # only headers break
        side: JustifyMethod = "left" if number < left else "right"
        table.add_column(header, justify=side, vertical="bottom", min_width=widest)
    for row in rows:
        table.add_row(*row)
    console = Console()
    least = Measurement.get(console, console.options.update(width=1000), table).minimum
    console.width = max(console.width, least)
    console.print(table)
