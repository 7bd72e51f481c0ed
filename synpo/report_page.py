"""The report of runs as one HTML page: no script, no network, light and dark."""

import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from . import html_page
from .report_samples import RunFiles, Sample, data_uri

PACKAGES = ("synpo", "torch", "transformers", "peft", "accelerate", "numpy", "av")


def versions() -> dict[str, str]:
    """Versions of what made the page."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def page(
    runs: Sequence[RunFiles],
    held_out: Mapping[str, list[tuple[float, float] | None]],
    curves: Mapping[str, tuple[bytes, bytes]],
    shown: Sequence[Sample],
) -> str:
    """The page.

    held_out: metric: for each run its first and last value on held-out pairs, or None. curves: PNG files by title, on
    light and on dark ground.
    """
    names = dict.fromkeys(name for run in runs for name in run.evaluations)
    options = sorted({name for run in runs for name in run.settings})
    settings = [(name, [run.settings.get(name) for run in runs]) for name in options]
    return html_page.page(
        _TEMPLATE,
        runs=runs,
        evaluations={name: _table(name, runs) for name in names},
        videos={name: next(run.evaluations[name].videos for run in runs if name in run.evaluations) for name in names},
        held_out=held_out,
        curves={title: [data_uri(png, "image/png") for png in pngs] for title, pngs in curves.items()},
        samples=shown,
        settings=[(name, values, any(value != values[0] for value in values)) for name, values in settings],
        versions=versions(),
        number=_number,
        sure=_sure,
    )


def _table(name: str, runs: Sequence[RunFiles]) -> dict[str, list[Mapping[str, Any] | None]]:
    """Metric: its row of each run's evaluation of that name, or None."""
    found = [run.evaluations[name].metrics if name in run.evaluations else {} for run in runs]
    return {metric: [rows.get(metric) for rows in found] for metric in dict.fromkeys(m for rows in found for m in rows)}


def _number(value: float | None, sign: bool = False) -> str:
    if value is None:
        return "none"
    return f"{value:{'+' if sign else ''}.{3 if abs(value) < 100 else 1}f}"


def _sure(change: Mapping[str, float]) -> str:
    """Which way a change goes, where its interval does not hold 0."""
    return "up" if change["low"] > 0 else "down" if change["high"] < 0 else ""


_TEMPLATE = """\
{% extends "frame" %}
{% block title %}synpo: {{ runs|map(attribute="label")|join(", ") }}{% endblock %}
{% block style %}
:root { --mark: light-dark(#ffe9a8, #5a4a12); --up: light-dark(#00664a, #4fd0a8); --down: light-dark(#a33c00, #ff9d66) }
.numbers td, .numbers th { white-space: nowrap }
th.run, td.first { border-left: 2px solid var(--line); padding-left: .9rem }
td.up { color: var(--up); font-weight: 600 } td.down { color: var(--down); font-weight: 600 }
.settings td, .settings th { overflow-wrap: anywhere } tr.differs td { font-weight: 600 }
img { max-width: 100%; height: auto; display: block }
.curves { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(20rem, 100%), 1fr)); gap: .8rem }
.sample { margin: 1.4rem 0 } .sample img { border-radius: 4px }
dl { display: grid; grid-template-columns: minmax(5rem, max-content) 1fr; gap: .1rem 1rem; margin: .4rem 0 }
dt { color: var(--soft); overflow-wrap: anywhere } dd { margin: 0 }
dt.how { grid-column: 1 / -1; color: inherit; font-weight: 600; margin-top: .4rem }
mark { background: var(--mark); color: inherit; border-radius: 2px; padding: 0 .1em }
@media (max-width: 40rem) { th.run, td.first { padding-left: .4rem } }
{% endblock %}
{% block body %}
<h1>{{ runs|map(attribute="label")|join(", ") }}</h1>
{% if evaluations %}
<h2>Captions before and after</h2>
<p class="note">Changes with their 95 % intervals (paired bootstrap over videos); coloured where the interval does not
hold 0.</p>
{% for name, rows in evaluations.items() %}
<h3>{{ name }}, {{ videos[name] }} videos</h3>
<div class="wide"><table class="numbers">
<thead>
{% if runs|length > 1 %}
<tr><th></th>{% for run in runs %}<th colspan="4" class="run">{{ run.label }}</th>{% endfor %}</tr>
{% endif %}
<tr><th></th>{% for run in runs %}<th class="n">before</th><th class="n">after</th><th class="n">change</th>
<th>95 % interval</th>{% endfor %}</tr>
</thead><tbody>
{% for metric, cells in rows.items() %}
<tr><td>{{ metric }}</td>
{% for row in cells %}
{% if row is none %}<td class="n first"></td><td></td><td></td><td></td>
{% elif row["values"]|length == 1 %}<td class="n first"></td><td class="n">{{ number(row["values"][0]) }}</td>
<td></td><td></td>
{% else %}<td class="n first">{{ number(row["values"][0]) }}</td><td class="n">{{ number(row["values"][1]) }}</td>
{% if row.change is defined %}<td class="n {{ sure(row.change) }}">{{ number(row.change.mean, true) }}</td>
<td>[{{ number(row.change.low, true) }}, {{ number(row.change.high, true) }}]</td>
{% elif none in row["values"] %}<td></td><td></td>
{% else %}<td class="n">{{ number(row["values"][1] - row["values"][0], true) }}</td><td></td>{% endif %}
{% endif %}
{% endfor %}
</tr>
{% endfor %}
</tbody></table></div>
{% endfor %}
{% endif %}
{% if held_out %}
<h2>Held-out pairs</h2>
<div class="wide"><table class="numbers">
<thead>
{% if runs|length > 1 %}
<tr><th></th>{% for run in runs %}<th colspan="3" class="run">{{ run.label }}</th>{% endfor %}</tr>
{% endif %}
<tr><th></th>{% for run in runs %}<th class="n">first</th><th class="n">last</th>
<th class="n">change</th>{% endfor %}</tr>
</thead><tbody>
{% for metric, cells in held_out.items() %}
<tr><td>{{ metric }}</td>
{% for pair in cells %}
{% if pair is none %}<td class="n first"></td><td></td><td></td>
{% else %}<td class="n first">{{ number(pair[0]) }}</td><td class="n">{{ number(pair[1]) }}</td>
<td class="n">{{ number(pair[1] - pair[0], true) }}</td>{% endif %}
{% endfor %}
</tr>
{% endfor %}
</tbody></table></div>
{% endif %}
<h2>Curves</h2>
<div class="curves">
{% for title, (light, dark) in curves.items() %}
<picture><source media="(prefers-color-scheme: dark)" srcset="{{ dark }}">
<img src="{{ light }}" alt="{{ title }} over optimizer steps: {{ runs|map(attribute="label")|join(", ") }}"></picture>
{% endfor %}
</div>
{% if samples %}
<h2>Sample videos</h2>
<p class="note">Every so many-th video of the captions' files, not chosen by hand. Marked: words that are not in the
first caption.</p>
{% for sample in samples %}
<div class="sample">
<h3>{{ sample.video }}</h3>
{% if sample.strip %}<img src="{{ sample.strip }}" alt="frames of {{ sample.video }}">
{% else %}<p class="note">No frames: {{ sample.problem }}</p>{% endif %}
<dl>
{% if sample.reference %}<dt>reference</dt><dd>{{ sample.reference }}</dd>{% endif %}
{% for name, captions in sample.captions.items() %}
<dt class="how">{{ name }}</dt>
{% for told in captions %}<dt>{{ told.who }}</dt><dd>{{ told.text }}</dd>{% endfor %}
{% endfor %}
</dl>
</div>
{% endfor %}
{% endif %}
{% if settings %}
<h2>Settings</h2>
{% if runs|length > 1 %}<p class="note">Bold: not the same in all runs.</p>{% endif %}
<div class="wide"><table class="settings">
<thead><tr><th>option</th>{% for run in runs %}<th>{{ run.label }}</th>{% endfor %}</tr></thead><tbody>
{% for name, values, differs in settings %}
<tr{% if differs %} class="differs"{% endif %}><td>{{ name }}</td>
{% for value in values %}<td>{{ "default" if value is none else value }}</td>{% endfor %}</tr>
{% endfor %}
</tbody></table></div>
{% endif %}
<h2>Versions</h2>
<p class="note">Of what made this page.</p>
<table><tbody>{% for name, value in versions.items() %}<tr><td>{{ name }}</td><td>{{ value }}</td></tr>
{% endfor %}</tbody></table>
{% endblock %}
"""
