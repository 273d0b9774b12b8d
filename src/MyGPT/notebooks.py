"""Short descriptions of objects: tables for notebooks and lines for terminals, both made from the same names and values."""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import Any

_CELL = "padding:0.15em 0.9em 0.15em 0;border:0;background:none;color:inherit;text-align:left;vertical-align:top"


class Described:
    """A mixin for classes that describe themselves by the names and values that `summary` returns."""

    def summary(self) -> Mapping[str, object]:
        """Return the names and values that describe this object in a few lines."""
        raise NotImplementedError

    def __repr__(self) -> str:
        values = (f"{name}={shown(value)}" for name, value in self.summary().items())
        return f"{type(self).__name__}({', '.join(values)})"

    def _repr_html_(self) -> str:
        return html_table(type(self).__name__, self.summary())


def html_table(title: str, rows: Mapping[str, object]) -> str:
    """Return a small HTML table of names and values under a title, without scripts, and with all text escaped.

    Its colours are those of the page around it, so it is readable in light and dark notebooks.
    """
    lines = "".join(
        f'<tr style="background:none"><td style="{_CELL};opacity:0.75">{html.escape(name)}</td>'
        f'<td style="{_CELL};overflow-wrap:anywhere">{html.escape(shown(value))}</td></tr>'
        for name, value in rows.items()
    )
    caption = f'<div style="font-weight:bold">{html.escape(title)}</div>'
    return f'<div>{caption}<table style="border-collapse:collapse;font-size:inherit;margin:0">{lines}</table></div>'


def model_table(model: Any) -> str:
    """Return the HTML table of a GPTModel: its sizes and options, its number of parameters, their type and their device."""
    weight = model.transformer.wte.weight
    rows = {"parameters": model.num_parameters(), "trainable": model.num_parameters(only_trainable=True)}
    return html_table(
        type(model).__name__, {**rows, **vars(model.config), "dtype": weight.dtype, "device": weight.device}
    )


def shown(value: object) -> str:
    """Return a value as text: whole numbers with thousands separators, other numbers with four decimal places."""
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4f}" if 0.001 <= abs(value) < 1e6 or value == 0 else f"{value:.4g}"
    return str(value)
