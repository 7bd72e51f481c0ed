"""The statistics of a build as one HTML page: no script, no network, light and dark."""

from collections.abc import Mapping
from typing import Any

from .. import html_page

_TEMPLATE = """\
{% extends "frame" %}
{% block title %}Preference pairs: {{ s.pairs }} from {{ s.videos }} videos{% endblock %}
{% block style %}
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(18rem, 1fr)); gap: 1.5rem }
.row { display: grid; grid-template-columns: 4.5rem 1fr 4rem; gap: .5rem; align-items: center; font-size: .85rem }
.row span { text-align: right; font-variant-numeric: tabular-nums }
.bar { background: light-dark(#0072b2, #56b4e9); height: .8rem; min-width: 1px }
details { font-size: .9rem } li { overflow-wrap: anywhere }
{% endblock %}
{% block body %}
<h1>{{ s.pairs }} preference pairs from {{ s.videos }} videos</h1>

<h2>Where videos and pairs were lost</h2>
<table>
<tr><th>reason</th><th class="n">videos</th></tr>
{% for reason, lost in s.lost.items() %}
<tr><td>{{ reason }}</td><td class="n">{{ lost.count }}</td></tr>
{% endfor %}
<tr><th>pairs written</th><th class="n">{{ s.pairs }}</th></tr>
</table>
{% for reason, lost in s.lost.items() if lost.first %}
<details><summary>{{ reason }}: which</summary><ul>
{% for name in lost.first %}<li>{{ name }}</li>{% endfor %}
{% if lost.count > lost.first|length %}<li>and {{ lost.count - lost.first|length }} more</li>{% endif %}
</ul></details>
{% endfor %}

<h2>Scores</h2>
<div class="charts">
{% for title, histogram in charts %}
<div><h3>{{ title }}</h3>
{% for value, count, share in histogram %}
<div class="row"><span>{{ value }}</span><div class="bar" style="width: {{ share }}%"></div>
<span>{{ count }}</span></div>
{% else %}<p>none</p>{% endfor %}
</div>
{% endfor %}
</div>

<h2>Length</h2>
<div class="wide"><table>
<tr><th>pairs</th><th class="n">number</th><th class="n">chosen longer</th><th class="n">chosen shorter</th>
<th class="n">mean characters, chosen</th><th class="n">rejected</th></tr>
{% for name, bias in s.lengths.items() %}
<tr><td>{{ name }}</td><td class="n">{{ bias.pairs }}</td>
{% if bias.pairs %}<td class="n">{{ "%.1f"|format(100 * bias.chosen_longer) }} %</td>
<td class="n">{{ "%.1f"|format(100 * bias.chosen_shorter) }} %</td><td class="n">{{ bias.mean_chosen }}</td>
<td class="n">{{ bias.mean_rejected }}</td>{% endif %}</tr>
{% endfor %}
</table></div>
<p>Correlation of a candidate's total score with its length: {{ shown(s.correlation_of_total_and_length) }}.</p>

<h2>Judge</h2>
<table>
<tr><th>criterion</th><th class="n">pairs of votes</th><th class="n">equal</th><th class="n">mean distance</th></tr>
{% for name, votes in s.agreement_of_votes.items() %}
<tr><td>{{ name }}</td><td class="n">{{ votes.pairs_of_votes }}</td>
<td class="n">{{ shown(votes.get("equal")) }}</td><td class="n">{{ shown(votes.get("mean_distance")) }}</td></tr>
{% endfor %}
</table>
<table>
<tr><th>criteria</th><th class="n">correlation</th></tr>
{% for names, value in s.correlation_of_criteria.items() %}
<tr><td>{{ names }}</td><td class="n">{{ shown(value) }}</td></tr>
{% endfor %}
</table>
{% if s.get("judge_problems") %}
<table>
<tr><th>replies without a usable score, and failed requests</th><th class="n">number</th></tr>
{% for kind, count in s.judge_problems.items() %}
<tr><td>{{ kind }}</td><td class="n">{{ count }}</td></tr>
{% endfor %}
</table>
{% endif %}
{% if s.get("cost") %}<p>All answers: {{ s.cost.tokens_read }} tokens read, {{ s.cost.tokens_written }} written
{% if s.cost.cost %}; cost {{ "%.4f"|format(s.cost.cost) }}{% endif %}.</p>{% endif %}

<h2>Settings</h2>
<table>
{% for name, value in s.settings.items() %}
<tr><td>{{ name }}</td><td><code>{{ value|tojson }}</code></td></tr>
{% endfor %}
</table>
{% endblock %}
"""


def page(summary: Mapping[str, Any]) -> str:
    """The page for a summary of `Statistics`, with `settings`, and where there is one `judge_problems` and `cost`."""
    histograms = {
        **{f"{name}": counts for name, counts in summary["scores"].items()},
        "weighted total": summary["totals"],
        "gap between best and worst": summary["gaps"],
    }
    charts = [(title, _bars(counts)) for title, counts in histograms.items()]
    return html_page.page(_TEMPLATE, s=summary, charts=charts, shown=_shown)


def _shown(value: float | None) -> str:
    return "-" if value is None else str(value)


def _bars(counts: Mapping[str, int]) -> list[tuple[str, int, float]]:
    """(value, count, width in per cent of the longest bar)."""
    most = max(counts.values(), default=0)
    return [(value, count, round(100 * count / most, 1)) for value, count in counts.items()]
